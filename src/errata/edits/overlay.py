"""The edits merged into one weight of a model, and the detection of changes of the weight by anything else.

An overlay keeps the original bits and the active deltas. The weight is always computed from these, and every write is
recorded first, as in a database, so that an interrupt at any moment loses nothing: the journal has the content that
will be written; removed deltas are dropped after the weight was written and read back, and the original bits last.

The journal also tells whether the weight still has the content written here. A weight that was only cast or moved
since is recognised; one that something else has changed is never overwritten silently.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from errata.edits.deltas import Delta, weight_with
from errata.host.base import OVERLAYS
from errata.host.identity import content

CASTS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Entry:
    """A possible content of a weight: the base with some deltas."""

    deltas: Mapping[str, Delta]
    content_hash: bytes
    """Hash of the weight with these deltas, see :func:`errata.host.identity.content`."""
    dtype: torch.dtype
    device: torch.device


@dataclass
class Overlay:
    """The edits merged into one weight of a model."""

    base: Tensor
    """The original bits, in the weight's shape ``[...]``."""
    deltas: Mapping[str, Delta]
    """Active deltas by edit, oriented as the weight is stored; replaced, never changed."""
    journal: tuple[Entry, ...]
    """Possible contents of the weight: the last one written, and during a write also the next one."""
    base_hash: bytes = field(default=b"", repr=False)
    """Hash of the base's content."""

    @staticmethod
    def of(weight: Tensor, deltas: Mapping[str, Delta]) -> Overlay:
        """Start an overlay of a weight ``[...]`` without edits; the deltas are still to be written into it."""
        base = weight.detach().clone()
        base_hash = content(base)
        return Overlay(base, deltas, (Entry({}, base_hash, base.dtype, base.device),), base_hash)

    def without(self, key: str) -> Mapping[str, Delta]:
        """Return the active deltas except one."""
        return {other: delta for other, delta in self.deltas.items() if other != key}

    def matches(self, weight: Tensor) -> bool:
        """Whether a weight ``[...]`` has the content written here, possibly cast or moved since."""
        if tuple(weight.shape) != tuple(self.base.shape) or weight.is_meta:
            return False
        content_hash = content(weight)
        return any(entry.content_hash == content_hash for entry in self.journal) or self._matches_cast(weight)

    @torch.no_grad()
    def _matches_cast(self, weight: Tensor) -> bool:
        """Whether a weight equals an entry of the journal after casts of the whole model."""
        if not weight.is_floating_point() or weight.element_size() < 2:
            return False
        for entry in self.journal:
            value = weight_with(self.base, entry.deltas, entry.dtype, entry.device)
            for dtype in CASTS:
                cast = value.to(dtype).to(weight.dtype)
                if torch.equal(cast.to(weight.device), weight):
                    return True
        return False

    def unedited(self, weight: Tensor) -> Tensor:
        """Return the weight ``[...]`` without the deltas; the weight itself if something else has changed it."""
        return self.base.to(weight.dtype) if self.matches(weight) else weight

    def unedited_hash(self, weight: Tensor) -> bytes:
        """Hash the content of :meth:`unedited` for a weight ``[...]``."""
        if weight.dtype != self.base.dtype or not self.matches(weight):
            return content(self.unedited(weight))
        return self.base_hash


def key_of(tensor_digest: str, digest: str) -> str:
    """Return the key of an edit's delta: the digest of its tensors, which orders it, and its own digest."""
    return f"{tensor_digest}.{digest}"


def digest_of(key: str) -> str:
    """Return the edit's digest in a key that :func:`key_of` returned."""
    return key.rpartition(".")[2]


def add_delta(model: nn.Module, name: str, weight: Tensor, key: str, delta: Delta) -> Overlay:
    """Register a delta, oriented as the weight ``[...]`` is stored, as active; the weight is not written here."""
    overlays: dict[str, Overlay] = model.__dict__.setdefault(OVERLAYS, {})
    overlay = overlays.get(name)
    if overlay is None:
        overlay = overlays[name] = Overlay.of(weight, {key: delta})
    else:
        overlay.deltas = {**overlay.deltas, key: delta}
    return overlay


def drop_delta(model: nn.Module, name: str, key: str) -> None:
    """Drop a delta, and with the last one the original bits; the weight is not written here."""
    overlays: dict[str, Overlay] = model.__dict__[OVERLAYS]
    rest = overlays[name].without(key)
    if rest:
        overlays[name].deltas = rest
    else:
        del overlays[name]
