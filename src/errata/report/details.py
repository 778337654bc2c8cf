"""Cases with their texts, packed for the page: each distinct text, probe and list of probes is stored once."""

from __future__ import annotations

import math
from collections.abc import Hashable
from itertools import islice
from typing import Any

from errata.evaluation.metrics import REGISTRY
from errata.report import kinds
from errata.report.read import Answer, CaseAnswers, Cell

LONGEST = 600
"""Maximum characters of a text; a longer one is truncated with an ellipsis."""


def judging_protocols() -> list[str]:
    """List the protocols whose scores are right or wrong, the one that boards rank by first."""
    judging = [metric for metric in REGISTRY.values() if metric.judges and not metric.by_judge]
    return [metric.name for metric in sorted(judging, key=lambda metric: not metric.headline)]


class _Numbered:
    """Numbers distinct items in order of first occurrence."""

    def __init__(self) -> None:
        self.items: dict[Hashable, int] = {}

    def __call__(self, item: Hashable) -> int:
        return self.items.setdefault(item, len(self.items))


class Details:
    """Data of the page's list of probes.

    The document: ``marked``, the protocols whose scores are right or wrong, the one that boards rank by first, each a
    base-3 digit of a probe's mark (0 not evaluated, 1 wrong, 2 right); ``strings``; ``probes``, each ``[kind, prompt,
    [answers], text before, changes, mark before]`` with texts as indices of strings (-1: none); ``lists`` of probes;
    ``cells``, each ``{"total", "cases"}`` with cases ``[name, edits, list, [texts after], [marks after], [probe,
    protocol, before, after, ...]]``, the last for other scores; ``kinds``, the headings of the probes' kinds.
    """

    def __init__(self, cases: int) -> None:
        self.cases = cases
        self._protocols = judging_protocols()
        self._strings = _Numbered()
        self._probes = _Numbered()
        self._lists = _Numbered()
        self._cells: list[dict[str, Any]] = []
        self._kinds: dict[str, str] = {}

    def add(self, cell: Cell) -> int | None:
        """Add a cell's first cases; return its index, or None where it has none."""
        packed = [self._case(case) for case in islice(cell.case_answers(), self.cases)]
        if not packed:
            return None
        self._cells.append({"total": cell.cases, "cases": packed})
        return len(self._cells) - 1

    def document(self) -> dict[str, Any]:
        """Return all data, JSON-ready."""
        return {
            "marked": self._protocols,
            "strings": list(self._strings.items),
            "probes": list(self._probes.items),
            "lists": list(self._lists.items),
            "cells": self._cells,
            "kinds": self._kinds,
        }

    def _text(self, text: str | None) -> int:
        if text is None:
            return -1
        return self._strings(text if len(text) <= LONGEST else text[: LONGEST - 2] + " …")

    def _case(self, case: CaseAnswers) -> list[Any]:
        probes = self._lists(tuple(self._probe(answer) for answer in case.answers))
        after = [self._text(answer.text_after) for answer in case.answers]
        marks = [self._mark(answer, 1) for answer in case.answers]
        return [self._text(case.case), case.edits, probes, after, marks, self._numbers(case.answers)]

    def _probe(self, answer: Answer) -> int:
        self._kinds.setdefault(answer.kind, kinds.label(answer.kind))
        return self._probes((
            self._text(answer.kind), self._text(answer.prompt), tuple(map(self._text, answer.answers)),
            self._text(answer.text_before), int(answer.changes), self._mark(answer, 0),
        ))  # fmt: skip

    def _numbers(self, answers: tuple[Answer, ...]) -> list[Any]:
        entries: list[Any] = []
        for i, answer in enumerate(answers):
            for protocol, pair in answer.scores.items():
                if protocol not in self._protocols or any(score not in (0.0, 1.0) for score in pair):
                    entries += [i, self._text(protocol), *map(_short, pair)]
        return entries

    def _mark(self, answer: Answer, side: int) -> int:
        mark = 0
        for place, protocol in enumerate(self._protocols):
            score = answer.scores.get(protocol, (None, None))[side]
            if score in (0.0, 1.0):
                mark += (2 if score else 1) * 3**place
        return mark


def _short(value: float | None) -> float | str | None:
    if value is None or math.isfinite(value):
        return None if value is None else float(f"{value:.3g}")
    return str(value)
