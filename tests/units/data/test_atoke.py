"""AToKe: what each question asks of the present and of the past, and which requests are true together."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from errata.data._base import Malformed, Record
from errata.data.reading import check, read
from errata.data.sets import atoke
from errata.types import Case, Probe, kind_of

FOLDER = Path(__file__).parents[2] / "fixtures" / "data"
STEPS = json.loads((FOLDER / "atoke_me.json").read_text())[0]


def asked(case: Case, kind: str) -> list[Probe]:
    return [probe for probe in case.probes if probe.kind == kind]


def made(record: dict, variant: str = "me") -> Case:
    (case,) = atoke.cases(Record(record, "record 1", 0), variant)
    return case


def test_one_edit_changes_the_present_and_keeps_the_past():
    (case,) = read(FOLDER / "atoke_se.json").cases
    assert case.id == "atoke:0" and case.request.text == "The mayor of Esk is"
    assert (case.request.target, case.request.target_old, case.request.valid_from) == (
        "Vela Orn", "Ilse Dorn", "2019",
    )  # fmt: skip
    now = asked(case, "current")
    assert [p.prompt for p in now] == ["Who is the mayor of Esk?", "Esk is governed by"]
    assert all(p.answers == ("Vela Orn",) and p.before == ("Ilse Dorn", "I. Dorn") for p in now)
    years = asked(case, "explicit_time")
    assert [p.prompt[:17] for p in years] == ["From 2019 to 2023", "Who is mayor of E", "From 2019 to 2023"]
    assert all(p.answers == ("Vela Orn",) and p.before == () for p in years)
    past = asked(case, "historical")
    assert len(past) == 3 and all("2011 to 2019" in p.prompt for p in past)
    assert all(p.answers == p.before == ("Ilse Dorn", "I. Dorn") and not p.changes for p in past)
    assert all(p.rival == "Vela Orn" for p in past)
    former = asked(case, "former")
    assert [p.prompt for p in former] == [
        "The former mayor of Esk is", "Who was mayor of Esk before?", "Esk was once governed by",
    ]  # fmt: skip
    assert all(p.answers == ("Ilse Dorn", "I. Dorn") and p.before == () for p in former)
    assert kind_of("former").group == "follows" and kind_of("historical").group == "kept"


def test_steps_before_the_last_are_requested_of_their_years():
    """All requests of a case are then true together, and no question asks for two answers."""
    (case,) = read(FOLDER / "atoke_me.json").cases
    last, first = case.requests
    assert (last.text, last.target, last.valid_from) == ("Vela Orn's team is", "Sund", "1948")
    assert first.text == "From 1947 to 1948, Vela Orn is a player of"
    assert (first.target, first.valid_from, first.target_old) == ("Kesh Rovers", "1947", None)
    rewritten = {p.prompt: p.answers[0] for p in asked(case, "efficacy")}
    assert rewritten == {last.text: "Sund", first.text: "Kesh Rovers"}
    assert {p.answers for p in asked(case, "current")} == {("Sund", "Sund FC")}
    assert {p.before for p in asked(case, "current")} == {("Ormo City", "Ormo Blues")}
    assert {p.answers for p in asked(case, "historical")} == {("Ormo City", "Ormo Blues")}
    former = {p.answers for p in asked(case, "former")}
    assert former == {("Kesh Rovers", "Rovers", "Ormo City", "Ormo Blues")}
    explicit = {p.prompt: p.answers[0] for p in asked(case, "explicit_time")}
    assert explicit["From 1947 to 1948, Vela Orn's team was"] == "Kesh Rovers"
    assert explicit["From 1948 to 1953, Vela Orn plays for"] == "Sund"
    prompts = [probe.prompt for probe in case.probes]
    assert len(prompts) == len(set(prompts)) == 18


def test_an_extended_fact_keeps_its_object():
    (case,) = read(FOLDER / "atoke_ee.json").cases
    assert case.request.text == "From 1990 to 2004, Ilse Dorn is a player of"
    assert case.request.target == "Sund" and case.request.target_old is None
    assert all(p.answers == p.before == ("Sund", "Sund FC") for p in asked(case, "current"))
    assert len(asked(case, "current")) == 3 and len(asked(case, "explicit_time")) == 2
    changed = copy.deepcopy(STEPS)
    changed["requested_rewrite"] = changed["requested_rewrite"][:1]
    changed |= {
        name: changed[name][:1] for name in ("answer", "answer_alias", "new_answer", "new_answer_alias")
    }
    with pytest.raises(Malformed, match="whose target_new is its target_true"):
        made(changed, "ee")


def test_files_are_recognised_and_counted():
    found = {name: check(FOLDER / f"atoke_{name}.json") for name in ("se", "me", "ee")}
    assert [one.name for one in found.values()] == ["atoke/se", "atoke/me", "atoke/ee"]
    assert (found["se"].rows, found["se"].cases) == (2, 1)  # the second has no year
    assert found["me"].facts["cases by edits"] == {2: 1} and found["me"].facts["former"] == 3
    assert (found["me"].facts["historical"], found["me"].facts["explicit_time"]) == (3, 8)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r["requested_rewrite"][0]["time_new"].pop("since"), "time_new.since: expected a year"),
        (lambda r: r.update(answer=["Ormo City"]), "answer: expected answers for each of 2 edits"),
        (lambda r: r["history_evaluation"].pop(), "history_evaluation: expected 2"),
        (lambda r: r.update(requested_rewrite=[]), "expected at least one edit"),
        (lambda r: r["requested_rewrite"][0].pop("time_prompt"), "time_prompt: expected a text"),
    ],
    ids=["year", "answers", "history", "edits", "prompt"],
)  # fmt: skip
def test_records_of_another_form_are_named(change, words):
    record = copy.deepcopy(STEPS)
    change(record)
    with pytest.raises(Malformed, match=words):
        made(record)
