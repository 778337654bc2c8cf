"""KEEL on float64 hosts: what a change costs, where it may go, and what a step does."""

from __future__ import annotations

import pytest
import torch

import errata
from errata.edits.records import Record
from errata.errors import ConfigError, EditError
from errata.host import hooks
from errata.linalg.lowrank import LowRank
from errata.linalg.solve import CostMatrix, key_basis, solve_with_history, square_factor, update
from errata.locate.contexts import Context
from errata.locate.keys import capture_from, subject_place
from errata.locate.own import OwnText, kept_keys, line_of, training_rows
from errata.locate.problems import value_problems
from errata.methods import _consolidate, _kernel, _method
from errata.training.low_rank import LowRankDescent
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


def test_more_steps_never_end_at_a_higher_loss(host):
    losses = []
    for steps in range(1, 9):
        edit = errata.edit(
            host, [ADA, BRUNO], **OPTIONS, steps=steps, stop_loss=0.0, layers=(0, 1, 2), rho=1e-3
        )
        losses.append(edit.provenance.notes["loss"])
        with edit.on(host):
            measured = [_loss(host, host.encode_answer(r.text, r.target)) for r in (ADA, BRUNO)]
        assert losses[-1] == pytest.approx(
            sum(measured) / 2, rel=1e-6
        )  # the loss that is noted is that of the edit
    assert losses == sorted(losses, reverse=True), losses


def _loss(host, answer) -> float:
    with torch.no_grad():
        logits = host.model(torch.tensor([answer.ids])).logits[0].log_softmax(-1)
    places = range(answer.start - 1, len(answer.ids) - 1)
    return -sum(float(logits[i, answer.ids[i + 1]]) for i in places) / len(places)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_at_the_start_is_named(loss):
    point = torch.zeros(2)
    with pytest.raises(ConfigError, match=r"loss is (nan|inf) before the first step; .* float32"):
        PolyakPath(None).step_([point], [torch.ones(2)], loss)
    path = PolyakPath(None)
    path.step_([point], [torch.ones(2)], 2.0)
    path.step_([point], [torch.ones(2)], loss)  # later on it is a step too long: again, a quarter as far
    torch.testing.assert_close(point, torch.full((2,), -0.25))


def test_earlier_keys_join_the_cost(cost):
    cost, matrix = cost
    keys, past = random(12, 3, seed=1), random(12, 20, seed=4)
    solved = solve_with_history(cost.solve(keys), past, cost.solve(past))
    joined = matrix + past @ past.mT
    torch.testing.assert_close(solved, torch.linalg.solve(joined, keys))
    small = square_factor(past)
    assert small.shape == (12, 12)
    torch.testing.assert_close(small @ small.mT, past @ past.mT)


ADA_ELSEWHERE = errata.Request("{} plays the", "Ada Brenner", "violin")


def test_keys_of_own_statements_join_the_cost_with_their_weights(host):
    """M = shrunken C + mu E_anchors[k k^T] + nu E_mates[k k^T], means over all positions from the subject on."""
    site = host.layout.site(1)
    own = OwnText(anchors=(ADA_ELSEWHERE,), mates=(BRUNO,))
    factor = kept_keys(host, [own], [site], anchors=0.3, mates=0.7)[0][site]
    expected = torch.zeros(site.d_in, site.d_in, dtype=torch.float64)
    for weight, statement in ((0.3, ADA_ELSEWHERE), (0.7, BRUNO)):
        row = host.encode_answer(statement.text, statement.target).ids[:-1]
        start = subject_place(host, statement).position
        keys = capture_from(host, [row], [start], [site])[site][0]
        expected += weight * keys.mT @ keys / len(keys)
    torch.testing.assert_close(factor @ factor.mT, expected)
    samples = random(site.d_in, 3 * site.d_in, seed=5)
    matrix = samples @ samples.mT / samples.shape[1]
    cost, keys = CostMatrix.of(matrix, ridge=0.1), random(site.d_in, 4, seed=6)
    shrunken = matrix + 0.1 * matrix.diagonal().mean() * torch.eye(site.d_in, dtype=torch.float64)
    basis = _kernel._basis(keys, cost, factor)
    torch.testing.assert_close(basis.mT @ (shrunken + expected) @ basis, torch.eye(4, dtype=torch.float64))


