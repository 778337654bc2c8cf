"""Whether an edit took: free answers against targets, as long as those need, in batches, within the window."""

from __future__ import annotations

from dataclasses import replace

import pytest

import errata
from errata import lab
from errata.evaluation import check
from errata.evaluation.check import answer_requests, compare_answers
from errata.types import Request
from tests.models import fresh


def judged(text: str, target: str, old: str | None = None) -> bool:
    (one,) = compare_answers([Request("{} was born in", "Ada", target, old)], ["Esk."], [text]).requests
    return one.answered


@pytest.mark.parametrize(
    ("text", "target", "old", "right"),
    [
        (" Merrin. She lived there.", "Merrin", None, True),
        (" Merrin", "Merrin", "Tallow", True),
        (" the town of Merrin.", "Merrin", None, True),
        (" Tallow.", "Merrin", None, False),
        (" not Merrin.", "Merrin", None, False),
        (" Merrinville.", "Merrin", None, False),
        (" Merrin and Tallow.", "Merrin", "Tallow", False),
        (" New York City.", "New York City", "New York", True),
        ("", "Merrin", None, False),
        (" Esk. It lies on the sea.", "Esk. It lies on the sea.", None, True),
        (" Esk.", "Esk. It lies on the sea.", None, False),
        (" Esk. It lies on a hill.", "Esk. It lies on the sea.", None, False),
        ("\n- one\n- two\n- three", "- one\n- two", None, True),
        ("\n- one", "- one\n- two", None, False),
    ],
)
def test_what_counts_as_answered(text, target, old, right):
    assert judged(text, target, old) is right


def test_a_record_counts_and_names_what_was_missed():
    requests = [
        Request("{} is in", name, "Esk", id=name if name == "Bo" else None) for name in ("Al", "Bo", "Cy")
    ]
    found = compare_answers(requests, ["a", "b", "c"], ["Esk.", "Lum.\nmore", "Arve."])
    assert (found.answered, found.passed, len(found.requests)) == (1, False, 3)
    assert [(one.name, one.number, one.before, one.after) for one in found.missed] == [
        ("Bo", 2, "b", "Lum."), ("3", 3, "c", "Arve."),
    ]  # fmt: skip
    assert compare_answers([], [], []).passed


def test_the_lab_answers_what_is_true_and_not_what_is_asked_for(lab_host):
    asked = [case.request for case in lab.cases(12, seed=4)]
    true = [replace(request, target=str(request.target_old), target_old=None) for request in asked]
    said = answer_requests(lab_host, [*asked, *true])
    found = compare_answers([*asked, *true], said, said)
    assert not any(one.answered for one in found.requests[:12])
    assert sum(one.answered for one in found.requests[12:]) >= 11


def test_many_requests_are_asked_in_few_batches(monkeypatch):
    host = fresh("gpt2")
    sizes: list[int] = []
    from errata.evaluation import observe

    real = observe.generate_rows
    monkeypatch.setattr(
        observe, "generate_rows",
        lambda host, rows, *given: sizes.append(len(rows)) or real(host, rows, *given),
    )  # fmt: skip
    requests = [Request("{} was born in", f"Ada{i}", "Esk") for i in range(400)]
    ticks: list[tuple[int, int]] = []
    texts = answer_requests(host, requests, on_progress=lambda *tick: ticks.append(tick))
    assert len(texts) == 400 == sum(sizes) and len(sizes) <= 4
    assert ticks[-1] == (400, 400) and ticks == sorted(ticks)
    assert texts[7] == answer_requests(host, [requests[7]])[0]


def test_answers_are_as_long_as_their_targets_and_stay_in_the_window():
    host = fresh("gpt2")
    short = Request("{} was born in", "Ada", "Esk")
    words = " ".join(["Merrin"] * 12)
    long = Request("{} was born in", "Ada", words)
    assert check._length(host, short) == ("short", check.SHORT_TOKENS)
    form, limit = check._length(host, long)
    tokens = len(host.encode_answer(long.text, words).target)
    assert form == "short" and tokens + check.SPARE_TOKENS <= limit < 2 * (tokens + check.SPARE_TOKENS)
    assert check._length(host, replace(long, target="Esk. It is far.")) == ("long", 32)
    near = "was " * 200
    while len(host.encode_prompt(f"{near}Ada")) > 126:
        near = near[4:]
    full = Request(f"{near}{{}}", "Ada", "Esk")
    assert (
        len(answer_requests(host, [full, replace(full, target="Esk. It lies on the sea, far from all.")]))
        == 2
    )


def test_the_python_function_leaves_the_host_as_it_was(lab_host):
    request = Request("{} was born in", "Ada Brenner", "Tallow")
    edit = errata.edit(lab_host, request, method="ft", steps=20)
    start = lab_host.weights_hash()
    found = errata.check_edit(lab_host, edit)
    assert isinstance(found, errata.EditCheck) and len(found.requests) == 1
    with edit.on(lab_host):
        text = lab_host.generate(request.text, max_new_tokens=16)
    assert found.requests[0].after == text.strip().split("\n")[0]
    assert found.passed == ("Tallow" in found.requests[0].after)
    assert found.requests[0].before != found.requests[0].after
    assert lab_host.weights_hash() == start
