"""Rehearsal for methods that change weights: earlier requests and the model's own text, kept beside new requests."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from errata.config import positive
from errata.host.host import Host
from errata.host.layout import Site
from errata.linalg.solve import CostMatrix
from errata.methods._method import Workspace, without
from errata.methods._settings import at_least_zero
from errata.training.rehearse import draw, recite, rehearse_
from errata.training.tune import lay_out
from errata.types import Request

ANSWER_TOKENS = 8
"""Length of the old answer that the host gives where a request names none."""


@dataclass(frozen=True)
class Rehearsal:
    """Settings of a rehearsal after a fit; earlier requests are those of the edit that is gone on from."""

    rehearsal: int = 0
    """How often each new request is rehearsed; 0: no rehearsal."""
    rehearsal_requests: int = 40
    """Requests in each round, at most half of them new where there are earlier ones."""
    rehearsal_texts: int = 32
    """Texts in each round, of which the edited model is to say what the unedited one does. 0: none."""
    rehearsal_weight: float = 10.0
    """Weight of the divergence there, nats per token, beside the requests' mean loss, nats per target token."""
    rehearsal_pool: int = 1280
    """Texts to draw from."""
    rehearsal_source: Literal["corpus", "model"] = "model"
    """Whose they are: written by the unedited model, or the first of the corpus that the second moments are taken
    from. A corpus may state what an evaluation asks for; what the model writes is its own."""
    rehearsal_tokens: int = 40
    """How many tokens of a text are read."""

    def rehearsal_problems(self) -> list[str]:
        """Check ranges."""
        return [
            *positive(self, "rehearsal_requests", "rehearsal_pool", "rehearsal_tokens"),
            *at_least_zero(self, "rehearsal", "rehearsal_texts", "rehearsal_weight"),
        ]


class _Settings(Protocol):
    @property
    def rehearsal(self) -> int: ...
    @property
    def rehearsal_requests(self) -> int: ...
    @property
    def rehearsal_texts(self) -> int: ...
    @property
    def rehearsal_weight(self) -> float: ...
    @property
    def rehearsal_pool(self) -> int: ...
    @property
    def rehearsal_source(self) -> Literal["corpus", "model"]: ...
    @property
    def rehearsal_tokens(self) -> int: ...
    @property
    def step_limit(self) -> float | None: ...


def rehearse(
    host: Host, requests: Sequence[Request], changes: Mapping[Site, Tensor],
    costs: Mapping[Site, CostMatrix], config: _Settings, work: Workspace,
) -> dict[str, float]:  # fmt: skip
    """Train ``changes`` ``[d_out, d_in]`` further, in place, on all requests and on texts to preserve.

    The rounds depend on the seed and the number of requests only, so a sequence resumed from a file
    continues as in memory. Returns the last round's losses.
    """
    earlier: tuple[Request, ...] = work.after.provenance.requests if work.after else ()
    every = [*earlier, *requests]
    texts = _texts(host, every, config, work) if config.rehearsal_texts else []
    rounds = draw(
        random.Random(f"rehearsal-{work.seed}-{len(every)}"), new=len(requests), earlier=len(earlier),
        texts=len(texts), passes=config.rehearsal, size=config.rehearsal_requests, beside=config.rehearsal_texts,
    )  # fmt: skip
    line_numbers = _in_use([one.lines for one in rounds])
    text_numbers = _in_use([one.texts for one in rounds])
    with without(work.after, host):
        recital = recite(host, [texts[i] for i in text_numbers])
    place_of_line, place_of_text = _places(line_numbers), _places(text_numbers)
    return rehearse_(
        host, changes, [lay_out(host, every[i], "target") for i in line_numbers], recital,
        [one.renumbered(place_of_line, place_of_text) for one in rounds], costs,
        weight=config.rehearsal_weight, limit=config.step_limit, batch=work.batch_size,
        tick=lambda done, total: work.on_progress("rehearsal", done, total),
    )  # fmt: skip


def _in_use(groups: Sequence[Sequence[int]]) -> list[int]:
    return sorted({i for group in groups for i in group})


def _places(numbers: Sequence[int]) -> dict[int, int]:
    return {number: place for place, number in enumerate(numbers)}


def _texts(
    host: Host, requests: Sequence[Request], config: _Settings, work: Workspace
) -> list[tuple[int, ...]]:
    """Return the ids of the texts to keep: those that do not state what a request changes.

    A text that names the subject and its old answer is left out: the edited model should not generate it any more.
    """
    rows = work.texts(
        host, config.rehearsal_pool, config.rehearsal_tokens, own=config.rehearsal_source == "model"
    )
    stale: set[int] = set()
    for request, old in zip(requests, work.old_answers(host, requests, ANSWER_TOKENS), strict=True):
        stale |= {i for i, (text, _) in enumerate(rows) if request.subject in text and old in text}
    return [ids for i, (_, ids) in enumerate(rows) if i not in stale]
