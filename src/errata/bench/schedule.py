"""Schedules: which requests are fitted together, which edits stay in place, and when the host is evaluated."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from errata.errors import ConfigError

EXPECTED = "expected single, batch:N or sequential:N with a number N of 1 or more"
LOOKS = "expected numbers of edits such as 10,50,100, or each, every:N, decades or end"

DECADES = "decades"

_FORM = re.compile(r"single|(batch|sequential):([1-9]\d*)")


@dataclass(frozen=True)
class Schedule:
    """The order of edits: one by one, in groups, or one group after another."""

    kind: Literal["single", "batch", "sequential"] = "single"
    """``single``: each case alone, then reverted. ``batch``: each group in one fit, then reverted.
    ``sequential``: group after group, edits accumulate."""
    size: int = 1
    """Number of cases in a group."""

    @staticmethod
    def parse(text: str) -> Schedule:
        """Read ``single``, ``batch:N`` or ``sequential:N``. Raises ConfigError for anything else."""
        match = _FORM.fullmatch(text.strip())
        if match is None:
            raise ConfigError(f"schedule {text!r}: {EXPECTED}")
        kind, size = match.groups()
        if kind is None:
            return Schedule()
        return Schedule("batch" if kind == "batch" else "sequential", int(size))

    def __str__(self) -> str:
        return self.kind if self.kind == "single" else f"{self.kind}:{self.size}"

    @property
    def together(self) -> bool:
        """Whether the edits of several cases may be in place at once."""
        return self.kind == "sequential" or self.size > 1

    def describe(self) -> str:
        """Return the schedule in words."""
        if self.kind == "single":
            return "each case edited alone, then reverted"
        group = "one case" if self.size == 1 else f"{self.size} cases"
        if self.kind == "batch":
            return f"{group} per fit, then reverted"
        return f"{group} per fit, edits accumulate"

    def groups(self, count: int, start: int = 0) -> Iterator[range]:
        """Yield the groups of ``count`` cases as ranges of their indices, from case ``start`` on."""
        for first in range(start, count, self.size):
            yield range(first, min(first + self.size, count))

    def checkpoints(self, count: int, at: str | Sequence[int] | None = None) -> tuple[int, ...]:
        """Return the numbers of edits after which a sequence of ``count`` edits is evaluated; the last is the end.

        ``at``: numbers (also as text, ``"10,50"``), ``"each"`` group, ``"every:N"`` edits, ``"decades"`` or
        ``"end"``. Decades are 1, 10, 32, 100, 316, 1000 and so on: two to a power of ten. None: 10, 50, 100,
        200, 500, 1000, 2000, 5000 and so on. Numbers of these two are rounded up to the end of a group.
        Raises ConfigError for numbers that are not ends of groups or exceed ``count``.
        """
        ends = [group.stop for group in self.groups(count)]
        if at is None:
            numbers = [n + -n % self.size for n in _usual(count)]
        elif isinstance(at, str) and at.strip() == DECADES:
            numbers = [n + -n % self.size for n in _decades(count)]
        else:
            numbers = _looks(at, ends, count) if isinstance(at, str) else list(at)
            wrong = sorted(set(numbers) - set(ends))
            if wrong:
                raise ConfigError(
                    f"no checkpoint after {', '.join(map(str, wrong))} of {count} edits in groups of {self.size}: "
                    f"expected {_some(ends)}"
                )
        return tuple(sorted({n for n in numbers if n < count} | {count}))


SINGLE = Schedule()
"""Each case alone."""


def check_looks(text: str) -> None:
    """Raise ConfigError for a text that specifies no checkpoints for any number of edits."""
    if text.strip() != DECADES:
        _looks(text, (), 0)


def _usual(count: int) -> Iterator[int]:
    """Yield 10, 50, then 1, 2 and 5 times every power of ten from 100, up to about ``count``."""
    yield from (10, 50)
    power = 100
    while power <= count:
        yield from (power, 2 * power, 5 * power)
        power *= 10


def _decades(count: int) -> Iterator[int]:
    """Yield 1, then half powers of ten from 10, up to ``count``."""
    yield 1
    half = 2
    while (number := round(10 ** (half / 2))) <= count:
        yield number
        half += 1


def _looks(text: str, ends: Sequence[int], count: int) -> list[int]:
    words = text.strip()
    if words == "end":
        return []
    if words == "each":
        return list(ends)
    step = re.fullmatch(r"every:([1-9]\d*)", words)
    if step:
        return list(range(int(step[1]), count + 1, int(step[1])))
    parts = [part.strip() for part in words.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ConfigError(f"checkpoints {text!r}: {LOOKS}")
    return [int(part) for part in parts]


def _some(ends: Sequence[int]) -> str:
    """List the first few ends of groups and the last."""
    numbers = ", ".join(map(str, ends[:4]))
    return numbers if len(ends) <= 4 else f"{numbers} ... {ends[-1]}"
