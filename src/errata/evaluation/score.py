"""Compute rows from observations. Pure: nothing here runs a model, or depends on the method or on particular metrics.

Rows are averaged by :mod:`errata.evaluation.metrics.summary`, whose functions are exported here too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from errata.errors import DataError
from errata.evaluation.metrics import REGISTRY, CaseResult, ProbeResult
from errata.evaluation.metrics.summary import legacy_scores, paired, ripple_scores, rome_scores, summarise
from errata.types import Case, Observation, Probe, Row

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
    """Score every probe of a case with every metric for its form, then add the scores that need several probes.

    ``checkpoint``: how many edits were in place, for the rows' detail; None adds nothing. ``generated``:
    whether texts were generated; if not, metrics of texts give no rows. ``idf``: weights of words for
    the reference score of open texts (:mod:`errata.evaluation.metrics.consistency`).

    A chain of thought is scored on the answer extracted from it; its rows' kind ends in ``.thought``, so that
    direct answers and reasoned ones are never averaged together. Groups of probes give a row of kind ``<kind>.any`` or
    ``<kind>.all`` under ``generate``, unless the unedited host failed one of their conditions.

    Raises DataError for a probe without accepted answers though its form needs one.
    """
    _check_answers(case)
    detail = {} if checkpoint is None else {"checkpoint": checkpoint}
    targets = tuple(request.target for request in case.requests)
    old_targets = tuple(r.target_old for r in case.requests if r.target_old is not None)
    results = [
        ProbeResult(case.id, probe, old, new, detail | _languages(case, probe), targets, old_targets)
        for probe, old, new in zip(case.probes, before, after, strict=True)
    ]
    metrics = [metric for metric in REGISTRY.values() if generated or not metric.needs_text]
    by_metric: dict[str, list[tuple[ProbeResult, Row]]] = {metric.name: [] for metric in metrics}
    table: list[Row] = []
    for result in results:
        for metric in metrics:
            if metric.rows is not None and result.probe.form in metric.forms:
                new_rows = metric.rows(result)
                by_metric[metric.name] += [(result, row) for row in new_rows]
                table += new_rows
    for metric in metrics:
        if metric.case_rows is not None:
            table += metric.case_rows(CaseResult(case.id, results, by_metric[metric.name], detail, idf))
    return table


def _languages(case: Case, probe: Probe) -> dict[str, str]:
    """Return the languages of a case's request and of a probe, where both are told."""
    edited = case.request.language
    return (
        {} if edited is None or probe.language is None else {"edited_in": edited, "asked_in": probe.language}
    )


def _check_answers(case: Case) -> None:
    """Raise DataError for probes without accepted answers though their form needs one."""
    without_answers = [probe for probe in case.probes if probe.form != "open" and not probe.answers]
    if without_answers:
        raise DataError(
            f"case {case.id}, prompt {without_answers[0].prompt!r}: a probe of form {without_answers[0].form} needs "
            f"at least one accepted answer ({len(without_answers)} such probes)"
        )


def check_packages(cases: Iterable[Case]) -> None:
    """Raise ConfigError, with the extra to install, for a probe whose form the installed packages cannot score."""
    forms = {probe.form for case in cases for probe in case.probes}
    for metric in REGISTRY.values():
        if metric.check is not None and metric.forms & forms:
            metric.check()
