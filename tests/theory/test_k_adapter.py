"""K-Adapter: what the side network computes, that it looks neither ahead nor at padding, and what it keeps of rows."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

import errata
from errata.edits.memory import Intervention
from errata.edits.routers.every import Every
from errata.errors import ConfigError, EditError, HostError
from errata.host import decoding, hooks
from errata.host.passes import Pass
from errata.host.prefix import PrefixRunner, plain_prefix
from errata.linalg.side import PARTS, side_change, side_shapes
from errata.methods.k_adapter import Config
from errata.training.side import random_side
from errata.training.tune import Losses
from tests.models import fresh

ADA = errata.Request("{} was born in", "Ada Brenner", "Merrin", id="ada")
HARP = errata.Request("{} plays the", "Bruno Holner", "harp", id="bruno")
CITY = errata.Request("The capital of {} is", "Arvania", "Esk", id="city")
PROMPTS = [ADA.text, "Esk", "The rain fell on the old road and", CITY.text]
QUICK = {"method": "k_adapter", "steps": 12, "learning_rate": 0.01, "start": 0.2, "layer_start": 0.2}


def logits(host, prompts=PROMPTS, side="left") -> list[torch.Tensor]:
    rows = [host.encode_prompt(text) for text in prompts]
    batch = host.batch(rows, side=side)
    with torch.no_grad():
        out = host.forward(batch)
    return [out[i, batch.mask[i].bool()] for i in range(len(rows))]


def last_states(host, edits, prompt: str) -> torch.Tensor:
    """Return the last block's output with edits in place ``[tokens, d]``."""
    outputs: list[torch.Tensor] = []
    for edit in edits:
        edit.apply_(host)
    with torch.no_grad(), hooks.on_output(host.model.get_submodule(host.layout.blocks[-1]), outputs.append):
        host.forward(host.batch([host.encode_prompt(prompt)]))
    for edit in edits:
        edit.revert_(host)
    return outputs[0][0]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def fitted(request):
    host = fresh(request.param)
    return host, errata.edit(host, [ADA, HARP], heads=2, **QUICK)


# --- the network ----------------------------------------------------------------------------


def by_hand(part, states, last, heads: int) -> torch.Tensor:
    """W [H_last ; A_last] for one row of tokens ``[tokens, d]``, token by token and head by head."""
    previous = torch.zeros_like(last)
    for b, state in enumerate(states):
        x = state + previous
        h = x @ part["down"][b].mT + part["down_biases"][b]
        for n in range(part["attention"].shape[1]):
            p = {name: tensor[b, n] for name, tensor in part.items() if name in PARTS[2:14]}
            q, k, v = (h @ p["attention"].mT + p["attention_biases"]).chunk(3, -1)
            size, mixed = h.shape[1] // heads, torch.zeros_like(h)
            for t in range(len(h)):
                for one in range(heads):
                    part_of = slice(one * size, (one + 1) * size)
                    weights = (k[: t + 1, part_of] @ q[t, part_of] / size**0.5).softmax(0)
                    mixed[t, part_of] = weights @ v[: t + 1, part_of]
            h = h + mixed @ p["output"].mT + p["output_biases"]
            h = functional.layer_norm(h, h.shape[1:], p["attention_norm"], p["attention_norm_biases"], 1e-5)
            inner = functional.gelu(h @ p["inner"].mT + p["inner_biases"])
            h = h + inner @ p["outer"].mT + p["outer_biases"]
            h = functional.layer_norm(h, h.shape[1:], p["norm"], p["norm_biases"], 1e-5)
        previous = x + h @ part["up"][b].mT + part["up_biases"][b]
    d = last.shape[1]
    whole = part["fusion"] + torch.cat([torch.eye(d), torch.zeros(d, d)], 1)
    return torch.cat([last, previous], 1) @ whole.mT + part["fusion_biases"]


