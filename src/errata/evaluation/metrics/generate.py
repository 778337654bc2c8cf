"""Free generation: whether the generated text gives an accepted answer and not the old one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from errata.evaluation.metrics import intervals, matching, propagation
from errata.evaluation.metrics._metric import (
    SIDES,
    CaseResult,
    Column,
    Metric,
    PaperScore,
    ProbeResult,
    Side,
    Summary,
    number_of,
    numbers,
    per_cent,
)
from errata.types import Row
from errata.types.kinds import CONDITION, EFFICACY, kind_of

NAME = "generate"


def rows(result: ProbeResult) -> list[Row]:
    """Match the generated text, or the answer extracted from a chain of thought, with the accepted answers."""
    probe = result.probe
    read = propagation.final_answer if probe.form == "thought" else matching.first_answer
    old, new = read(result.before.text), read(result.after.text)
    wrong = [answer for answer in probe.before if answer not in probe.answers] if probe.changes else []
    detail: dict[str, Any] = {
        "text_before": old,
        "text_after": new,
        "answers": list(probe.answers),
        "changes": probe.changes,
        "exact_before": matching.exact(old, probe.answers),
        "exact_after": matching.exact(new, probe.answers),
    }
    if wrong:
        detail["old_before"] = matching.asserts_old(old, probe.answers, wrong)
        detail["old_after"] = matching.asserts_old(new, probe.answers, wrong)
    if not probe.changes:
        detail["unchanged"] = result.before.text.strip() == result.after.text.strip()
    before, after = (matching.answered(text, probe.answers, wrong) for text in (old, new))
    return [result.row(NAME, before, after, **detail)]


def group_rows(case: CaseResult) -> list[Row]:
    """Compute one row for each group of probes of a kind, ``<kind>.any`` or ``<kind>.all``.

    There is none for a group if the unedited host failed one of its conditions.
    """
    groups: dict[tuple[str, str], list[tuple[ProbeResult, Row]]] = {}
    conditions: dict[str, list[bool]] = {}
    for result, row in case.rows:
        if result.probe.group is None:
            continue
        if result.probe.kind == CONDITION:
            conditions.setdefault(result.probe.group, []).append(row.before > 0)
        else:
            groups.setdefault((row.kind, result.probe.group), []).append((result, row))
    efficacy = [row.after > 0 for result, row in case.rows if result.probe.kind == EFFICACY]
    edited = {"edited": all(efficacy)} if efficacy else {}
    return [
        _group_row(case, kind, name, members, edited)
        for (kind, name), members in groups.items()
        if propagation.counts(conditions.get(name, ()), edited=True)
    ]


def _group_row(
    case: CaseResult, kind: str, name: str, members: Sequence[tuple[ProbeResult, Row]], edited: Mapping[str, bool]
) -> Row:  # fmt: skip
    first = members[0][0].probe
    before, after = ([getattr(row, side) > 0 for _, row in members] for side in ("before", "after"))
    detail = {
        **case.detail, "group": name, "of": len(members), "mean_before": sum(before) / len(before),
        "mean_after": sum(after) / len(after), "changes": any(result.probe.changes for result, _ in members),
        **edited,
    }  # fmt: skip
    return Row(
        case.case, f"{kind}.{first.need}", NAME, first.prompt, float(propagation.together(before, first.need)),
        float(propagation.together(after, first.need)), detail,
    )  # fmt: skip


def summary(rows: Sequence[Row], relevant: Sequence[Row]) -> dict[str, Any]:
    """Return averages of the rows' detail; None where no row has the entry.

    ``exact`` and ``exact_before``: strict exact match, over the relevant rows; ``old`` and ``old_before``: share that
    asserts the old answer, where there is one; ``unchanged``: share of equal texts among probes whose answer must not
    change; ``known`` and ``unknown``: the average where the unedited host gave the old answer and where it did not,
    and ``n_known``; for groups ``edited``, the average where the edit itself succeeded, and ``n_edited``.
    """
    changing = [row for row in rows if row.detail.get("changes", True)]
    old_before = [row for row in changing if row.detail.get("old_before")]
    other_before = [row for row in changing if row.detail.get("old_before") is False]
    entry = {
        "exact": intervals.mean(numbers(relevant, "exact_after")),
        "exact_before": intervals.mean(numbers(rows, "exact_before")),
        "old": intervals.mean(numbers(rows, "old_after")),
        "old_before": intervals.mean(numbers(rows, "old_before")),
        "unchanged": intervals.mean(numbers(rows, "unchanged")),
        "known": intervals.mean([row.after for row in old_before]),
        "unknown": intervals.mean([row.after for row in other_before]),
        "n_known": len(old_before),
    }
    if any("edited" in row.detail for row in rows):
        edited = [row.after for row in relevant if row.detail.get("edited")]
        entry |= {"edited": intervals.mean(edited), "n_edited": len(edited)}
    return entry


def fuar(summary: Summary, side: Side) -> float | None:
    """Return what was forgotten for what was learned: the loss of kept answers over the gain in efficacy.

    The forgotten / (updated + acquired) ratio of CKL (arXiv 2110.03215) for one step. Both differences are at least
    zero; the loss is the mean over kept kinds. None before the edit, where no kept kind was asked, and where nothing
    was learned.
    """

    def change(key: str) -> float:
        before, after = (number_of(summary, key, "macro", one) or 0.0 for one in SIDES)
        return after - before

    kept = [key for key in summary if key.endswith(f".{NAME}") and kind_of(key).group == "kept"]
    learned = f"{EFFICACY}.{NAME}"
    if side == "before" or not kept or learned not in summary or change(learned) <= 0:
        return None
    return sum(max(0.0, -change(key)) for key in kept) / len(kept) / change(learned)


METRIC = Metric(
    name=NAME,
    label="generate",
    title="free generation",
    judges=True,
    forms=frozenset({"short", "thought", "steps"}),
    needs_text=True,
    rows=rows,
    case_rows=group_rows,
    summary=summary,
    columns=(
        Column("exact", "strict", "only the answer", "changing"),
        Column("old", "old answer", "still asserted", "changing"),
        Column("unchanged", "same text", "word for word as before", "kept"),
    ),
    scores=(
        per_cent("MH.any", "multi_hop.any.generate", order=2),
        per_cent("MH.mean", "multi_hop.generate", order=2),
        per_cent("MH.any.thought", "multi_hop.thought.any.generate", order=2),
        per_cent("MH.mean.thought", "multi_hop.thought.generate", order=2),
        per_cent("MH.mean.steps", "multi_hop.steps.generate", order=2),
        per_cent("Instance", "hop.all.generate", order=2),
        PaperScore("FUAR", fuar, order=9),
    ),
    order=0,
    headline=True,
)
