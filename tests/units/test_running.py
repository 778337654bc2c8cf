"""Running means and variances against the batch formulas, in any portions."""

from __future__ import annotations

import pytest
import torch

from errata.linalg.running import Running

WIDTH = 9


def data(count: int = 60, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-6, 3, WIDTH, dtype=torch.float64)
    return 5.0 + scale * torch.randn(count, WIDTH, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("portions", [[60], [1] * 60, [7, 20, 1, 32], [1, 0, 59], [59, 1]])
def test_any_portions_give_the_batch_formula(portions):
    rows = data()
    running = Running.empty(WIDTH)
    for part in rows.split(portions):
        running.update_(part)
    assert running.count == 60
    torch.testing.assert_close(running.mean, rows.mean(0), atol=0, rtol=1e-12)
    # entries of 5 with deviations of 1e-6 keep ten of their sixteen digits
    torch.testing.assert_close(running.variance[2:], rows.var(0)[2:], atol=0, rtol=1e-9)
    centred = rows - 5.0
    running = Running.empty(WIDTH)
    for part in centred.split(portions):
        running.update_(part)
    torch.testing.assert_close(running.variance, centred.var(0), atol=0, rtol=1e-12)


@pytest.mark.parametrize("cuts", [(10, 25), (1, 2), (30, 59)])
def test_merging_is_associative(cuts):
    one, two, three = data().tensor_split(cuts)
    left, right = Running.of(one), Running.of(two)
    left.merge_(Running.of(two))
    left.merge_(Running.of(three))
    right.merge_(Running.of(three))
    whole = Running.of(one)
    whole.merge_(right)
    assert whole.count == left.count == 60
    torch.testing.assert_close(whole.mean, left.mean, atol=0, rtol=1e-13)
    torch.testing.assert_close(whole.spread, left.spread, atol=0, rtol=1e-9)


def test_a_portion_of_one_vector_weighs_as_one():
    """No NaN from a variance of one, and B - 1 degrees of freedom for each portion, not B."""
    rows = data(4)
    running = Running.of(rows[:3])
    running.update_(rows[3:])
    torch.testing.assert_close(running.variance[3:], rows.var(0)[3:], atol=0, rtol=1e-10)
    wrong = (3 * rows[:3].var(0) + 3 / 4 * (rows[3] - rows[:3].mean(0)).square()) / 3
    assert float((wrong / rows.var(0))[3:].min()) > 1.001


def test_normalised_vectors_have_mean_zero_and_variance_one():
    rows = data()
    made = Running.of(rows).normalise(rows)[:, 3:]
    torch.testing.assert_close(made.mean(0), torch.zeros(WIDTH - 3, dtype=torch.float64), atol=1e-10, rtol=0)
    torch.testing.assert_close(made.var(0), torch.ones(WIDTH - 3, dtype=torch.float64), atol=1e-3, rtol=0)
    free = Running.of(rows).normalise(rows, centre=False)
    torch.testing.assert_close(free.square().mean(0), torch.ones(WIDTH, dtype=torch.float64))


def test_constant_entries_normalise_to_zero():
    rows = data()
    rows[:, 0] = 0.1  # its mean over 60 is off by rounding
    rows[:, 1] = 0.0
    running = Running.empty(WIDTH)
    for part in rows.split(7):
        running.update_(part)
    for centre in (True, False):
        assert torch.isfinite(running.normalise(rows, centre=centre)).all()
    assert float(running.normalise(rows)[:, :2].abs().max()) < 1e-6


@pytest.mark.parametrize("unit", [1e-12, 1e9])
def test_the_unit_of_the_vectors_does_not_matter(unit):
    rows = data()
    for centre in (True, False):
        plain = Running.of(rows).normalise(rows, centre=centre)
        torch.testing.assert_close(Running.of(unit * rows).normalise(unit * rows, centre=centre), plain)


def test_one_vector_has_no_variance():
    for few in (Running.empty(WIDTH), Running.of(data(1))):
        with pytest.raises(ValueError, match="two are needed"):
            few.normalise(data(1))
    one = data(1)
    torch.testing.assert_close(Running.of(one).normalise(one, centre=False), one.sign())


def test_state_goes_through_tensors_unchanged():
    running = Running.of(data())
    back = Running.restore(running.tensors())
    assert back.count == 60
    assert torch.equal(back.mean, running.mean) and torch.equal(back.spread, running.spread)
    narrow = running.tensors(torch.float32)
    assert all(tensor.dtype == torch.float32 for tensor in narrow.values())
    again = Running.restore(narrow).tensors(torch.float32)
    assert all(torch.equal(again[part], narrow[part]) for part in Running.PARTS)


def test_widths_must_agree():
    with pytest.raises(ValueError, match="do not merge"):
        Running.empty(3).update_(data())
