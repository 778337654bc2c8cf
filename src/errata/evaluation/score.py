"""From observations to rows. Pure: nothing here runs a model or knows which method ran.

Averages of rows are made by :mod:`errata.evaluation.metrics.summary`, whose functions are named here too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from errata.errors import DataError
from errata.evaluation.metrics import (
    collapse,
    consistency,
    divergence,
    locality,
    longform,
    matching,
    probability,
    propagation,
)
from errata.evaluation.metrics.ngrams import distinct, repetition
from errata.evaluation.metrics.summary import legacy_scores, paired, ripple_scores, rome_scores, summarise
from errata.types import Case, Observation, Probe, Row
from errata.writing import joint

__all__ = ["PROTOCOLS", "legacy_scores", "paired", "ripple_scores", "rome_scores", "rows", "summarise"]

PROTOCOLS = (
    "generate", "teacher_forced", "probability", "kl", "choice", "long_form", "perplexity", "fluency", "reference",
)  # fmt: skip

CONDITION = "condition"
"""Kind of probes that the unedited host must answer for their group to count."""


def rows(
    case: Case,
    before: Sequence[Observation],
    after: Sequence[Observation],
    *,
    checkpoint: int | None = None,
    generated: bool = True,
    idf: Mapping[str, float] | None = None,
) -> list[Row]:
    """Score every probe of a case under every protocol its form allows, then every group of probes.

    ``checkpoint``: how many edits were in place, for the rows' detail; None adds nothing. ``generated``:
    whether texts were asked for; without, rows that judge a text are not made. ``idf``: weights of words,
    which the reference score of open texts needs (:mod:`errata.evaluation.metrics.consistency`).

    A chain of thought is judged on the answer read out of it; its rows' kind ends in ``.thought``, so that
    direct answers and reasoned ones are never averaged together. Groups give a row of kind ``<kind>.any`` or
    ``<kind>.all`` under ``generate``, unless the unedited host failed one of their conditions.

    Raises DataError for a probe that names no accepted answer though its form needs one.
    """
    nameless = [probe for probe in case.probes if probe.form != "open" and not probe.answers]
    if nameless:
        raise DataError(
            f"case {case.id}, prompt {nameless[0].prompt!r}: a probe of form {nameless[0].form} needs at least "
            f"one accepted answer ({len(nameless)} such probes)"
        )
    moment = {} if checkpoint is None else {"checkpoint": checkpoint}
    asked = [
        _Asked(case.id, probe, old, new, moment)
        for probe, old, new in zip(case.probes, before, after, strict=True)
    ]
    made: list[Row] = []
    answers: list[tuple[Probe, Row]] = []
    for one in asked:
        if generated and one.probe.form in ("short", "thought"):
            answers.append((one.probe, _generate(one)))
            made.append(answers[-1][1])
        if one.probe.form != "thought":  # an answer forced right after the question is no conclusion
            made += _ROWS_OF[one.probe.form](one, generated)
    made += _groups(case.id, answers, moment)
    if generated and idf is not None:
        made += _reference([one for one in asked if one.probe.form == "open" and one.probe.answers], idf)
    return made


@dataclass(frozen=True)
class _Asked:
    """One probe with what the host said before and after."""

    case: str
    probe: Probe
    old: Observation
    new: Observation
    moment: Mapping[str, int]

    def row(self, protocol: str, b: float, a: float, **detail: Any) -> Row:
        kind = f"{self.probe.kind}.thought" if self.probe.form == "thought" else self.probe.kind
        return Row(
            self.case, kind, protocol, self.probe.prompt, float(b), float(a), {**self.moment, **detail}
        )


def _generate(one: _Asked) -> Row:
    """Judge the text, or the answer read out of a chain of thought."""
    probe = one.probe
    read = propagation.final_answer if probe.form == "thought" else matching.first_answer
    old, new = read(one.old.text), read(one.new.text)
    wrong = [w for w in probe.before if w not in probe.answers] if probe.changes else []
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
        detail["unchanged"] = locality.same_text(one.old.text, one.new.text)
    return one.row(
        "generate",
        matching.answered(old, probe.answers, wrong),
        matching.answered(new, probe.answers, wrong),
        **detail,
    )


def _short(one: _Asked, generated: bool) -> list[Row]:
    """Score the forced answer, its rival, and the distribution of the next token."""
    old, new, changes = one.old, one.new, one.probe.changes
    made = [
        one.row(
            "teacher_forced",
            probability.exact(old.answer_top),
            probability.exact(new.answer_top),
            tokens_before=probability.token_accuracy(old.answer_top),
            tokens_after=probability.token_accuracy(new.answer_top),
            changes=changes,
        )
    ]
    if one.probe.rival is not None:
        made.append(_probability(one, one.probe.rival))
    if old.next_logprobs is not None and new.next_logprobs is not None:
        forward, reverse = divergence.both(old.next_logprobs, new.next_logprobs)
        legacy = divergence.nkl_legacy(old.next_logprobs, new.next_logprobs)
        made.append(one.row("kl", 0.0, forward, reverse=reverse, nkl_legacy=legacy))
    return made


def _probability(one: _Asked, rival: str) -> Row:
    """Compare the forced answer with its rival, per token and summed."""
    old, new = one.old, one.new
    sides = {
        "before": (old.answer_logprobs, old.rival_logprobs),
        "after": (new.answer_logprobs, new.rival_logprobs),
    }
    detail: dict[str, Any] = {"rival": rival, "changes": one.probe.changes}
    for side, (answer, against) in sides.items():
        detail |= {
            f"magnitude_{side}": probability.magnitude(answer, against),
            f"summed_{side}": probability.prefers(answer, against, summed=True),
            f"answer_{side}": probability.per_token(answer),
            f"rival_{side}": probability.per_token(against),
        }
    return one.row(
        "probability", probability.prefers(*sides["before"]), probability.prefers(*sides["after"]), **detail
    )


def _choice(one: _Asked, generated: bool) -> list[Row]:
    """Score whether the most probable choice is an accepted answer, per token and summed."""
    probe, old, new = one.probe, one.old.choice_logprobs, one.new.choice_logprobs
    if not old and not new:
        return []
    for found in (old, new):
        if len(found) != len(probe.choices):
            raise DataError(
                f"case {one.case}, prompt {probe.prompt!r}: {len(probe.choices)} choices, log-probabilities "
                f"of {len(found)}; observe both sides with the same probes"
            )
    detail: dict[str, Any] = {
        "answers": list(probe.answers), "choices": list(probe.choices), "changes": probe.changes,
    }  # fmt: skip
    right: dict[str, bool] = {}
    for side, found in (("before", old), ("after", new)):
        chosen, summed = (
            None if (place := probability.most_probable(found, summed=how)) is None else probe.choices[place]
            for how in (False, True)
        )
        right[side] = chosen in probe.answers
        detail |= {
            f"text_{side}": chosen or "",
            f"summed_{side}": summed in probe.answers,
            f"probabilities_{side}": [probability.per_token(choice) for choice in found],
        }
    return [one.row("choice", right["before"], right["after"], **detail)]


def _span(one: _Asked, generated: bool) -> list[Row]:
    """Score the perplexity of the answer's tokens alone."""
    old, new = one.old.answer_logprobs, one.new.answer_logprobs
    return [one.row("perplexity", probability.perplexity(old), probability.perplexity(new), tokens=len(new))]


