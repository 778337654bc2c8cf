"""What kinds of probes are called in tables, and what they are about: learned, kept, or following from the edit."""

from __future__ import annotations

from collections.abc import Iterable

LEARNED = ("efficacy", "paraphrase", "paraphrase_seen", "question", "persona", "long", "long_paraphrase")
KEPT = (
    "neighbourhood", "locality", "same_subject", "distracting", "other_task", "relation_specificity",
    "forgetfulness", "entity_locality",
)  # fmt: skip
FIRST = ("efficacy", "paraphrase", "neighbourhood", "locality", "same_subject")
"""Kinds of the first table; all others stand in the second."""
HEADLINE = (("efficacy",), ("paraphrase",), ("neighbourhood", "locality"))
"""What the headline is the harmonic mean of: of each group the first kind that the board has."""
GROUPS = {"learned": "learned", "kept": "kept", "follows": "what follows"}
"""Groups of kinds in the order of columns, with their titles."""


def group(kind: str, kept: Iterable[str] = ()) -> str:
    """Say what a kind is about: ``learned``, ``kept`` or ``follows``. ``kept``: kinds known to change nothing."""
    bare = kind.partition(".")[0]
    if bare in LEARNED:
        return "learned"
    return "kept" if bare in KEPT or bare in set(kept) else "follows"


def label(kind: str) -> str:
    """Word a kind for a heading: ``multi_hop.any`` is "multi hop, any"."""
    return kind.replace(".", ", ").replace("_", " ")


def order(kinds: Iterable[str], kept: Iterable[str] = ()) -> list[str]:
    """Sort kinds: learned, kept, what follows; the common ones first in each."""
    known = [*LEARNED, *KEPT]
    rank = {name: i for i, name in enumerate(known)}
    places = list(GROUPS)
    return sorted(
        dict.fromkeys(kinds),
        key=lambda k: (places.index(group(k, kept)), rank.get(k.partition(".")[0], len(known)), k),
    )
