"""What stands on one weight of a model, and how it is told whether something else has changed the weight.

An overlay keeps the original bits and the deltas that are active. It is the truth: the weight follows it,
in the order of a database, so that an interrupt at any moment loses nothing. Before a write, a journal
names what the weight will hold; the deltas that are taken away are dropped after the weight was written and
read back, and the original bits last of all.

The journal also tells whether the weight still holds what was written here. A weight that was only cast or
moved since is recognised; one that something else has changed is never overwritten in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from errata.edits.branch import Delta
from errata.host.identity import content
from errata.host.load import OVERLAYS
from errata.linalg.lowrank import LowRank

CASTS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Entry:
    """One content that a weight may hold: the base with some deltas."""

    deltas: Mapping[str, Delta]
    mark: bytes
    """Its content, see :func:`errata.host.identity.content`."""
    dtype: torch.dtype
    device: torch.device


@dataclass
class Overlay:
    """What stands on one weight of a model."""

    base: Tensor
    """The original bits."""
    deltas: Mapping[str, Delta]
    """Active deltas by edit digest, oriented as the weight is stored; replaced, never changed."""
    journal: tuple[Entry, ...]
    """What the weight may hold: what was written last, and during a write also what is coming."""
    base_mark: bytes = field(default=b"", repr=False)
    """Content of the base."""

    @staticmethod
    def over(weight: Tensor, deltas: Mapping[str, Delta]) -> Overlay:
        """Stand deltas on a weight that nothing stands on; it is still to be written."""
        base = weight.detach().clone()
        mark = content(base)
        return Overlay(base, deltas, (Entry({}, mark, base.dtype, base.device),), mark)

    def without(self, digest: str) -> Mapping[str, Delta]:
        """Return the active deltas but one."""
        return {key: delta for key, delta in self.deltas.items() if key != digest}

    def written(self, weight: Tensor) -> bool:
        """Whether a weight holds what was written here, perhaps cast or moved since."""
        if tuple(weight.shape) != tuple(self.base.shape) or weight.is_meta:
            return False
        mark = content(weight)
        return any(entry.mark == mark for entry in self.journal) or self._cast(weight)

    @torch.no_grad()
    def _cast(self, weight: Tensor) -> bool:
        """Whether a weight holds something of the journal after casts of the whole model."""
        if not weight.is_floating_point() or weight.element_size() < 2:
            return False
        for entry in self.journal:
            value = composed(self.base, entry.deltas, entry.dtype, entry.device)
            for kind in CASTS:
                cast = value.to(kind).to(weight.dtype)
                if torch.equal(cast.to(weight.device), weight):
                    return True
        return False

    def unedited(self, weight: Tensor) -> Tensor:
        """Return what the weight would be without the deltas: itself, where something else has changed it."""
        return self.base.to(weight.dtype) if self.written(weight) else weight

    def holds(self, weight: Tensor) -> bytes:
        """Name the content of :meth:`unedited`."""
        if weight.dtype != self.base.dtype or not self.written(weight):
            return content(self.unedited(weight))
        return self.base_mark


def key_of(numbers: str, digest: str) -> str:
    """Return the name of an edit among the changes of a weight: what orders it, and its digest."""
    return f"{numbers}.{digest}"


def digest_of(key: str) -> str:
    """Return the digest in a name that :func:`key_of` made."""
    return key.rpartition(".")[2]


@torch.no_grad()
def composed(base: Tensor, deltas: Mapping[str, Delta], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Add deltas to a base in float32 or wider, in an order that depends on them alone, and cast once."""
    value = base.to(device)
    if deltas:
        value = value.to(torch.promote_types(torch.promote_types(base.dtype, dtype), torch.float32))
        for digest in sorted(deltas):
            value = value + multiplied(deltas[digest], value)
    return value.to(dtype)


def multiplied(delta: Delta, like: Tensor) -> Tensor:
    """Multiply a delta out in the shape of its weight, float32 or wider, on the weight's device."""
    wide = torch.promote_types(like.dtype, torch.float32)
    moved = delta.to(device=like.device, dtype=wide)
    return (moved.dense() if isinstance(moved, LowRank) else moved).reshape(like.shape)


def claim(model: nn.Module, name: str, weight: Tensor, digest: str, delta: Delta) -> Overlay:
    """Count a delta, oriented as the weight is stored, as active; the weight is still to be written."""
    held: dict[str, Overlay] = model.__dict__.setdefault(OVERLAYS, {})
    overlay = held.get(name)
    if overlay is None:
        overlay = held[name] = Overlay.over(weight, {digest: delta})
    else:
        overlay.deltas = {**overlay.deltas, digest: delta}
    return overlay


def forget(model: nn.Module, name: str, digest: str) -> None:
    """Drop a delta, and with the last one the original bits, whatever the weight holds."""
    held: dict[str, Overlay] = model.__dict__[OVERLAYS]
    left = held[name].without(digest)
    if left:
        held[name].deltas = left
    else:
        del held[name]