def check_packages(cases: Iterable[Case]) -> None:
    """Raise ConfigError, naming the extra, where some probe asks for a long answer that nothing here could score."""
    if any(probe.form == "long" for case in cases for probe in case.probes):
        longform.check_packages()


def _long(one: _Asked, generated: bool) -> list[Row]:
    """Compare a long text with the reference; the value is the F of ROUGE-L."""
    if not generated:
        return []
    reference = one.probe.answers[0]
    detail: dict[str, Any] = {}
    value: dict[str, float] = {}
    for side, text in (("before", one.old.text), ("after", one.new.text)):
        overlap = longform.rouge_l(text, reference)
        value[side] = overlap.f
        detail |= {
            f"precision_{side}": overlap.precision,
            f"recall_{side}": overlap.recall,
            f"rouge1_{side}": longform.rouge(text, reference, 1).f,
            f"rouge2_{side}": longform.rouge(text, reference, 2).f,
            f"bleu_{side}": longform.bleu(text, reference),
            f"legacy_recall_{side}": longform.legacy_recall(text, reference),
            f"legacy_bleu_{side}": longform.legacy_character_bleu(text, reference),
            f"length_ratio_{side}": longform.length_ratio(text, reference),
            f"repetition_{side}": repetition(text),
            f"text_{side}": text,
        }
    return [one.row("long_form", value["before"], value["after"], answers=[reference], **detail)]


