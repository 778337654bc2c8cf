"""Questions about a time: what is asked, and what an editor that tells times apart is told."""

from __future__ import annotations

from dataclasses import replace

import pytest

import errata
from errata.bench import sources
from errata.data.times import Times, with_times
from errata.edits import PromptEdit
from errata.errors import ConfigError, RequestError
from errata.lab import default_world
from errata.types import Case, Picture, Probe, kind_of, plain_case
from tests.models import fresh

MAYOR = errata.Request("The mayor of {} is", "Esk", "Vela Orn", "Ilse Dorn", "mayor", valid_from="2019-05")
CASE = Case("c", MAYOR, (Probe("efficacy", MAYOR.text, ("Vela Orn",), ("Ilse Dorn",)),))


def test_the_past_stays_and_the_present_changes() -> None:
    (case,) = with_times([CASE])
    asked = {p.kind: p for p in case.probes}
    assert list(asked) == ["efficacy", "current", "explicit_time", "historical"]
    assert asked["current"].prompt == "Today, the mayor of Esk is"
    assert asked["explicit_time"].prompt == "In 2024, the mayor of Esk is"
    assert asked["historical"].prompt == "In 2014, the mayor of Esk is"
    for kind in ("current", "explicit_time"):
        assert (asked[kind].answers, asked[kind].before) == (("Vela Orn",), ("Ilse Dorn",))
        assert asked[kind].rival == "Ilse Dorn" and kind_of(kind).group == "learned"
    past = asked["historical"]
    assert past.answers == past.before == ("Ilse Dorn",) and past.rival == "Vela Orn" and not past.changes
    assert kind_of("historical").group == "kept"


def test_questions_about_a_picture_show_it() -> None:
    picture = Picture.of(b"bytes", "esk.png")
    about = replace(MAYOR, prompt="The mayor of this town is", subject="this town", image=picture)
    (case,) = with_times([Case("c", about, ())])
    assert [probe.image for probe in case.probes] == [picture] * 3
    assert case.probes[0].prompt == f"Today, {picture.mark}The mayor of this town is"


def test_wordings_and_names_are_settings() -> None:
    times = Times(current="{prompt} (now)", explicit="{prompt} ({year})", years=1)
    (case,) = with_times([CASE], times, names={"Ilse Dorn": ("Ilse Dorn", "I. Dorn")})
    now, later, before = case.probes[1:]
    assert [p.prompt for p in (now, later, before)] == [
        f"The mayor of Esk is ({t})" for t in ("now", 2020, 2018)
    ]
    assert before.answers == ("Ilse Dorn", "I. Dorn")
    with pytest.raises(RequestError, match=r"explicit: expected \{year\}"):
        Times(explicit="{prompt}")
    with pytest.raises(RequestError, match="years"):
        Times(years=0)


@pytest.mark.parametrize("field", ["valid_from", "target_old"])
def test_a_request_without_date_or_old_answer_asks_nothing(field: str) -> None:
    bare = replace(CASE, request=replace(MAYOR, **{field: None}))
    with pytest.raises(RequestError, match="no request has both"):
        with_times([bare])
    assert with_times([bare, CASE])[0] == bare


def test_a_case_without_dates_is_identified_as_before() -> None:
    plain = plain_case(replace(CASE, request=replace(MAYOR, valid_from=None)))
    assert set(plain["request"]) == {"prompt", "subject", "target", "target_old", "id"}
    assert plain_case(CASE)["request"]["valid_from"] == "2019-05"


def test_the_lab_asks_its_edits_of_years() -> None:
    plain, _ = sources.read("lab:6:3")
    dated, facts = sources.read("lab:dated:6:3")
    assert facts["source"] == "lab:dated:6:3"
    for before, case in zip(plain, dated, strict=True):
        assert replace(case.request, valid_from=None) == before.request
        year = int(case.request.valid_from or 0)
        (past,) = (p for p in case.probes if p.kind == "historical")
        assert past.prompt.startswith(f"In {year - 5}, ")
        assert past.answers == default_world().names(before.request.target_old or "")
        assert {p for p in case.probes if p.kind == "efficacy"} == {
            p for p in before.probes if p.kind == "efficacy"
        }


def test_a_prompt_is_told_since_when_a_fact_holds() -> None:
    host = fresh("llama")
    for since, line in (("", "New fact: "), (", since {date}", "New fact, since 2019-05: ")):
        edit = errata.edit(host, MAYOR, method="in_prompt", since=since)
        assert isinstance(edit, PromptEdit)
        assert edit.contexts[0].startswith(f"{line}The mayor of Esk is Vela Orn.")
    with pytest.raises(ConfigError, match="since"):
        errata.edit(host, MAYOR, method="in_prompt", since="long ago")


def test_a_date_and_indirect_prompts_travel_with_an_edit(tmp_path) -> None:  # type: ignore[no-untyped-def]
    host = fresh("llama")
    request = replace(MAYOR, indirect=("The mayor where Ivo lives is",))
    errata.edit(host, request, method="in_prompt").save(tmp_path / "edit.safetensors")
    (stored,) = errata.Edit.load(tmp_path / "edit.safetensors").provenance.requests
    assert stored == request
