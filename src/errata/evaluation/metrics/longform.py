"""How near a long answer comes to the one that was taught: UnKE, AKEW, EditEverything, FRUIT.

The published code of these sets (arXiv 2405.15349, 2502.05628) prints recall as "ROUGE-L" and a BLEU of
characters; both stand here as ``legacy_*`` beside the usual definitions.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from errata.evaluation.metrics._metric import Metric, ProbeResult, per_cent
from errata.evaluation.metrics.ngrams import grams, repetition
from errata.types import Row

_TERM = re.compile(r"[^\W_]+")


@dataclass(frozen=True)
class Overlap:
    """What two texts share, each in [0, 1]."""

    precision: float
    recall: float
    f: float
    """Harmonic mean of the two."""


def rouge(said: str, wanted: str, n: int) -> Overlap:
    """ROUGE-n: n-grams in common, each as often as both have it (Lin 2004).

    Terms are runs of letters and digits, case folded, without stemming. 0 where either text has none.
    """
    a, b = Counter(grams(_terms(said), n)), Counter(grams(_terms(wanted), n))
    return _overlap((a & b).total(), a.total(), b.total())


def rouge_l(said: str, wanted: str) -> Overlap:
    """ROUGE-L: the longest common subsequence of terms over each text's length (Lin 2004)."""
    a, b = _terms(said), _terms(wanted)
    return _overlap(_lengths(a, b)[-1][-1] if a and b else 0, len(a), len(b))


def legacy_recall(said: str, wanted: str) -> float:
    """Return what the UnKE and AnyEdit code prints as ROUGE-L: recall, of the ``rouge`` package's definition.

    Quirks kept: sentences are cut at every period; of each pair of sentences one longest common subsequence
    is taken, its words are put into one set for all pairs, and the set's size is divided by the number of
    different words of the wanted text. Case and punctuation count, and a blank after the last period is a
    word. 0 where either text has no sentence.
    """
    hypothesis, reference = _sentences(said), _sentences(wanted)
    vocabulary = {word for sentence in reference for word in sentence}
    found = {word for ref in reference for hyp in hypothesis for word in _common(ref, hyp)}
    return len(found) / len(vocabulary) if vocabulary else 0.0


def bleu(said: str, wanted: str) -> float:
    """Word BLEU of one text against one reference, in [0, 1], as sacreBLEU scores a sentence (arXiv 1804.08771).

    BP * exp(mean of log p_n) for n = 1 to 4, as far as the text has n-grams; the i-th n without a match
    counts as 1 / (2^i * number of n-grams); BP = exp(1 - r / c) for a text of c tokens shorter than its
    reference of r. Tokens are those of mteval 13a.
    """
    return _bleu(_tokens_13a(said), _tokens_13a(wanted), smooth=True)


def legacy_character_bleu(said: str, wanted: str) -> float:
    """BLEU of single characters, in [0, 1], as the UnKE and AnyEdit code has it.

    Quirk kept: NLTK's ``sentence_bleu`` is handed strings where it expects rows of words, so letters and
    spaces are its tokens and any two texts of one language look alike. No smoothing: 0 where some n has no
    match (NLTK prints a number below 1e-70).
    """
    return _bleu(list(said), list(wanted), smooth=False)


def length_ratio(said: str, wanted: str) -> float:
    """Words of a text per word of the wanted one; infinite where nothing is wanted."""
    words = len(wanted.split())
    return len(said.split()) / words if words else math.inf


def _terms(text: str) -> list[str]:
    return _TERM.findall(text.casefold())


def _overlap(common: int, said: int, wanted: int) -> Overlap:
    if not common:
        return Overlap(0.0, 0.0, 0.0)
    precision, recall = common / said, common / wanted
    return Overlap(precision, recall, 2 * precision * recall / (precision + recall))


