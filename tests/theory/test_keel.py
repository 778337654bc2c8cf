"""KEEL on float64 hosts: what a change costs, where it may go, and what a step does."""

from __future__ import annotations

import pytest
import torch

import errata
from errata.errors import ConfigError
from errata.linalg.lowrank import LowRank
from errata.linalg.solve import CostMatrix, conditioned, key_basis, square_factor, update
from errata.locate.keys import capture_from
from errata.training.polyak import PolyakPath
from tests.models import fresh

ADA = errata.Request("{} was born in", "Ada Brenner", "Merrin")
BRUNO = errata.Request("{} lives in the town of", "Bruno Holner", "Tallow")
OPTIONS = {"method": "keel", "tokens": 400, "energy": 1.0}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def cost() -> tuple[CostMatrix, torch.Tensor]:
    samples = random(12, 40)
    matrix = samples @ samples.mT / 40
    shrunken = matrix + 0.1 * matrix.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    return CostMatrix.of(matrix, ridge=0.1), shrunken


@pytest.fixture()
def host():
    made = fresh("llama")
    made.model.double()
    return made


def test_the_square_of_y_is_what_the_change_costs(cost):
    cost, matrix = cost
    keys, outer = random(12, 5, seed=1), random(7, 5, seed=2)
    basis = key_basis(keys, cost.solve(keys))
    torch.testing.assert_close(basis.mT @ matrix @ basis, torch.eye(5, dtype=torch.float64))
    change = outer @ basis.mT
    assert torch.trace(change @ matrix @ change.mT) == pytest.approx(float(outer.square().sum()))


def test_equal_keys_count_once(cost):
    cost, _ = cost
    keys = random(12, 3, seed=1)
    double = torch.cat([keys, keys[:, :2]], 1)
    assert key_basis(double, cost.solve(double)).shape == (12, 3)
    with pytest.raises(ValueError, match="zero"):
        key_basis(torch.zeros(12, 2), torch.zeros(12, 2))


def test_nothing_changes_at_inputs_that_the_metric_keeps_apart_from_all_keys(cost):
    """The span argument: k^T M^-1 U = 0 means that no Y moves the output at k."""
    cost, _ = cost
    keys = random(12, 4, seed=1)
    solved = cost.solve(keys)
    basis = key_basis(keys, solved)
    other = random(12, seed=3)
    other -= solved @ torch.linalg.lstsq(solved, other).solution
    assert float((basis.mT @ other).norm()) < 1e-10 < float(other.norm())


def test_one_key_and_one_layer_give_the_direction_of_rome(cost):
    cost, _ = cost
    key, residual = random(12, 1, seed=1), random(7, 1, seed=2)
    rome = update(key, residual, cost, gamma=0.0).dense()
    basis = key_basis(key, cost.solve(key))
    change = (residual / (basis.mT @ key)) @ basis.mT  # the Y that gives the same output at the key
    torch.testing.assert_close(change, rome)


def test_with_the_identity_a_step_is_the_gradient_step_of_fine_tuning_on_the_keys_span():
    """Y A^T with A orthonormal: the gradient for Y, mapped back, is the weight's gradient projected."""
    keys, gradients = random(12, 5, seed=1), random(7, 5, seed=2)
    basis = key_basis(keys, CostMatrix.identity().solve(keys))
    weight_gradient = gradients @ keys.mT
    torch.testing.assert_close((gradients @ (basis.mT @ keys).mT) @ basis.mT, weight_gradient)


def test_a_step_lowers_a_linear_loss_to_zero():
    y = random(3, 4, seed=1).requires_grad_()
    direction = random(3, 4, seed=2)
    loss = (direction * y).sum() + 2.0
    (gradient,) = torch.autograd.grad(loss, [y])
    start, loss = y.detach().clone(), float(loss.detach().abs())
    direction = direction * torch.sign((direction * start).sum() + 2.0)
    path = PolyakPath(None)
    path.step_([y], [direction], loss)
    assert float((direction * (y.detach() - start)).sum()) == pytest.approx(-loss)
    whole = float((y.detach() - start).norm())
    path.step_([y], [gradient], loss + 1.0)  # the loss rose: again from the start, a quarter as far
    torch.testing.assert_close(start - y.detach(), whole / 4 * direction / direction.norm())
    y.data.copy_(start)
    PolyakPath(0.5).step_([y], [direction], 100.0)
    assert float((y.detach() - start).norm()) == pytest.approx(0.5)