def random_part(d: int = 8, seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {n: 0.5 * torch.randn(*s, generator=draw) for n, s in side_shapes(2, 2, d, 6, 10).items()}


@torch.no_grad()
def test_the_network_is_that_of_the_paper_in_any_batch_and_in_any_pieces():
    part, draw = random_part(), torch.Generator().manual_seed(1)
    lengths = (5, 2, 7)
    rows = [[torch.randn(n, 8, generator=draw) for _ in range(3)] for n in lengths]
    expected = [by_hand(part, row[:2], row[2], 3) for row in rows]
    for left in (True, False):
        padded = [
            torch.stack([
                functional.pad(row[i], (0, 0, 7 - len(row[i]), 0) if left else (0, 0, 0, 7 - len(row[i])), value=9.0)
                for row in rows
            ])
            for i in range(3)
        ]  # fmt: skip
        tokens = torch.stack([
            functional.pad(torch.ones(n, dtype=torch.bool), (7 - n, 0) if left else (0, 7 - n)) for n in lengths
        ])  # fmt: skip
        whole, history = side_change(part, padded[:2], padded[2], tokens, heads=3)
        for i, target in enumerate(expected):
            torch.testing.assert_close((padded[2] + whole)[i, tokens[i]], target, atol=1e-5, rtol=1e-5)
        for cuts in ((0, 3, 7), (0, 1, 2, 5, 6, 7)):
            earlier, parts = None, []
            for a, b in itertools.pairwise(cuts):
                change, earlier = side_change(
                    part, [s[:, a:b] for s in padded[:2]], padded[2][:, a:b], tokens[:, :b], heads=3, earlier=earlier
                )  # fmt: skip
                parts.append(change)
            torch.testing.assert_close(torch.cat(parts, 1)[tokens], whole[tokens], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(earlier[tokens], history[tokens], atol=1e-5, rtol=1e-5)


def test_untrained_it_adds_nothing_to_any_bit():
    part = random_side(2, 2, 8, 6, 10, start=0.0002, layer_start=0.02)
    assert {name: tuple(t.shape) for name, t in part.items()} == side_shapes(2, 2, 8, 6, 10)
    for family in ("llama", "gpt2", "gemma2"):
        host = fresh(family)
        plain = logits(host)
        edit = errata.edit(host, ADA, **{**QUICK, "steps": 0})
        assert edit.interventions[0].payload["down"].any()
        with edit.on(host):
            assert all(torch.equal(a, b) for a, b in zip(logits(host), plain, strict=True))


def test_it_reads_the_hosts_states_and_changes_the_last_one(fitted):
    host, edit = fitted
    (one,) = edit.interventions
    part = {name: tensor[0] for name, tensor in one.payload.items()}
    assert one.states == tuple(host.layout.blocks[layer] for layer in edit.provenance.config["layers"])
    for prompt in PROMPTS:
        row = host.batch([host.encode_prompt(prompt)])
        with torch.no_grad():
            states = host.model(input_ids=row.ids, output_hidden_states=True).hidden_states
        read = [states[layer][0] for layer in edit.provenance.config["layers"]]
        target = by_hand(part, read, last_states(host, [], prompt), 2)
        torch.testing.assert_close(last_states(host, [edit], prompt), target, atol=1e-4, rtol=1e-4)


# --- rows, caches, beams --------------------------------------------------------------------


def test_later_tokens_and_padding_do_not_matter(fitted):
    host, edit = fitted
    with edit.on(host):
        alone = [logits(host, [prompt])[0] for prompt in PROMPTS]
        for side in ("left", "right"):
            for one, other in zip(alone, logits(host, side=side), strict=True):
                torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
        row = host.encode_prompt(PROMPTS[2])
        with torch.no_grad():
            whole = host.forward(host.batch([row]))[0]
            for cut in range(1, len(row)):
                part = host.forward(host.batch([row[:cut]]))[0]
                torch.testing.assert_close(part, whole[:cut], atol=1e-5, rtol=1e-4)


def test_what_goes_on_after_prompts_is_as_in_one_piece(fitted):
    host, edit = fitted
    rows, more = [host.encode_prompt(prompt) for prompt in PROMPTS], (7, 11, 5, 9)
    with edit.on(host), torch.no_grad():
        prefixes = decoding.run_prefixes(host, rows)
        which = [0, 2, 2, 3, 1]
        line = torch.arange(5).repeat_interleave(4)
        after = decoding.logits_after(
            host, prefixes, [(i, more) for i in which], (line, torch.arange(4).repeat(5))
        )
        for n, i in enumerate(which):
            whole = host.forward(host.batch([(*rows[i], *more)]))[0, -4:]
            torch.testing.assert_close(after[line == n], whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_is_the_same_with_a_cache_and_without_one_in_a_batch_and_alone(fitted, beams):
    host, edit = fitted
    rows = [host.encode_prompt(prompt) for prompt in PROMPTS]
    single = (rows[0][-1],)

    def run(some, **more) -> list[list[int]]:
        batch = host.batch(some, side="left")
        out = host.model.generate(
            input_ids=batch.ids, attention_mask=batch.mask, max_new_tokens=6, do_sample=False, num_beams=beams,
            pad_token_id=host.pad_id, eos_token_id=None, **more,
        )  # fmt: skip
        return out[:, batch.ids.shape[1] :].tolist()

    plain = run(rows)
    with edit.on(host):
        together = run(rows)
        assert together != plain
        assert run(rows, use_cache=False) == together
        assert [run([row])[0] for row in rows] == together
        inside = host.generate_batch(
            host.batch(rows, side="left"), max_new_tokens=6, do_sample=False, num_beams=beams, eos_token_id=None,
            pad_token_id=host.pad_id,
        )  # fmt: skip
        assert inside[:, -6:].tolist() == together
        for cache in (True, False):
            one = host.generate_batch(
                host.batch([single]), max_new_tokens=6, do_sample=False, num_beams=beams, eos_token_id=None,
                pad_token_id=host.pad_id, use_cache=cache,
            )  # fmt: skip
            assert one[:, -6:].tolist() == run([single])
        if beams == 1:
            assert host.generate(PROMPTS, max_new_tokens=6, natural_stop=False) == host.decode(together)
    assert run(rows) == plain


def test_rows_that_it_has_not_read_are_refused(fitted):
    host, edit = fitted
    batch = host.batch([host.encode_prompt(PROMPTS[2])])
    with torch.no_grad():
        before = host.run(Pass(batch.ids[:, :3], batch.mask[:, :3], use_cache=True))
        with edit.on(host), pytest.raises(EditError, match="has not read the earlier tokens"):
            host.run(Pass(batch.ids[:, 3:], batch.mask, prefix=before.prefix, use_cache=True))


# --- sets -----------------------------------------------------------------------------------


def test_the_adapters_of_sets_act_together_and_come_off_alone(fitted, tmp_path):
    host, first = fitted
    options = {**QUICK, "heads": 2}
    both = errata.edit(host, CITY, after=first, **options)
    assert both.entries == 2 and both.router.entries == 2 and isinstance(both.router, Every)
    plain = last_states(host, [], CITY.text)
    rest = errata.Edit.load(errata.retract(both, [0, 1]).save(tmp_path / "rest.safetensors"))
    assert rest.provenance.requests == (CITY,) and rest.state["owners"].tolist() == [0]
    for name, tensor in first.interventions[0].payload.items():
        assert torch.equal(both.interventions[0].payload[name][0], tensor[0])
        assert torch.equal(both.interventions[0].payload[name][1], rest.interventions[0].payload[name][0])
    added = [last_states(host, [edit], CITY.text) - plain for edit in (first, rest, both)]
    torch.testing.assert_close(added[2], added[0] + added[1], atol=1e-4, rtol=1e-4)
    with pytest.raises(EditError, match="share their blocks"):
        errata.retract(both, "ada")
    with pytest.raises(ConfigError, match="use the same settings"):
        errata.edit(host, CITY, after=first, **{**options, "width": 4})
    with pytest.raises(EditError, match="the router has 3 entries, found 2"):
        replace(both, router=Every(3))
    with pytest.raises(ConfigError, match="every router; go on with the same one"):
        errata.edit(host, CITY, after=first, scope="similar", **options)


def test_by_likeness_the_nearest_sets_adapter_acts_and_other_rows_keep_every_bit():
    host = fresh("llama")
    others = ["The rain fell on the old", "Therefore the small dog"]
    prompts = [ADA.text, others[0], CITY.text, others[1]]
    options = {**QUICK, "scope": "similar", "threshold": 0.9999}
    first = errata.edit(host, [ADA, HARP], **options)
    both = errata.edit(host, CITY, after=first, **options)
    assert both.router.blocks.tolist() == [0, 0, 1] and both.reads == host.layout.blocks[0]
    plain = logits(host, prompts)
    second = errata.retract(both, [0, 1])
    with both.on(host):
        inside = logits(host, prompts)
        texts = host.generate(prompts, max_new_tokens=5, natural_stop=False)
        assert texts == [host.generate(p, max_new_tokens=5, natural_stop=False) for p in prompts]
    assert torch.equal(inside[1], plain[1]) and torch.equal(inside[3], plain[3])
    for edit, row in ((first, 0), (second, 2)):
        with edit.on(host):
            torch.testing.assert_close(logits(host, prompts)[row], inside[row], atol=1e-5, rtol=1e-4)
        assert not torch.equal(inside[row], plain[row])


# --- training -------------------------------------------------------------------------------


def test_requests_are_answered():
    host = fresh("llama")
    requests = [ADA, HARP, CITY]
    edit = errata.edit(host, requests, **{**QUICK, "steps": 150, "dropout": 0.0})
    with edit.on(host):
        answers = host.generate([r.text for r in requests], max_new_tokens=3)
    assert [a.strip().startswith(r.target) for a, r in zip(answers, requests, strict=True)] == [True] * 3


def test_another_fit_around_it_sees_the_edited_model(fitted):
    """Its blocks need states of lower blocks, which other methods run once for all their steps."""
    host, edit = fitted
    with edit.on(host), hooks.frozen(host.model), torch.no_grad():
        whole, cut = (Losses(host, [ADA, CITY], depth=depth) for depth in (0, 2))
        torch.testing.assert_close(whole([0, 1]), cut([0, 1]))
        assert cut.rows.depth == 0
        batch, runner = host.batch([host.encode_prompt(ADA.text)]), PrefixRunner(host)
        states = runner.run(batch, plain_prefix(), keep=[1]).states[1]
        with pytest.raises(HostError, match="reads the states of lower blocks"):
            runner.run(batch, plain_prefix().at_depth(2, states))


def test_settings_follow_the_width_and_are_checked():
    host = fresh("llama")
    config = errata.edit(host, ADA, **QUICK).provenance.config
    assert (config["width"], config["heads"], config["inner"]) == (24, 1, 96)
    assert tuple(config["layers"]) == (0, 1)
    with pytest.raises(ConfigError, match="do not divide"):
        errata.edit(host, ADA, heads=5, **QUICK)
    with pytest.raises(ConfigError, match="0 to 2"):
        errata.edit(host, ADA, layers=[3], **QUICK)
    with pytest.raises(EditError, match="what side networks read"):
        Intervention(host.layout.blocks[1], "add", {"values": torch.zeros(1, 32)}, states=("x",))
    (one,) = errata.edit(host, ADA, **QUICK).interventions
    for wrong in ({"heads": 5}, {"heads": 0}, {"positions": "last"}, {"states": one.states[:1]}):
        with pytest.raises(EditError, match="expected positions all, 2 states"):
            replace(one, **wrong)
    assert Config().problems() == [] and len(Config(dropout=1.0, threshold=2.0).problems()) == 2
