"""From rows to averages: by kind and protocol, as papers name them, and two methods side by side.

Loads neither torch nor a model, so reports can use it on result files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from errata.evaluation.metrics import intervals, probability, propagation
from errata.evaluation.metrics.intervals import Difference
from errata.types import Row

JUDGED = frozenset({"generate", "teacher_forced", "probability", "choice", "judge"})
"""Protocols that say right or wrong. Others measure, and none of their rows is left out."""

PORTABILITY = ("one_hop", "inverse", "alias", "logical")
"""Kinds that EasyEdit averages as portability."""

Side = Literal["before", "after"]
Summary = Mapping[str, Mapping[str, Any]]


def summarise(table: Iterable[Row], *, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Average rows by kind and protocol, as ``{"<kind>.<protocol>": {before, after, n, ci, ...}}``.

    For probes whose answer must not change, ``before`` is the share right before and ``after`` the
    share still right among those; ``n`` counts what ``after`` averages. ``ci`` is a 95 % bootstrap
    interval of ``after`` over cases, ``[None, None]`` where there is none.

    ``macro_before``, ``macro_after``: as papers average, over all rows, inside a case first. Besides, by
    protocol (None where nothing of the kind was found):

    * generate: ``exact`` and ``exact_before``, strict exact match, over the rows ``after`` averages; ``old``
      and ``old_before``, share that asserts the old answer, where one is known; ``unchanged``, share of the
      same text among probes whose answer must not change; ``known`` and ``unknown``, ``after`` where the
      unedited host said the old answer and where it did not, and ``n_known``; of groups ``edited``,
      ``after`` where the edit itself succeeded, and ``n_edited``;
    * teacher_forced: ``tokens_before``, ``tokens_after``, share of tokens, averaged as the papers do;
    * probability: ``magnitude_*``, ``summed_*``, ``answer_*``, ``rival_*``: margin, preference by summed
      log-probability, and the two probabilities; choice: ``summed_*``;
    * kl: ``mean``, ``p95``, and of the other direction ``reverse``, ``reverse_p95``; ``nkl_legacy``;
    * perplexity, long_form, fluency, reference: ``mean`` and what the rows' detail measures.
    """
    return {name: _entry(group, seed) for name, group in _grouped(table).items()}


def paired(first: Iterable[Row], second: Iterable[Row], *, seed: int = 0) -> dict[str, Difference]:
    """Compare two methods on the same cases, by ``"<kind>.<protocol>"``: second minus first, with interval.

    Each table is one method's, and of a sequence one look's. Values are those that ``after`` of
    :func:`summarise` averages; what the two have no case of in common is left out.
    """
    a, b = _counted_by_case(first), _counted_by_case(second)
    found = {name: intervals.paired(a[name], b[name], seed=seed) for name in a if name in b}
    return {name: difference for name, difference in found.items() if difference is not None}


def _counted_by_case(table: Iterable[Row]) -> dict[str, dict[str, list[float]]]:
    return {name: _by_case(_counted(group)) for name, group in _grouped(table).items()}