def test_earlier_keys_join_the_cost(cost):
    cost, matrix = cost
    keys, past = random(12, 3, seed=1), random(12, 20, seed=4)
    solved = conditioned(cost.solve(keys), past, cost.solve(past))
    joined = matrix + past @ past.mT
    torch.testing.assert_close(solved, torch.linalg.solve(joined, keys))
    small = square_factor(past)
    assert small.shape == (12, 12)
    torch.testing.assert_close(small @ small.mT, past @ past.mT)


def test_cutting_keeps_the_energy_it_says(cost):
    cost, matrix = cost
    keys = random(12, 6, seed=1)
    basis = key_basis(keys, cost.solve(keys))
    scales = torch.tensor([10.0, 3.0, 1.0, 0.1, 0.1, 0.01], dtype=torch.float64)
    whole = LowRank(random(7, 6, seed=2) * scales, basis.mT)
    part = whole.cut(0.99)
    assert part.rank < whole.cut(1.0).rank
    lost = part.dense() - whole.dense()
    energy = torch.trace(whole.dense() @ matrix @ whole.dense().mT)
    assert float(torch.trace(lost @ matrix @ lost.mT) / energy) < 0.01
    torch.testing.assert_close(whole.cut(1.0).dense(), whole.dense())


def test_keys_are_read_from_the_subject_to_the_last_predicting_token(host):
    site = host.layout.site(1)
    answer = host.encode_answer(ADA.text, ADA.target)
    rows = [answer.ids[:-1], host.encode_answer(BRUNO.text, BRUNO.target).ids[:-1]]
    seen = []
    from errata.host import hooks

    with torch.no_grad(), hooks.on_input(host.model.get_submodule(site.name), seen.append):
        host.forward(host.batch([rows[0]]))
    found = capture_from(host, rows, [3, 2], [site])[site]
    torch.testing.assert_close(found[0], seen[0][0, 3:])
    assert [len(keys) for keys in found] == [len(rows[0]) - 3, len(rows[1]) - 2]


def test_the_edit_in_place_has_the_loss_it_was_fitted_to(host):
    """What is searched is what is applied: the change acts at every token, in all layers at once."""
    edit = errata.edit(host, [ADA, BRUNO], steps=12, **OPTIONS)
    losses = []
    with edit.on(host), torch.no_grad():
        for request in (ADA, BRUNO):
            answer = host.encode_answer(request.text, request.target)
            logits = host.forward(host.batch([answer.ids]))[0, answer.start - 1 : -1]
            target = torch.tensor(answer.target)
            losses.append(float(torch.nn.functional.cross_entropy(logits, target)))
    assert max(losses) == pytest.approx(edit.provenance.notes["worst"], abs=2e-5)


def test_a_long_sequence_keeps_its_history_bounded(host):
    edit, width = None, host.layout.site(0).d_in
    for i in range(8):
        request = errata.Request("{} was born in the old town of", f"Ada Brenner the {i}th of Arvania", "Esk")
        edit = errata.edit(host, request, after=edit, layers=[0], steps=3, **OPTIONS)
    (history,) = edit.state.values()
    assert history.shape == (width, width)


def test_on_the_lab_a_fact_is_changed_in_a_few_steps_and_the_rest_of_its_subject_is_kept():
    host = errata.load("lab")
    cases = errata.lab.cases(4, seed=3)
    edit = errata.edit(host, cases[0].request, method="keel", tokens=20_000)
    assert edit.provenance.notes["worst"] < 0.04 and edit.provenance.notes["steps"] <= 10
    summary = errata.evaluate(host, cases, method="keel", tokens=20_000).summary
    assert summary["efficacy.generate"]["after"] == 1.0
    assert summary["same_subject.generate"]["after"] >= 0.9


def test_settings_are_checked(host):
    with pytest.raises(ConfigError, match="energy"):
        errata.edit(host, ADA, method="keel", energy=1.5)
    with pytest.raises(ConfigError, match="history"):
        errata.edit(host, ADA, method="keel", history=-1.0)
