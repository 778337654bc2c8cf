"""Similarity of a long answer to its target: UnKE, AKEW, EditEverything, FRUIT.

The published code of these datasets (arXiv 2405.15349, 2502.05628) prints recall as "ROUGE-L" and a BLEU of
characters; both are here as ``legacy_*``, in addition to the usual definitions of rouge-score and sacreBLEU
(``pip install 'errata[text]'``).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import regex

from errata import extras
from errata.evaluation.metrics._metric import Metric, ProbeResult, per_cent
from errata.evaluation.metrics.ngrams import grams, repetition
from errata.types import Row
from errata.writing import UNSPACED

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics.bleu import BLEU

_TERM = regex.compile(rf"[{UNSPACED}]|(?:(?![{UNSPACED}])[^\W_])+")
_HAN = regex.compile(r"\p{Script=Han}")


@dataclass(frozen=True)
class Overlap:
    """Overlap of two texts, each number in [0, 1]."""

    precision: float
    recall: float
    f: float
    """Harmonic mean of the two."""


def check_packages() -> None:
    """Raise ConfigError, naming the extra, where the packages that score long answers are not installed."""
    extras.need("scoring long answers", "text", "rouge_score.rouge_scorer", "sacrebleu.metrics.bleu")


def rouge(text: str, reference: str, n: int) -> Overlap:
    """Return ROUGE-n: the overlap of n-gram counts (Lin 2004), as computed by rouge-score.

    Terms are runs of letters and digits, case folded, without stemming; in scripts without spaces, such as
    Chinese, each letter is a term. 0 where either text has none.
    """
    return _rouge(f"rouge{n}", text, reference)


def rouge_l(text: str, reference: str) -> Overlap:
    """Return ROUGE-L: the longest common subsequence of terms over each text's length, as in rouge-score."""
    return _rouge("rougeL", text, reference)


def rouge_l_of_sentences(text: Sequence[str], reference: Sequence[str]) -> Overlap:
    """Return ROUGE-Lsum: the union of longest common subsequences of terms over a text's sentences, as rouge-score."""
    return _rouge("rougeLsum", "\n".join(text), "\n".join(reference))


def legacy_recall(text: str, reference: str) -> float:
    """Return what the UnKE and AnyEdit code prints as ROUGE-L: recall, of the ``rouge`` package's definition.

    Quirks reproduced: sentences end at every period; the words of the longest common subsequences of all pairs of
    sentences are collected in one set, and its size is divided by the number of distinct words of the reference.
    Case and punctuation matter, and a blank after the last period is a word. 0 where either text has no sentence.
    """
    sentences, references = _sentences(text), _sentences(reference)
    vocabulary = {word for sentence in references for word in sentence}
    common = {word for one in references for other in sentences for word in _common(one, other)}
    return len(common) / len(vocabulary) if vocabulary else 0.0


def bleu(text: str, reference: str) -> float:
    """Return word BLEU of one text against one reference, in [0, 1], as sacreBLEU scores a sentence (arXiv 1804.08771).

    BP * exp(mean of log p_n) for n = 1 to 4, as far as the text has n-grams; the i-th n without a match has
    p_n = 1 / (2^i * number of n-grams); BP = exp(1 - r / c) for a text of c tokens shorter than its reference of r.
    Tokenised by mteval 13a, or sacreBLEU's ``zh`` where the reference has Chinese characters.
    """
    tokens = "zh" if _HAN.search(reference) else "13a"
    return _bleu(tokens).sentence_score(text, [reference]).score / 100


def legacy_character_bleu(text: str, reference: str) -> float:
    """BLEU of single characters, in [0, 1], as in the UnKE and AnyEdit code.

    Quirk reproduced: NLTK's ``sentence_bleu`` is given strings where it expects lists of words, so its tokens are
    letters and spaces and any two texts of a language score high. No smoothing: 0 where some n has no match
    (NLTK prints a number below 1e-70).
    """
    logs = []
    for n in range(1, 5):
        a, b = Counter(grams(text, n)), Counter(grams(reference, n))
        matches = (a & b).total()
        if not matches:
            return 0.0
        logs.append(math.log(matches / a.total()))
    brevity = min(1.0, math.exp(1 - len(reference) / len(text)))
    return brevity * math.exp(sum(logs) / len(logs))


def length_ratio(text: str, reference: str) -> float:
    """Words of a text per word of the reference; infinite where the reference has none."""
    words = len(reference.split())
    return len(text.split()) / words if words else math.inf


class _Terms:
    """A tokenizer for rouge-score, whose own one drops all letters except a to z."""

    def tokenize(self, text: str) -> list[str]:
        """Split a text into terms."""
        return _TERM.findall(text.casefold())


@lru_cache(maxsize=4)
def _scorer(kind: str) -> RougeScorer:
    from rouge_score.rouge_scorer import RougeScorer

    terms: Any = _Terms()
    return RougeScorer([kind], tokenizer=terms)


@lru_cache(maxsize=2)
def _bleu(tokens: str) -> BLEU:
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(tokenize=tokens, effective_order=True)


def _rouge(kind: str, text: str, reference: str) -> Overlap:
    score = _scorer(kind).score(reference, text)[kind]
    return Overlap(float(score.precision), float(score.recall), float(score.fmeasure))


def _lengths(a: Sequence[str], b: Sequence[str]) -> list[list[int]]:
    """Lengths of the longest common subsequences of all prefixes ``[len(a) + 1][len(b) + 1]``."""
    table = [[0] * (len(b) + 1)]
    for x in a:
        above, row = table[-1], [0]
        for j, y in enumerate(b):
            row.append(above[j] + 1 if x == y else max(above[j + 1], row[j]))
        table.append(row)
    return table


def _common(a: Sequence[str], b: Sequence[str]) -> list[str]:
    """Return one longest common subsequence, traced from the end; ties shorten b."""
    table = _lengths(a, b)
    i, j = len(a), len(b)
    common = []
    while i and j:
        if a[i - 1] == b[j - 1]:
            common.append(a[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return common[::-1]


def _sentences(text: str) -> list[list[str]]:
    return [" ".join(part.split()).split(" ") for part in text.split(".") if part]


NAME = "long_form"


def rows(result: ProbeResult) -> list[Row]:
    """Compare a long answer with its target; the value is the ROUGE-L F-score."""
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
    title="long form: ROUGE-L F-score against the target text, per cent",
    unit="share",
    higher_is_better=True,
    forms=frozenset({"long"}),
    needs_text=True,
    check=check_packages,
    rows=rows,
    scores=(
        per_cent("ROUGE-L", "long.long_form", "legacy_recall", order=3),
        per_cent("BLEU", "long.long_form", "legacy_bleu", order=3),
        per_cent("ROUGE-L.paraphrase", "long_paraphrase.long_form", "legacy_recall", order=3),
        per_cent("BLEU.paraphrase", "long_paraphrase.long_form", "legacy_bleu", order=3),
    ),
)
