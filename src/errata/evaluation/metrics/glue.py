"""The ``glue_eval`` score of the AlphaEdit code base, for comparison with its tables only.

100 examples a task make its 95 % interval about 20 points wide; general ability is measured elsewhere.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

RTE_ENTAILMENT = 0
"""GLUE's label of entailment."""


def glue_f1(wanted: Sequence[Hashable], said: Sequence[Hashable]) -> float:
    """F1 of each wanted label, weighted by how often it is wanted (``glue_f1_legacy``).

    An answer that could not be parsed is a label of its own, usually -1. Raises ValueError where the rows
    differ in length or are empty.
    """
    if len(wanted) != len(said) or not wanted:
        raise ValueError(f"expected as many answers as labels, found {len(said)} and {len(wanted)}")
    score = 0.0
    for label in dict.fromkeys(wanted):
        both = sum(w == label == s for w, s in zip(wanted, said, strict=True))
        count = sum(w == label for w in wanted)
        f1 = 2 * both / (count + sum(s == label for s in said))
        score += f1 * count / len(wanted)
    return score


def rte_label(answer: str, *, legacy: bool = False) -> int:
    """Return the GLUE label of an answer to "entailed: true or false?"; -1 if it is neither.

    ``legacy`` keeps the bug of the published code, which takes "true" for label 1 where GLUE has entailment
    as 0: there a model that answers every example right scores 0.
    """
    said = answer.strip().lower()
    if said.startswith("true"):
        return 1 - RTE_ENTAILMENT if legacy else RTE_ENTAILMENT
    if said.startswith("false"):
        return RTE_ENTAILMENT if legacy else 1 - RTE_ENTAILMENT
    return -1
