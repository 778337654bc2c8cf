"""Fluency: the n-gram entropy of generated text with its prompt, GE as printed in papers (times 100)."""

from __future__ import annotations

from typing import Any

from errata.evaluation.metrics import collapse
from errata.evaluation.metrics._metric import Metric, ProbeResult, plain
from errata.evaluation.metrics.ngrams import distinct, repetition
from errata.types import Probe, Row
from errata.writing import joint

NAME = "fluency"


def rows(result: ProbeResult) -> list[Row]:
    """Score a generated text together with its prompt."""
    detail: dict[str, Any] = {}
    value: dict[str, float] = {}
    for side, text in (("before", result.before.text), ("after", result.after.text)):
        value[side] = collapse.legacy_fluency(with_prompt(result.probe, text))
        detail |= {
            f"evenness_{side}": collapse.evenness(text),
            f"distinct_{side}": distinct(text),
            f"repetition_{side}": repetition(text),
            f"text_{side}": text,
        }
    return [result.row(NAME, value["before"], value["after"], **detail)]


def with_prompt(probe: Probe, text: str) -> str:
    """Join a prompt and its text, as ROME's code scores them."""
    return joint(probe.prompt.strip(), text)[0]


METRIC = Metric(
    name=NAME,
    label="fluency",
    title="fluency: n-gram entropy of open text",
    higher_is_better=True,
    forms=frozenset({"open"}),
    needs_text=True,
    rows=rows,
    scores=(plain("GE", "generation.fluency", order=8),),
)
