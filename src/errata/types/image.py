"""Requests to an image classifier, and what is wrong with them. Loads the standard library only."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from errata.errors import RequestError, shown

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ImageRecord:
    """What is stored of an :class:`ImageRequest` in the record of an edit: names and identity, no pixels."""

    concept: str
    replacement: str
    pairs: int
    """How many pairs of images there were."""
    digest: str
    """Identity of images and masks, 16 hex digits."""
    id: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the set fields as plain data."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, eq=False)
class ImageRequest:
    """What an image classifier is to take for what: ``replacement`` for ``concept``, shown in pairs of images.

    Each pair shows one scene twice, with ``concept`` in the original and ``replacement`` in its place in the
    changed image; the mask marks where. Raises :class:`RequestError` listing all that is wrong.
    """

    original: Tensor
    """Images with the concept ``[n, c, h, w]``, in the host's unit; see ``ImageHost.prepare``."""
    changed: Tensor
    """The same images with the replacement ``[n, c, h, w]``."""
    mask: Tensor
    """Where the two differ in meaning ``[n, h, w]``, 0 to 1."""
    concept: str
    """What the mask marks in the originals, e.g. road."""
    replacement: str
    """What the changed images show in its place and is to be treated like the concept, e.g. snow."""
    id: str | None = None
    """A name for messages and tables."""
    reference: Tensor | None = None
    """Further images ``[k, c, h, w]`` whose activations are typical of a layer; None: the originals."""

    def __post_init__(self) -> None:
        problems = image_problems(self)
        if problems:
            name = f"request {shown(self.id)}: " if self.id else ""
            raise RequestError(name + "; ".join(problems))

    @cached_property
    def record(self) -> ImageRecord:
        """Names, number of pairs and content hash."""
        digest = hashlib.sha256()
        for part in (self.original, self.changed, self.mask, self.reference):
            if part is not None:
                digest.update(f"{tuple(part.shape)}".encode())
                digest.update(part.detach().float().contiguous().cpu().numpy().tobytes())
        return ImageRecord(
            self.concept, self.replacement, self.original.shape[0], digest.hexdigest()[:16], self.id
        )


def image_problems(request: ImageRequest) -> list[str]:
    """List what is wrong with an image request, in words a user can act on."""
    texts: list[tuple[str, Any]] = [("concept", request.concept), ("replacement", request.replacement)]
    problems = [
        f"{name} must be a text that is not empty, found {shown(value)}"
        for name, value in texts
        if not isinstance(value, str) or not value.strip()
    ]
    parts: list[tuple[str, Any, str]] = [
        ("original", request.original, "[n, c, h, w]"),
        ("changed", request.changed, "[n, c, h, w]"),
        ("mask", request.mask, "[n, h, w]"),
    ]
    if request.reference is not None:
        parts.append(("reference", request.reference, "[k, c, h, w]"))
    for name, value, axes in parts:
        shape: list[int] = list(getattr(value, "shape", ()))
        if len(shape) != axes.count(",") + 1 or 0 in shape or not hasattr(value, "isfinite"):
            problems.append(f"{name} must be a tensor {axes}, found {type(value).__name__} {shape}")
        elif not bool(value.isfinite().all()):
            problems.append(f"{name} holds NaN or infinite numbers")
    if problems:
        return problems
    n, c, h, w = request.original.shape
    if request.changed.shape != request.original.shape:
        problems.append(
            f"changed is {list(request.changed.shape)}, original is {[n, c, h, w]}; they must agree"
        )
    if tuple(request.mask.shape) != (n, h, w):
        problems.append(f"mask is {list(request.mask.shape)}, expected {[n, h, w]}, as the images are")
        return problems
    if bool(((request.mask < 0) | (request.mask > 1)).any()):
        problems.append("mask has values outside 0 to 1")
    empty = [i for i in range(n) if not bool((request.mask[i] > 0).any())]
    if empty:
        problems.append(
            f"the mask of pair {', '.join(str(i + 1) for i in empty)} (counted from 1) marks nothing"
        )
    return problems
