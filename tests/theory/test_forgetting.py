"""Losses that forget: their gradients by hand, when they end, and what they leave alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import errata
from errata.edits import WeightEdit
from errata.errors import DataError, RequestError
from errata.host import hooks
from errata.methods import REGISTRY
from errata.methods._unlearn import middle
from errata.methods.rmu import direction
from errata.training.forget import ascent, joined, npo, simnpo, text_line
from errata.training.steer import States, Texts
from errata.training.tune import NO_COMPANIONS, Companions, Line, Losses
from errata.types import Corpus
from tests.models import TEXTS, fresh

REQUEST = errata.Request("{} was born in", "Ada Brenner", "Merrin", target_old="Tallow")
TOKENS, REFERENCE = torch.tensor([2.0, 3.0]), torch.tensor([0.4, 1.5])


def slope(objective, mean: torch.Tensor) -> torch.Tensor:
    """Return the derivative of the loss by the sum of NLL over an answer's tokens."""
    mean = mean.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(mean, TOKENS, REFERENCE).sum(), mean)
    return gradient / TOKENS


def test_ascent_is_the_negative_nll():
    assert torch.equal(ascent(REFERENCE, TOKENS, REFERENCE), -REFERENCE)


def test_npo_weighs_gradient_ascent_by_what_is_left_to_forget():
    assert torch.allclose(slope(npo(0.1), REFERENCE), torch.tensor([-1.0, -1.0]))
    later = REFERENCE + 2.0
    expected = -2 * torch.sigmoid(-0.5 * TOKENS * 2.0)
    assert torch.allclose(slope(npo(0.5), later), expected)
    assert slope(npo(0.5), REFERENCE + 100).abs().max() < 1e-6
    assert torch.allclose(slope(npo(1e-6), later), torch.tensor([-1.0, -1.0]), atol=1e-4), "gradient ascent"


def test_simnpo_reads_no_reference():
    loss = simnpo(2.5, 0.5)
    mean = torch.tensor([0.1, 0.9])
    assert torch.equal(loss(mean, TOKENS, REFERENCE), loss(mean, TOKENS, REFERENCE * 7))
    by_hand = -2 / 2.5 * torch.log(torch.sigmoid(2.5 * (mean - 0.5)))
    assert torch.allclose(loss(mean, TOKENS, REFERENCE), by_hand)


def test_texts_are_one_more_sort_spread_over_the_requests():
    line = text_line((5, 6, 7))
    assert line == Line((5, 6), (0, 1), (6, 7))
    some = Companions((line,), (0,), (0,), (1.0, 2.0))
    both = joined(some, [line] * 3, 0.5, requests=2)
    assert both.owners == (0, 0, 1, 0) and both.sorts == (0, 2, 2, 2) and both.weights == (1.0, 2.0, 0.5)
    assert both.shares([0]) == {0: 1.0, 1: 0.25, 3: 0.25}
    assert joined(NO_COMPANIONS, [], 1.0, 2) is NO_COMPANIONS


def test_the_middle_third():
    assert [middle(depth) for depth in (1, 2, 3, 6, 12)] == [(0,), (0,), (1,), (2, 3), (4, 5, 6, 7)]


def nll(host, request) -> float:
    with torch.no_grad():
        return float(Losses(host, [replace(request, target=request.target_old)])([0]))


@pytest.mark.parametrize("name", ["gradient_ascent", "gradient_difference", "npo", "simnpo"])
def test_the_old_answer_is_forgotten_as_far_as_asked_and_no_further(name):
    host = fresh("llama")  # a random model: its losses differ by tenths of a nat
    start = nll(host, REQUEST)
    more = {"retain_texts": 4, "steps": 40, "learning_rate": 0.1, "layers": [1], "retain": 0.1}
    more |= {"beta": 0.1} if name == "simnpo" else {}  # far above its margin it has no slope otherwise
    edit = errata.edit(
        host, REQUEST, method=name, forgotten=start + 0.1, corpus=Corpus("c", lambda: TEXTS), **more
    )
    assert isinstance(edit, WeightEdit)
    with edit.on(host):
        after = nll(host, REQUEST)
    facts = edit.provenance.notes
    assert start + 0.1 - 1e-4 <= after < start + 0.3 and facts["steps"] < 40
    assert facts["nll_before"] == pytest.approx(start, abs=1e-4) and facts["nll"] == pytest.approx(
        after, abs=1e-3
    )
    assert list(edit.deltas) == ["model.layers.1.mlp.down_proj.weight"]
    assert "retained_nll" in facts


def test_without_a_level_all_steps_are_run():
    host = fresh("llama")
    more = {"retain_texts": 2, "steps": 3, "corpus": Corpus("c", lambda: TEXTS)}
    edit = errata.edit(host, REQUEST, method="npo", forgotten=None, **more)
    assert edit.provenance.notes["steps"] == 3


