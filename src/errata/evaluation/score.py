"""From observations to rows. Pure: nothing here runs a model or knows which method ran, or which metrics there are.

Averages of rows are made by :mod:`errata.evaluation.metrics.summary`, whose functions are named here too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from errata.errors import DataError
from errata.evaluation.metrics import REGISTRY, CaseResult, ProbeResult
from errata.evaluation.metrics.summary import legacy_scores, paired, ripple_scores, rome_scores, summarise
from errata.types import Case, Observation, Row

__all__ = ["legacy_scores", "paired", "ripple_scores", "rome_scores", "rows", "summarise"]


def rows(
    case: Case,
    before: Sequence[Observation],
    after: Sequence[Observation],
    *,
    checkpoint: int | None = None,
    generated: bool = True,
    idf: Mapping[str, float] | None = None,
) -> list[Row]:
    """Score every probe of a case with every metric that takes its form, then what needs several probes.

    ``checkpoint``: how many edits were in place, for the rows' detail; None adds nothing. ``generated``:
    whether texts were asked for; without, metrics that read a text make no rows. ``idf``: weights of words,
    which the reference score of open texts needs (:mod:`errata.evaluation.metrics.consistency`).

    A chain of thought is judged on the answer read out of it; its rows' kind ends in ``.thought``, so that
    direct answers and reasoned ones are never averaged together. Groups give a row of kind ``<kind>.any`` or
    ``<kind>.all`` under ``generate``, unless the unedited host failed one of their conditions.

    Raises DataError for a probe that names no accepted answer though its form needs one.
    """
    _check_answers(case)
    detail = {} if checkpoint is None else {"checkpoint": checkpoint}
    results = [
        ProbeResult(case.id, probe, old, new, detail)
        for probe, old, new in zip(case.probes, before, after, strict=True)
    ]
    metrics = [metric for metric in REGISTRY.values() if generated or not metric.needs_text]
    scored: dict[str, list[tuple[ProbeResult, Row]]] = {metric.name: [] for metric in metrics}
    table: list[Row] = []
    for result in results:
        for metric in metrics:
            if metric.rows is not None and result.probe.form in metric.forms:
                new_rows = metric.rows(result)
                scored[metric.name] += [(result, row) for row in new_rows]
                table += new_rows
    for metric in metrics:
        if metric.case_rows is not None:
            table += metric.case_rows(CaseResult(case.id, results, scored[metric.name], detail, idf))
    return table


def _check_answers(case: Case) -> None:
    """Raise DataError for probes that name no accepted answer though their form needs one."""
    nameless = [probe for probe in case.probes if probe.form != "open" and not probe.answers]
    if nameless:
        raise DataError(
            f"case {case.id}, prompt {nameless[0].prompt!r}: a probe of form {nameless[0].form} needs at least "
            f"one accepted answer ({len(nameless)} such probes)"
        )


def check_packages(cases: Iterable[Case]) -> None:
    """Raise ConfigError, naming the extra, where some probe has a form that nothing installed here can score."""
    forms = {probe.form for case in cases for probe in case.probes}
    for metric in REGISTRY.values():
        if metric.check is not None and metric.forms & forms:
            metric.check()
