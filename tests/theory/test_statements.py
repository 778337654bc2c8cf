"""The model's own statements beside requests: as terms of the closed forms' cost, as further rows of fine-tuning."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import errata
from errata.edits import WeightEdit
from errata.errors import ConfigError
from errata.job import workspace
from errata.linalg.lowrank import LowRank
from errata.linalg.solve import independent_columns
from errata.locate.keys import Place, capture, capture_from, subject_place
from errata.locate.own import OwnCounts, OwnText
from errata.methods import _method
from errata.methods._settings import StatementRows
from errata.methods._statements import consistent, own_statements
from errata.training.tune import Companions, Losses, Stop, descend
from tests.models import fresh

FAST = {"steps": 4, "tokens": 2000}
BARE = {
    "memit": {"contexts": 0},
    "alphaedit": {"contexts": 0},
    "rome": {"contexts": (), "context_tokens": ()},
}
"""One key for each request, that of the bare prompt."""
ADA = errata.Request("{} was born in", "Ada Brenner", "Merrin", id="ada")
BRUNO = errata.Request("{} lives in", "Bruno Holner", "Tallow", id="bruno")
OWN = {
    ADA: OwnText(
        anchors=(
            errata.Request("{} plays the", "Ada Brenner", "cello"),
            errata.Request("{} lives in the town of", "Ada Brenner", "Esk"),
            errata.Request("{} and the small dog waited for", "Ada Brenner", "Bruno"),
        ),
        mates=(errata.Request("{} was born in", "Lena Ost", "Esk"),),
    ),
    BRUNO: OwnText(
        anchors=(errata.Request("{} plays the", "Bruno Holner", "harp"),),
        mates=(
            errata.Request("{} lives in", "Lena Ost", "Merrin"),
            errata.Request("{} lives in", "Pia Holt", "Esk"),
        ),
    ),
}
CLOSED = ["rome", "memit", "alphaedit"]
TRAINED = ["ft", "lora"]


@pytest.fixture()
def host():
    made = fresh("llama")
    made.model.double()
    return made


@pytest.fixture()
def own(monkeypatch):
    """Statements that need no tables."""

    def texts(self, host, requests, counts):
        return [OWN[request] for request in requests]

    monkeypatch.setattr(_method.Workspace, "own_texts", texts)


def fit(host, requests, method, **options):
    options = {**FAST, **BARE.get(method, {}), **options}
    if method in TRAINED:
        options.pop("tokens")
    return errata.edit(host, requests, method=method, **options)


def dense(edit, site) -> torch.Tensor:
    assert isinstance(edit, WeightEdit)
    delta = edit.deltas[site.parameter]
    return (delta.dense() if isinstance(delta, LowRank) else delta).double()


def relative(one, other) -> float:
    return float((one - other).norm() / other.norm())


def keys_of(host, statements, site) -> torch.Tensor:
    """Keys of all positions from the subject's last token to the last that predicts, one a row."""
    rows = [host.encode_answer(one.text, one.target).ids[:-1] for one in statements]
    starts = [subject_place(host, one).position for one in statements]
    return torch.cat(capture_from(host, rows, starts, [site])[site]).double()


def terms(host, request, site, anchors: float, mates: float) -> torch.Tensor:
    """anchors E[k k^T] + mates E[k k^T] of a request."""
    total = torch.zeros(site.d_in, site.d_in, dtype=torch.float64)
    for weight, statements in ((anchors, OWN[request].anchors), (mates, OWN[request].mates)):
        keys = keys_of(host, statements, site)
        total += weight * keys.mT @ keys / len(keys)
    return total


def moment(host, site, **options: float) -> torch.Tensor:
    factor = workspace(host, seed=0).costs(host, [site], FAST["tokens"], **options)[site].factor
    return factor @ factor.mT


# --- the subject's last token ---------------------------------------------------------------


