"""The guard: what is out of bounds fails, whatever else is right."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from errata.ledger.guard import (
    Guard,
    Measurement,
    _divergence,
    draw_statements,
    judge,
    largest_norm,
    spread_over,
)
from errata.ledger.settings import LEAST, MOST, Bounds, GuardSettings
from errata.linalg.lowrank import LowRank
from errata.types import Corpus, Request
from tests.models import fresh
from tests.units.ledger.small import random_edit

GOOD = Measurement(1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0)


def test_what_is_within_bounds_passes():
    assert judge(GOOD, Bounds()).passed
    assert judge(Measurement(), Bounds()).passed  # nothing was there to be asked


@pytest.mark.parametrize("name", [*LEAST, *MOST])
@pytest.mark.parametrize("value", [math.nan, None])
def test_each_bound_fails_alone(name, value):
    bad = value if value is not None else (-0.01 if name in LEAST else 1e9)
    verdict = judge(replace(GOOD, **{name: bad}), Bounds())
    assert len(verdict.failures) == 1 and verdict.failures[0].startswith((LEAST | MOST)[name])


def test_numbers_that_are_not_finite_fail():
    assert not judge(replace(GOOD, finite=False), Bounds()).passed


@given(st.floats(0, 1), st.floats(0, 1))
def test_a_share_at_its_bound_passes_and_one_below_fails(value, bound):
    assert judge(Measurement(answered=value), Bounds(answered=bound)).passed == (value >= bound)


def test_divergence_is_that_of_torch():
    draw = torch.Generator().manual_seed(0)
    p, q = (torch.randn(5, 11, generator=draw).log_softmax(-1) for _ in range(2))
    expected = torch.nn.functional.kl_div(q.double(), p.double(), reduction="batchmean", log_target=True)
    assert _divergence(p, q) == pytest.approx(float(expected))
    assert _divergence(p, p) == 0
    assert _divergence(p[:0], q[:0]) is None


def test_subjects_are_spread_over_a_long_batch():
    requests = [Request("{} lives in", f"name {i}", "Rome") for i in range(100)]
    assert [r.subject for r in spread_over(requests, 4)] == ["name 0", "name 25", "name 50", "name 75"]
    assert spread_over(requests[:3], 4) == requests[:3]
    assert len(spread_over([*requests[:1]] * 9, 4)) == 1


def test_norms_of_several_edits_add_as_their_changes_do():
    host = fresh("llama")
    one, two = random_edit(host, 1), random_edit(host, 2)
    ratios = []
    for name in one.deltas:
        weight = host.model.get_parameter(name).detach()
        total = one.deltas[name].dense() + two.deltas[name].dense()
        ratios.append(float(total.norm() / weight.norm()))
    assert largest_norm(host, [one, two]) == pytest.approx(max(ratios), rel=1e-5)
    with one.on(host), two.on(host):  # the weight's own norm is that without edits
        assert largest_norm(host, [one, two]) == pytest.approx(max(ratios), rel=1e-5)
    assert largest_norm(host, []) is None


@pytest.fixture(scope="module")
def guarded():
    host = fresh("llama")
    words = ("old", "new", "red", "big")
    texts = tuple(f"the {word} house stood near the river for {i} years" for i, word in enumerate(words))
    host.resources = replace(
        host.resources, corpus=Corpus("some", lambda: texts), neutral_texts=lambda n: texts[:n]
    )
    return Guard.of(host, GuardSettings(canaries=("the river is",), prompts=4, statements=0))


def test_an_edit_that_changes_nothing_moves_nothing(guarded):
    host = guarded.host
    request = Request("{} lives in", "Ada", "Rome")
    edit = random_edit(host, 1)
    nothing = replace(edit, deltas={n: LowRank(d.B * 0, d.A) for n, d in edit.deltas.items()})
    before = guarded.before([request], [])
    with nothing.on(host):
        measured = guarded.measure(before, nothing, [])
    assert measured.divergence == 0 and measured.perplexity == 1 and measured.total_perplexity == 1
    assert measured.canaries == 1 and measured.norm == 0 and measured.finite


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_edit_that_is_not_finite_fails_without_being_run(guarded, value):
    host = guarded.host
    edit = random_edit(host, 1)
    broken = replace(edit, deltas={n: LowRank(d.B * value, d.A) for n, d in edit.deltas.items()})
    verdict = judge(
        guarded.measure(guarded.before([Request("{} lives in", "Ada", "Rome")], []), broken, []), Bounds()
    )
    assert verdict.failures == ("numbers of the edit or of the edited model are not finite",)


def test_a_collapse_is_out_of_bounds(guarded):
    host = guarded.host
    edit = random_edit(host, 3)
    large = replace(edit, deltas={n: LowRank(d.B * 3e3, d.A) for n, d in edit.deltas.items()})
    before = guarded.before([Request("{} lives in", "Ada", "Rome")], [])
    with large.on(host):
        verdict = judge(guarded.measure(before, large, []), replace(Bounds(), answered=0.0))
    broken = {failure.split(":")[0] for failure in verdict.failures}
    assert {LEAST["canaries"], MOST["norm"]} <= broken


def test_what_is_in_place_is_measured_once(guarded, monkeypatch):
    """An attempt that fails leaves the next one what was measured before it; one that is applied, what came after."""
    guard = replace(guarded, _recent={})
    host, request, runs = guard.host, Request("{} lives in", "Ada", "Rome"), []
    ask = Guard._ask
    monkeypatch.setattr(
        Guard, "_ask", lambda self, canaries: runs.append(self.host.placed) or ask(self, canaries)
    )
    one, two = random_edit(host, 1, scale=0.5), random_edit(host, 2, scale=0.5)
    before = guard.before([request], [])
    with one.on(host):
        guard.measure(before, one, [])
    again = guard.before([request], [])
    assert runs == [(), (one.digest,)] and again.perplexity == before.perplexity
    with one.on(host):
        after = guard.before([request], [])
        assert len(runs) == 2 and after.perplexity != before.perplexity
        with two.on(host):
            measured = guard.measure(after, two, [one])
        fresh_guard = replace(guard, _recent={})
        anew = fresh_guard.before([request], [])
        assert torch.equal(anew.spread, after.spread) and anew.canary_answers == after.canary_answers
        assert anew.perplexity == after.perplexity
        with two.on(host):
            assert fresh_guard.measure(anew, two, [one]) == measured
    assert runs[2:] == [tuple(sorted((one.digest, two.digest))), (one.digest,), *runs[2:3]]
    assert len(guard._recent) == 3


def test_canaries_are_not_about_what_is_edited(guarded):
    guard = replace(guarded, canaries=("the river is", "Ada lives in", "Bob lives in"))
    assert guard.canaries_beside({"Ada"}) == ("the river is", "Bob lives in")
    assert guard.canaries_beside({"river"}) == guard.canaries  # those of the settings whatever they are about


def test_drawn_statements_are_always_the_same(lab_host):
    from errata.job import workspace

    tables = workspace(lab_host, seed=0).tables(lab_host)
    first = draw_statements(tables, 12)
    assert first == draw_statements(tables, 12) and len(set(first)) == 12
    assert all(any(name in prompt for table in tables.types for name in table.names) for prompt in first)
