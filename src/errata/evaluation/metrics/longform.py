"""How near a long answer comes to the one that was taught: UnKE, AKEW, EditEverything, FRUIT.

The published code of these sets (arXiv 2405.15349, 2502.05628) prints recall as "ROUGE-L" and a BLEU of
characters; both stand here as ``legacy_*`` beside the usual definitions.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from errata.evaluation.metrics import matching
from errata.evaluation.metrics.ngrams import grams

Embed = Callable[[Sequence[str]], "np.ndarray"]
"""Turns n texts into vectors ``[n, d]``."""

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


def similarity(embed: Embed, said: Sequence[str], wanted: Sequence[str]) -> list[float]:
    """Cosine of two lists of texts under an embedding, pair by pair, in [-1, 1].

    Published as "BERT Score" with all-MiniLM-L6-v2; it is a cosine of sentence vectors and no BERTScore.
    0 where a vector is 0.
    """
    if len(said) != len(wanted):
        raise ValueError(f"expected as many texts as wanted ones, found {len(said)} and {len(wanted)}")
    if not said:
        return []
    a, b = (np.asarray(embed(texts), dtype=np.float64) for texts in (said, wanted))
    lengths = np.sqrt((a * a).sum(1) * (b * b).sum(1))
    return [float(dot / size) if size else 0.0 for dot, size in zip((a * b).sum(1), lengths, strict=True)]


def sub_questions(texts: Sequence[str], answers: Sequence[Sequence[str]]) -> float | None:
    """Share of sub-questions whose text gives an accepted answer, see :func:`matching.says`; None of none."""
    right = [matching.says(text, accepted) for text, accepted in zip(texts, answers, strict=True)]
    return sum(right) / len(right) if right else None


def update_rouge(said: Sequence[str], wanted: Sequence[str], source: Sequence[str], n: int) -> Overlap:
    """ROUGE-n of what was changed only: sentences of both texts that the source has are left out (FRUIT).

    Source: arXiv 2112.08634. Texts are given as sentences; ``n`` 0 asks for ROUGE-L.
    """
    old = set(source)
    new, target = (" ".join(s for s in text if s not in old) for text in (said, wanted))
    return rouge(new, target, n) if n else rouge_l(new, target)


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