@pytest.mark.parametrize("method", CLOSED)
def test_at_the_subjects_last_token_an_anchor_changes_as_the_request_does(host, own, method):
    """Its key is the edited key, so no cost, null space or weight can tell the two apart."""
    site = host.layout.site(1)
    places = [subject_place(host, one) for one in (ADA, *OWN[ADA].anchors)]
    whole = [Place(host.encode_answer(one.text, one.target).ids) for one in (ADA, *OWN[ADA].anchors)]
    assert len({place.ids for place in whole}) == 4 and len({place.ids for place in places}) == 1
    sites = [host.layout.site(layer) for layer in range(len(host.layout.blocks))]
    for keys in capture(host, places, sites).keys.values():
        assert all(torch.equal(key, keys[0]) for key in keys[1:])
    keys = capture(host, places, [site]).keys[site].double()
    for weight in (0.0, 1.0, 1e3):
        options = {"energy": 0.9} if method == "alphaedit" else {}
        edit = fit(host, ADA, method, layers=[1], anchors=weight, **options)
        key = edit.records[site.parameter].keys[:, 0]
        torch.testing.assert_close(key.double(), keys[0])
        response = dense(edit, site) @ keys.mT
        assert float(response[:, 0].norm()) > 0
        for i in range(1, 4):
            assert torch.equal(response[:, i], response[:, 0])


def test_later_keys_of_anchors_change_the_less_the_more_they_weigh(host, own):
    site, place = host.layout.site(1), subject_place(host, ADA)
    later = torch.cat([keys_of(host, [one], site)[1:] for one in OWN[ADA].anchors])
    key = capture(host, [place], [site]).keys[site][0].double()
    moved, target = [], []
    for weight in (0.0, 0.1, 1.0, 10.0, 1e3):
        change = dense(fit(host, ADA, "rome", layers=[1], anchors=weight), site)
        moved.append(float((change @ later.mT).norm()))
        target.append(change @ key)
    for other in target[1:]:
        torch.testing.assert_close(other, target[0])  # rome's value is exact at its key
    assert moved == sorted(moved, reverse=True) and moved[0] > 1.05 * moved[-1]
    shares = []
    for weight in (0.0, 1.0, 1e3):  # where the value is a compromise, relative to what is left of it
        change = dense(fit(host, ADA, "memit", layers=[1], anchors=weight), site)
        shares.append(float((change @ later.mT).norm() / (change @ key).norm()))
    assert shares == sorted(shares, reverse=True) and shares[0] > 1.05 * shares[-1]


# --- the formulas ---------------------------------------------------------------------------


def lower_part(edit, parameters):
    """The solutions of some layers alone."""
    return WeightEdit({name: edit.deltas[name] for name in parameters}, frozenset(), edit.provenance)


def test_memit_with_statements_is_the_dense_solution_layer_by_layer(host, own):
    """delta = R K^T (lambda (C + anchors E[k k^T] + mates E[k k^T]) + K K^T)^-1, keys with lower layers edited."""
    edit = fit(host, [ADA, BRUNO], "memit", layers=[0, 1], cov_weight=5.0, anchors=0.7, mates=0.4)
    plain = fit(host, [ADA, BRUNO], "memit", layers=[0, 1], cov_weight=5.0)
    below: list[str] = []
    for layer in (0, 1):
        site = host.layout.site(layer)
        record = edit.records[site.parameter]
        keys, residual = record.keys[:, :2], record.target_changes[:, :2]
        assert record.in_cost[:2] == (False, False) and all(record.in_cost[2:])
        matrix = moment(host, site)
        part = lower_part(edit, below) if below else None
        if part is not None:
            part.apply_(host)
        matrix = matrix + sum(terms(host, request, site, 0.7, 0.4) for request in (ADA, BRUNO))
        if part is not None:
            part.revert_(host)
        expected = torch.linalg.solve(5.0 * matrix + keys @ keys.mT, keys @ residual.mT).mT
        assert relative(dense(edit, site), expected) < 1e-9
        assert relative(dense(plain, site), expected) > 1e-3
        assert edit.deltas[site.parameter].rank == 2
        below.append(site.parameter)


