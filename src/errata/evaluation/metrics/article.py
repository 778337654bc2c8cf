"""Articles rewritten by new evidence: what is scored is the change, not what was copied (FRUIT, arXiv 2112.08634).

Most sentences of a rewritten article stay, so ordinary ROUGE is high for an article that was only copied. UpdateROUGE
is the ROUGE F-score of the sentences that are not the old article's, of the answer against those of the target; one if
neither has any, zero if only one has. Sentences are told apart as texts, cut at sentence ends by one rule on both
sides; the authors compare sentences by their numbers in the file.

Names and numbers are found by their spelling, where the authors tag entities. Recall is of those that the target adds
and that the evidence has; precision is the share of those in the answer's new sentences that the old article or the
evidence has: the others are not supported.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from errata.evaluation.metrics._metric import Metric, ProbeResult, per_cent
from errata.evaluation.metrics.longform import check_packages, rouge, rouge_l_of_sentences
from errata.types import Row

NAME = "article"
EVIDENCE = "[CONTEXT]"
"""What stands in a prompt between the old article and the evidence."""

_ENDS = re.compile(r"([.!?][\"'”’)\]]*)\s+(?=[\"'“‘(\[]*[A-Z0-9])")
_NAMES = re.compile(r"\b[A-Z][\w'’.-]*\w(?:\s+[A-Z][\w'’.-]*\w)*|\d[\d,.]*\d|\d")
_COMMON = frozenset(
    ("A", "An", "And", "As", "At", "But", "By", "For", "From", "He", "Her", "His", "However", "In", "It", "Its", "On",
     "She", "The", "Their", "They", "This", "To", "Was", "When", "With")
)  # fmt: skip


def sentences(text: str) -> list[str]:
    """Cut a text at sentence ends before a capital letter or a digit; white space is made uniform."""
    marked = _ENDS.sub(r"\1\n", " ".join(text.split()))
    return [part for part in marked.split("\n") if part]


def changed(text: str, source: str) -> list[str]:
    """Return the sentences of a text that its source does not have."""
    old = set(sentences(source))
    return [sentence for sentence in sentences(text) if sentence not in old]


@dataclass(frozen=True)
class UpdateRouge:
    """ROUGE F-scores of what changed, each in [0, 1]."""

    rouge1: float
    rouge2: float
    rouge_l: float
    """Of summaries: the union of longest common subsequences over sentences."""


def update_rouge(source: str, target: str, text: str) -> UpdateRouge:
    """Return UpdateROUGE of a rewritten text: of the sentences of ``target`` and ``text`` that ``source`` lacks."""
    new, own = changed(target, source), changed(text, source)
    if not new and not own:
        return UpdateRouge(1.0, 1.0, 1.0)
    if not new or not own:
        return UpdateRouge(0.0, 0.0, 0.0)
    one, other = " ".join(own), " ".join(new)
    return UpdateRouge(rouge(one, other, 1).f, rouge(one, other, 2).f, rouge_l_of_sentences(own, new).f)


def names(text: str) -> set[str]:
    """Return the names and numbers of a text: runs of capitalised words, without a common word in front, and digits."""
    found = set[str]()
    for match in _NAMES.findall(text):
        words = match.split()
        while words and words[0] in _COMMON:
            words.pop(0)
        if words:
            found.add(" ".join(words))
    return found


def name_recall(source: str, target: str, text: str, evidence: str) -> float | None:
    """Return the share of names that the target adds and the evidence has which the text adds too; None without any."""
    expected = {name for name in _added(target, source) if name in evidence}
    return _share(expected, " ".join(changed(text, source)))


def name_precision(source: str, text: str, evidence: str) -> float | None:
    """Return the share of names in a text's new sentences that its source or the evidence has; None without any."""
    return _share(names(" ".join(changed(text, source))), f"{source} {evidence}")


def _added(text: str, source: str) -> set[str]:
    return {name for name in names(" ".join(changed(text, source))) if name not in source}


def _share(expected: Collection[str], text: str) -> float | None:
    return sum(name in text for name in expected) / len(expected) if expected else None


def retained(source: str, target: str, text: str) -> tuple[float, float, float]:
    """Return precision, recall and F of the old sentences that a text keeps, against those that the target keeps.

    One where neither keeps any, zero where only one does.
    """
    old = set(sentences(source))
    expected, own = old & set(sentences(target)), old & set(sentences(text))
    if not expected or not own:
        same = float(not expected and not own)
        return same, same, same
    both = len(expected & own)
    precision, recall = both / len(own), both / len(expected)
    return precision, recall, 2 * precision * recall / (precision + recall) if both else 0.0


def rows(result: ProbeResult) -> list[Row]:
    """Score both texts; the value is UpdateROUGE-L. Empty where the probe has no old article and evidence."""
    probe = result.probe
    _, mark, evidence = probe.prompt.partition(EVIDENCE)
    if not (mark and probe.before):
        return []
    evidence = evidence.replace("_", " ")  # as in titles of pages
    source, target = probe.before[0], probe.answers[0]
    value: dict[str, float] = {}
    detail: dict[str, Any] = {}
    for side, text in (("before", result.before.text), ("after", result.after.text)):
        scores = update_rouge(source, target, text)
        value[side] = scores.rouge_l
        kept = retained(source, target, text)
        detail |= {
            f"update_rouge1_{side}": scores.rouge1,
            f"update_rouge2_{side}": scores.rouge2,
            f"exact_{side}": float(" ".join(text.split()) == " ".join(target.split())),
            f"name_recall_{side}": name_recall(source, target, text, evidence),
            f"name_precision_{side}": name_precision(source, text, evidence),
            **{f"retained_{name}_{side}": share for name, share in zip(("p", "r", "f"), kept, strict=True)},
        }
    return [result.row(NAME, value["before"], value["after"], **detail)]


SCORES = {
    "UpdateROUGE-L": "macro", "UpdateROUGE-1": "update_rouge1", "UpdateROUGE-2": "update_rouge2",
    "FRUIT.exact": "exact", "FRUIT.name-recall": "name_recall", "FRUIT.name-precision": "name_precision",
    "FRUIT.retained-F": "retained_f",
}  # fmt: skip

METRIC = Metric(
    name=NAME,
    label="article",
    title="rewritten articles: UpdateROUGE-L of the sentences that changed, per cent",
    unit="share",
    higher_is_better=True,
    forms=frozenset({"long"}),
    needs_text=True,
    check=check_packages,
    rows=rows,
    scores=tuple(per_cent(name, f"long.{NAME}", number, order=6) for name, number in SCORES.items()),
)