def test_each_request_brings_as_much_of_its_own_as_it_would_alone(host):
    site, own = host.layout.site(1), OwnText(anchors=(ADA_ELSEWHERE,))
    alone = kept_keys(host, [own], [site], anchors=1.0, mates=0.0)[0][site]
    factors, owners = kept_keys(host, [own, OwnText(anchors=(BRUNO,))], [site], anchors=1.0, mates=0.0)
    both = factors[site]
    assert owners == [0] * alone.shape[1] + [1] * (both.shape[1] - alone.shape[1])
    torch.testing.assert_close(both[:, : alone.shape[1]], alone)
    assert both.shape[1] > alone.shape[1]
    assert kept_keys(host, [own], [site], anchors=0.0, mates=1.0) == ({}, [])


def test_at_the_subjects_last_token_alone_other_statements_about_it_cannot_be_kept(host, cost):
    """Their keys are equal there, whatever the relation: what changes one output changes the other as much."""
    place, other = (subject_place(host, one) for one in (ADA, ADA_ELSEWHERE))
    assert place.ids == other.ids
    cost, _ = cost
    key, residual = random(12, 1, seed=1), random(7, 1, seed=2)
    for weight in (1.0, 1e6):
        # the anchor's key is the edit's: no weight on it takes the change away from the anchor alone
        kept = key * weight**0.5
        basis = _kernel._basis(key, cost, kept)
        change = (residual / (basis.mT @ key)) @ basis.mT
        torch.testing.assert_close(change @ key, residual)
    # at a later position keys differ, and the anchor's output stays the better the more it weighs
    later, anchor = random(12, 1, seed=3), random(12, 1, seed=4)
    moved = []
    for weight in (0.0, 1.0, 1e6):
        keys = torch.cat([key, later], 1)
        kept = torch.cat([key, anchor], 1) * weight**0.5
        basis = _kernel._basis(keys, cost, kept)
        gram = basis.mT @ later
        change = residual @ (gram / gram.square().sum()).mT @ basis.mT  # the cheapest with that output there
        torch.testing.assert_close(change @ later, residual)
        moved.append(float((change @ torch.cat([key, anchor], 1)).norm()))
    assert moved[0] > moved[1] > 1e3 * moved[2]


def test_own_paraphrases_weigh_half_and_the_weights_sum_to_one(host):
    (problem,) = value_problems(host, [ADA], [Context("", 1.0)], merge=False)
    assert training_rows(host, problem.rows, OwnText()) == problem.rows
    own = OwnText(paraphrases=(errata.Request("{} comes from", "Ada Brenner", "Merrin"),))
    weights = [row.loss_weight for row in training_rows(host, problem.rows, own)]
    assert weights == pytest.approx([2 / 3, 1 / 3])


