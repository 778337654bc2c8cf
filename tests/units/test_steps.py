"""Answers reached step by step, and what a host asserts before its answer."""

from __future__ import annotations

import json
from typing import Any

import pytest

import errata
from errata.data.requests import read_cases, write_cases
from errata.errors import RequestError
from errata.evaluation import score
from errata.evaluation.metrics import trace
from errata.evaluation.observe import observe
from errata.evaluation.steps import Walk, bare, walk
from errata.types import AskOptions, Observation, Probe
from tests.models import fresh

ASKED = Probe(
    "multi_hop", "Ada is married to", ("Merrin",), ("Tallow",), "Tallow", "steps",
    steps=("{} was born in", "The country of {} is"),
)  # fmt: skip


def test_each_step_continues_the_sentences_so_far_with_the_answer_to_the_one_before() -> None:
    told = {
        "Ada is married to Ivo Marn. Ivo Marn was born in": " Esk, they say. And",
        "Ada is married to Ivo Marn. Ivo Marn was born in Esk, they say. The country of Esk, they say is": " Merrin.",
    }
    asked: list[str] = []

    def ask(prompts: Any) -> list[str]:
        asked.extend(prompts)
        return [told[prompt] for prompt in prompts]

    (done,) = walk([ASKED], [" Ivo Marn.\n"], ask)
    assert asked == list(told) and done.answer == " Merrin."
    assert done.trace == asked[-1]
    assert [bare(text) for text in (" Ivo Marn.\n", "Esk! Yes", "  \n", "St. Ives. He")] == [
        "Ivo Marn",
        "Esk",
        "",
        "St. Ives",
    ]


def test_a_step_without_an_answer_ends_the_walk() -> None:
    (done, other) = walk([ASKED, ASKED], ["\n", " Ivo."], lambda prompts: [" Esk." for _ in prompts])
    assert done == Walk(ASKED.prompt, "") and other.answer == " Esk."


def test_a_host_is_asked_what_it_said_itself() -> None:
    host = fresh("llama")
    short = AskOptions(max_new_tokens=4)
    (seen,) = observe(host, [ASKED], short)
    text = ASKED.prompt
    answer = host.generate([text], max_new_tokens=4)[0]
    for step in ASKED.steps:
        text = f"{text} {bare(answer)}. {step.replace('{}', bare(answer))}"
        answer = host.generate([text], max_new_tokens=4)[0]
    assert (seen.text, seen.trace) == (answer, text) and seen.answer_logprobs == ()
    (silent,) = observe(host, [ASKED], AskOptions(generate=False))
    assert (silent.text, silent.trace) == ("", "")


def test_a_step_that_does_not_fit_the_window_is_refused() -> None:
    host = fresh("llama", max_position_embeddings=16)
    with pytest.raises(RequestError, match="step .*window"):
        observe(host, [Probe("multi_hop", "Ada is", ("x",), (), form="steps", steps=("the " * 30 + "{}",))])


# --- the metric --------------------------------------------------------------------------------

REQUEST = errata.Request("{} is married to", "Ada", "Ivo Marn", "Bruno Holt")


def rows_of(before: tuple[str, str], after: tuple[str, str], probe: Probe = ASKED) -> list[Any]:
    case = errata.Case("c", REQUEST, (probe,))
    seen = [
        [Observation(text, (-1.0,), (True,), (-2.0,), trace=thoughts)] for thoughts, text in (before, after)
    ]
    return [row for row in score.rows(case, *seen) if row.protocol == trace.NAME]


@pytest.mark.parametrize(
    ("thoughts", "answer", "new", "old", "corrected", "relapsed"),
    [
        ("Ada is married to Ivo Marn. He was born in", " Merrin.", True, False, False, False),
        ("Ada is married to Bruno Holt. He was born in", " Tallow.", False, True, False, False),
        ("Ada is married to Bruno Holt. Wait, to Ivo Marn.", " Merrin.", True, True, True, False),
        ("Ada is married to Ivo Marn. So", " Tallow.", True, False, False, True),
        ("This is not Bruno Holt.", " Merrin.", False, False, False, False),
        ("Ada is married to Ivo Marnsen.", " Esk.", False, False, False, False),
    ],
)
def test_what_traces_assert(
    thoughts: str, answer: str, new: bool, old: bool, corrected: bool, relapsed: bool
) -> None:
    (row,) = rows_of(("Ada is married to Bruno Holt.", " Tallow."), (thoughts, answer))
    assert (row.kind, row.before, row.after) == ("multi_hop.steps", 0.0, float(new))
    detail = row.detail
    assert (detail["asserts_old_before"], detail["asserts_old_after"]) == (True, old)
    assert (detail["corrected_after"], detail["relapsed_after"]) == (corrected, relapsed)
    assert detail["length_ratio"] == len(thoughts.split()) / 6


def test_no_row_without_a_trace_or_where_nothing_changes() -> None:
    assert rows_of(("", " Tallow."), ("", " Merrin.")) == []
    kept = Probe("neighbourhood", "x", ("Esk",), ("Esk",), form="thought")
    assert rows_of(("thoughts", "Esk"), ("thoughts", "Esk"), kept) == []


def test_a_chain_of_thought_is_its_own_trace() -> None:
    probe = Probe("multi_hop", "Where?", ("Merrin",), ("Tallow",), form="thought")
    text = "Ada is married to Ivo Marn.\nHe is from Merrin.\nAnswer: Merrin"
    (row,) = rows_of(("", "Ada is married to Bruno Holt.\nAnswer: Tallow"), ("", text), probe)
    assert (
        row.detail["text_after"] == "Ada is married to Ivo Marn.\nHe is from Merrin.\nAnswer:"
        and row.after == 1.0
    )


def test_repetition_counts_runs_of_four_words() -> None:
    assert trace.repetition("a b c") == 0 and trace.repetition("a b c d e") == 0
    assert trace.repetition("a b c d a b c d") == pytest.approx(1 / 5)


def test_the_summary_averages_both_sides() -> None:
    good = rows_of(("Bruno Holt.", "Tallow"), ("Ivo Marn.", "Merrin"))
    bad = rows_of(("Bruno Holt.", "Tallow"), ("Bruno Holt.", "Tallow"))
    entry = score.summarise([*good, *bad])["multi_hop.steps.trace"]
    assert (entry["asserts_old_before"], entry["asserts_old"], entry["corrected"]) == (1.0, 0.5, 0.0)


def test_steps_are_written_and_read(tmp_path: Any) -> None:
    case = errata.Case("c", REQUEST, (Probe("efficacy", REQUEST.text, ("Ivo Marn",), ()), ASKED))
    path = tmp_path / "cases.jsonl"
    write_cases(path, [case])
    assert read_cases(path)[0].probes == case.probes
    record = json.loads(path.read_text())
    del record["probes"][1]["steps"]
    path.write_text(json.dumps(record) + "\n")
    with pytest.raises(RequestError, match="steps belong together"):
        read_cases(path)
