"""Causal tracing and the patching under it: what must hold whatever the model."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch

from errata import edit, lab
from errata.errors import ConfigError, HostError, RequestError
from errata.host import hooks
from errata.inspect import facts, tracing
from errata.inspect.facts import END, FIRST, LAST, NEXT, SUBJECT
from errata.inspect.tracing import PROBABILITY, TOP, Settings
from errata.linalg import resampling
from errata.locate.patching import Patch, Patcher, window
from errata.types import Request
from tests.models import fresh

PROMPT, NAME = "The old Ada Brenner was born in", "Ada Brenner"
FAMILIES = ("llama", "gpt2", "gptj", "gemma2")
LOUD = Settings(noise="1.0", draws=2, width=1)


@pytest.fixture(scope="module", params=FAMILIES)
def host(request):
    return fresh(request.param)


def fact_of(host):
    return facts.fact(host, PROMPT, NAME)


def naive(host, base, donor, cell):
    """Run whole rows with plain hooks, nothing shared; logits at the end ``[rows, vocab]``."""
    patcher = Patcher(host, longest=base.length)
    order = sorted(cell, key=lambda patch: patch.kind == "hidden")
    with torch.no_grad(), ExitStack() as stack:
        if base.shift is not None:
            embedding = host.model.get_input_embeddings()
            stack.enter_context(hooks.on_output(embedding, lambda tensor: tensor + base.shift))
        for patch in order:
            source = (base if patch.origin == "base" else donor).outputs[patch.kind, patch.layer]

            def act(output, patch=patch, source=source):
                changed = output.reshape(base.rows, base.length, -1).clone()
                changed[:, list(patch.positions)] = source[:, list(patch.positions)]
                return changed.reshape(output.shape)

            stack.enter_context(hooks.on_output(patcher.module(patch.kind, patch.layer), act))
        return host.run(host.as_pass(base.batch)).logits[:, -1].float()


def recorded(host):
    fact = fact_of(host)
    patcher = Patcher(host, longest=len(fact.ids))
    clean = patcher.record([fact.ids])
    shift = torch.zeros(2, len(fact.ids), host.layout.width)
    shift[:, list(fact.place)] = torch.randn(
        2, len(fact.place), host.layout.width, generator=torch.Generator().manual_seed(3)
    )
    return fact, patcher, clean, patcher.record([fact.ids] * 2, shift=shift)


def test_a_resumed_run_equals_a_whole_one(host):
    fact, patcher, clean, corrupted = recorded(host)
    last = len(fact.ids) - 1
    cells = [
        (Patch("hidden", 0, fact.place),), (Patch("hidden", 2, (last,)),), (Patch("mlp", 0, (last,)),),
        (Patch("mlp", 1, fact.place), Patch("mlp", 2, fact.place)), (Patch("attn", 1, (last - 1, last)),),
        (Patch("hidden", 0, fact.place), Patch("mlp", 1, fact.place, "base"), Patch("mlp", 2, fact.place, "base")),
        (Patch("attn", 0, fact.place), Patch("hidden", 1, (last,))), (),
    ]  # fmt: skip
    found = patcher.run(corrupted, clean, cells, lambda logits: logits)
    for scores, cell in zip(found, cells, strict=True):
        assert torch.allclose(scores, naive(host, corrupted, clean, cell), atol=2e-5), cell


def test_scores_do_not_depend_on_the_other_cells(host):
    fact, patcher, clean, corrupted = recorded(host)
    cells = [(Patch("mlp", layer, (at,)),) for layer in range(3) for at in fact.place]
    together = patcher.run(corrupted, clean, cells, lambda logits: logits)
    alone = torch.cat([patcher.run(corrupted, clean, [cell], lambda logits: logits) for cell in cells])
    assert torch.allclose(together, alone, atol=1e-5)
    assert corrupted.shift is not None
    one = patcher.record([fact.ids], shift=corrupted.shift[:1])  # and not on the other rows
    assert torch.allclose(patcher.run(one, clean, cells, lambda logits: logits), together[:, :1], atol=1e-5)


def test_restoring_everything_gives_the_clean_run(host):
    fact, patcher, clean, corrupted = recorded(host)
    whole = tuple(range(len(fact.ids)))
    cells = [(Patch("hidden", layer, whole),) for layer in range(3)]
    cells.append((Patch("hidden", 2, (len(fact.ids) - 1,)),))
    for scores in patcher.run(corrupted, clean, cells, lambda logits: logits):
        assert torch.allclose(scores, clean.logits.expand(2, -1), atol=1e-5)
    assert not torch.allclose(corrupted.logits, clean.logits.expand(2, -1), atol=1e-2)


def test_nothing_corrupted_nothing_to_restore(host):
    traced = tracing.trace(host, fact_of(host), Settings(noise="0", draws=2, severed=("mlp",)))
    assert abs(traced.total) < 1e-6
    assert all(traced.effects(name).abs().max() < 1e-6 for name in traced.maps)


def test_the_map_s_edges(host):
    settings = Settings(noise="1.0", draws=2, width=1, severed=("mlp", "attn"))
    fact = fact_of(host)
    traced = tracing.trace(host, fact, settings)
    hidden = traced.effects("hidden")
    assert hidden.shape == (3, len(fact.ids) - fact.place[0] + 1)
    assert float(hidden[-1, -2]) == pytest.approx(traced.total, abs=1e-6)  # last token, last layer
    for part in ("mlp", "attn"):  # above the last layer there is nothing to sever
        assert torch.allclose(traced.effects(f"hidden, {part} severed")[-1], hidden[-1], atol=1e-6)
    patcher = Patcher(host, longest=len(fact.ids))
    clean = patcher.record([fact.ids])
    left = patcher.run(clean, clean, [(Patch("hidden", 1, (0,)),)], tracing.reading(fact.answer))
    assert torch.allclose(left[0], tracing.reading(fact.answer)(clean.logits), atol=1e-6)


def test_a_window_of_nothing_restores_nothing():
    host = fresh("llama")
    traced = tracing.trace(
        host, fact_of(host), Settings(noise="1.0", draws=2, width=0, kinds=("mlp", "attn"))
    )
    assert all(bool((traced.effects(name) == 0).all()) for name in traced.maps)
    assert list(window(2, 0, 6)) == [] and list(window(2, 1, 6)) == [2]
    assert list(window(2, 4, 6)) == [0, 1, 2, 3] and list(window(5, 10, 6)) == [0, 1, 2, 3, 4, 5]
    assert list(window(0, 3, 6)) == [0, 1] and list(window(24, 10, 48)) == list(range(19, 29))


def test_a_window_is_its_layers_at_once():
    host = fresh("llama")
    fact = fact_of(host)
    wide = tracing.trace(host, fact, Settings(noise="1.0", draws=2, width=3, kinds=("mlp",)))
    patcher = Patcher(host, longest=len(fact.ids))
    clean = patcher.record([fact.ids])
    shift = tracing._noise(clean.embeddings[0], fact, wide.settings, wide.sigma)
    base = patcher.record([fact.ids] * 2, shift=shift)
    cell = tuple(Patch("mlp", layer, (fact.place[0],)) for layer in range(3))
    expected = tracing.reading(fact.answer)(naive(host, base, clean, cell))
    assert torch.allclose(wide.maps["mlp"][1, 0], expected, atol=1e-5)


def test_the_same_noise_everywhere_and_the_host_as_it_was():
    host = fresh("gpt2")
    before = host.weights_hash()
    one, two = (tracing.trace(host, fact_of(host), LOUD) for _ in range(2))
    assert torch.equal(one.corrupted, two.corrupted)
    other = tracing.trace(host, fact_of(host), Settings(noise="1.0", draws=2, width=1, seed=1))
    assert not torch.equal(one.corrupted, other.corrupted)
    assert host.weights_hash() == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in host.model.modules())


def test_the_deviation_is_that_of_the_subjects_embeddings():
    host = fresh("gpt2")
    table = host.model.get_input_embeddings().weight.detach()
    ids = [i for name in (NAME, "Tallow") for i in host.encode(name, special=False).ids]
    assert tracing.subject_deviation(host, [NAME, "Tallow"]) == pytest.approx(
        float(table[ids].std(correction=0))
    )
    assert tracing.noise_deviation(host, [NAME], Settings(noise="s0")) == 0
    assert tracing.noise_deviation(host, [NAME], Settings(noise="0.5")) == 0.5


def test_roles():
    host = fresh("llama")
    fact = fact_of(host)
    assert "".join(fact.tokens[at] for at in fact.place).strip() == NAME
    roles = fact.roles
    assert roles[fact.place[-1]] == LAST and roles[fact.place[0]] == FIRST
    assert roles[fact.place[-1] + 1] == NEXT and roles[len(fact.ids) - 1] == END
    traced = tracing.trace(host, fact, LOUD)
    assert traced.by_role("mlp").shape == (7, 3)
    assert torch.allclose(traced.by_role("hidden")[-1], traced.effects("hidden")[:, -1])


def test_what_is_refused(monkeypatch):
    host = fresh("gpt2")
    with pytest.raises(RequestError, match="does not occur"):
        facts.fact(host, PROMPT, "Boris")
    with pytest.raises(ConfigError, match="noise"):
        Settings(noise="loud")
    with pytest.raises(ConfigError, match="draws"):
        Settings(draws=0)
    with pytest.raises(RequestError, match="same number of tokens"):
        Patcher(host, longest=5).record([[1, 2], [1, 2, 3]])
    strange = facts.facts(host, [lab.cases(1)[0].request], answers=["zzzz"])
    with pytest.raises(ConfigError, match="nothing to trace"):
        tracing.average(host, strange)
    monkeypatch.setattr(type(host.codec), "reads_by_encoder", True)  # as an encoder-decoder's
    with pytest.raises(HostError, match="causal language model"):
        facts.fact(host, PROMPT, NAME)
    with pytest.raises(HostError, match="causal language model"):
        tracing.trace(host, strange[0])


def test_a_memory_in_place_is_refused():
    host = fresh("llama")
    fact = fact_of(host)
    request = Request(PROMPT, NAME, "Tallow")
    grace = edit(host, [request], method="grace", layer=1, steps=2)
    with grace.on(host), pytest.raises(HostError, match="act by row"):
        tracing.trace(host, fact)
    ft = edit(host, [request], method="ft", layers=[1], steps=2)
    plain = tracing.trace(host, fact, LOUD)
    with ft.on(host):  # a change of weights is looked at like any model
        assert not torch.equal(tracing.trace(host, fact, LOUD).corrupted, plain.corrupted)


def test_restoring_the_subject_recovers_the_lab_s_facts():
    host = lab.load()
    cases = lab.cases(14, seed=5)
    known = facts.facts(host, [c.request for c in cases], answers=[c.request.target_old for c in cases])
    found = tracing.average(host, known, Settings(draws=4, kinds=("hidden",)))
    first = found.stacked("hidden", TOP, restored=True).nanmean(0)
    assert found.to_dict()["roles"][-1] == SUBJECT
    assert bool((first[-1, :3] >= 0.9).all()) and float(first[-1, -1]) < 0.6
    effect = found.stacked("hidden", PROBABILITY).nanmean(0)
    end = effect[-2]
    assert float(end[-1]) == pytest.approx(found.to_dict()["total_effect"], abs=1e-4)
    assert float(end[0]) < 0.1 and bool((end.diff() > -0.02).all())
    assert bool((effect[2, :3] > 3 * effect[2, 4].clamp_min(0)).all())


def test_the_statistics():
    values = torch.arange(20.0)
    low, high = resampling.mean_interval(values)
    assert 6 < float(low) < 9.5 < float(high) < 13
    assert resampling.ranks(torch.tensor([3.0, 1.0, 3.0, 7.0])).tolist() == [1.5, 0.0, 1.5, 3.0]
    line = torch.linspace(0, 1, 9)
    assert resampling.correlation(line, -2 * line + 1) == pytest.approx(-1)
    assert resampling.rank_correlation(line, line**5) == pytest.approx(1)
    assert resampling.explained(torch.stack([torch.ones(9), line], 1), 3 * line - 1) == pytest.approx(1)
    assert resampling.explained(torch.ones(9, 1), line) == pytest.approx(0, abs=1e-9)
    assert resampling.correlation(torch.ones(4), torch.arange(4.0)) != resampling.correlation(line, line)
