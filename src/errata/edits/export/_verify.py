"""Comparisons of what an export wrote with the edit in place, before it counts.

Logits are those of the edit's own prompts and of a few neutral texts, at every token. In float32 they may differ by
:data:`EXACT` of the largest one. Where numbers of 16 bits are computed with, by :data:`STEPS` of their rounding steps;
and where a change is known to have lost a share of itself, by that share of what the edit does.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from errata.edits.edit import Edit
from errata.edits.export._exporter import WRITE_ANYWAY
from errata.errors import EditError, RequestError
from errata.host.base import ModelHost
from errata.host.images import PROBE, ImageHost
from errata.host.passes import Pass
from errata.host.text_to_image import TextToImageHost
from errata.types import Request

EXACT = 1e-5
"""Largest difference of logits in float32, as a share of the largest logit (of 1 where that is smaller)."""
STEPS = 16
"""The same in narrower numbers, in steps of their rounding: 2^-7 of bfloat16, 2^-10 of float16."""
MOST = 16
"""Most prompts of the edit's requests."""
NEUTRAL = (
    "The weather this morning is", "Water boils at a temperature of", "She opened the door and",
    "In the year 1900 the town",
)  # fmt: skip
"""Texts that have nothing to do with the edit."""
IMAGES = 4
"""Random images, for models that read them: records of edits hold no pixels."""


def passes(edit: Edit, host: ModelHost) -> list[Pass]:
    """Return what the host is run on, one pass a prompt, with the prompts that its window and vocabulary allow."""
    if isinstance(host, ImageHost):
        draw = torch.Generator().manual_seed(0)
        height, width = host.size or (PROBE, PROBE)
        images = torch.rand(IMAGES, host.channels, height, width, generator=draw)
        return [Pass(pixels=host.prepare(image[None])) for image in images]
    text_host: Any = host
    asked = [request.text for request in edit.provenance.requests if isinstance(request, Request)]
    made: list[Pass] = []
    for text in dict.fromkeys((*asked[:MOST], *NEUTRAL)):
        try:
            if isinstance(host, TextToImageHost):
                made.append(host.as_pass([text]))
                continue
            row = text_host.encode_prompt(text)
            made.append(text_host.as_pass(text_host.batch([row])))
        except RequestError:
            continue  # longer than the window, or with a token that has no embedding: not to be run at all
    if not made:
        raise EditError(
            f"{host.name} takes none of the prompts that the export is compared on; {WRITE_ANYWAY}"
        )
    return made


@torch.no_grad()
def logits(host: ModelHost, some: Sequence[Pass]) -> list[Tensor]:
    """Return the logits ``[1, length, vocab]`` of each pass, in float32 in main memory."""
    return [host.run(one).logits.float().cpu() for one in some]


@contextmanager
def in_place(edit: Edit, host: ModelHost, *, merge: bool | None) -> Generator[None, None, None]:
    """Have an edit in place; ``merge=False``: beside the weights where all of it can be, else merged."""
    with ExitStack() as stack:
        try:
            stack.enter_context(edit.on(host, foreign=True, merge=merge))
        except EditError:
            if merge is not False:
                raise
            stack.enter_context(edit.on(host, foreign=True))  # say of a norm, beside which nothing can act
        yield


@dataclass(frozen=True)
class Reference:
    """Logits of the host without and with the edit."""

    passes: Sequence[Pass]
    plain: Sequence[Tensor]
    edited: Sequence[Tensor]

    @classmethod
    def of(cls, edit: Edit, host: ModelHost, *, merge: bool | None = None) -> Reference:
        """Run the host without and with the edit; it is left as it was."""
        some = passes(edit, host)
        plain = logits(host, some)
        with in_place(edit, host, merge=merge):
            return cls(some, plain, logits(host, some))

    @property
    def effect(self) -> float:
        """Largest change of a logit by the edit."""
        return _largest(self.edited, self.plain)

    def compare(self, exported: ModelHost, *dtypes: torch.dtype, lost: Mapping[str, float]) -> dict[str, Any]:
        """Compare with what was written; return counts, the largest difference, its bound and the edit's effect.

        ``dtypes``: those that either side computes in. ``lost``: shares of the change by tensor that it is known to
        lack. Raises EditError where logits differ by more than the bound.
        """
        found = logits(exported, self.passes)
        scale = max(1.0, *(float(one.abs().max()) for one in self.edited))
        step = max(torch.finfo(dtype).eps for dtype in dtypes)
        exact = step <= torch.finfo(torch.float32).eps
        bound = scale * (EXACT if exact else STEPS * step) + 2 * max(lost.values(), default=0.0) * self.effect
        difference = _largest(found, self.edited)
        if not difference <= bound:  # written so that what is not a number fails
            raise EditError(
                f"what was written does not do what the edit does: logits differ by {difference:.3g}, at most "
                f"{bound:.3g} was expected, and the edit changes them by {self.effect:.3g}; {WRITE_ANYWAY}"
            )
        return {
            "prompts": len(self.passes), "difference": difference, "bound": bound, "effect": self.effect,
        }  # fmt: skip


def _largest(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """Return the largest difference; infinite where shapes differ, not a number where an entry is none."""
    pairs = list(zip(some, others, strict=True))
    if any(one.shape != other.shape for one, other in pairs):
        return float("inf")
    differences = torch.stack([(one - other).abs().max() for one, other in pairs])
    return float(differences.max())


def refuse_unlike(what: str) -> EditError:
    """Return the error for a file that was read back and holds something else than was to be written."""
    return EditError(f"{what} was read back and is not what was to be written; {WRITE_ANYWAY}")
