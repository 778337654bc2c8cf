"""NKB: values are shifted by differences of output embeddings, as far as needed and no further; what values say."""

from __future__ import annotations

import contextlib

import pytest
import torch

import errata
from errata.edits.memory import MemoryEdit
from errata.errors import ConfigError, HostError
from errata.host import hooks
from errata.locate.neurons import value_tokens
from errata.locate.shifts import OutputShifts, lead
from errata.training.slots import inputs_of
from errata.training.tune import lay_out
from tests.models import fresh

ADA = errata.Request("{} was born in", "Ada Brenner", "Merrin")
HARP = errata.Request("{} plays the", "Bruno Holner", "harp")


def top(host, request) -> list[int]:
    line = lay_out(host, request, "target")
    with torch.no_grad():
        return host.forward(host.batch([line.ids]))[0, list(line.at)].argmax(-1).tolist()


def target(host, request) -> list[int]:
    return list(lay_out(host, request, "target").targets)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_every_token_of_the_target_becomes_the_most_probable_one(family):
    host = fresh(family)
    edit = errata.edit(host, HARP, method="nkb")
    before = top(host, HARP)
    assert isinstance(edit, MemoryEdit) and edit.provenance.notes["missed"] == 0
    with edit.on(host):
        assert top(host, HARP) == target(host, HARP) != before
    assert top(host, HARP) == before


def test_tokens_that_no_shift_can_bring_about_are_counted():
    """Gemma 2 normalises what the feed-forward gives, so that a random model cannot say all."""
    host = fresh("gemma2")
    edit = errata.edit(host, ADA, method="nkb")
    with edit.on(host):
        missed = sum(one != other for one, other in zip(top(host, ADA), target(host, ADA), strict=True))
    assert edit.provenance.notes["missed"] == missed > 0


def test_a_published_shift_is_lambda_times_the_difference_at_the_most_active_slot():
    host = fresh("llama")
    edit = errata.edit(host, ADA, method="nkb", amount=0.09, target_tokens="first")
    (one,), (entry,) = edit.interventions, edit.log
    line = lay_out(host, ADA, "target")
    query = inputs_of(host, one.module, [line.ids])[line.at[0]]
    active = (one.payload["keys"][0] @ query + one.payload["biases"][0]).relu()
    assert entry["slot"] == int(active.argmax()) and entry["token"] == line.at[0]
    embeddings = host.model.lm_head.weight.detach()
    old = top(host, ADA)[0]
    values = torch.zeros_like(one.payload["values"][0])
    values[entry["slot"]] = 0.09 * (embeddings[line.targets[0]] - embeddings[old])
    assert entry["old"] == old and entry["new"] == line.targets[0]
    torch.testing.assert_close(one.payload["values"][0], values)
    assert one.payload["keys"].shape == (1, 4 * host.layout.width, host.layout.width)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_least_shift_is_enough_and_a_shorter_one_is_not(family):
    host = fresh(family)
    layer, line = 2, lay_out(host, ADA, "target")
    module, at = host.layout.feed_forward(2), line.at[0]
    step = torch.randn(host.layout.width, generator=torch.Generator().manual_seed(0))
    with hooks.frozen(host.model):
        outputs = OutputShifts(host, module, layer, line, contextlib.nullcontext)
        plain = host.forward(host.batch([line.ids]))[0, at]
        torch.testing.assert_close(outputs.logits(at)[0], plain, rtol=1e-4, atol=1e-5)
        token = int(outputs.logits(at, 30.0 * step[None])[0].argmax())  # one that the direction leads to
        assert token != int(plain.argmax())
        margin = 0.5 * float(lead(outputs.logits(at, 30.0 * step[None]), token))
        length = outputs.least(at, token, step, margin=margin)
        shorter, enough = lead(outputs.logits(at, torch.tensor([[0.99], [1.0001]]) * length * step), token)
    assert float(enough) >= margin > float(shorter)


def test_what_leads_by_the_margin_already_is_left_as_it_is():
    host = fresh("llama")
    first = errata.edit(host, ADA, method="nkb", margin=0.05)
    again = errata.edit(host, ADA, method="nkb", margin=0.04, after=first)
    assert len(again.log) == len(first.log)
    assert torch.equal(again.interventions[0].payload["values"], first.interventions[0].payload["values"])


def test_a_later_fit_goes_on_with_the_bank_and_leaves_the_earlier_edit_as_it_was():
    host = fresh("gpt2")
    first = errata.edit(host, ADA, method="nkb")
    digest = first.interventions[0].payload["values"].clone()
    both = errata.edit(host, HARP, method="nkb", after=first)
    assert torch.equal(first.interventions[0].payload["values"], digest)
    assert torch.equal(both.interventions[0].payload["keys"], first.interventions[0].payload["keys"])
    assert [entry["request"] for entry in both.log] == [0] * len(first.log) + [1] * (
        len(both.log) - len(first.log)
    )
    with pytest.raises(ConfigError, match="use the same layer"):
        errata.edit(host, HARP, method="nkb", after=first, layer=0)


def test_an_untrained_bank_changes_nothing_and_a_trained_one_lowers_the_loss():
    host = fresh("llama")
    texts = errata.types.Corpus("one text", lambda: ["Ada Brenner lives in Tallow and plays the harp."])
    options = {"method": "nkb", "amount": 1e-9, "target_tokens": "first", "corpus": texts}
    untrained = errata.edit(host, ADA, **options)
    assert float(untrained.interventions[0].payload["values"].abs().max()) < 1e-6
    few, many = (
        errata.edit(host, ADA, statements="texts", steps=steps, warmup=0, learning_rate=0.05, **options)
        for steps in (1, 200)
    )
    assert many.provenance.notes["loss"] < few.provenance.notes["loss"] - 0.3
    learnt = errata.edit(
        host, ADA, method="nkb", statements="requests", steps=300, learning_rate=0.05, warmup=0, margin=0.0
    )
    assert learnt.provenance.notes["shifts"] == 0, "what training has taught needs no shift"
    with learnt.on(host):
        assert top(host, ADA) == target(host, ADA)


def test_a_value_says_the_token_whose_embedding_it_is_nearest_to():
    host = fresh("llama")
    weight = host.model.lm_head.weight.detach()
    tokens = [5, 17, 60]
    expected = [
        [host.tokenizer.decode([int(row)]) for row in (weight @ weight[token]).topk(3).indices]
        for token in tokens
    ]
    assert value_tokens(host, weight[tokens], count=3) == expected
    with pytest.raises(HostError, match="output embeddings of width 3"):
        value_tokens(host, torch.zeros(1, 3))


@pytest.mark.parametrize("wrong", [{"amount": 0.0}, {"amount": -1.0}, {"margin": -0.1}, {"rounds": 0}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        errata.edit(fresh("llama"), ADA, method="nkb", **wrong)