def _open(one: _Asked, generated: bool) -> list[Row]:
    """Measure running text with its prompt; the value is GE as papers print it, times 100."""
    if not generated:
        return []
    detail: dict[str, Any] = {}
    value: dict[str, float] = {}
    for side, text in (("before", one.old.text), ("after", one.new.text)):
        value[side] = collapse.legacy_fluency(_whole(one.probe, text))
        detail |= {
            f"evenness_{side}": collapse.evenness(text),
            f"distinct_{side}": distinct(text),
            f"repetition_{side}": repetition(text),
            f"text_{side}": text,
        }
    return [one.row("fluency", value["before"], value["after"], **detail)]


def _whole(probe: Probe, text: str) -> str:
    """Put a prompt before its text, as ROME's code scores them."""
    return joint(probe.prompt.strip(), text)[0]


_ROWS_OF = {"short": _short, "choice": _choice, "span": _span, "long": _long, "open": _open}


def _groups(case: str, answers: Sequence[tuple[Probe, Row]], moment: Mapping[str, int]) -> list[Row]:
    """Make one row of each group of probes of one kind: any of them right, or all."""
    groups: dict[tuple[str, str], list[tuple[Probe, Row]]] = {}
    conditions: dict[str, list[bool]] = {}
    for probe, row in answers:
        if probe.group is None:
            continue
        if probe.kind == CONDITION:
            conditions.setdefault(probe.group, []).append(row.before > 0)
        else:
            groups.setdefault((row.kind, probe.group), []).append((probe, row))
    efficacy = [row.after > 0 for probe, row in answers if probe.kind == "efficacy"]
    edited = {"edited": all(efficacy)} if efficacy else {}
    made = []
    for (kind, name), members in groups.items():
        if not propagation.counts(conditions.get(name, ()), edited=True):
            continue
        need = members[0][0].need
        before, after = ([getattr(row, side) > 0 for _, row in members] for side in ("before", "after"))
        detail = {
            **moment, "group": name, "of": len(members), "mean_before": sum(before) / len(before),
            "mean_after": sum(after) / len(after), "changes": any(p.changes for p, _ in members), **edited,
        }  # fmt: skip
        made.append(
            Row(
                case, f"{kind}.{need}", "generate", members[0][0].prompt,
                float(propagation.together(before, need)), float(propagation.together(after, need)), detail,
            )
        )  # fmt: skip
    return made


def _reference(asked: Sequence[_Asked], idf: Mapping[str, float]) -> list[Row]:
    """Compare all open texts of a case, prompts and all, with all passages that their probes name: one row."""
    if not asked:
        return []
    passages = list(dict.fromkeys(passage for one in asked for passage in one.probe.answers))
    old, new = ([_whole(one.probe, getattr(one, side).text) for one in asked] for side in ("old", "new"))
    before, after = (consistency.reference_score(texts, passages, idf) for texts in (old, new))
    return [asked[0].row("reference", before, after, texts=len(asked))]
