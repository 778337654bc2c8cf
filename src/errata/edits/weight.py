"""Edits that change weights. The only place where a host's weight is written.

A host keeps, per touched weight, a copy of the original bits and the deltas that are active. The
weight is always base + sum of deltas, summed in float32 (in float64 for float64 weights) in an order
that depends on the edits alone, and cast once. So edits can come and go in any order, and the last one
to go leaves the original bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from errata.edits.edit import Edit, Provenance
from errata.errors import EditError
from errata.host.load import Host
from errata.linalg.lowrank import LowRank

Delta = LowRank | Tensor


@dataclass
class Overlay:
    """What stands on one weight of a model."""

    base: Tensor
    """The original bits."""
    deltas: dict[str, Delta] = field(default_factory=dict)
    """Active deltas by edit digest, oriented as the weight is stored."""


@dataclass
class WeightEdit(Edit):
    """Per weight a delta ``[d_out, d_in]``: thin factors, or dense."""

    kind: ClassVar[str] = "weight"

    deltas: Mapping[str, Delta]
    """Delta by parameter path."""
    transposed: frozenset[str]
    """Parameters stored ``[d_in, d_out]``."""
    provenance: Provenance

    @property
    def digest(self) -> str:
        """Identity of the numbers, 16 hex digits."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self._tensors().items()):
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def apply_(self, host: Host, *, foreign: bool = False) -> None:
        """Add the deltas to the host's weights.

        Raises EditError, with nothing changed, when the host is another one, a weight is missing or
        of another shape, the edit is active already, or it would vanish in the weights' precision.
        """
        self.check_host(host, foreign=foreign)
        weights = self._weights(host)
        overlays: dict[str, Overlay] = host.overlays
        digest = self.digest
        if any(name in overlays and digest in overlays[name].deltas for name in weights):
            raise EditError(f"edit {digest} is active on this host already")
        done: list[str] = []
        changed = False
        for name, weight in weights.items():
            before = weight.detach().clone()
            overlay = overlays.setdefault(name, Overlay(before))
            overlay.deltas[digest] = self.deltas[name]
            _write(weight, overlay, name in self.transposed)
            done.append(name)
            changed = changed or not torch.equal(weight, before)
        if not changed and self.norm() > 0:
            self._remove(host, done, digest)
            raise EditError(
                f"edit {digest} changes nothing: every entry is lost in {host.dtype} rounding; "
                "load the model in float32"
            )

    def revert_(self, host: Host) -> None:
        """Take the deltas away again; raises EditError if the edit is not active."""
        overlays: dict[str, Overlay] = host.overlays
        digest = self.digest
        names = [n for n in self.deltas if n in overlays and digest in overlays[n].deltas]
        if len(names) != len(self.deltas):
            raise EditError(f"edit {digest} is not active on this host; nothing to take back")
        self._remove(host, names, digest)

    def _remove(self, host: Host, names: list[str], digest: str) -> None:
        overlays = host.overlays
        for name in names:
            overlay = overlays[name]
            del overlay.deltas[digest]
            _write(host.model.get_parameter(name), overlay, name in self.transposed)
            if not overlay.deltas:
                del overlays[name]

    def _weights(self, host: Host) -> dict[str, nn.Parameter]:
        found = {}
        for name, delta in self.deltas.items():
            try:
                weight = host.model.get_parameter(name)
            except AttributeError as error:
                raise EditError(f"the host has no weight {name!r}, which the edit changes") from error
            stored = tuple(reversed(delta.shape)) if name in self.transposed else tuple(delta.shape)
            if tuple(weight.shape) != stored:
                raise EditError(f"weight {name!r} is {tuple(weight.shape)}, the edit expects {stored}")
            if weight.is_meta or not weight.is_floating_point():
                raise EditError(f"weight {name!r} is {weight.dtype} on {weight.device}: it cannot be written")
            found[name] = weight
        return found

    def norm(self) -> float:
        """Frobenius norm over all deltas."""
        return sum(_norm(delta) ** 2 for delta in self.deltas.values()) ** 0.5

    def rounding(self, host: Host) -> float:
        """Relative error of the change as realised in the host's precision, while applied alone.

        ||(W' - W) - delta|| / ||delta||; 0 means exact.
        """
        error = total = 0.0
        overlays = host.overlays
        for name, weight in self._weights(host).items():
            overlay = overlays.get(name)
            if overlay is None or set(overlay.deltas) != {self.digest}:
                raise EditError("rounding is measured with this edit applied and no other on its weights")
            wanted = _oriented(self.deltas[name], name in self.transposed, weight.device)
            realised = weight.detach().float() - overlay.base.float()
            error += float((realised - wanted).square().sum())
            total += float(wanted.square().sum())
        return (error / total) ** 0.5 if total else 0.0

    def _tensors(self) -> Mapping[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name, delta in self.deltas.items():
            if isinstance(delta, LowRank):
                tensors[f"{name}.B"], tensors[f"{name}.A"] = delta.B, delta.A
            else:
                tensors[f"{name}.dense"] = delta
        return tensors

    def _header(self) -> Mapping[str, Any]:
        return {"transposed": sorted(self.transposed), "digest": self.digest}

    @classmethod
    def _restore(
        cls, tensors: Mapping[str, Tensor], header: Mapping[str, Any], provenance: Provenance
    ) -> WeightEdit:
        deltas: dict[str, Delta] = {}
        for name in tensors:
            stem, _, part = name.rpartition(".")
            if part == "B":
                deltas[stem] = LowRank(tensors[name], tensors[f"{stem}.A"])
            elif part == "dense":
                deltas[stem] = tensors[name]
        edit = cls(deltas, frozenset(header["transposed"]), provenance)
        if edit.digest != header["digest"]:
            raise ValueError(f"content {edit.digest} does not match the recorded {header['digest']}")
        return edit

    def summary(self) -> dict[str, Any]:
        """Describe the edit: what was asked, by which method, what it touches and how strongly."""
        return {
            "kind": self.kind,
            "digest": self.digest,
            "method": self.provenance.method,
            "host": self.provenance.host,
            "host_name": self.provenance.host_name,
            "seed": self.provenance.seed,
            "config": dict(self.provenance.config),
            "requests": [request.to_dict() for request in self.provenance.requests],
            "versions": dict(self.provenance.versions),
            "notes": dict(self.provenance.notes),
            "overrides": list(self.provenance.overrides),
            "norm": self.norm(),
            "weights": {
                name: {
                    "shape": list(delta.shape),
                    "form": f"rank {delta.rank}" if isinstance(delta, LowRank) else "dense",
                    "norm": _norm(delta),
                }
                for name, delta in self.deltas.items()
            },
        }


def _norm(delta: Delta) -> float:
    return delta.norm() if isinstance(delta, LowRank) else float(delta.double().norm())


def active(host: Host) -> list[str]:
    """List the digests of the weight edits in place on a host."""
    return sorted({digest for overlay in host.overlays.values() for digest in overlay.deltas})


def _oriented(delta: Delta, transposed: bool, device: torch.device) -> Tensor:
    dense = delta.to(device).dense() if isinstance(delta, LowRank) else delta.to(device)
    dense = dense.float()
    return dense.mT if transposed else dense


@torch.no_grad()
def _write(weight: nn.Parameter, overlay: Overlay, transposed: bool) -> None:
    if not overlay.deltas:
        weight.copy_(overlay.base)
        return
    wide = torch.promote_types(weight.dtype, torch.float32)
    total = overlay.base.to(wide)
    for digest in sorted(overlay.deltas):
        total = total + _oriented(overlay.deltas[digest], transposed, weight.device)
    weight.copy_(total.to(weight.dtype))
