"""How far an edit of a text-to-image pipeline moves keys and values: those of its concepts, and all others.

No image is drawn. What is compared is all that a text decides of one: the keys and values of every cross-attention at
the last token of a phrase, of all maps together; of an edit of the text encoder at the token that ends the text, which
takes part in all attention and is what such edits are fitted by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from errata.edits.edit import Edit
from errata.errors import RequestError
from errata.host.pipelines import ENCODERS
from errata.host.text_to_image import TextToImageHost
from errata.types import Request

OTHERS = ("a dog", "a house", "a red car", "a man", "the sky at night")
"""Phrases that have nothing to do with most edits."""


@dataclass(frozen=True)
class Distance:
    """What an edit does to the keys and values of one phrase."""

    kind: Literal["edited", "preserved", "other"]
    phrase: str
    target: str | None
    """What an edited phrase is to be read as; None for others, and where an edit names none."""
    left: float | None
    """Distance to the target's keys and values with the edit, as a share of that without it: 1 nothing done, 0 exact.
    None without a target."""
    moved: float
    """Distance to the phrase's own keys and values without the edit, as a share of their norm."""

    def to_dict(self) -> dict[str, Any]:
        """Return the distances as plain data."""
        return asdict(self)


@torch.no_grad()
def distances(
    host: TextToImageHost, edit: Edit, *, preserved: Sequence[str] | None = None, others: Sequence[str] = OTHERS,
    foreign: bool = False,
) -> list[Distance]:  # fmt: skip
    """Measure an edit on its requests, on phrases that are preserved and on others. The host is left as it was.

    ``preserved``: None for those that the edit's settings name. Targets are as the host reads them without the edit.
    Phrases that the text encoder does not take are left out of ``others``. Raises HostError for a pipeline without maps
    that read the text alone, EditError as :meth:`Edit.apply_` does.
    """
    config = edit.provenance.config
    end = any(name.startswith(ENCODERS) for name in getattr(edit, "deltas", {}))
    named = config.get("preserve") or () if preserved is None else preserved
    plan: list[tuple[Literal["edited", "preserved", "other"], str, str | None, int, int]] = []
    for request in edit.provenance.requests:
        if isinstance(request, Request):
            plan.append(_asked(host, request, str(config.get("form", "replace")), end=end))
    for phrase in named:
        plan.append(("preserved", phrase, None, _last(host, phrase, end=end), 0))
    for phrase in (one for one in others if one not in named):
        try:
            plan.append(("other", phrase, None, _last(host, phrase, end=end), 0))
        except RequestError:
            continue  # longer than a small encoder's window
    before = [_at(host, text, at) for _, text, _, at, _ in plan]
    goals = [None if target is None else _at(host, target, goal) for _, _, target, _, goal in plan]
    with edit.on(host, foreign=foreign):
        after = [_at(host, text, at) for _, text, _, at, _ in plan]
    return [
        Distance(
            kind,
            text,
            target,
            None if goal is None else _share(now - goal, old - goal),
            _share(now - old, old),
        )
        for (kind, text, target, _, _), old, goal, now in zip(plan, before, goals, after, strict=True)
    ]


def _asked(
    host: TextToImageHost, request: Request, form: str, *, end: bool
) -> tuple[Literal["edited"], str, str | None, int, int]:
    """Return a request's texts, as its edit read them, and the token of each."""
    head, tail = request.template
    source = request.text
    if end:
        target = head + request.target + tail
        return "edited", source, target, _last(host, source, end=True), _last(host, target, end=True)
    at = host.read(source).last(*request.span)
    if form == "debias":  # towards itself with attributes added
        return "edited", source, None, at, 0
    if form == "moderate":
        return "edited", source, "", at, host.read("").last(0, 0)
    target = head + request.target + tail
    return "edited", source, target, at, host.read(target).last(len(head), len(head) + len(request.target))


def _last(host: TextToImageHost, phrase: str, *, end: bool) -> int:
    reading = host.read(phrase)
    return len(reading.ids) - 1 if end else reading.last(0, len(phrase))


def _at(host: TextToImageHost, text: str, at: int) -> Tensor:
    return torch.cat(list(host.keys_and_values(text, at).values())).double()


def _share(part: Tensor, whole: Tensor) -> float:
    size = float(whole.norm())
    return float(part.norm()) / size if size else 0.0