def _grouped(table: Iterable[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in table:
        groups.setdefault(f"{row.kind}.{row.protocol}", []).append(row)
    return groups


def _counted(group: Sequence[Row]) -> list[Row]:
    """Leave out kept answers that were wrong before: they say nothing of damage."""
    if group[0].protocol not in JUDGED:
        return list(group)
    return [row for row in group if row.detail.get("changes", True) or row.before > 0]


def _by_case(
    group: Iterable[Row], value: Callable[[Row], Any] = lambda row: row.after
) -> dict[str, list[float]]:
    """Collect a number of each row by case; rows where it is None are left out."""
    cases: dict[str, list[float]] = {}
    for row in group:
        if (found := value(row)) is not None:
            cases.setdefault(row.case, []).append(float(found))
    return cases


def _entry(group: list[Row], seed: int) -> dict[str, Any]:
    counted = _counted(group)
    interval = intervals.bootstrap(list(_by_case(counted).values()), seed=seed)
    entry: dict[str, Any] = {
        "before": intervals.mean([row.before for row in group]),
        "after": intervals.mean([row.after for row in counted]),
        "n": len(counted),
        "ci": list(interval) if interval else [None, None],
        "macro_before": intervals.macro(list(_by_case(group, lambda row: row.before).values())),
        "macro_after": intervals.macro(list(_by_case(group).values())),
    }
    protocol = group[0].protocol
    if protocol == "generate":
        entry |= _generated(group, counted)
    elif protocol == "teacher_forced":
        entry |= _details(group, ("tokens_before", "tokens_after"))
    elif protocol in ("probability", "choice"):
        names = ("magnitude", "summed", "answer", "rival") if protocol == "probability" else ("summed",)
        entry |= _details(group, [f"{name}_{side}" for name in names for side in ("before", "after")])
    elif protocol == "kl":
        reverse = [row.detail["reverse"] for row in group if "reverse" in row.detail]
        entry |= {
            "mean": entry["after"],
            "p95": intervals.quantile([row.after for row in group], 0.95),
            "reverse": intervals.mean(reverse),
            "reverse_p95": intervals.quantile(reverse, 0.95),
            **_details(group, ("nkl_legacy",)),
        }
    elif protocol not in JUDGED:
        entry |= {"mean": entry["after"], **_details(group, _measured(group))}
    return entry


def _generated(group: Sequence[Row], counted: Sequence[Row]) -> dict[str, Any]:
    """Return what free generation tells besides right and wrong."""
    changing = [row for row in group if row.detail.get("changes", True)]
    said_old = [row for row in changing if row.detail.get("old_before")]
    said_else = [row for row in changing if row.detail.get("old_before") is False]
    entry = {
        "exact": intervals.mean(_numbers(counted, "exact_after")),
        "exact_before": intervals.mean(_numbers(group, "exact_before")),
        "old": intervals.mean(_numbers(group, "old_after")),
        "old_before": intervals.mean(_numbers(group, "old_before")),
        "unchanged": intervals.mean(_numbers(group, "unchanged")),
        "known": intervals.mean([row.after for row in said_old]),
        "unknown": intervals.mean([row.after for row in said_else]),
        "n_known": len(said_old),
    }
    if any("edited" in row.detail for row in group):
        done = [row.after for row in counted if row.detail.get("edited")]
        entry |= {"edited": intervals.mean(done), "n_edited": len(done)}
    return entry


def _numbers(group: Iterable[Row], name: str) -> list[float]:
    return [float(value) for row in group if (value := row.detail.get(name)) is not None]


def _details(group: Sequence[Row], names: Iterable[str]) -> dict[str, float | None]:
    """Average numbers of the rows' detail, inside a case first."""
    return {
        name: intervals.macro(list(_by_case(group, lambda row, name=name: row.detail.get(name)).values()))
        for name in names
    }


def _measured(group: Sequence[Row]) -> list[str]:
    """Names of the numbers in the rows' detail, each in the order it first comes up."""
    names = dict.fromkeys(name for row in group for name in row.detail)
    return [name for name in names if name.endswith(("_before", "_after")) and not name.startswith("text_")]


def legacy_scores(summary: Summary, *, side: Side = "after") -> dict[str, float]:
    """Return scores under the names and in the units of the papers; those the summary allows.

    Averaged as papers do, over all rows and inside a case first; ``side`` "before" gives the unedited row.

    * ES PS NS, EM PM NM, S in per cent (ROME); NS+ NM+ (CounterFact+); AMS.*, CAP.*, DP.*, EOS.* by kind
      (EVOKE); NKL, NKL+ in the published unit, "after" only;
    * Rel Gen Loc Port: teacher-forced share of tokens in per cent (zsRE, EasyEdit). Loc is held against the
      gold answer, as by ROME and UltraEdit; EasyEdit's own Loc is :func:`locality.agreement`. Rel.exact and
      Gen.exact: all tokens (MEND's ES);
    * GE times 100, RS in per cent; MH.any, MH.mean, Instance in per cent (MQuAKE), with ``.thought`` where a
      chain of thought was asked; ROUGE-L (recall) and BLEU (characters) in per cent, ``.paraphrase`` of the
      paraphrased question (UnKE); PPL and PPL.spec (ECBD), EI.acc and EI.spec in per cent.
    """
    read = _Reader(summary, side)
    scores = read.per_cent({
        "ES": ("efficacy.probability", "macro"), "PS": ("paraphrase.probability", "macro"),
        "NS": ("neighbourhood.probability", "macro"), "EM": ("efficacy.probability", "magnitude"),
        "PM": ("paraphrase.probability", "magnitude"), "NM": ("neighbourhood.probability", "magnitude"),
        "NS+": ("distracting.probability", "macro"), "NM+": ("distracting.probability", "magnitude"),
        "Rel": ("efficacy.teacher_forced", "tokens"), "Gen": ("paraphrase.teacher_forced", "tokens"),
        "Loc": ("locality.teacher_forced", "tokens"), "Rel.exact": ("efficacy.teacher_forced", "macro"),
        "Gen.exact": ("paraphrase.teacher_forced", "macro"), "RS": ("generation.reference", "macro"),
        "MH.any": ("multi_hop.any.generate", "macro"), "MH.mean": ("multi_hop.generate", "macro"),
        "MH.any.thought": ("multi_hop.thought.any.generate", "macro"),
        "MH.mean.thought": ("multi_hop.thought.generate", "macro"), "Instance": ("hop.all.generate", "macro"),
        "ROUGE-L": ("long.long_form", "legacy_recall"), "BLEU": ("long.long_form", "legacy_bleu"),
        "ROUGE-L.paraphrase": ("long_paraphrase.long_form", "legacy_recall"),
        "BLEU.paraphrase": ("long_paraphrase.long_form", "legacy_bleu"),
        "EI.acc": ("entity.choice", "macro"), "EI.spec": ("entity_locality.choice", "macro"),
    })  # fmt: skip
    for kind in ("multi_hop", "distracting", "same_subject", "neighbourhood"):
        of = f"{kind}.probability"
        names = {f"CAP.{kind}": "answer", f"DP.{kind}": "rival", f"EOS.{kind}": "macro"}
        scores |= read.per_cent({name: (of, what) for name, what in names.items()})
    for kind in ("efficacy", "paraphrase"):
        of = f"{kind}.probability"
        names = {f"CAP.{kind}": "answer", f"OAP.{kind}": "rival", f"AMS.{kind}": "macro"}
        scores |= read.per_cent({name: (of, what) for name, what in names.items()})
    return scores | _composed(read, scores)


def _composed(read: _Reader, scores: Mapping[str, float]) -> dict[str, float]:
    """Return the scores that are no share in per cent, or made of several."""
    made: dict[str, float] = {}
    shares = [scores[name] / 100 for name in ("ES", "PS", "NS") if name in scores]
    if len(shares) == 3:
        made["S"] = probability.legacy_score(shares)
    ported = [v for kind in PORTABILITY if (v := read.value(f"{kind}.teacher_forced", "tokens")) is not None]
    if ported:
        made["Port"] = 100 * sum(ported) / len(ported)
    plain = {"GE": "generation.fluency", "PPL": "entity.perplexity", "PPL.spec": "entity_locality.perplexity"}
    made |= {name: v for name, of in plain.items() if (v := read.value(of, "macro")) is not None}
    if read.side == "after":
        for name, kind in (("NKL", "neighbourhood"), ("NKL+", "distracting")):
            value = read.summary.get(f"{kind}.kl", {}).get("nkl_legacy")
            if value is not None:
                made[name] = value
    return made


def rome_scores(summary: Summary) -> dict[str, float]:
    """Return ROME's ES, PS, NS and their harmonic mean S, in per cent, from a summary."""
    scores = legacy_scores(summary)
    return {name: scores[name] for name in ("ES", "PS", "NS", "S") if name in scores}


def ripple_scores(table: Iterable[Row]) -> dict[str, float]:
    """Return RippleEdits' criteria in per cent, from rows: tests of cases whose edit succeeded.

    Tests whose conditions the unedited host failed have no row. Averaged per case, then over cases; ``mean``
    is that of the criteria.
    """
    examples: dict[str, dict[str, list[bool]]] = {}
    for row in table:
        kind, _, need = row.kind.rpartition(".")
        if kind in propagation.CRITERIA and need in ("any", "all") and row.detail.get("edited"):
            examples.setdefault(row.case, {}).setdefault(kind, []).append(row.after > 0)
    found = propagation.criteria(list(examples.values()))
    order = (*(name for name in propagation.CRITERIA if name in found), "mean")
    return {name: 100 * found[name] for name in order if name in found}


class _Reader:
    """Looks numbers of one side up in a summary."""

    def __init__(self, summary: Summary, side: Side) -> None:
        self.summary, self.side = summary, side

    def value(self, key: str, what: str) -> float | None:
        """Return a number, None where it was not measured."""
        return self.summary.get(key, {}).get(f"{what}_{self.side}")

    def per_cent(self, wanted: Mapping[str, tuple[str, str]]) -> dict[str, float]:
        """Return those shares that were measured, in per cent."""
        found = {name: self.value(*place) for name, place in wanted.items()}
        return {name: 100 * value for name, value in found.items() if value is not None}
