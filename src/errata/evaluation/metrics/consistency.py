"""RS, the reference score: similarity of texts about an edited subject to texts about its new object.

ROME (arXiv 2202.05262, Sec. 3.4): the cosine of two TF-IDF vectors, of all generated texts joined (with their
prompts) and of all reference passages joined; printed times 100. Vocabulary and idf come as files; :func:`idf`
computes them from a corpus.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from errata.evaluation.metrics._metric import CaseResult, Metric, per_cent
from errata.evaluation.metrics.fluency import with_prompt
from errata.types import Row

NAME = "reference"

_TERM = re.compile(r"\b\w\w+\b")


def terms(text: str) -> list[str]:
    """Split a text into lower-case words of two or more letters, like scikit-learn's vectoriser."""
    return _TERM.findall(text.lower())


def idf(corpus: Iterable[str]) -> dict[str, float]:
    """Return each word's smoothed inverse document frequency, ln((1 + n) / (1 + df)) + 1 over n documents."""
    document_counts: Counter[str] = Counter()
    n = 0
    for document in corpus:
        n += 1
        document_counts.update(set(terms(document)))
    return {word: math.log((1 + n) / (1 + df)) + 1 for word, df in document_counts.items()}


def reference_score(generated: Sequence[str], passages: Sequence[str], weights: Mapping[str, float]) -> float:
    """Return RS in [0, 1], the cosine of both sides' TF-IDF; words without a weight are ignored.

    Quirk: all texts of a side are joined first, so a long passage dominates. 0 where a side has no word with a
    weight.
    """
    a, b = (_vector(" ".join(texts), weights) for texts in (generated, passages))
    dot = math.fsum(value * b[word] for word, value in a.items() if word in b)
    size = math.sqrt(math.fsum(v * v for v in a.values()) * math.fsum(v * v for v in b.values()))
    return dot / size if size else 0.0


def _vector(text: str, weights: Mapping[str, float]) -> dict[str, float]:
    return {word: n * weights[word] for word, n in Counter(terms(text)).items() if word in weights}


def case_rows(case: CaseResult) -> list[Row]:
    """Compare all open texts of a case, including prompts, with all reference passages of its probes: one row.

    Empty without word weights, or if no probe has a passage.
    """
    open_results = [result for result in case.probes if result.probe.form == "open" and result.probe.answers]
    if case.idf is None or not open_results:
        return []
    passages = list(dict.fromkeys(passage for result in open_results for passage in result.probe.answers))
    old, new = (
        [with_prompt(result.probe, getattr(result, side).text) for result in open_results]
        for side in ("before", "after")
    )
    before, after = (reference_score(texts, passages, case.idf) for texts in (old, new))
    return [open_results[0].row(NAME, before, after, texts=len(open_results))]


METRIC = Metric(
    name=NAME,
    label="reference",
    higher_is_better=True,
    needs_text=True,
    case_rows=case_rows,
    scores=(per_cent("RS", "generation.reference", order=1),),
)
