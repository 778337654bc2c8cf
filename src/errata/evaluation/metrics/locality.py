"""Whether an edit leaves alone what it should: right answers stay right, texts stay the same."""

from __future__ import annotations

from collections.abc import Hashable, Sequence


def kept(before: Sequence[bool], after: Sequence[bool]) -> float | None:
    """Share still right among what was right before; None where nothing was.

    What the unedited host got wrong says nothing about damage, so it does not count.
    """
    still = [now for was, now in zip(before, after, strict=True) if was]
    return sum(still) / len(still) if still else None


def unchanged(before: Sequence[str], after: Sequence[str]) -> float:
    """Share of texts that are the same to the letter, space at the ends aside.

    Stricter than :func:`kept` and free of gold answers. Raises ValueError of no texts.
    """
    if not before:
        raise ValueError("no texts: expected at least one before and after")
    return sum(map(same_text, before, after)) / len(before)


def same_text(before: str, after: str) -> bool:
    """Whether two continuations are the same to the letter, space at the ends aside."""
    return before.strip() == after.strip()


def agreement(before: Sequence[Hashable], after: Sequence[Hashable]) -> float:
    """Share of places at which the most probable tokens before and after agree (legacy, arXiv 2308.07269).

    EasyEdit's locality. Quirks: both are read off under the forced gold answer, which hides drift after
    the first wrong token, and a wrong answer that stays the same counts as kept. Raises ValueError where
    the lengths differ or are 0.
    """
    if len(before) != len(after) or not before:
        raise ValueError(f"expected two rows of tokens of one length, found {len(before)} and {len(after)}")
    return sum(a == b for a, b in zip(before, after, strict=True)) / len(before)


def drawdown(before: Sequence[bool], after: Sequence[bool]) -> float:
    """Loss of accuracy on what an edit is not about, before minus after (MEND, arXiv 2110.11309).

    Quirk: what an edit happens to mend pays for what it breaks. Raises ValueError of nothing.
    """
    if len(before) != len(after) or not before:
        raise ValueError(f"expected as many answers before as after, found {len(before)} and {len(after)}")
    return (sum(before) - sum(after)) / len(before)
