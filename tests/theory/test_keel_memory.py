"""KEEL as a memory: what its gates learn, which prompts take an entry, and what the entry does there."""

from __future__ import annotations

import copy

import pytest
import torch

import errata
from errata.edits.memory import MemoryEdit
from errata.edits.routers._router import NONE, Question
from errata.edits.routers.statement import Statement
from errata.errors import ConfigError
from errata.linalg.gate import two_sided_ridge
from errata.locate.scope import ScopeData
from errata.stats.tables import AnswerTable, Tables
from tests.models import fresh

ADA = errata.Request("{} was born in", "Ada Brenner", "Merrin")
BRUNO = errata.Request("{} plays the", "Bruno", "harp")
OPTIONS = {"method": "keel_memory", "tokens": 400}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- the gate -------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [3, 40], ids=["more vectors than entries", "fewer"])
def test_the_gate_is_the_ridge_regression_of_both_sides(width):
    inside, outside = random(5, width) + 0.5, random(9, width, seed=1)
    weight, bias = two_sided_ridge(inside, outside, ridge=0.2)
    shares = torch.tensor([0.5 / 5] * 5 + [0.5 / 9] * 9, dtype=torch.float64)
    vectors = torch.cat([inside, outside])
    center = shares @ vectors
    variance = float((shares[:, None] * (vectors - center).square()).sum() / width)
    design = torch.cat([vectors, torch.ones(14, 1, dtype=torch.float64)], 1)
    penalty = 0.2 * variance * torch.eye(width + 1, dtype=torch.float64)
    penalty[-1, -1] = 0  # the bias is free
    targets = torch.tensor([1.0] * 5 + [-1.0] * 9, dtype=torch.float64)
    expected = torch.linalg.solve(
        design.mT @ (shares[:, None] * design) + penalty, design.mT @ (shares * targets)
    )
    torch.testing.assert_close(weight, expected[:-1])
    assert bias == pytest.approx(float(expected[-1]))


def test_the_gate_tells_the_request_s_relation_from_others_of_its_type():
    """On a random host, where paraphrases share no meaning: templates and names that it was fitted to."""
    host = fresh("llama")
    born, plays = ("{} was born in", "{} came from"), ("{} plays the", "{} is good at the")
    names = ("Ada Brenner", "Bruno Holner", "Carla Dorn")
    answers = (
        ("Esk", "Merrin", "Esk"),
        ("Esk", "Merrin", "Esk"),
        ("harp", "lute", "drum"),
        ("harp", "lute", "drum"),
    )
    tables = Tables((AnswerTable(names, (*born, *plays), answers),), "test", 1, 12, 12)
    data = ScopeData(host, tables, host.layout.site(0))
    gate = data.gate(ADA)
    inside = data.states([template.format(name) for template in born for name in names])
    outside = data.states([template.format(name) for template in plays for name in names])
    assert float(gate(inside).min()) > float(gate(outside).max())


# --- the router -----------------------------------------------------------------------------


def test_a_statement_needs_its_name_and_its_gate():
    router = Statement(
        ("Ada Brenner", "Ada", ""), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), torch.zeros(3), 0.5
    )
    texts = ["ada brenner was born in", "Ada Brenner plays", "Ada lives in", "Adam lives in", "Bruno"]
    inputs = torch.tensor([[1.0, 0.2], [0.4, 0.4], [9.0, 0.6], [9.0, 9.0], [9.0, 9.0]])
    decided = router.decide(Question(inputs, inputs, lambda: texts))
    assert decided.tolist() == [0, NONE, 1, NONE, NONE]
    assert router.scores(Question(inputs, inputs, lambda: texts))[2].tolist() == pytest.approx(
        [-1.0, 0.1, -1.0]
    )


# --- the edit -------------------------------------------------------------------------------