def test_without_data_of_its_own_the_method_is_the_core_form_and_makes_no_tables(host, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("tables were made")

    monkeypatch.setattr(_method, "own_tables", refuse)
    core = errata.edit(host, [ADA, BRUNO], steps=3, **OPTIONS)
    rows = {"anchor_rows": 3, "mate_rows": 5}
    same = errata.edit(host, [ADA, BRUNO], steps=3, paraphrases=0, anchors=0.0, mates=0.0, **rows, **OPTIONS)
    for name, delta in core.deltas.items():
        assert torch.equal(delta.A, same.deltas[name].A) and torch.equal(delta.B, same.deltas[name].B)
    with pytest.raises(AssertionError, match="tables"):
        errata.edit(host, ADA, anchors=0.1, **OPTIONS)


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


def _descent(host, requests=(ADA, BRUNO), layers=(0, 1, 2)):
    (sites, problems) = (
        [host.layout.site(i) for i in layers],
        value_problems(host, requests, [Context("", 1.0)], merge=False),
    )
    rows = [row for one in problems for row in one.rows]
    return rows, LowRankDescent(host, [line_of(row) for row in rows], [1.0] * len(rows), [0, 1], sites)


def test_the_first_pass_gives_keys_and_the_gradients_at_zero(host):
    """dL/dY at Y = 0 is the weight's gradient times A, so the pass that reads the keys is a step's pass as well."""
    with hooks.frozen(host.model):
        rows, descent = _descent(host)
        first = descent.first_pass()
        bases = {site: random(site.d_in, 3, seed=i) for i, site in enumerate(descent.sites)}
        factors = {s: (torch.zeros(s.d_out, 3, dtype=a.dtype).requires_grad_(), a) for s, a in bases.items()}
        losses, gradients = descent._gradients(factors, stop_loss=0.0)
    torch.testing.assert_close(first.losses, losses)
    for site, gradient in zip(descent.sites, gradients, strict=True):
        torch.testing.assert_close(first.gradients[site] @ bases[site], gradient)
    keys = capture_from(host, [row.ids for row in rows], [0] * len(rows), descent.sites)
    for site, read in first.inputs.items():
        for one, other in zip(read, keys[site], strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("batch_size", [None, 1])
def test_the_pass_that_finds_all_losses_low_is_not_differentiated(host, monkeypatch, batch_size):
    """k steps take k + 1 passes forward and k back, for rows run together or one by one."""
    with hooks.frozen(host.model):
        _, descent = _descent(host)
        descent.batch_size = batch_size or descent.batch_size
        first = descent.first_pass()
        bases = {
            site: key_basis(keys, keys)
            for site, keys in ((s, torch.cat(read).mT) for s, read in first.inputs.items())
        }
        counts = {"forward": 0, "backward": 0}
        measure, differentiate = descent.measure, torch.autograd.grad

        def forward(indices):
            counts["forward"] += len(indices)
            return measure(indices)

        def backward(*args, **kwargs):
            counts["backward"] += 1
            return differentiate(*args, **kwargs)

        descent.measure = forward
        forward.lines = measure.lines
        monkeypatch.setattr(torch.autograd, "grad", backward)
        bound = float(first.losses.max()) - 0.3
        fitted = descent.run(first, bases, steps=60, stop_loss=bound, step_limit=0.5)
    assert 1 < fitted.steps < 60 and float(fitted.losses.max()) < bound
    steps, parts = fitted.steps, 1 if batch_size is None else 2
    if parts == 1:
        assert counts == {"forward": 2 * steps, "backward": steps - 1}  # the first pass was both, before
    else:
        assert counts["backward"] == 2 * (steps - 1)
        assert (
            2 * steps <= counts["forward"] <= 2 * steps + steps - 1
        )  # a row that is low waits for the other


def test_requests_that_are_not_fitted_jointly_are_a_sequence(host):
    options = {**OPTIONS, "steps": 4, "rho": 1e-3}
    one = errata.edit(host, ADA, **options)
    sequence = errata.edit(host, BRUNO, after=one, **options)
    together = errata.edit(host, [ADA, BRUNO], **options, joint=1)
    assert together.provenance.requests == (ADA, BRUNO) and together.provenance.parents == ()
    for name, delta in sequence.deltas.items():
        assert torch.equal(delta.B, together.deltas[name].B) and torch.equal(delta.A, together.deltas[name].A)
        assert torch.equal(sequence.records[name].keys, together.records[name].keys)
        assert together.records[name].requests == sequence.records[name].requests
    notes = [one.provenance.notes, sequence.provenance.notes]
    assert together.provenance.notes["worst"] == max(note["worst"] for note in notes)
    assert together.provenance.notes["fits"] == 2
    whole = errata.edit(host, [ADA, BRUNO], **options, joint=2)
    assert "fits" not in whole.provenance.notes
    later = errata.edit(host, [BRUNO, ADA_ELSEWHERE], after=one, **options, joint=1)
    assert later.provenance.parents == (one.digest,) and len(later.provenance.requests) == 3
    assert not host.placed


# --- records --------------------------------------------------------------------------------


def test_records_hold_what_the_edit_does_at_its_keys_and_solve_for_it_again(host):
    edit = errata.edit(host, [ADA, BRUNO], **OPTIONS, rho=1e-3, gamma=1e-9)
    refitted = errata.refit(edit)
    for name, record in edit.records.items():
        torch.testing.assert_close(edit.deltas[name] @ record.keys, record.target_changes)
        torch.testing.assert_close(
            refitted.deltas[name].dense(), edit.deltas[name].dense(), rtol=1e-3, atol=1e-6
        )
        assert {i for group in record.requests for i in group} == {0, 1}


def test_retracting_a_request_keeps_the_outputs_at_the_others_keys(host):
    edit = errata.edit(host, [ADA, BRUNO], **OPTIONS, rho=1e-3, gamma=1e-9)
    rest = errata.retract(edit, 0)
    assert rest.provenance.requests == (BRUNO,)
    for name, delta in rest.deltas.items():
        record = edit.records[name].select([1])
        torch.testing.assert_close(delta @ record.keys, record.target_changes, rtol=1e-4, atol=1e-7)
        assert torch.equal(delta.A, record.delta().A)  # of the other request's keys nothing is left


def test_without_records_nothing_is_retracted(host):
    edit = errata.edit(host, [ADA, BRUNO], **OPTIONS, steps=2, records=False)
    assert not edit.records
    with pytest.raises(EditError, match="has no records"):
        errata.retract(edit, 0)
    later = errata.edit(host, ADA_ELSEWHERE, after=edit, **OPTIONS, steps=2)
    with pytest.raises(EditError, match="some of its requests only"):
        errata.retract(later, 0)
    with pytest.raises(ConfigError, match="consolidate needs the records of 2 earlier requests"):
        errata.edit(host, ADA_ELSEWHERE, after=edit, **OPTIONS, steps=2, consolidate=1)
    with pytest.raises(ConfigError, match="records=true"):
        errata.edit(host, ADA, **OPTIONS, consolidate=1, records=False)


def test_a_consolidated_sequence_solves_for_all_its_records(host):
    options = {**OPTIONS, "steps": 6, "rho": 1e-3, "gamma": 1e-6}
    edit = errata.edit(host, ADA, **options, consolidate=2)
    edit = errata.edit(host, BRUNO, after=edit, **options, consolidate=2)
    for name, record in edit.records.items():
        delta = edit.deltas[name]
        dense = delta.dense() if isinstance(delta, LowRank) else delta
        torch.testing.assert_close(dense, record.delta().dense(), rtol=1e-3, atol=1e-6)


def test_many_keys_are_solved_for_in_the_coordinates_of_their_entries(cost):
    cost, _ = cost
    keys, outputs = random(12, 40, seed=1), random(7, 40, seed=2)
    record = Record(keys, outputs, cost.solve(keys), 0.3, cost.label, ((0,),) * 40)
    solution = _consolidate.solve_all(record, cost)
    assert isinstance(solution, torch.Tensor)
    terms = random(12, 3, seed=3)
    with_terms = record.join(record.as_terms(terms, cost.solve(terms), ((0,),) * 3))
    other = _consolidate.solve_all(with_terms, cost)
    assert isinstance(other, torch.Tensor) and not torch.allclose(other, solution)
    torch.testing.assert_close(other, with_terms.delta().dense().double(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(solution, record.delta().dense(), rtol=1e-5, atol=1e-6)


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


def test_a_change_of_high_rank_is_descended_in_the_weight_as_it_is_beside_it(monkeypatch):
    """At a rank above d_in d_out / (d_in + d_out) gradients come from the weight; they are the same."""
    from errata.training.low_rank import LowRankDescent

    names = ("Ada Brenner", "Bruno Holner", "Carla Dorn", "Ivo Marn", "Lena Ost")
    requests = [errata.Request("{} was born in the town of", name, "Merrin") for name in names]
    edits = []
    for family in ("llama", "gpt2"):
        for merged in (True, False):
            host, seen = fresh(family), []
            own = LowRankDescent._merged

            def watched(self, factors, seen=seen, merged=merged, own=own):
                found = own(self, factors) if merged else {}
                seen.append(len(found))
                return found

            with monkeypatch.context() as patch:
                patch.setattr(LowRankDescent, "_merged", watched)
                edits.append((host, errata.edit(host, requests, method="keel", tokens=400, energy=1.0)))
            assert (max(seen) > 0) is merged
    for (_, one), (_, other) in (edits[:2], edits[2:]):
        for name in one.deltas:
            apart = one.deltas[name].dense() - other.deltas[name].dense()
            assert apart.norm() <= 1e-4 * other.deltas[name].dense().norm(), name
