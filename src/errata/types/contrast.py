"""Contrast pairs: what shows a behaviour that a model is to be steered to. Loads the standard library only."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from errata.errors import RequestError, shown
from errata.types.concept import ConceptRecord


@dataclass(frozen=True)
class ContrastPair:
    """A prompt with an answer that shows a behaviour, and one that does not."""

    prompt: str
    """May be empty: the answers are then texts of their own."""
    positive: str
    negative: str
    subject: str | None = None
    """What the pair is about; a split keeps all pairs about it on one side. None: the prompt, without one the pair."""

    def problems(self) -> list[str]:
        """List what is wrong with it."""
        fields: dict[str, Any] = {"prompt": self.prompt, "positive": self.positive, "negative": self.negative}
        wrong = [
            f"{name} must be a text{' that is not empty' * (name != 'prompt')}, found {shown(value)}"
            for name, value in fields.items()
            if not isinstance(value, str) or (name != "prompt" and not value.strip())
        ]
        if not wrong and self.positive.strip() == self.negative.strip():
            wrong.append(f"positive and negative are both {shown(self.positive)}")
        return wrong


@dataclass(frozen=True)
class Contrasts:
    """A behaviour, shown by contrast pairs. Raises RequestError listing errors."""

    name: str
    """What the positive answers show, e.g. refusal."""
    pairs: tuple[ContrastPair, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "pairs", tuple(self.pairs))
        wrong = [f"pair {i}: {one}" for i, pair in enumerate(self.pairs, 1) for one in pair.problems()]
        name: Any = self.name
        if not isinstance(name, str) or not name.strip():
            wrong.insert(0, f"the behaviour needs a name, found {shown(self.name)}")
        if not self.pairs:
            wrong.append("no contrast pairs given")
        if wrong:
            raise RequestError("\n".join(wrong))

    @cached_property
    def record(self) -> ConceptRecord:
        """Name, number of answers on each side, and content hash."""
        content = json.dumps([[p.prompt, p.positive, p.negative] for p in self.pairs], ensure_ascii=False)
        digest = hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        return ConceptRecord(self.name, {"negative": len(self.pairs), "positive": len(self.pairs)}, digest)

    @property
    def id(self) -> str:
        """The name, for messages."""
        return self.name

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain data."""
        return self.record.to_dict()

    def split(self, shares: Sequence[float], *, seed: int = 0) -> tuple[Contrasts, ...]:
        """Return a part to fit on and a part for each share of the subjects that is held out; no two share a subject.

        Raises RequestError where there are too few subjects for a part to have one.
        """
        subjects = sorted({_subject(pair) for pair in self.pairs})
        random.Random(f"errata-contrasts-{seed}").shuffle(subjects)
        counts = [max(1, round(share * len(subjects))) for share in shares]
        if len(subjects) <= sum(counts):
            raise RequestError(
                f"{len(subjects)} different subjects are too few to fit on some and hold {len(shares)} parts out; give "
                "more pairs"
            )
        groups: list[set[str]] = []
        for count in counts:
            groups.append(set(subjects[:count]))
            subjects = subjects[count:]
        return tuple(
            Contrasts(self.name, tuple(p for p in self.pairs if _subject(p) in group))
            for group in (set(subjects), *groups)
        )


def _subject(pair: ContrastPair) -> str:
    own = f"{pair.positive}\n{pair.negative}"  # of texts of their own, no two are about one thing
    return next((text for text in (pair.subject, pair.prompt) if text and text.strip()), own)