def test_rome_with_statements_is_exact_at_its_key_at_the_least_cost_under_the_whole_matrix(host, own):
    site = host.layout.site(1)
    matrix = moment(host, site) + terms(host, ADA, site, 0.7, 0.4)
    for keys in ("mean", "mixed"):
        edit = fit(host, ADA, "rome", layers=[1], keys=keys, anchors=0.7, mates=0.4)
        key = capture(host, [subject_place(host, ADA)], [site]).keys[site][0].double()
        solved = torch.linalg.solve(matrix, key)
        value = dense(edit, site) @ key
        assert relative(dense(edit, site), value[:, None] * solved[None] / (solved @ key)) < 1e-9
    assert relative(dense(edit, site), dense(fit(host, ADA, "rome", layers=[1], keys="mixed"), site)) > 1e-3


def test_alphaedit_with_statements_keeps_to_its_null_space_and_adds_them_to_its_keys(host, own):
    site = host.layout.site(1)
    options = {"layers": [1], "energy": 0.9, "ridge": 3.0, "anchors": 0.7}
    first = fit(host, ADA, "alphaedit", **options)
    both = fit(host, BRUNO, "alphaedit", after=first, **options)
    eigen, _ = workspace(host, seed=0).spectra(host, [site], FAST["tokens"])[site]
    free = int((eigen.values.clamp_min(0).cumsum(0) <= 0.1 * eigen.values.clamp_min(0).sum()).sum())
    u = eigen.vectors[:, eigen.values < eigen.values[free]]
    record = both.records[site.parameter]
    targets = [i for i, term in enumerate(record.in_cost) if not term]
    past, key = (record.keys[:, [i]] for i in targets)
    matrix = 3.0 * torch.eye(u.shape[1]).double()
    known = past @ past.mT + terms(host, ADA, site, 0.7, 0.0)
    residual = record.target_changes[:, [targets[1]]] - dense(first, site) @ key
    known = known + terms(host, BRUNO, site, 0.7, 0.0) + key @ key.mT
    step = (u @ torch.linalg.solve(matrix + u.mT @ known @ u, u.mT @ key @ residual.mT)).mT
    assert relative(dense(both, site) - dense(first, site), step) < 1e-8


# --- records --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["memit", "alphaedit"])
def test_retracting_a_request_takes_its_statements_along(host, own, method, tmp_path):
    site = host.layout.site(1)
    options = {"layers": [1], "anchors": 0.7, "mates": 0.4, "clamp": 1.0}
    if method == "alphaedit":
        options["energy"] = 0.9
    both = fit(host, [ADA, BRUNO], method, **options)
    alone = fit(host, BRUNO, method, **options)
    left = errata.retract(both, "ada")
    assert relative(dense(left, site), dense(alone, site)) < 1e-8
    assert left.records[site.parameter].in_cost == alone.records[site.parameter].in_cost
    assert relative(dense(errata.refit(both), site), dense(both, site)) < 1e-8
    stored = errata.Edit.load(both.save(tmp_path / "both.safetensors"))
    assert torch.equal(dense(errata.retract(stored, "ada"), site), dense(left, site))
    assert all(0 < share <= 1 for share in errata.leverages(both))
    joined = errata.refit([fit(host, ADA, method, **options), alone])
    assert relative(dense(joined, site), dense(both, site)) < 1e-8


