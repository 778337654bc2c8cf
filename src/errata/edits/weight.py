"""Edits that change weights. The only place where a host's weight is written.

A host keeps, per touched weight, a copy of the original bits and the deltas that are active, see
:mod:`errata.edits.overlay`. The weight is always base + sum of deltas, summed in float32 (in float64 for
float64 weights) in an order that depends on the edits alone, and cast once. So edits can come and go in any
order, and the last one to go leaves the original bits. After every write the weight is read back.

A delta may also stand beside its weight instead, see :mod:`errata.edits.branch`: exact in 16 bits, and
the only way with packed weights.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from errata.edits import branch, overlay
from errata.edits import format as file_format
from errata.edits import header as fields
from errata.edits.branch import Delta
from errata.edits.edit import Edit, Outside, Placement, Provenance
from errata.edits.records import Record, contiguous_copy
from errata.errors import EditError
from errata.host import locking, placed, placement
from errata.host.base import ModelHost
from errata.host.identity import content
from errata.linalg.lowrank import LowRank

WARN_ABOVE_SHARE_LOST = 0.5
"""Share of a change that rounding may eat before a warning is given."""


@dataclass(frozen=True, eq=False)
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

    def __post_init__(self) -> None:
        # stored as a file would have them, so that a loaded edit goes on to the very same bits
        deltas = {name: _contiguous(delta) for name, delta in self.deltas.items()}
        records = {name: record.contiguous() for name, record in self.records.items()}
        state = {name: contiguous_copy(tensor) for name, tensor in self.state.items()}
        for name, value in (("deltas", deltas), ("records", records), ("state", state)):
            object.__setattr__(self, name, value)

    @cached_property
    def _key(self) -> str:
        """Name among the changes of a weight: they are added in the order of their numbers, then of digests.

        So the sum does not depend on what an edit says of itself besides its numbers.
        """
        return overlay.key_of(file_format.tensor_digest(self.parts()), self.digest)

    def place(
        self, host: ModelHost, *, foreign: bool = False, merge: bool | None = None, rows: str | None = None
    ) -> Placement:
        """Put the deltas in place: merged into the weights, or added to their modules' outputs.

        Unmerged, the weights stay as they are and each module adds delta @ input to its output in float32;
        merged costs nothing at run time but is rounded to the weights' precision, see :attr:`Placement.lost`,
        with a warning where that loses most of the change. None merges, except that packed (quantised)
        weights, which cannot be written, stay unmerged; True insists on merging. Other threads that run or
        change the model wait meanwhile, or are waited for. ``rows``: an edit set; the change is then unmerged
        and acts on the rows that belong to the set.

        Raises EditError, with nothing changed, when the host is another one, a weight is missing, of
        another shape, not where it can be edited or changed by something else while an edit stands on it, the
        edit is active already, or it would vanish in the weights' precision.
        """
        return locking.alone(host, self._place, host, foreign, merge, rows)

    def _place(self, host: ModelHost, foreign: bool, merge: bool | None, rows: str | None) -> Placement:
        if rows is not None and merge:
            raise EditError(f"a weight has no rows: an edit of the set {rows!r} cannot be merged")
        overrides = self.overruled(host, foreign=foreign)
        self._refuse_active(host)
        try:
            number = placed.set_number(host.model, rows)
            lost, moved = self._put(host, merge if rows is None else False, number)
            self._check_rounding(host, lost, moved)
            unmerged = tuple(name for name in self.deltas if name not in lost)
            return Placement(self.digest, host.fingerprint, lost, unmerged, overrides, rows)
        except BaseException:  # an interrupt, too, must leave nothing half done
            self._remove(host)
            raise

    def _check_rounding(self, host: ModelHost, lost: Mapping[str, float], moved: bool) -> None:
        """Raise EditError where merging lost the whole change, warn where it lost most of it."""
        if not moved and self.norm() > 0:
            raise EditError(
                f"edit {self.digest} changes nothing: every entry is lost in {host.dtype} rounding; "
                "use merge=False (--no-merge), or load the model in float32"
            )
        worst = max(lost, key=lambda name: lost[name], default=None)
        if worst is not None and lost[worst] > WARN_ABOVE_SHARE_LOST:
            warnings.warn(
                f"merging edit {self.digest} lost {lost[worst]:.0%} of its change of {worst} in "
                f"{host.model.get_parameter(worst).dtype} rounding: most of the edit was lost; use "
                "merge=False or float32",
                stacklevel=_outside(),
            )

    def trial(self, host: ModelHost, *, foreign: bool = False) -> dict[str, float]:
        """Return by weight what merging would lose, measured by applying and reverting.

        Packed weights do not appear: they are never merged. Raises EditError as :meth:`apply_` does,
        but not for an edit that vanishes: its losses are 1.
        """
        return locking.alone(host, self._trial, host, foreign)

    def _trial(self, host: ModelHost, foreign: bool) -> dict[str, float]:
        self.overruled(host, foreign=foreign)
        self._refuse_active(host)
        try:
            return self._put(host, None)[0]
        finally:
            self._remove(host)

    def revert_(self, host: ModelHost, *, outside: Outside = "refuse") -> None:
        """Take the deltas away again, also after a change or a revert that was interrupted half-way.

        A model that was cast or moved meanwhile gets its original bits, cast and moved likewise. A weight that
        something else has changed meanwhile (a training step, a merged adapter, a loaded checkpoint) is not
        written over: ``outside`` says what to do with it. ``refuse`` raises EditError and changes nothing;
        ``discard`` restores the original bits; ``leave`` keeps such a weight as it is and forgets what
        stood on it.

        Raises EditError if the edit is not active, or a weight cannot be written; the original bits are kept.
        """
        locking.alone(host, self._revert, host, outside)

    def _revert(self, host: ModelHost, outside: Outside) -> None:
        if not self.in_place(host):
            raise EditError(f"edit {self.digest} is not active on this host; nothing to take back")
        names = sorted(self._merged(host))
        obstacles = {name: self._obstacle(host, name, outside) for name in names}
        left = [name for name, problem in obstacles.items() if problem is not None]
        if left and outside != "leave":
            raise EditError(f"{obstacles[left[0]]}; nothing was taken back, and the original bits are kept")
        for name in left:
            for digest in list(host.overlays[name].deltas):
                overlay.forget(host.model, name, digest)
        self._remove(host)

    def in_place(self, host: ModelHost) -> bool:
        """Whether the edit, or part of it after an interrupt, is in place on a host."""
        return bool(self._merged(host) or self._aside(host))

    def _refuse_active(self, host: ModelHost) -> None:
        names = self._merged(host) | self._aside(host)
        if names:
            half = "" if len(names) == len(self.deltas) else ", in part, after an interrupt: revert it first"
            raise EditError(f"edit {self.digest} is active on this host already{half}")

    def _obstacle(self, host: ModelHost, name: str, outside: Outside) -> str | None:
        """Say why a weight on which this edit stands cannot be written now; None where it can."""
        try:
            weight = host.model.get_parameter(name)
            reason = placement.obstacle(host.model, name)
        except AttributeError:
            return (
                f"the model has no weight {name!r} any more, on which edit {self.digest} stands: undo what "
                "replaced its module (an adapter, a parametrisation), or give outside='leave' to forget the edit"
            )
        stands: overlay.Overlay = host.overlays[name]
        if reason is None and weight.shape != stands.base.shape:
            reason = f"it is {list(weight.shape)} now, {list(stands.base.shape)} before"
        if reason is not None:
            return f"weight {name!r} cannot be written back: {reason}; or give outside='leave' to forget the edit"
        if outside == "discard" or stands.written(weight) or self._is_restored(stands, weight):
            return None
        return (
            f"weight {name!r} was changed by something else while edit {self.digest} stood on it (training, a "
            "merged adapter, a loaded checkpoint), and taking the edit back would throw that change away: undo "
            "it first, or give outside='discard' to restore the original bits, or outside='leave' to keep the "
            "weight as it is and forget the edit"
        )

    def _is_restored(self, stands: overlay.Overlay, weight: Tensor) -> bool:
        """Whether a weight holds already what taking this edit back would write."""
        left = stands.without(self._key)
        return torch.equal(overlay.composed(stands.base, left, weight.dtype, weight.device), weight)

    def _put(
        self, host: ModelHost, merge: bool | None, number: int | None = None
    ) -> tuple[dict[str, float], bool]:
        """Put all deltas in place; return what was lost by merged weight, and whether any weight moved."""
        for name, delta in self.deltas.items():
            if not all(torch.isfinite(t).all() for t in _tensors(delta)):
                raise EditError(f"the change of {name!r} holds NaN or infinite numbers; refused")
        unmerged = {n for n in self.deltas if merge is False or (merge is None and _is_packed(host, n))}
        fits = {n: branch.fitted(host, n, self.deltas[n], n in self.transposed) for n in sorted(unmerged)}
        weights = self._weights(host, [name for name in self.deltas if name not in unmerged])
        lost, moved = {}, bool(fits)
        for name, delta in fits.items():
            branch.attach(host.model, name, self._key, delta, self._stored(name), number)
        for name, weight in weights.items():
            lost[name], changed = self._merge(host, name, weight)
            moved = moved or changed
        return lost, moved

    def _stored(self, name: str) -> Delta:
        return stored(self.deltas[name], name in self.transposed)

    def _merge(self, host: ModelHost, name: str, weight: nn.Parameter) -> tuple[float, bool]:
        """Add a delta to a weight; return the share of it that rounding lost, and whether any bit changed."""
        before = weight.detach().clone()
        delta = self._stored(name)
        # active from here on, so that whatever happens next is undone by taking it back
        stands = overlay.claim(host.model, name, weight, self._key, delta)
        _write(weight, stands, stands.deltas, name)
        return _share_lost(delta, weight, before), not torch.equal(weight, before)

    def _remove(self, host: ModelHost) -> None:
        """Take away whatever of this edit is in place."""
        for name in sorted(self._aside(host)):
            branch.detach(host.model, name, self._key)
        for name in sorted(self._merged(host)):
            stands: overlay.Overlay = host.overlays[name]
            _write(host.model.get_parameter(name), stands, stands.without(self._key), name)
            overlay.forget(host.model, name, self._key)  # last: until now the original bits are there

    def _merged(self, host: ModelHost) -> set[str]:
        stands = host.overlays
        return {n for n in self.deltas if n in stands and self._key in stands[n].deltas}

    def _aside(self, host: ModelHost) -> set[str]:
        stands = branch.standing(host.model)
        return {n for n in self.deltas if n in stands and self._key in stands[n].deltas}

    def _weights(self, host: ModelHost, names: Sequence[str]) -> dict[str, nn.Parameter]:
        """Return the weights to write. Raises EditError where one is missing, misshapen or out of reach."""
        found = {}
        for name in names:
            delta = self.deltas[name]
            try:
                reason = placement.obstacle(host.model, name)
                weight = None if reason else host.model.get_parameter(name)
            except AttributeError as error:
                raise EditError(f"the host has no weight {name!r}, which the edit changes") from error
            if weight is None:
                raise EditError(f"weight {name!r} cannot be written: {reason}")
            shape = tuple(reversed(delta.shape)) if name in self.transposed else tuple(delta.shape)
            thin = isinstance(delta, LowRank) and weight.ndim > 2
            found_shape = tuple(weight.flatten(1).shape) if thin else tuple(weight.shape)
            if found_shape != shape:
                raise EditError(f"weight {name!r} is {found_shape}, the edit expects {shape}")
            found[name] = weight
            self._refuse_changed(host, name, weight)
        twins = placement.sharing(host.model, names)
        if twins is not None:
            raise EditError(
                f"weight {twins[0]!r} shares its memory with {twins[1]!r}, so writing one changes the other; "
                "use merge=False, or untie them first"
            )
        return found

    def _refuse_changed(self, host: ModelHost, name: str, weight: Tensor) -> None:
        """Raise EditError where something else has changed a weight on which other edits stand."""
        stands: overlay.Overlay | None = host.overlays.get(name)
        if stands is not None and not stands.written(weight):
            digests = ", ".join(sorted(map(overlay.digest_of, stands.deltas)))
            raise EditError(
                f"weight {name!r} was changed by something else while {digests} stood on "
                "it (training, a merged adapter, a loaded checkpoint), and another edit would throw that change "
                "away: take those edits back first, with outside='discard' or outside='leave'"
            )

    def norm(self) -> float:
        """Frobenius norm over all deltas."""
        return sum(_norm(delta) ** 2 for delta in self.deltas.values()) ** 0.5

    def rounding(self, host: ModelHost) -> float:
        """Relative error of the change as realised in the host's precision, while applied alone.

        ||(W' - W) - delta|| / ||delta|| over all weights; 0 means exact, as is what stands beside.
        """
        found = self.rounding_by_weight(host)
        sizes = {name: _norm(delta) ** 2 for name, delta in self.deltas.items()}
        total = sum(sizes.values())
        return (sum(found[n] ** 2 * sizes[n] for n in sizes) / total) ** 0.5 if total else 0.0

    def rounding_by_weight(self, host: ModelHost) -> dict[str, float]:
        """Return :meth:`rounding` for each weight by itself.

        Raises EditError unless this edit is applied and no other on its weights.
        """
        aside = self._aside(host)
        return {name: 0.0 if name in aside else self._rounding(host, name) for name in self.deltas}

    def _rounding(self, host: ModelHost, name: str) -> float:
        stands: overlay.Overlay | None = host.overlays.get(name)
        if stands is None or set(stands.deltas) != {self._key}:
            raise EditError("rounding is measured with this edit applied and no other on its weights")
        return _share_lost(stands.deltas[self._key], host.model.get_parameter(name), stands.base)

    def parts(self) -> Mapping[str, Tensor]:
        """Return factors or dense deltas, records and state."""
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

    def body(self) -> Mapping[str, Any]:
        """Return which parameters are stored transposed, and the facts of the records."""
        return {
            "transposed": sorted(self.transposed),
            "records": {name: record.facts() for name, record in self.records.items()},
        }

    def then(self, later: Edit, *, cumulative: bool = False) -> WeightEdit:
        """Return one edit for this one and a fit of the same method that went on from it.

        Provenance lists the requests of both; notes and settings are the later one's, and this edit is its
        parent. ``cumulative``: whether the later one's deltas hold this one's already. Raises EditError for an
        edit of another kind.
        """
        if not isinstance(later, WeightEdit):
            raise EditError(f"a {later.kind} edit does not add up with a {self.kind} edit")
        deltas = dict(later.deltas) if cumulative else dict(self.deltas)
        for name, delta in later.deltas.items() if not cumulative else ():
            deltas[name] = added(deltas[name], delta) if name in deltas else delta
        records = dict(self.records)
        first = len(self.provenance.requests)
        for name, record in later.records.items():
            moved = record.shifted(first)
            records[name] = records[name].joined(moved) if name in records else moved
        provenance = replace(
            later.provenance,
            requests=(*self.provenance.requests, *later.provenance.requests),
            parents=(self.digest,),
        )
        state = {**self.state, **later.state}
        return WeightEdit(deltas, self.transposed | later.transposed, provenance, records, state)

    @classmethod
    def restore(
        cls, parts: Mapping[str, Tensor], body: Mapping[str, Any], provenance: Provenance
    ) -> WeightEdit:
        """Build the edit from its file's tensors and header. Raises ValueError or KeyError where they do not fit."""
        deltas: dict[str, Delta] = {}
        for name in parts:
            stem, _, part = name.rpartition(".")
            if part == "B":
                deltas[stem] = LowRank(parts[name], parts[f"{stem}.A"])
            elif part == "dense":
                deltas[stem] = parts[name]
        records = {}
        for name, facts in fields.typed(body.get("records", {}), dict, "records").items():
            where = f"records of {name[:80]!r}"
            read = fields.record(facts, where, len(provenance.requests))
            stored = {part: parts[f"{name}.record.{part}"] for part in Record.PARTS}
            fields.fits(stored, read, deltas[name], where)
            records[name] = Record.restored(read, stored)
        state = {n.removesuffix(".state"): t for n, t in parts.items() if n.endswith(".state")}
        transposed = frozenset(fields.texts(body, "transposed", "the header"))
        if not transposed <= deltas.keys():
            raise ValueError(f"{min(transposed - deltas.keys())[:80]!r} is called transposed and not changed")
        return cls(deltas, transposed, provenance, records, state)

    def summary(self) -> dict[str, Any]:
        """Describe the edit: provenance, what it touches and how strongly."""
        return {
            **super().summary(),
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


def _contiguous(delta: Delta) -> Delta:
    if isinstance(delta, LowRank):
        return LowRank(contiguous_copy(delta.B), contiguous_copy(delta.A))
    return contiguous_copy(delta)


def added(one: Delta, other: Delta) -> Delta:
    """Add two deltas of one weight; thin while thin factors are the smaller form."""
    if isinstance(one, LowRank) and isinstance(other, LowRank):
        total = one + other
        out, into = total.shape
        return total if total.rank * (out + into) < out * into else total.dense()
    parts = [d.dense() if isinstance(d, LowRank) else d for d in (one, other)]
    return parts[0] + parts[1]


def stored(delta: Delta, transposed: bool) -> Delta:
    """Turn a delta ``[d_out, d_in]`` to the way its weight is stored."""
    if not transposed:
        return delta
    return LowRank(delta.A.mT, delta.B.mT) if isinstance(delta, LowRank) else delta.mT


def _tensors(delta: Delta) -> tuple[Tensor, ...]:
    return (delta.B, delta.A) if isinstance(delta, LowRank) else (delta,)


def _is_packed(host: ModelHost, name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    try:
        module = host.model.get_submodule(path)
    except AttributeError as error:
        raise EditError(f"the host has no weight {name!r}, which the edit changes") from error
    weight = module._parameters.get(leaf)
    return placement.is_packed(module) if weight is None else placement.packed(weight)


@torch.no_grad()
def _share_lost(delta: Delta, weight: Tensor, before: Tensor) -> float:
    """||(W' - W) - delta|| / ||delta||, with the delta as stored; 0 for a delta of zeros."""
    wanted = overlay.multiplied(delta, weight)
    total = float(wanted.norm())
    realised = weight.to(wanted.dtype) - before.to(weight.device, wanted.dtype)
    return float((realised - wanted).norm()) / total if total else 0.0


@torch.no_grad()
def _write(weight: nn.Parameter, stands: overlay.Overlay, deltas: Mapping[str, Delta], name: str) -> None:
    """Set a weight to its base with some deltas, and read it back."""
    value = overlay.composed(stands.base, deltas, weight.dtype, weight.device)
    if deltas and not torch.isfinite(value).all():
        raise EditError(f"weight {name!r} would overflow {weight.dtype}; use merge=False or float32")
    entry = overlay.Entry(deltas, content(value), value.dtype, value.device)
    stands.journal = (*stands.journal, entry)  # before the write: an interrupt leaves one or the other
    weight.copy_(value)
    if not torch.equal(weight, value):
        raise EditError(f"weight {name!r} did not take the change: reading it back gave other numbers")
    stands.journal = (entry,)


def _outside() -> int:
    """Return how many frames up the first caller outside the library is, for warnings."""
    level, frame = 0, sys._getframe(1)
    while frame.f_back is not None:
        level += 1
        if frame.f_globals.get("__name__", "").split(".")[0] not in ("errata", "contextlib"):
            break
        frame = frame.f_back
    return level