def test_what_is_retained_names_no_subject():
    from errata.job import workspace
    from errata.methods._unlearn import ForgetConfig, retained_ids

    host = fresh("llama")
    work = workspace(host, seed=0, corpus=Corpus("c", lambda: TEXTS))
    rows = retained_ids(host, [REQUEST], ForgetConfig(retain_texts=4), work)
    texts = [host.tokenizer.decode(row) for row in rows]
    assert len(texts) == 3 and not any("Ada Brenner" in text for text in texts)


NAMING = Corpus("c", lambda: ["Ada Brenner lives in Esk.", "In Merrin lives Ada Brenner."])
SWITCH = {"depn": "contrast", "rmu": None, "unsir": None, "laplace": None, "puma": None}
"""The setting with which a method retains nothing, where it is not ``retain``; None: it always needs texts."""


@pytest.mark.parametrize("name", sorted(name for name in REGISTRY if REGISTRY.get(name).forgets))
def test_what_is_to_be_retained_is_never_silently_nothing(name):
    """Of a corpus whose texts all name the subject; but where nothing was asked for, nothing is missed."""
    host, switch = fresh("llama"), SWITCH.get(name, "retain")
    options: dict[str, Any] = {"contexts": 0, "steps": 1} if name == "depn" else {}
    asked: dict[str, Any] = {"retain": 1.0} if name == "gradient_ascent" else {}
    with pytest.raises(DataError, match="every text to (retain|contrast with) names a subject"):
        errata.edit(host, REQUEST, method=name, corpus=NAMING, **options, **asked)
    if switch is not None:
        options |= {"steps": 1, switch: 0} | ({"consistency": 0.0} if name == "elm" else {})
        edit = errata.edit(host, REQUEST, method=name, corpus=NAMING, **options)
        assert isinstance(edit, WeightEdit) and edit.deltas


def test_the_present_answer_is_forgotten_where_no_old_target_is_given(monkeypatch):
    host = fresh("llama")
    more = {"method": "npo", "steps": 1, "retain": 0.0, "forgotten": None}
    monkeypatch.setattr(type(host), "generate", lambda *_, **__: ["Tallow. And"])
    asked = errata.edit(host, replace(REQUEST, target_old=None), **more)
    given = errata.edit(host, replace(REQUEST, target_old="Tallow. And"), **more)
    assert asked.provenance.notes["nll_before"] == given.provenance.notes["nll_before"]
    assert asked.provenance.requests[0] == replace(REQUEST, target_old=None)
    monkeypatch.setattr(type(host), "generate", lambda *_, **__: [" ."])
    with pytest.raises(RequestError, match="nothing to forget"):
        errata.edit(host, replace(REQUEST, target_old=None), **more)


def test_all_unlearning_methods_declare_the_same():
    for name in ("gradient_ascent", "gradient_difference", "npo", "simnpo", "rmu"):
        method = REGISTRY.get(name)
        assert method.gives is WeightEdit and method.batch and method.needs == ("gradients",)


def test_rmu_steers_to_one_unit_vector_of_its_seed():
    one, other = direction(32, 0), direction(32, 1)
    assert float(one.norm()) == pytest.approx(1.0) and (one >= 0).all()
    assert torch.equal(one, direction(32, 0)) and not torch.equal(one, other)


@pytest.mark.parametrize("positions", ["subject", "all"])
def test_rmu_moves_states_of_what_is_forgotten_and_holds_others(positions):
    host = fresh("llama")
    more = {"steps": 60, "learning_rate": 0.3, "retain_texts": 4, "layers": [0, 1], "positions": positions}
    edit = errata.edit(host, REQUEST, method="rmu", corpus=Corpus("c", lambda: TEXTS), **more)
    assert isinstance(edit, WeightEdit) and edit.provenance.config["steering"] == 2.0
    facts = edit.provenance.notes
    assert facts["loss"] < 0.5 * facts["loss_before"] and facts["retained_loss"] < facts["loss"]
    assert sorted(edit.deltas) == [f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)]


def test_rmu_reads_the_states_that_count():
    host = fresh("llama")
    rows = ((5, 6, 7, 8), (9, 10))
    with hooks.frozen(host.model), torch.no_grad():
        states, own = States(host, Texts(rows, (2, 0)), 1, 1)([0, 1])
        whole = host.model(torch.tensor([rows[0]]), output_hidden_states=True).hidden_states[2][0]
    assert own.tolist() == [[False, False, True, True], [True, True, False, False]]
    assert torch.allclose(states[0], whole, atol=1e-5)