def test_a_sequence_of_rome_with_statements_joins_and_leaves_exactly(host, own):
    """Both values exactly, at the least cost under C and all statements; without one, the other as if alone."""
    site = host.layout.site(1)
    first = fit(host, ADA, "rome", layers=[1], anchors=0.7)
    both = fit(host, BRUNO, "rome", layers=[1], anchors=0.7, after=first)
    record = both.records[site.parameter]
    targets = torch.tensor([not term for term in record.in_cost])
    keys, changes = record.keys[:, targets].double(), record.target_changes[:, targets].double()
    own_terms = [terms(host, request, site, 0.7, 0.0) for request in (ADA, BRUNO)]

    def least(chosen: list[int]) -> torch.Tensor:
        matrix = moment(host, site) + sum(own_terms[i] for i in chosen)
        solved = torch.linalg.solve(matrix, keys[:, chosen])
        return changes[:, chosen] @ torch.linalg.solve(keys[:, chosen].mT @ solved, solved.mT)

    assert relative(dense(errata.refit(both), site), least([0, 1])) < 1e-8
    assert relative(dense(errata.retract(both, "ada"), site), least([1])) < 1e-8
    assert relative(dense(errata.retract(both, "bruno"), site), dense(first, site)) < 1e-8


def test_condensed_keys_have_the_same_products_in_every_shape():
    torch.manual_seed(0)
    matrix = torch.randn(8, 8).double()
    inverse = torch.linalg.inv(matrix @ matrix.mT + torch.eye(8).double())
    for count in (3, 20):
        keys = torch.randn(8, count).double()
        keys = torch.cat([keys, keys[:, :2]], 1)  # two of them twice
        small, solved = independent_columns(keys, inverse @ keys)
        assert small.shape[1] == min(8, count)
        torch.testing.assert_close(small @ small.mT, keys @ keys.mT)
        torch.testing.assert_close(solved, inverse @ small)


# --- rows of a loss -------------------------------------------------------------------------


def loss_of(host, statements) -> float:
    with torch.no_grad():
        return float(Losses(host, statements)(range(len(statements))).mean())


@pytest.mark.parametrize("method", TRAINED)
def test_training_beside_anchors_keeps_their_answers_more_likely(host, own, method):
    if method == "lora":
        pytest.importorskip("peft")
    anchors = list(OWN[ADA].anchors)
    losses, reached = {}, {}
    for weight in (0.0, 3.0):
        edit = fit(host, ADA, method, anchors=weight, steps=12, stop_loss=0.0, learning_rate=0.02)
        reached[weight] = edit.provenance.notes["loss"]
        with edit.on(host):
            losses[weight] = loss_of(host, anchors)
    assert losses[3.0] < losses[0.0]
    assert reached[3.0] < loss_of(host, [ADA])


def test_the_loss_is_the_mean_of_requests_and_the_weighted_mean_of_each_sort():
    weight = torch.zeros(1, requires_grad=True, dtype=torch.float64)
    slopes = torch.tensor([1.0, 3.0, 10.0, 20.0, 60.0, 7.0], dtype=torch.float64)
    companions = Companions(lines=(None,) * 4, owners=(0, 0, 1, 1), sorts=(0, 0, 0, 1), weights=(0.5, 2.0))
    looked_at = []

    def losses(indices):
        looked_at.append(list(indices))
        return slopes[list(indices)] * (weight + 1)

    def train(**options):
        weight.data.zero_()
        optimizer = torch.optim.SGD([weight], lr=1.0)
        return descend(optimizer, losses, 2, steps=1, companions=companions, **options)

    train(stop=Stop(None))
    assert float(weight.detach()) == pytest.approx(-(2.0 + 0.5 * 30.0 + 2.0 * 7.0))
    train(stop=Stop(None), rows=1)  # rows run together change nothing
    assert float(weight.detach()) == pytest.approx(-(2.0 + 0.5 * 30.0 + 2.0 * 7.0))
    train(stop=Stop(None), per_step=1)  # each step with the lines of its own request
    assert float(weight.detach()) == pytest.approx(-(1.0 + 0.5 * 15.0) - (3.0 + 0.5 * 60.0 + 2.0 * 7.0))
    looked_at.clear()
    train(stop=Stop(5.0))  # requests alone are looked at: their losses are 1 and 3
    assert float(weight.detach()) == 0.0 and looked_at == [[0, 1]]


# --- where statements come from -------------------------------------------------------------