def _lengths(a: Sequence[str], b: Sequence[str]) -> list[list[int]]:
    """Length of the longest common subsequence of all beginnings ``[len(a) + 1][len(b) + 1]``."""
    table = [[0] * (len(b) + 1)]
    for x in a:
        above, row = table[-1], [0]
        for j, y in enumerate(b):
            row.append(above[j] + 1 if x == y else max(above[j + 1], row[j]))
        table.append(row)
    return table


def _common(a: Sequence[str], b: Sequence[str]) -> list[str]:
    """One longest common subsequence, read from the end; of two equal ways the one that shortens b."""
    table = _lengths(a, b)
    i, j = len(a), len(b)
    found = []
    while i and j:
        if a[i - 1] == b[j - 1]:
            found.append(a[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found[::-1]


def _sentences(text: str) -> list[list[str]]:
    return [" ".join(part.split()).split(" ") for part in text.split(".") if part]


def _bleu(said: Sequence[Hashable], wanted: Sequence[Hashable], *, smooth: bool) -> float:
    logs: list[float] = []
    misses = 0
    for n in range(1, 5):
        a, b = Counter(grams(said, n)), Counter(grams(wanted, n))
        total, matches = a.total(), (a & b).total()
        if smooth and (not total or (n == 1 and not matches)):
            break
        if matches:
            logs.append(math.log(matches / total))
        elif smooth:
            misses += 1
            logs.append(-math.log(2**misses * total))
        else:
            return 0.0
    if not logs:
        return 0.0
    brevity = min(1.0, math.exp(1 - len(wanted) / len(said)))
    return brevity * math.exp(sum(logs) / len(logs))


def _tokens_13a(text: str) -> list[str]:
    """Cut as mteval 13a: marks stand alone, but periods and commas inside numbers and hyphens inside words do not."""
    line = f" {text} ".replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for name, sign in (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
        line = line.replace(name, sign)
    line = re.sub(r"([!-&(-+/:-@\[-`{-~])", r" \1 ", line)
    line = re.sub(r"([^0-9])([.,])", r"\1 \2 ", line)
    line = re.sub(r"([.,])([^0-9])", r" \1 \2", line)
    return re.sub(r"([0-9])(-)", r"\1 \2 ", line).split()


NAME = "long_form"


def rows(result: ProbeResult) -> list[Row]:
    """Compare a long text with the target text; the value is the F of ROUGE-L."""
    target = result.probe.answers[0]
    detail: dict[str, Any] = {}
    value: dict[str, float] = {}
    for side, text in (("before", result.before.text), ("after", result.after.text)):
        overlap = rouge_l(text, target)
        value[side] = overlap.f
        detail |= {
            f"precision_{side}": overlap.precision,
            f"recall_{side}": overlap.recall,
            f"rouge1_{side}": rouge(text, target, 1).f,
            f"rouge2_{side}": rouge(text, target, 2).f,
            f"bleu_{side}": bleu(text, target),
            f"legacy_recall_{side}": legacy_recall(text, target),
            f"legacy_bleu_{side}": legacy_character_bleu(text, target),
            f"length_ratio_{side}": length_ratio(text, target),
            f"repetition_{side}": repetition(text),
            f"text_{side}": text,
        }
    return [result.row(NAME, value["before"], value["after"], answers=[target], **detail)]


METRIC = Metric(
    name=NAME,
    label="long form",
    title="long form: ROUGE-L F against the wanted text, per cent",
    unit="share",
    higher_is_better=True,
    forms=frozenset({"long"}),
    needs_text=True,
    rows=rows,
    scores=(
        per_cent("ROUGE-L", "long.long_form", "legacy_recall", order=3),
        per_cent("BLEU", "long.long_form", "legacy_bleu", order=3),
        per_cent("ROUGE-L.paraphrase", "long_paraphrase.long_form", "legacy_recall", order=3),
        per_cent("BLEU.paraphrase", "long_paraphrase.long_form", "legacy_bleu", order=3),
    ),
)