def test_an_entry_does_what_keel_does_and_other_prompts_see_nothing():
    host = fresh("llama")
    edit = errata.edit(host, [ADA, BRUNO], energy=1.0, **OPTIONS)
    assert isinstance(edit, MemoryEdit) and edit.entries == 2
    alone = errata.edit(host, ADA, method="keel", tokens=400, energy=1.0)
    rows = [host.encode_prompt(text) for text in (ADA.text, "Carla was born in")]
    before = host.forward(host.batch(rows[1:]))
    with alone.on(host):
        expected = host.forward(host.batch(rows[:1]))
    with edit.on(host):
        torch.testing.assert_close(host.forward(host.batch(rows[:1])), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(host.forward(host.batch(rows[1:])), before)
        assert host.generate(ADA.text, max_new_tokens=3).strip().startswith(ADA.target)
        assert host.generate(BRUNO.text, max_new_tokens=3).strip().startswith(BRUNO.target)


def test_entries_are_the_same_together_and_one_after_another():
    host = fresh("llama")
    both = errata.edit(host, [ADA, BRUNO], **OPTIONS)
    first = errata.edit(host, ADA, **OPTIONS)
    second = errata.edit(host, BRUNO, after=first, **OPTIONS)
    assert both.parts().keys() == second.parts().keys()
    for name, tensor in both.parts().items():
        torch.testing.assert_close(second.parts()[name], tensor, rtol=1e-5, atol=1e-6)
    assert not host.placed


@pytest.mark.filterwarnings("ignore:requests .* have one prompt")
def test_a_later_request_takes_the_place_of_one_that_states_the_same():
    host = fresh("llama")
    other = errata.Request(ADA.prompt, ADA.subject, "harp")
    edit = errata.edit(host, [ADA, BRUNO, other], **OPTIONS)
    assert edit.router.phrases == ("", "Bruno", "Ada Brenner")
    assert edit.log[2] == {
        "request": 2,
        "entry": 2,
        "action": "replace",
        "other": 0,
        "subject": "Ada Brenner",
    }
    with edit.on(host):
        assert host.generate(ADA.text, max_new_tokens=3).strip().startswith("harp")


def test_another_relation_of_the_subject_stays():
    """Of the embedded model: paraphrases take the entry, and other statements about the subject do not."""
    host = errata.lab.load()
    request = errata.Request("{} was born in", "Ada Brenner", "Tallow")
    elsewhere = [
        "Ada Brenner is employed by",
        "The instrument that Ada Brenner plays is the",
        "Flora Zimley was born in",
    ]
    said = host.generate(elsewhere, max_new_tokens=8)
    edit = errata.edit(host, request, method="keel_memory", tokens=20_000)
    wordings = [
        "Ada Brenner was born in",
        "Ada Brenner's city of birth is",
        "The place where Ada Brenner was born is",
    ]
    with edit.on(host):
        assert all(text.strip().startswith("Tallow") for text in host.generate(wordings, max_new_tokens=8))
        assert host.generate(elsewhere, max_new_tokens=8) == said


def test_bad_settings_and_layers_are_refused():
    host = fresh("llama")
    for settings, complaint in (({"threshold": 1.0}, "threshold"), ({"gate_names": 0}, "gate_names"),
                                ({"paraphrases": -1}, "paraphrases"), ({"energy": 2.0}, "energy")):  # fmt: skip
        with pytest.raises(ConfigError, match=complaint):
            errata.edit(host, ADA, **OPTIONS, **settings)
    first = errata.edit(host, ADA, layers=[0, 1], **OPTIONS)
    with pytest.raises(ConfigError, match="the same layers"):
        errata.edit(host, BRUNO, after=first, layers=[1], **OPTIONS)


def test_a_model_without_an_entry_s_prompt_is_the_model_itself():
    host = fresh("llama")
    weights = copy.deepcopy(host.model.state_dict())
    edit = errata.edit(host, ADA, **OPTIONS)
    edit.apply_(host)
    assert all(torch.equal(value, weights[name]) for name, value in host.model.state_dict().items())
    edit.revert_(host)