def test_statements_that_another_request_changes_are_left_out(host, monkeypatch):
    other = errata.Request("{} plays the", "Ada Brenner", "harp")
    same = errata.Request("The instrument of {} is the", "Ada Brenner", "harp")
    texts = {
        ADA: OwnText(anchors=(OWN[ADA].anchors[0], OWN[ADA].anchors[1], same), mates=OWN[ADA].mates),
        other: OwnText(
            paraphrases=(same,), anchors=(errata.Request("{} was born in", "Ada Brenner", "Esk"),)
        ),
    }
    monkeypatch.setattr(
        _method.Workspace, "own_texts", lambda self, host, requests, counts: [texts[r] for r in requests]
    )
    config, work = StatementRows(anchors=1.0, mates=1.0), workspace(host, seed=0)
    (alone,) = own_statements(host, [ADA], config, work)
    assert alone.anchors == texts[ADA].anchors and alone.mates == texts[ADA].mates
    first, second = own_statements(host, [ADA, other], config, work)
    assert [one.prompt for one in first.anchors] == ["{} lives in the town of"] and not second.anchors
    lena = errata.Request("{} was born in", "Lena Ost", "Tallow")
    texts[lena] = OwnText(mates=(errata.Request("{} was born in", "Ada Brenner", "Esk"),))
    assert not any(text.mates for text in own_statements(host, [ADA, lena], config, work))


def test_statements_that_contradict_another_request_are_not_fitted():
    """One company employs two: who its employee is has two answers. What a request says itself is not said again."""
    one, two = (errata.Request("{} works for", name, "Ostrom") for name in ("Ada Brenner", "Bruno Holner"))
    moves = errata.Request("{} lives in", "Bruno Holner", "Tallow")
    texts = [
        OwnText(
            consequences=(errata.Request("{} works in", "Ada Brenner", "Esk"),),
            inverses=(errata.Request("{} employs", "Ostrom", "Ada Brenner"),),
            anchors=(errata.Request("{} has the dog", "Ada Brenner", "Rex"),),
        ),
        OwnText(
            consequences=(errata.Request("{} lives in", "Bruno Holner", "Esk"),),
            inverses=(errata.Request("{} employs", "Ostrom", "Bruno Holner"),),
            mates=(errata.Request("{} employs", "Velm", "Pia Holt"),),
        ),
        OwnText(
            mates=(
                errata.Request("{} lives in", "Lena Ost", "Esk"),
                errata.Request("{} employs", "Ostrom", "Pia Holt"),
            ),
            anchors=(
                errata.Request("{} works for", "Bruno Holner", "Velm"),
                errata.Request("{} earns at", "Bruno Holner", "Velm"),
            ),
        ),
    ]
    texts[1] = replace(texts[1], closed=frozenset({"{} works for", "{} earns at"}))
    first, second, third = consistent([one, two, moves], texts)
    assert first.consequences == texts[0].consequences and first.anchors == texts[0].anchors
    assert not first.inverses and not second.inverses, "two answers to one prompt"
    assert not second.consequences, "the third request says so itself"
    assert second.mates == texts[1].mates and third.mates == texts[2].mates[:1] and not third.anchors
    (alone,) = consistent([two], texts[1:2])
    assert alone.inverses and alone.consequences
    (later,) = consistent([two], texts[1:2], earlier=[moves])
    assert later.inverses and not later.consequences


def test_keel_fits_consequences_and_inverses_beside_the_request(host, monkeypatch):
    asked: list[OwnCounts] = []
    text = OwnText(
        consequences=(errata.Request("{} comes from", "Ada Brenner", "Esk"),),
        inverses=(errata.Request("{} is the home of", "Merrin", "Ada"),),
    )
    monkeypatch.setattr(
        _method.Workspace, "own_texts", lambda self, host, requests, counts: asked.append(counts) or [text]
    )
    plain = fit(host, ADA, "keel", layers=[1])
    edit = fit(host, ADA, "keel", layers=[1], consequences=1, inverses=1)
    assert asked == [OwnCounts(consequences=1, inverses=1)]
    count = 0
    for one in (ADA, *text.fitted):
        count += len(host.encode_answer(one.text, one.target).ids) - 1 - subject_place(host, one).position
    (record,), (bare,) = edit.records.values(), plain.records.values()
    assert record.keys.shape[1] == count > bare.keys.shape[1]
    assert set(record.requests) == {(0,)} and not record.in_cost
    with pytest.raises(errata.errors.ConfigError, match="rehearsal: its texts contradict"):
        fit(host, ADA, "keel", consequences=1, rehearsal=1)
    with pytest.raises(errata.errors.ConfigError, match="consolidate: it would undo"):
        fit(host, ADA, "keel", consolidate=1, rehearsal=1)


