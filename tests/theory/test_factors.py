"""Factors of gradients: what they add up to, whose they are, and changes beside the weights made of them."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

import errata
from errata.host import hooks
from errata.linalg.lowrank import LowRank
from errata.training.factors import Change, beside, by_owner, capture, joined
from tests.models import fresh

REQUESTS = [
    errata.Request("{} was born in", "Ada Brenner", "Merrin"),
    errata.Request("The capital of {} is", "Arvania", "Esk"),
    errata.Request("{} plays", "Bruno", "the harp"),
]
FAMILIES = ("llama", "gpt2", "gemma2")


def answers(host):
    return [host.encode_answer(r.text, r.target) for r in REQUESTS]


def maps(host) -> list[str]:
    return [site.name for site in host.layout.mlp_out if site is not None]


def loss(host, answer) -> torch.Tensor:
    at = torch.arange(answer.start - 1, len(answer.ids) - 1)
    logits = host.forward_at(host.batch([answer.ids[:-1]]), torch.zeros_like(at), at)
    return functional.cross_entropy(logits, torch.tensor(answer.target), reduction="sum")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_products_add_up_to_the_gradient_of_the_weight(family):
    """Of all tokens, not of those of the answer alone; a Conv1D is as a Linear."""
    host = fresh(family)
    host.model.double()
    factors = capture(host, answers(host), maps(host), tokens="all", rows=2)
    for i, answer in enumerate(answers(host)):
        parameters = [host.model.get_submodule(name).weight for name in maps(host)]
        gradients = torch.autograd.grad(loss(host, answer), parameters)
        for name, gradient in zip(maps(host), gradients, strict=True):
            one = factors[name]
            own = one.owner == i
            found = one.gradients[own].mT @ one.keys[own]  # [d_out, d_in]
            assert one.shape == tuple(found.shape)
            torch.testing.assert_close(
                found, gradient.mT if one.transposed else gradient, atol=1e-5, rtol=1e-5
            )
            assert found.norm() > 1e-3 or name == maps(host)[-1]
    assert factors[maps(host)[0]].transposed is (family == "gpt2")


@pytest.mark.parametrize("tokens", ["all", "answer"])
def test_rows_do_not_depend_on_those_beside_them(tokens):
    host = fresh("llama")
    together = capture(host, answers(host), maps(host), tokens=tokens, rows=3)
    for i, answer in enumerate(answers(host)):
        alone = capture(host, [answer], maps(host), tokens=tokens, rows=1)
        for name, one in alone.items():
            own = together[name].owner == i
            torch.testing.assert_close(together[name].keys[own], one.keys, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(together[name].gradients[own], one.gradients, atol=1e-5, rtol=1e-4)
            most = len(answer.target) if tokens == "answer" else len(answer.ids) - 1
            assert 1 <= len(one.keys) <= most


def test_tokens_that_add_nothing_are_left_out():
    """Above the last attention, only the tokens that predict the answer have a gradient."""
    host = fresh("llama")
    top = maps(host)[-1]
    found = capture(host, answers(host), maps(host), tokens="all", rows=3)
    assert len(found[top].keys) == sum(len(a.target) for a in answers(host)) < len(found[maps(host)[0]].keys)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_see_the_change_of_their_own_edit(family):
    """As if each row's weight were changed, and gradients reach both sides as through the weight."""
    host = fresh(family)
    rows = [host.encode_prompt(r.text) for r in REQUESTS]
    name = maps(host)[1]
    one = capture(host, answers(host)[:2], [name], tokens="all", rows=2)[name]
    generator = torch.Generator().manual_seed(0)
    outer = 0.3 * torch.randn(one.gradients.shape, generator=generator)
    inner = torch.randn(one.keys.shape, generator=generator)
    outer.requires_grad_(), inner.requires_grad_()
    change = Change(outer, inner, one.owner)
    edits = (1, 0, 1)
    with hooks.frozen(host.model), beside(host, {name: change}, edits):
        found = host.forward(host.batch(rows))
        own_tokens = sum(found[i, : len(row)].square().sum() for i, row in enumerate(rows))
        sides = torch.autograd.grad(own_tokens, [outer, inner])
    weight = host.model.get_submodule(name).weight
    before = weight.detach().clone()
    total = [torch.zeros_like(outer), torch.zeros_like(inner)]
    for i, (row, edit) in enumerate(zip(rows, edits, strict=True)):
        own = one.owner == edit
        delta = LowRank(outer[own].mT, inner[own]).dense()
        changed = before + (delta.mT if one.transposed else delta)
        single = torch.func.functional_call(
            host.model, {f"{name}.weight": changed}, (), {"input_ids": host.batch([row]).ids}
        ).logits[0]
        torch.testing.assert_close(found[i, : len(row)], single, atol=1e-4, rtol=1e-4)
        for side, part in zip(total, torch.autograd.grad(single.square().sum(), [outer, inner]), strict=True):
            side += part
    for mine, theirs in zip(sides, total, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-3, rtol=1e-3)
    assert torch.equal(weight, before) and not host.model.get_submodule(name)._forward_hooks


def test_a_joined_change_is_the_sum_for_every_row():
    host = fresh("llama")
    name = maps(host)[0]
    one = capture(host, answers(host), [name], tokens="all", rows=3)[name]
    change = Change(-0.2 * one.gradients, one.keys, one.owner)
    rows = host.batch([host.encode_prompt(r.text) for r in REQUESTS])
    with torch.no_grad(), beside(host, {name: joined(change)}, (0, 0, 0)):
        found = host.forward(rows)
    weight = host.model.get_submodule(name).weight
    with torch.no_grad():
        before = weight.clone()
        weight += change.outer.mT @ change.inner
        torch.testing.assert_close(found, host.forward(rows), atol=1e-4, rtol=1e-4)
        weight.copy_(before)


def test_rows_are_sorted_by_owner_and_filled_up():
    rows = torch.arange(1.0, 7.0).view(3, 2)
    found = by_owner(rows, torch.tensor([0, 0, 2]), 3)
    assert found.tolist() == [[[1, 2], [3, 4]], [[0, 0], [0, 0]], [[5, 6], [0, 0]]]
