"""Mixtures of experts: stacked experts are one linear map of block keys, and edited as such."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import errata
from errata.bench.schedule import Schedule
from errata.errors import EditError, HostError
from errata.evaluation.metrics.routing import drift
from errata.host import hooks, passes, placed
from errata.host.experts import stack_of
from errata.host.host import Host
from errata.host.layout import linear_map
from errata.host.routed import routed
from errata.linalg.block_moments import BlockMoments
from errata.locate.keys import capture, subject_place
from errata.stats.cache import read, write
from errata.stats.collect import facts, second_moments
from errata.types import Corpus
from tests.contract.test_methods import EXAMPLES, options
from tests.models import MIXTURES, TEXTS, fresh

REQUEST = errata.Request("{} was born in", "Ada Brenner", "Merrin")
OTHERS = ["The capital of Arvania is", "Bruno Holner lives in the", "Éric said"]
EDITED = {  # a layer of stacked experts, but where a shared expert stands beside them
    "mixtral": (1, "mlp.experts.down_proj"), "qwen3_moe": (1, "mlp.experts.down_proj"),
    "olmoe": (1, "mlp.experts.down_proj"), "deepseek_v3": (1, "mlp.shared_experts.down_proj.weight"),
    "gpt_oss": (1, "mlp.experts.down_proj"), "jamba": (1, "feed_forward.experts.down_proj"),
}  # fmt: skip
STACKED = [family for family in MIXTURES if family != "deepseek_v3"]


@pytest.fixture(scope="module", params=MIXTURES)
def host(request: pytest.FixtureRequest) -> Host:
    return fresh(request.param)


def logits(host: Host) -> torch.Tensor:
    rows = [host.encode_prompt(text) for text in (REQUEST.text, *OTHERS)]
    with torch.no_grad():
        return host.forward(host.batch(rows))


def fitted(host: Host, method: str, **more: Any) -> Any:
    layer, _ = EDITED[host.family]
    where = {"layer": layer, "radius": 1e-4} if method == "grace" else {"layers": [layer]}
    tokens = {} if method in ("grace", "ft") else {"tokens": 300}
    return errata.edit(host, REQUEST, method=method, **{"steps": 4, **where, **tokens, **more})


def test_the_layout_names_stacked_experts(host: Host):
    layer, name = EDITED[host.family]
    assert host.layout.site(layer).parameter == f"{host.layout.blocks[layer]}.{name}"
    site = host.layout.site(layer, "experts")
    assert (site.experts, site.d_out, site.d_in) == (4, 32, 4 * (80 if host.family == "jamba" else 24))
    assert site.transposed == (host.family == "gpt_oss") and host.layout.adds_directly
    assert (site.part == "experts") == (
        host.family == "deepseek_v3"
    )  # else it is the feed-forward's own site


def test_memory_that_runs_out_is_no_reading_of_a_module(monkeypatch: pytest.MonkeyPatch):
    host = fresh("mixtral")
    module: Any = host.model.get_submodule(host.layout.site(1, "experts").name)
    expected = module.__dict__.pop("_errata_stack")
    with monkeypatch.context() as patch:
        patch.setattr(module, "forward", runs_out)
        with pytest.raises(torch.OutOfMemoryError):
            stack_of(module)
    assert stack_of(module) == expected  # nothing was kept of the failure
    linear: Any = torch.nn.Linear(3, 2)
    linear.forward = runs_out
    with pytest.raises(torch.OutOfMemoryError):
        linear_map(linear, 3, torch.zeros(1))


def runs_out(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_the_output_is_the_joined_weight_times_the_block_key(host: Host):
    site = host.layout.site(1, "experts")
    module: Any = host.model.get_submodule(site.name)
    places = [subject_place(host, REQUEST)]
    seen = capture(host, places, [site])
    key = seen.keys[site].unflatten(1, (4, -1))
    assert int(key.any(2).sum()) == 2  # two experts of four
    output = seen.keys[site] @ host.weight(site).mT
    if host.family == "gpt_oss":
        calls: list[Any] = []
        with torch.no_grad():
            handle = module.register_forward_pre_hook(
                lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
            )
            host.forward(host.batch([places[0].ids]))
            handle.remove()
        stack = stack_of(module)
        assert stack is not None
        output = output + stack.bias(module, *calls[0])[-1]  # type: ignore[index]
    torch.testing.assert_close(output, seen.values[site], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("method", ["memit", "rome", "ft", "grace"])
def test_an_edit_goes_through_its_life(host: Host, method: str, tmp_path: Any):
    start, plain = host.weights_hash(), logits(host)
    edit = fitted(host, method)
    assert host.weights_hash() == start
    loaded: Any = errata.Edit.load(edit.save(tmp_path / "edit.safetensors"))
    if method != "grace":
        assert list(edit.deltas) == [host.layout.site(1).parameter]
    with loaded.on(host):
        inside = logits(host)
        assert not torch.equal(inside, plain)
        if method == "grace":  # one row of many is its own
            torch.testing.assert_close(inside[1:], plain[1:], atol=1e-5, rtol=0)
        else:
            others = {n for n, p in host.model.named_parameters() if n not in edit.deltas}
            assert len(others) == len(dict(host.model.named_parameters())) - 1
    assert host.weights_hash() == start and torch.equal(logits(host), plain)
    if method != "grace":  # beside the weight: the same, and no bit is written
        with loaded.on(host, merge=False):
            assert host.weights_hash() == start
            torch.testing.assert_close(logits(host), inside, atol=2e-5, rtol=1e-4)
        assert torch.equal(logits(host), plain)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in host.model.modules())


def test_a_change_of_few_experts_touches_no_other(host: Host):
    if host.family not in STACKED:
        pytest.skip("its layers are edited at the shared expert")
    site = host.layout.site(1)
    edit = fitted(host, "rome", contexts=[], context_tokens=[])
    before = host.model.get_parameter(site.parameter).detach().clone()
    routed = capture(host, [subject_place(host, REQUEST)], [site]).keys[site].unflatten(1, (4, -1)).any(2)[0]
    with edit.on(host):
        moved = (host.model.get_parameter(site.parameter) != before).flatten(1).any(1)
    assert torch.equal(moved, routed)


def test_placed_deltas_reach_the_joined_weight_as_they_are(host: Host):
    site = host.layout.site(1)
    edit = fitted(host, "memit")
    before = host.weight(site)
    with edit.on(host):
        merged = host.weight(site)
    with edit.on(host, merge=False):
        beside = host.weight(site)
    delta = edit.deltas[site.parameter].dense()
    torch.testing.assert_close(merged - before, delta, atol=1e-6, rtol=1e-3)
    torch.testing.assert_close(beside, merged, atol=1e-6, rtol=1e-5)


def test_moments_are_by_expert_and_over_all_tokens(tmp_path: Any, monkeypatch: pytest.MonkeyPatch):
    host = fresh("mixtral")
    site, corpus = host.layout.site(1), Corpus("texts", lambda: iter(TEXTS))
    keys: list[torch.Tensor] = []
    add = BlockMoments.update_

    def record(moments: BlockMoments, vectors: torch.Tensor) -> None:
        keys.append(vectors.double())
        add(moments, vectors)

    monkeypatch.setattr(BlockMoments, "update_", record)
    moments = second_moments(host, [site], corpus, tokens=200)[site]
    assert isinstance(moments, BlockMoments) and moments.count == 200
    part = torch.cat(keys).unflatten(1, (4, -1))
    expected = torch.einsum("tei,tej->eij", part, part) / 200
    enough = [e for e, block in enumerate(moments.blocks) if block.count >= 24]
    assert enough
    torch.testing.assert_close(moments.second[enough], expected[enough], atol=1e-9, rtol=1e-6)
    assert float(moments.shares.sum()) == pytest.approx(2.0)  # each token takes two
    site_facts = facts(host, site, corpus, tokens=200)
    write(tmp_path, site_facts, moments)
    stored = read(tmp_path, site_facts)
    assert stored is not None and torch.equal(stored.second, moments.second)


def test_a_merged_mixture_is_exported_and_opened_again(tmp_path: Any):
    host = fresh("mixtral")
    edit = fitted(host, "memit")
    with edit.on(host):
        inside = logits(host)
    errata.export(edit, tmp_path / "merged", to="checkpoint", host=host)
    torch.testing.assert_close(logits(errata.load(str(tmp_path / "merged"))), inside, atol=1e-5, rtol=1e-4)
    with pytest.raises(EditError, match="delta or to a checkpoint"):
        errata.export(edit, tmp_path / "adapter", to="peft", host=host)


def test_edit_sets_tell_rows_apart_whose_tokens_are_joined():
    host = fresh("mixtral")
    edit = fitted(host, "memit")
    edit.place(host, rows="one")
    row, length = host.encode_prompt(REQUEST.text), len(host.encode_prompt(REQUEST.text))
    routes = {passes.SETS: placed.numbers(host.model, ["one", None])}
    last = torch.tensor([0, 1]), torch.tensor([length - 1] * 2)
    with torch.no_grad():
        mine, other = host.forward_at(host.batch([row] * 2), *last, routes=routes)
    edit.revert_(host)
    with torch.no_grad(), edit.on(host):
        (expected,) = host.forward_at(host.batch([row]), last[0][:1], last[1][:1])
    with torch.no_grad():
        (plain,) = host.forward_at(host.batch([row]), last[0][:1], last[1][:1])
    torch.testing.assert_close(mine, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(other, plain, atol=1e-5, rtol=0)
    assert not torch.allclose(mine, other, atol=1e-5)


def test_generation_with_a_memory_at_experts_equals_single_rows():
    host = fresh("olmoe")
    edit = fitted(host, "grace", steps=30)
    prompts = [REQUEST.text, *OTHERS]
    with edit.on(host):
        together = host.generate(prompts, max_new_tokens=6)
        assert together == [host.generate(prompt, max_new_tokens=6) for prompt in prompts]


# --- what other methods do there ----------------------------------------------------------------


@pytest.mark.parametrize("method", ["alphaedit", "encore", "nse", "kn", "lora", "npo"])
def test_other_methods_write_experts_too(method: str):
    host = fresh("mixtral")
    start, plain = host.weights_hash(), logits(host)
    edit = errata.edit(host, REQUEST, method=method, **options(method))
    with edit.on(host):
        inside = logits(host)
        assert not torch.equal(inside, plain)
    with edit.on(host, merge=False):
        torch.testing.assert_close(logits(host), inside, atol=2e-5, rtol=1e-4)
    assert host.weights_hash() == start


@pytest.mark.parametrize("method", ["wise", "defer", "keel_memory"])
def test_memories_act_at_experts(method: str, tmp_path: Any):
    host = fresh("mixtral")
    plain = logits(host)
    edit = errata.edit(host, REQUEST, method=method, **options(method))
    loaded = errata.Edit.load(edit.save(tmp_path / "edit.safetensors"))
    row = host.encode_prompt(REQUEST.text)
    with loaded.on(host), torch.no_grad():
        alone = host.forward(host.batch([row]))[0, -1]
        together = host.forward_at(
            host.batch([row, host.encode_prompt(OTHERS[2])]), torch.tensor([0]), torch.tensor([len(row) - 1])
        )[0]
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=0)
    assert torch.equal(logits(host), plain)


@pytest.mark.parametrize("method", ["ultraedit", "mend", "melo"])
def test_methods_of_plain_linear_maps_say_so(method: str):
    host = fresh("mixtral")
    more: dict[str, Any] = {"examples": EXAMPLES} if method == "mend" else {}
    with pytest.raises(HostError, match=r"stacks 4 experts in model.layers.\d.mlp.experts.down_proj"):
        errata.edit(host, REQUEST, method=method, **options(method), **more)


# --- routing drift ------------------------------------------------------------------------------


def test_routes_are_the_sets_of_experts_of_each_token():
    host = fresh("qwen3_moe")
    rows = [host.encode(text).ids for text in (TEXTS[0], "Éric")]
    calls: list[torch.Tensor] = []
    module = host.model.get_submodule(host.layout.site(1).name)
    with hooks.on_call(module, lambda call: calls.append(call[0][1].clone())):
        found = routed(host, rows)
    assert [len(one) for one in found] == [2, 2]  # layers with experts
    assert [len(one[0]) for one in found] == [len(row) for row in rows]
    for one, row in zip(found, rows, strict=True):
        calls.clear()
        with hooks.on_call(module, lambda call: calls.append(call[0][1].clone())), torch.no_grad():
            host.forward(host.batch([row]))
        assert list(one[1]) == [sum(1 << int(e) for e in sorted(token)) for token in calls[0]]
    assert routed(fresh("llama"), rows) == [(), ()]


def test_more_experts_than_a_word_has_bits():
    host = fresh("olmoe", num_experts=70, num_experts_per_tok=3)
    (one,) = routed(host, [host.encode(TEXTS[0]).ids])
    assert all(number.bit_count() == 3 for layer in one for number in layer)
    assert max(number for layer in one for number in layer) >= 1 << 62


def test_drift_counts_tokens_and_layers():
    assert drift([(((1, 2), (4, 4)), ((1, 3), (4, 4)))]) == 0.25
    assert drift([(((1,),), ((1,),)), (((2, 2),), ((4, 8),))]) == pytest.approx(2 / 3)
    assert drift([]) is None and drift([((), ())]) is None


def test_an_evaluation_shows_the_drift_of_neighbours_and_of_neutral_text():
    host = fresh("mixtral")
    probes = (
        errata.Probe("efficacy", REQUEST.text, ("Merrin",), (), None),
        errata.Probe("neighbourhood", "Bruno Holner was born in", ("Tallow",), ("Tallow",)),
    )
    case = errata.Case("one", REQUEST, probes)
    fast = {"steps": 8, "epsilon": None, "layers": [0], "learning_rate": 3.0}
    report = errata.evaluate(host, [case], method="ft", **fast, schedule=Schedule("batch", 1))
    entry = report.summary["neighbourhood.routing"]
    (row,) = [row for row in report.rows if row.protocol == "routing"]
    by_layer = row.detail["by_layer"]
    assert by_layer[0] == 0.0  # the edited layer routes by what it reads, which the edit does not change
    assert entry["after"] == pytest.approx(sum(by_layer) / 3) and row.after > 0
    (point,) = report.checkpoints
    assert point.routing_drift is not None and 0 < point.routing_drift <= 2 / 3
    unedited = errata.evaluate(host, [case], method="none", schedule=Schedule("batch", 1))
    assert unedited.checkpoints[0].routing_drift == 0.0 == unedited.summary["neighbourhood.routing"]["after"]
