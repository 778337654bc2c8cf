"""Damage files and documents in many ways, and judge what a reader makes of each.

A reader has two right ways out: the value it would have given for the undamaged file, or one
``ErrataError`` with a message that a person can read. Everything else counts as a fault: another
exception, another value without a word, a message without bound, or more time than :data:`SECONDS`.
"""

from __future__ import annotations

import json
import random
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from errata.errors import ErrataError

SECONDS = 10.0
"""Longest time that one variant may take."""
LONGEST_MESSAGE = 4000
"""Most characters of an error message."""
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**63, -(2**64), 10**400, 1e308, float("nan"), float("inf"), 0.5, "", " ",
    "\x00", "\x1b[31mred\x1b[0m", "\ud800", "a" * 5000, "=1+1", "../../x", "ि", [], [[]], [None], {}, {"a": 1},
    [1, 2, 3], ["x", "y"], {"prompt": 1},
)  # fmt: skip
"""Values that a well-formed document may hold where another one is expected."""


@dataclass
class Findings:
    """What a reader made of all variants."""

    outcomes: Counter[str] = field(default_factory=Counter)
    """Number of variants by outcome: same, refused, different, traceback, message, slow."""
    faults: list[str] = field(default_factory=list)
    """One line for each variant that ended wrongly."""

    def __str__(self) -> str:
        return ", ".join(f"{name} {count}" for name, count in sorted(self.outcomes.items()))


def byte_variants(data: bytes, count: int, *, seed: int, start: int = 0) -> Iterator[tuple[str, bytes]]:
    """Yield ``count`` damaged copies of a file with a description of the damage.

    ``start``: damage only what stands from this byte on.
    """
    rng = random.Random(seed)
    for _ in range(count):
        at = rng.randrange(start, max(len(data), start + 1))
        kind = rng.choice(("bit", "byte", "cut", "insert", "remove", "repeat", "zero"))
        if kind == "bit" and at < len(data):
            bit = rng.randrange(8)
            yield f"bit {bit} of byte {at}", data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :]
        elif kind == "byte":
            yield f"byte {at} replaced", data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
        elif kind == "insert":
            yield f"bytes inserted at {at}", data[:at] + rng.randbytes(rng.randint(1, 16)) + data[at:]
        elif kind == "remove":
            length = rng.randint(1, 64)
            yield f"{length} bytes removed at {at}", data[:at] + data[at + length :]
        elif kind == "repeat":
            length = rng.randint(1, 64)
            yield f"{length} bytes repeated at {at}", data[: at + length] + data[at:]
        elif kind == "zero":
            length = rng.randint(1, 64)
            yield f"{length} bytes zeroed at {at}", data[:at] + bytes(length) + data[at + length :]
        else:
            yield f"cut at {at}", data[:at]


def document_variants(document: Any, count: int, *, seed: int) -> Iterator[tuple[str, Any]]:
    """Yield ``count`` copies of a JSON document with one value replaced, removed, renamed, swapped or doubled."""
    rng = random.Random(seed)
    paths = list(_paths(document, ()))
    for _ in range(count):
        copy = json.loads(json.dumps(document))
        path = rng.choice(paths)
        parent, key = _parent(copy, path)
        kind = rng.choice(("replace", "replace", "remove", "rename", "nudge", "double", "nest"))
        if not path or kind == "replace":
            value = rng.choice(ODD_VALUES)
            if not path:
                copy = value
            else:
                parent[key] = value
        elif kind == "remove":
            del parent[key]
        elif kind == "rename" and isinstance(parent, dict):
            parent[f"{key}x"] = parent.pop(key)
        elif kind == "double" and isinstance(parent, list):
            parent.insert(key, parent[key])
        elif kind == "nest":
            parent[key] = [parent[key]]
        else:
            parent[key] = _nudged(parent[key], rng)
        yield f"{kind} at {'/'.join(map(str, path))}", copy


def _nudged(value: Any, rng: random.Random) -> Any:
    """Return a value of the same type that is a little different."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + rng.choice((1, -1, 7))
    if isinstance(value, str):
        return value + "x" if not value or rng.random() < 0.5 else value[:-1]
    if isinstance(value, list):
        return value[::-1] if len(value) > 1 and value != value[::-1] else [*value, "x"]
    if isinstance(value, dict):
        return {**value, "unheard of": 1}
    return "x"


def _paths(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _paths(inner, (*path, key))


def _parent(document: Any, path: tuple[Any, ...]) -> tuple[Any, Any]:
    if not path:
        return None, None
    for key in path[:-1]:
        document = document[key]
    return document, path[-1]


def judge(
    variants: Iterator[tuple[str, Any]], read: Callable[[Any], Any], right: Callable[[Any], bool]
) -> Findings:
    """Read each variant and sort what happened.

    ``read`` is given the variant and returns the reader's value; ``right`` says whether a value is what the
    undamaged file gives, or what the damaged one truly says.
    """
    findings = Findings()
    for what, variant in variants:
        begun, problem = time.perf_counter(), None
        try:
            outcome = "same" if right(read(variant)) else "different"
        except ErrataError as error:
            problem = str(error)
            outcome = "refused" if _readable(problem) else "message"
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            problem = f"{type(error).__name__}: {str(error)[:200]} ({last.filename}:{last.lineno})"
            outcome = "traceback"
        if time.perf_counter() - begun > SECONDS:
            outcome = "slow"
        findings.outcomes[outcome] += 1
        if outcome not in ("same", "refused"):
            findings.faults.append(f"{outcome}: {what}: {problem or ''}"[:500])
    return findings


def _readable(message: str) -> bool:
    """Whether a message is bounded and holds no control characters but line breaks and tabs."""
    if not message.strip() or len(message) > LONGEST_MESSAGE:
        return False
    return all(char.isprintable() or char in "\n\t" for char in message)
