"""One Newton step: what it solves, what it leaves where it is, and how long it is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import errata
from errata.edits import WeightEdit
from errata.host import hooks
from errata.locate.gradients import Pairs
from errata.training.deletion import Gradients, far_enough, newton, unchanging
from errata.training.tune import Losses
from errata.types import Corpus
from tests.models import TEXTS, fresh

REQUEST = errata.Request("{} was born in", "Ada Brenner", "unknown", target_old="Tallow")
SITE = fresh("llama").layout.site(1)


def rows(count: int, seed: int) -> list[dict[str, Pairs]]:
    draw = torch.Generator().manual_seed(seed)

    def one() -> Pairs:
        inputs, slopes = (torch.randn(3, d, generator=draw) for d in (SITE.d_in, SITE.d_out))
        return Pairs(inputs, slopes, False, torch.zeros(3, dtype=torch.long))

    return [{SITE.name: one()} for _ in range(count)]


def dense(row: dict[str, Pairs]) -> torch.Tensor:
    pairs = row[SITE.name]
    return sum(
        (torch.outer(g, h) for g, h in zip(pairs.gradients, pairs.inputs, strict=True)), torch.zeros(())
    )


def test_the_step_is_the_gradient_over_the_fisher_information():
    found = Gradients((SITE,), rows(2, 0), rows(3, 1))
    fisher = found.fisher(0.5)[SITE]
    squares = torch.stack([dense(row).square() for row in found.kept]).mean(0)
    assert torch.allclose(fisher, squares + 0.5 * squares.mean(), rtol=1e-5)
    expected = (dense(found.deleted[0]) + dense(found.deleted[1])) / fisher
    assert torch.allclose(newton(found, {SITE: fisher})[SITE], expected, rtol=1e-4, atol=1e-5)


def test_a_quadratic_loss_is_at_its_minimum_without_what_is_deleted():
    """Sum over z of h_z (w - m_z)^2 / 2, entry by entry, from its minimum to that without the first example."""
    points, weights = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([1.0, 2.0, 0.5])
    minimum = (weights * points).sum() / weights.sum()
    gradient, rest = weights[0] * (minimum - points[0]), weights[1:].sum()
    after = (weights[1:] * points[1:]).sum() / rest
    assert minimum + gradient / rest == pytest.approx(float(after))


def test_weights_of_kept_texts_leave_their_loss_where_it_is_to_first_order():
    found = Gradients((SITE,), rows(2, 0), rows(5, 1))
    fisher = found.fisher(1.0)
    criterion = torch.stack([dense(row) for row in found.kept]).mean(0)
    plain, still = (float((step(found, fisher)[SITE] * criterion).sum()) for step in (newton, unchanging))
    assert abs(plain) > 1e-2 and abs(still) < 1e-4 * abs(plain)


def test_a_step_is_as_long_as_it_has_to_be():
    assert 3 <= far_enough(lambda t: t * t, 9.0, 0.1) <= 3 * (1 + 1 / 32)
    assert far_enough(lambda t: t, 1.0, 2.0) == pytest.approx(1.0, abs=2 / 64)
    assert far_enough(lambda t: -abs(t - 4), 1.0, 1.0) == 4.0, "never reached: the best of those tried"


def nll(host) -> float:
    with hooks.frozen(host.model), torch.no_grad():
        return float(Losses(host, [replace(REQUEST, target="Tallow")])([0]))


@pytest.mark.parametrize("name", ["laplace", "puma"])
def test_the_answer_costs_what_was_asked_for(name):
    host = fresh("llama")
    start = nll(host)
    more: dict[str, Any] = {
        "method": name,
        "retain_texts": 6,
        "corpus": Corpus("c", lambda: TEXTS),
        "layers": [1],
    }
    edit = errata.edit(host, REQUEST, forgotten=start + 0.1, **more)
    assert isinstance(edit, WeightEdit) and list(edit.deltas) == [SITE.parameter]
    with edit.on(host):
        assert start + 0.1 - 1e-4 <= nll(host) < start + 0.2
    facts = edit.provenance.notes
    assert facts["nll_before"] == pytest.approx(start, abs=1e-4) and facts["nll"] >= start + 0.1 - 1e-4
    there = errata.edit(host, REQUEST, forgotten=start - 1, **more)
    assert not any(bool(one.any()) for one in dict(there.parts()).values()), "it costs that much already"
    plain = errata.edit(host, REQUEST, forgotten=None, **more)
    assert plain.provenance.notes["length"] == 1.0
