"""Traces: what a host asserts before its answer, in a thinking block, a chain of thought or steps.

Source: the reasoning of edited models as in arXiv 2606.00570 and the Gravity-QA study: an edited model may give the new
answer directly and derive the old one when it reasons, or correct itself. Counted by sentences and whole words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from errata.evaluation.metrics import intervals, matching, propagation
from errata.evaluation.metrics._metric import (
    Column,
    Metric,
    ProbeResult,
    numbers,
)
from errata.types import Row

NAME = "trace"
GRAM = 4
"""Words of the runs whose repetition is counted."""


def sentences(text: str) -> Iterator[str]:
    """Yield the sentences of a text, line by line."""
    for line in text.splitlines():
        rest = line.strip()
        while rest:
            sentence = matching.first_sentence(rest)
            yield sentence
            rest = rest[len(sentence) :].strip()


def asserts(text: str, names: Sequence[str]) -> bool:
    """Whether any sentence of a text asserts one of some names, see :func:`matching.says`."""
    return bool(names) and any(matching.says(sentence, names) for sentence in sentences(text))


def repetition(text: str) -> float:
    """Return the share of a text's runs of four words that occurred in it before."""
    words = text.casefold().split()
    runs = [tuple(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def rows(result: ProbeResult) -> list[Row]:
    """Return a row for a probe whose answer the edit changes and before which the host wrote something.

    Its value is whether the trace asserts something new: an accepted answer, or a target of the case's requests.
    """
    probe = result.probe
    traces = [_trace(probe.form, one.trace, one.text) for one in (result.before, result.after)]
    if not probe.changes or not any(traces):
        return []
    new = [*result.targets, *probe.answers]
    old = [name for name in (*result.old_targets, *probe.before) if name not in new]
    detail: dict[str, Any] = {}
    for side, trace, one in zip(("before", "after"), traces, (result.before, result.after), strict=True):
        answer = (
            propagation.final_answer(one.text) if probe.form == "thought" else matching.first_answer(one.text)
        )
        says_new, says_old = asserts(trace, new), asserts(trace, old)
        right = matching.answered(answer, probe.answers, [a for a in probe.before if a not in probe.answers])
        stale = matching.asserts_old(answer, probe.answers, probe.before)
        detail |= {
            f"text_{side}": trace, f"asserts_old_{side}": says_old, f"corrected_{side}": says_old and right,
            f"relapsed_{side}": says_new and not right and stale, f"words_{side}": len(trace.split()),
            f"repetition_{side}": repetition(trace),
        }  # fmt: skip
    if detail["words_before"]:
        detail["length_ratio"] = detail["words_after"] / detail["words_before"]
    return [result.row(NAME, asserts(traces[0], new), asserts(traces[1], new), **detail)]


def _trace(form: str, trace: str, text: str) -> str:
    """Return what was written before an answer; of a chain of thought, the lines before the last one's answer."""
    if trace or form != "thought":
        return trace
    answer = propagation.final_answer(text)
    return text[: text.rfind(answer)].strip() if answer else text


def summary(rows: Sequence[Row], relevant: Sequence[Row]) -> Mapping[str, Any]:
    """Return the shares of traces that assert something new or old, of corrections and relapses, and their lengths.

    ``asserts_old``: of traces that assert an old target or answer; ``corrected``: that do and end in the new answer;
    ``relapsed``: that assert something new and end in the old answer; ``length_ratio``: words after over words before;
    ``repetition``: mean share of repeated runs of four words. Each after the edit, and ``*_before`` but for the ratio.
    """
    entry: dict[str, Any] = {
        "mean_before": _mean([r.before for r in rows]),
        "mean": _mean([r.after for r in rows]),
    }
    for name in ("asserts_old", "corrected", "relapsed", "repetition"):
        entry[name] = _mean(numbers(rows, f"{name}_after"))
        entry[f"{name}_before"] = _mean(numbers(rows, f"{name}_before"))
    return {**entry, "length_ratio": _mean(numbers(rows, "length_ratio"))}


def _mean(values: Sequence[float]) -> float | None:
    return intervals.mean(list(values))


METRIC = Metric(
    name=NAME,
    label="trace, new",
    title="traces that assert the new fact",
    unit="share",
    higher_is_better=True,
    forms=frozenset({"short", "thought", "steps"}),
    needs_text=True,
    rows=rows,
    summary=summary,
    columns=(
        Column("asserts_old", "old", "asserts the old fact", "changing"),
        Column("corrected", "corrected", "asserts the old fact, answers with the new one", "changing"),
        Column("relapsed", "relapsed", "asserts the new fact, answers with the old one", "changing"),
        Column("length_ratio", "length", "words over words before the edit", "changing"),
        Column("repetition", "repeated", "runs of four words that occurred before", "changing"),
    ),
    order=1,
)