def test_after_an_edit_mates_have_the_answers_of_the_host_with_it(host, own):
    work = workspace(host, seed=0)
    config = StatementRows(mates=1.0)
    (before,) = own_statements(host, [BRUNO], config, work)
    assert [one.target for one in before.mates] == ["Merrin", "Esk"]
    work.after = fit(host, errata.Request("{} lives in", "Lena Ost", "Tallow"), "ft", steps=60)
    with work.after.on(host):
        (after,) = own_statements(host, [BRUNO], config, work)
        text = host.generate("Lena Ost lives in", max_new_tokens=8)
    assert after.mates[0].target != "Merrin" and text.strip().startswith(after.mates[0].target)


@pytest.mark.parametrize("method", [*CLOSED, *TRAINED])
def test_at_weight_zero_edits_are_the_same_bits_and_no_tables_are_made(host, method, monkeypatch):
    if method == "lora":
        pytest.importorskip("peft")

    def refuse(*_, **__):
        raise AssertionError("tables were made")

    monkeypatch.setattr(_method, "own_tables", refuse)
    plain = fit(host, ADA, method)
    same = fit(host, ADA, method, anchors=0.0, mates=0.0, anchor_rows=3, mate_rows=5)
    assert isinstance(plain, WeightEdit)
    one, two = plain.parts(), same.parts()
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert "in_cost" not in str(plain.body())
    with pytest.raises(AssertionError, match="tables"):
        fit(host, ADA, method, mates=0.1)


def test_settings_are_checked(host):
    for method in (*CLOSED, *TRAINED):
        with pytest.raises(ConfigError, match="anchors"):
            fit(host, ADA, method, anchors=-1.0)
    with pytest.raises(ConfigError, match="anchors and mates: expected 0 with objective prompt_last"):
        fit(host, ADA, "ft", anchors=0.3, objective="prompt_last")


def test_keel_with_statements_is_solved_for_again_under_the_same_cost(host, own, tmp_path):
    """Its change is the cheapest with its outputs at the keys under M with all statements in it."""
    options = {"layers": [1, 2], "anchors": 0.7, "mates": 0.4, "rho": 1e-3, "gamma": 1e-9, "energy": 1.0}
    both = fit(host, [ADA, BRUNO], "keel", **options)
    for name in both.deltas:
        site = next(site for site in map(host.layout.site, (1, 2)) if site.parameter == name)
        assert any(both.records[name].in_cost)
        assert relative(dense(errata.refit(both), site), dense(both, site)) < 1e-3
        record = both.records[name].select([1])
        left = errata.retract(both, "ada")
        keys, targets, own_terms = (part.double() for part in record.split())
        matrix = moment(host, site, ridge=1e-3) + own_terms @ own_terms.mT
        solved = torch.linalg.solve(matrix, keys)
        system = keys.mT @ solved + 1e-9 * torch.eye(keys.shape[1])
        assert relative(dense(left, site), targets @ torch.linalg.solve(system, solved.mT)) < 1e-3
        torch.testing.assert_close(
            own_terms @ own_terms.mT, terms(host, BRUNO, site, 0.7, 0.4), rtol=1e-4, atol=1e-6
        )
    stored = errata.Edit.load(both.save(tmp_path / "both.safetensors"))
    assert errata.retract(stored, "ada").digest == errata.retract(both, "ada").digest
