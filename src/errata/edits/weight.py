"""Edits that change weights. The only place where a host's weight is written.

A host keeps, per touched weight, a copy of the original bits and the deltas that are active. The
weight is always base + sum of deltas, summed in float32 (in float64 for float64 weights) in an order
that depends on the edits alone, and cast once. So edits can come and go in any order, and the last one
to go leaves the original bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from errata.edits.edit import Edit, Provenance
from errata.edits.records import Record
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
    """Per weight a delta: thin factors ``[d_out, d_in]``, or dense in the weight's own shape.

    A weight of more than two axes (a convolution) counts as ``[d_out, all others]`` for thin factors.
    """

    kind: ClassVar[str] = "weight"

    deltas: Mapping[str, Delta]
    """Delta by parameter path."""
    transposed: frozenset[str]
    """Parameters stored ``[d_in, d_out]``."""
    provenance: Provenance
    records: Mapping[str, Record] = field(default_factory=dict)
    """By parameter path, what a closed-form delta was solved from; see :mod:`errata.edits.algebra`."""
    state: Mapping[str, Tensor] = field(default_factory=dict)
    """What a method needs to go on from here: running statistics, queues, projections."""
    whole: bool = False
    """Whether a fit that went on from another edit gives that edit's change too, not only what is new."""

    @cached_property
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
            thin = isinstance(delta, LowRank) and weight.ndim > 2
            found_shape = tuple(weight.flatten(1).shape) if thin else tuple(weight.shape)
            if found_shape != stored:
                raise EditError(f"weight {name!r} is {found_shape}, the edit expects {stored}")
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
            wanted = _oriented(self.deltas[name], name in self.transposed, weight)
            realised = weight.detach().to(wanted.dtype) - overlay.base.to(wanted.dtype)
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
        for name, record in self.records.items():
            tensors.update({f"{name}.record.{part}": t for part, t in record.tensors().items()})
        tensors.update({f"{name}.state": tensor for name, tensor in self.state.items()})
        return tensors

    def _header(self) -> Mapping[str, Any]:
        return {
            "transposed": sorted(self.transposed),
            "digest": self.digest,
            "records": {name: record.facts() for name, record in self.records.items()},
        }

    def then(self, later: WeightEdit) -> WeightEdit:
        """Return one edit for this one and a fit of the same method that went on from it.

        Provenance lists the requests of both; notes and settings are the later one's.
        """
        deltas = dict(later.deltas) if later.whole else dict(self.deltas)
        for name, delta in later.deltas.items() if not later.whole else ():
            deltas[name] = added(deltas[name], delta) if name in deltas else delta
        records = dict(self.records)
        first = len(self.provenance.requests)
        for name, record in later.records.items():
            moved = record.shifted(first)
            records[name] = records[name].joined(moved) if name in records else moved
        provenance = replace(
            later.provenance,
            requests=(*self.provenance.requests, *later.provenance.requests),
            overrides=tuple(dict.fromkeys((*self.provenance.overrides, *later.provenance.overrides))),
        )
        state = {**self.state, **later.state}
        return WeightEdit(deltas, self.transposed | later.transposed, provenance, records, state)

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
        records = {
            name: Record.restored(facts, {p: tensors[f"{name}.record.{p}"] for p in Record.PARTS})
            for name, facts in header.get("records", {}).items()
        }
        state = {n.removesuffix(".state"): t for n, t in tensors.items() if n.endswith(".state")}
        edit = cls(deltas, frozenset(header["transposed"]), provenance, records, state)
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


def added(one: Delta, other: Delta) -> Delta:
    """Add two deltas of one weight; thin while thin factors are the smaller form."""
    if isinstance(one, LowRank) and isinstance(other, LowRank):
        total = one + other
        out, into = total.shape
        return total if total.rank * (out + into) < out * into else total.dense()
    parts = [d.dense() if isinstance(d, LowRank) else d for d in (one, other)]
    return parts[0] + parts[1]


def _oriented(delta: Delta, transposed: bool, weight: Tensor) -> Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    moved = delta.to(device=weight.device, dtype=wide)
    dense = moved.dense() if isinstance(moved, LowRank) else moved
    return dense.mT if transposed else dense.reshape(weight.shape)


@torch.no_grad()
def _write(weight: nn.Parameter, overlay: Overlay, transposed: bool) -> None:
    if not overlay.deltas:
        weight.copy_(overlay.base)
        return
    wide = torch.promote_types(weight.dtype, torch.float32)
    total = overlay.base.to(wide)
    for digest in sorted(overlay.deltas):
        total = total + _oriented(overlay.deltas[digest], transposed, weight)
    weight.copy_(total.to(weight.dtype))
