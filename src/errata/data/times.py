"""Questions about a time, for requests that say since when they hold: what is true now, and what was true before.

Source: the form of AToKe (arXiv 2312.05497): an update of a fact must keep what was true before it. An editor
that cannot tell times apart fails either what is current or what is historical.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from errata.errors import RequestError
from errata.types import Case, Probe, Request

CURRENT, EXPLICIT, HISTORICAL, FORMER = "current", "explicit_time", "historical", "former"


@dataclass(frozen=True)
class Times:
    """Wordings of questions about a time; ``{prompt}`` is the request's prompt, ``{year}`` a year."""

    current: str = "Today, {prompt}"
    explicit: str = "In {year}, {prompt}"
    """Of a year since which the new fact holds, and of one before it."""
    years: int = 5
    """How far the asked years are from the year of the change."""

    def __post_init__(self) -> None:
        """Raise RequestError for a wording without its places, and for a distance below one year."""
        for name, slots in (("current", ("{prompt}",)), ("explicit", ("{prompt}", "{year}"))):
            for slot in slots:
                if slot not in getattr(self, name):
                    raise RequestError(f"{name}: expected {slot} in it, found {getattr(self, name)!r}")
        if self.years < 1:
            raise RequestError(f"years: expected 1 or more, found {self.years}")


ENGLISH = Times()
_LOWERED = frozenset(("The", "A", "An", "These", "This", "By", "At", "In", "On"))
"""English words that have a small letter inside a sentence; other first words may be names."""


def with_times(
    cases: Sequence[Case], times: Times = ENGLISH, *, names: Mapping[str, tuple[str, ...]] | None = None
) -> list[Case]:
    """Return cases with probes about a time, for each of their requests that has a date and an old target.

    ``current``: the target is the answer today; ``explicit_time``: the same of a year after the change;
    ``historical``: of a year before it the old target stays the answer. Cases without such a request stay as they are.
    ``names``: other accepted names of targets, canonical ones first. Raises RequestError where no request has a date
    and an old target.
    """
    known = names or {}
    result = [
        replace(case, probes=(*case.probes, *(p for r in case.requests for p in _probes(r, times, known))))
        for case in cases
    ]
    if result == list(cases):
        raise RequestError(
            "no request has both valid_from and target_old, without which nothing is asked about a time"
        )
    return result


def _probes(request: Request, times: Times, names: Mapping[str, tuple[str, ...]]) -> Iterator[Probe]:
    if request.valid_from is None or request.target_old is None:
        return
    year = int(request.valid_from[:4])
    new, old = (names.get(one, (one,)) for one in (request.target, request.target_old))

    def asked(wording: str, year: int) -> str:
        text = request.text
        inside = not wording.startswith("{prompt}") and text.split(" ", 1)[0] in _LOWERED
        text = text[0].lower() + text[1:] if inside else text
        return wording.replace("{year}", str(year)).replace("{prompt}", text)

    own: dict[str, Any] = {
        "language": request.language, "image": request.image, "more_images": request.more_images
    }  # fmt: skip
    now = asked(times.current, year)
    yield Probe(CURRENT, now, new, old, request.target_old, **own)
    after = asked(times.explicit, year + times.years)
    yield Probe(EXPLICIT, after, new, old, request.target_old, **own)
    before = asked(times.explicit, year - times.years)
    yield Probe(HISTORICAL, before, old, old, request.target, **own)
