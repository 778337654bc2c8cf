"""Consequences of an edit: multi-hop questions and ripple criteria.

MQuAKE (arXiv 2305.14795): *edit-wise*, the share of edited facts recalled; *instance-wise*, the share of cases with
all hops of the new chain recalled; *multi-hop*, the share of cases with a multi-hop question answered.
RippleEdits (arXiv 2307.12976): tests with conditions, in six criteria.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

_CUE = re.compile(
    r"\banswer\b(?: (?:to|of|for) [^.:?\n]{1,80}?)?\W{0,4}(?:\bis\b[\s:*]*|:[\s*]*)", re.IGNORECASE
)
_NEXT_QUESTION = re.compile(r"\n\s*(?:question|q)\s*:", re.IGNORECASE)

CRITERIA = (
    "logical_generalization",
    "compositionality_1",
    "compositionality_2",
    "subject_aliasing",
    "forgetfulness",
    "relation_specificity",
)
"""RippleEdits' six, in the order of its tables; its paper calls forgetfulness preservation."""


def together(right: Sequence[bool], need: Literal["any", "all"]) -> bool:
    """Whether a group of probes passes: any of them right, or all (OR and AND). False for an empty group.

    MQuAKE counts a case if any of its three phrasings is answered, which inflates the score: also report the mean.
    """
    return bool(right) and (any(right) if need == "any" else all(right))


def final_answer(text: str) -> str:
    """Extract the answer of a chain of thought: the text after the last "Answer:" or "answer is".

    A further question generated after the answer is removed first. Without such words the answer is the last
    non-empty line, the conclusion.
    """
    own = text[: match.start()] if (match := _NEXT_QUESTION.search(text)) else text
    for cue in reversed(list(_CUE.finditer(own))):
        if (rest := own[cue.end() :]).strip():
            return next(line for line in rest.splitlines() if line.strip()).strip()
    lines = [line.strip() for line in own.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def counts(conditions_before: Sequence[bool], *, edited: bool) -> bool:
    """Whether RippleEdits counts a test: the unedited host passes all its conditions, and the edit succeeded."""
    return edited and all(conditions_before)


def criteria(examples: Sequence[Mapping[str, Sequence[bool]]]) -> dict[str, float]:
    """Average the tests per example, then over the examples that have any, by criterion; with ``mean``.

    ``examples``: per example and criterion, whether each counted test passed. ``mean``: over the criteria present,
    as in the last column of the paper's tables; empty where no test counts.
    """
    names = dict.fromkeys(name for example in examples for name in example)
    scores: dict[str, float] = {}
    for name in names:
        shares = [sum(tests) / len(tests) for example in examples if (tests := example.get(name))]
        if shares:
            scores[name] = sum(shares) / len(shares)
    if scores:
        scores["mean"] = sum(scores.values()) / len(scores)
    return scores
