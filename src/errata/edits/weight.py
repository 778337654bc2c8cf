"""Edits that change weights. The only place where a host's weight is written.

A host keeps, per changed weight, a copy of the original bits and the active deltas, see
:mod:`errata.edits.overlay`. The weight is always base + sum of deltas, summed in float32 (in float64 for
float64 weights) in an order that depends on the edits alone, and cast once. So edits can come and go in any
order, and the last one to go leaves the original bits. After every write the weight is read back.

A delta may also stay unmerged, see :mod:`errata.edits.branch`: exact in 16 bits, and the only way with
packed weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from errata.edits import branch
from errata.edits import format as file_format
from errata.edits import header as fields
from errata.edits import overlay as overlays
from errata.edits.deltas import Delta, dense, fits, weight_with
from errata.edits.edit import Edit, Outside, Placement, Provenance
from errata.edits.frames import stack_level
from errata.edits.records import Record, contiguous_copy
from errata.errors import EditError
from errata.host import locking, placed, placement
from errata.host.base import ModelHost
from errata.host.identity import content
from errata.linalg.lowrank import LowRank
from errata.linalg.routines import norm

WARN_ABOVE_SHARE_LOST = 0.5
"""Share of a change lost to rounding above which a warning is given."""


@dataclass(frozen=True, eq=False)
class WeightEdit(Edit):
    """Per weight a delta: thin factors ``[d_out, d_in]``, or dense in the weight's own shape.

    A weight of more than two axes (a convolution) counts as ``[d_out, all others]`` for thin factors, one that stacks
    experts as their matrices side by side, ``[d_out, experts * d_in]``.
    """

    kind: ClassVar[str] = "weight"

    deltas: Mapping[str, Delta]
    """Delta by parameter path."""
    transposed: frozenset[str]
    """Parameters stored ``[d_in, d_out]``."""
    provenance: Provenance
    records: Mapping[str, Record] = field(default_factory=dict[str, Record])
    """By parameter path, the keys and target values that a closed-form delta was solved from; see
    :mod:`errata.edits.algebra`."""
    state: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Tensors that a method needs to continue from here: running statistics, queues, projections."""

    def __post_init__(self) -> None:
        # the same memory layout as after loading, so that a loaded edit continues to the same bits
        deltas = {name: _contiguous(delta) for name, delta in self.deltas.items()}
        records = {name: record.contiguous() for name, record in self.records.items()}
        state = {name: contiguous_copy(tensor) for name, tensor in self.state.items()}
        for name, value in (("deltas", deltas), ("records", records), ("state", state)):
            object.__setattr__(self, name, value)

    @cached_property
    def _key(self) -> str:
        """Key of its deltas in a weight's overlay, which adds them in the order of tensor digests, then of digests.

        So the sum does not depend on an edit's provenance.
        """
        return overlays.key_of(file_format.tensor_digest(self.parts()), self.digest)

    def place(
        self, host: ModelHost, *, foreign: bool = False, merge: bool | None = None, rows: str | None = None
    ) -> Placement:
        """Put the deltas in place: merged into the weights, or added to their modules' outputs.

        Unmerged, the weights stay as they are and each module adds delta @ input to its output in float32;
        merged costs nothing at run time but is rounded to the weights' precision, see :attr:`Placement.lost`,
        with a warning if that loses most of the change. None merges, except that quantised weights, which cannot be
        written, stay unmerged; True requires merging. The model is locked meanwhile, so other threads that run or
        change it wait. ``rows``: an edit set; the change is then unmerged and acts on the rows that belong to the set.

        Raises EditError, with nothing changed, if the host is another one, a weight is missing, has another shape,
        cannot be edited where it is, or was changed by something else while an edit is merged into it, if the edit is
        active already, or if it would vanish in the weights' precision.
        """
        return locking.alone(host, self._place, host, foreign, merge, rows)

    def _place(self, host: ModelHost, foreign: bool, merge: bool | None, rows: str | None) -> Placement:
        if rows is not None and merge:
            raise EditError(f"a weight has no rows: an edit of the set {rows!r} cannot be merged")
        overrides = self.overridden_checks(host, foreign=foreign)
        self._refuse_active(host)
        try:
            number = placed.set_number(host.model, rows)
            losses, changed = self._attach(host, merge if rows is None else False, number)
            self._check_rounding(host, losses, changed)
            unmerged = tuple(name for name in self.deltas if name not in losses)
            return Placement(self.digest, host.fingerprint, losses, unmerged, overrides, rows)
        except BaseException:  # an interrupt, too, must leave nothing half done
            self._remove(host)
            raise

    def _check_rounding(self, host: ModelHost, losses: Mapping[str, float], changed: bool) -> None:
        """Raise EditError if merging lost the whole change, warn if it lost most of it."""
        if not changed and self.norm() > 0:
            raise EditError(
                f"edit {self.digest} changes nothing: every entry is lost in {host.dtype} rounding; "
                "use merge=False (--no-merge), or load the model in float32"
            )
        worst = max(losses, key=lambda name: losses[name], default=None)
        if worst is not None and losses[worst] > WARN_ABOVE_SHARE_LOST:
            warnings.warn(
                f"merging edit {self.digest} lost {losses[worst]:.0%} of its change of {worst} in "
                f"{host.model.get_parameter(worst).dtype} rounding: most of the edit was lost; use "
                "merge=False or float32",
                stacklevel=stack_level("errata", "contextlib"),
            )

    def trial(self, host: ModelHost, *, foreign: bool = False) -> dict[str, float]:
        """Return the share of each weight's change that merging would lose, measured by applying and reverting.

        Quantised weights are not included, as they are never merged. Raises EditError as :meth:`apply_` does, but not
        for an edit that vanishes: its losses are 1.
        """
        return locking.alone(host, self._trial, host, foreign)

    def _trial(self, host: ModelHost, foreign: bool) -> dict[str, float]:
        self.overridden_checks(host, foreign=foreign)
        self._refuse_active(host)
        try:
            return self._attach(host, None)[0]
        finally:
            self._remove(host)

    def revert_(self, host: ModelHost, *, outside: Outside = "refuse") -> None:
        """Remove the deltas, also after an interrupted :meth:`place` or :meth:`revert_`.

        A model that was cast or moved meanwhile gets its original bits, cast and moved in the same way. A weight that
        something else has changed meanwhile (a training step, a merged adapter, a loaded checkpoint) is not
        overwritten: ``outside`` says what to do with it. ``refuse`` raises EditError and changes nothing;
        ``discard`` restores the original bits; ``leave`` keeps such a weight as it is and forgets the
        edits merged into it.

        Raises EditError if the edit is not active, or a weight cannot be written; the original bits are kept.
        """
        locking.alone(host, self._revert, host, outside)

    def _revert(self, host: ModelHost, outside: Outside) -> None:
        self.require_in_place(host)
        names = sorted(self._merged_names(host))
        obstacles = {name: self._obstacle(host, name, outside) for name in names}
        blocked = [name for name, problem in obstacles.items() if problem is not None]
        if blocked and outside != "leave":
            raise EditError(f"{obstacles[blocked[0]]}; nothing was reverted, and the original bits are kept")
        for name in blocked:
            for key in list(host.overlays[name].deltas):
                overlays.drop_delta(host.model, name, key)
        self._remove(host)

    def in_place(self, host: ModelHost) -> bool:
        """Whether the edit, or part of it after an interrupt, is in place on a host."""
        return bool(self._merged_names(host) or self._unmerged_names(host))

    def _refuse_active(self, host: ModelHost) -> None:
        names = self._merged_names(host) | self._unmerged_names(host)
        if names:
            half = "" if len(names) == len(self.deltas) else ", in part, after an interrupt: revert it first"
            raise EditError(f"edit {self.digest} is active on this host already{half}")

    def _obstacle(self, host: ModelHost, name: str, outside: Outside) -> str | None:
        """Return why a weight that this edit is merged into cannot be written now; None where it can."""
        try:
            weight = host.model.get_parameter(name)
            reason = placement.obstacle(host.model, name)
        except AttributeError:
            return (
                f"the model has no weight {name!r} any more, into which edit {self.digest} was merged: undo what "
                "replaced its module (an adapter, a parametrisation), or pass outside='leave' to forget the edit"
            )
        overlay: overlays.Overlay = host.overlays[name]
        if reason is None and weight.shape != overlay.base.shape:
            reason = f"it is {list(weight.shape)} now, {list(overlay.base.shape)} before"
        if reason is not None:
            return f"weight {name!r} cannot be written back: {reason}; or pass outside='leave' to forget the edit"
        if outside == "discard" or overlay.matches(weight) or self._is_restored(overlay, weight):
            return None
        return (
            f"weight {name!r} was changed by something else while edit {self.digest} was merged into it (training, a "
            "merged adapter, a loaded checkpoint), and reverting the edit would discard that change: undo it first, or "
            "pass outside='discard' to restore the original bits, or outside='leave' to keep the weight as it is and "
            "forget the edit"
        )

    def _is_restored(self, overlay: overlays.Overlay, weight: Tensor) -> bool:
        """Whether a weight already has the content that reverting this edit would write."""
        rest = overlay.without(self._key)
        return torch.equal(weight_with(overlay.base, rest, weight.dtype, weight.device), weight)

    def _attach(
        self, host: ModelHost, merge: bool | None, number: int | None = None
    ) -> tuple[dict[str, float], bool]:
        """Put all deltas in place; return the loss of each merged weight, and whether any output can change."""
        for name, delta in self.deltas.items():
            if not all(torch.isfinite(t).all() for t in _tensors(delta)):
                raise EditError(f"the change of {name!r} holds NaN or infinite numbers; refused")
        unmerged = {n for n in self.deltas if merge is False or (merge is None and _is_packed(host, n))}
        for_modules = {
            n: branch.for_module(host, n, self.deltas[n], n in self.transposed) for n in sorted(unmerged)
        }
        weights = self._weights(host, [name for name in self.deltas if name not in unmerged])
        losses: dict[str, float] = {}
        changed = bool(for_modules)
        for name, delta in for_modules.items():
            branch.attach(host.model, name, self._key, delta, self._stored(name), number)
        for name, weight in weights.items():
            losses[name], differs = self._merge(host, name, weight)
            changed = changed or differs
        return losses, changed

    def _stored(self, name: str) -> Delta:
        return as_stored(self.deltas[name], name in self.transposed)

    def _merge(self, host: ModelHost, name: str, weight: nn.Parameter) -> tuple[float, bool]:
        """Add a delta to a weight; return the share of it that rounding lost, and whether any bit changed."""
        before = weight.detach().clone()
        delta = self._stored(name)
        # active from here on, so that reverting undoes whatever happens next
        overlay = overlays.add_delta(host.model, name, weight, self._key, delta)
        _write(weight, overlay, overlay.deltas, name)
        return _share_lost(delta, weight, before), not torch.equal(weight, before)

    def _remove(self, host: ModelHost) -> None:
        """Remove everything of this edit that is in place."""
        for name in sorted(self._unmerged_names(host)):
            branch.detach(host.model, name, self._key)
        for name in sorted(self._merged_names(host)):
            overlay: overlays.Overlay = host.overlays[name]
            _write(host.model.get_parameter(name), overlay, overlay.without(self._key), name)
            overlays.drop_delta(host.model, name, self._key)  # last: the original bits are kept until now

    def _merged_names(self, host: ModelHost) -> set[str]:
        active = host.overlays
        return {n for n in self.deltas if n in active and self._key in active[n].deltas}

    def _unmerged_names(self, host: ModelHost) -> set[str]:
        active = branch.branches_of(host.model)
        return {n for n in self.deltas if n in active and self._key in active[n].deltas}

    def _weights(self, host: ModelHost, names: Sequence[str]) -> dict[str, nn.Parameter]:
        """Return the weights to write. Raises EditError where one is missing, misshapen or out of reach."""
        weights: dict[str, nn.Parameter] = {}
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
            if not fits(shape, weight.shape):
                raise EditError(f"weight {name!r} is {tuple(weight.shape)}, the edit expects {shape}")
            weights[name] = weight
            self._refuse_changed(host, name, weight)
        shared = placement.sharing(host.model, names)
        if shared is not None:
            raise EditError(
                f"weight {shared[0]!r} shares its memory with {shared[1]!r}, so writing one changes the other; "
                "use merge=False, or untie them first"
            )
        return weights

    def _refuse_changed(self, host: ModelHost, name: str, weight: Tensor) -> None:
        """Raise EditError if something else has changed a weight that other edits are merged into."""
        overlay: overlays.Overlay | None = host.overlays.get(name)
        if overlay is not None and not overlay.matches(weight):
            digests = ", ".join(sorted(map(overlays.digest_of, overlay.deltas)))
            raise EditError(
                f"weight {name!r} was changed by something else while {digests} were "
                "merged into it (training, a merged adapter, a loaded checkpoint), and another edit would discard that "
                "change: revert those edits first, with outside='discard' or outside='leave'"
            )

    def norm(self) -> float:
        """Frobenius norm over all deltas."""
        return sum(delta_norm(delta) ** 2 for delta in self.deltas.values()) ** 0.5

    def rounding(self, host: ModelHost) -> float:
        """Return the relative error of the change in the host's precision, while applied alone.

        ||(W' - W) - delta|| / ||delta|| over all weights; 0 means exact, as unmerged changes are.
        """
        rounding = self.rounding_by_weight(host)
        sizes = {name: delta_norm(delta) ** 2 for name, delta in self.deltas.items()}
        total = sum(sizes.values())
        return (sum(rounding[n] ** 2 * sizes[n] for n in sizes) / total) ** 0.5 if total else 0.0

    def rounding_by_weight(self, host: ModelHost) -> dict[str, float]:
        """Return :meth:`rounding` for each weight by itself.

        Raises EditError unless this edit is applied and no other on its weights.
        """
        unmerged = self._unmerged_names(host)
        return {name: 0.0 if name in unmerged else self._rounding(host, name) for name in self.deltas}

    def _rounding(self, host: ModelHost, name: str) -> float:
        overlay: overlays.Overlay | None = host.overlays.get(name)
        if overlay is None or set(overlay.deltas) != {self._key}:
            raise EditError("rounding is measured with this edit applied and no other on its weights")
        return _share_lost(overlay.deltas[self._key], host.model.get_parameter(name), overlay.base)

    def parts(self) -> Mapping[str, Tensor]:
        """Return factors ``[d_out, r]`` and ``[r, d_in]`` or dense deltas in the weight's shape, records and state."""
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
        """Return one edit for this one and a later fit of the same method that continued it.

        The provenance lists the requests of both; notes and settings are the later one's, and this edit is its parent.
        ``cumulative``: whether the later one's deltas already include this one's. Raises EditError for an edit of
        another kind.
        """
        if not isinstance(later, WeightEdit):
            raise EditError(f"a {later.kind} edit cannot be combined with a {self.kind} edit")
        deltas = dict(later.deltas) if cumulative else dict(self.deltas)
        for name, delta in later.deltas.items() if not cumulative else ():
            deltas[name] = add_deltas(deltas[name], delta) if name in deltas else delta
        records = dict(self.records)
        first = len(self.provenance.requests)
        for name, record in later.records.items():
            record = record.shift_requests(first)
            records[name] = records[name].join(record) if name in records else record
        state = {**self.state, **later.state}
        transposed = self.transposed | later.transposed
        return WeightEdit(deltas, transposed, self.joint_provenance(later), records, state)

    @classmethod
    def restore(
        cls, parts: Mapping[str, Tensor], body: Mapping[str, Any], provenance: Provenance
    ) -> WeightEdit:
        """Build the edit from its file's tensors, with the shapes of :meth:`parts` such as ``[d_out, r]``, and header.

        Raises ValueError or KeyError where they do not fit.
        """
        deltas: dict[str, Delta] = {}
        for name in parts:
            stem, _, part = name.rpartition(".")
            if part == "B":
                deltas[stem] = LowRank(parts[name], parts[f"{stem}.A"])
            elif part == "dense":
                deltas[stem] = parts[name]
        records: dict[str, Record] = {}
        for name, facts in fields.check_type(body.get("records", {}), dict, "records").items():
            where = f"records of {name[:80]!r}"
            read = fields.record_fields(facts, where, len(provenance.requests))
            stored = {part: parts[f"{name}.record.{part}"] for part in Record.PARTS}
            fields.check_shapes(stored, read, deltas[name], where)
            records[name] = Record.restore(read, stored)
        state = {n.removesuffix(".state"): t for n, t in parts.items() if n.endswith(".state")}
        transposed = frozenset(fields.get_texts(body, "transposed", "the header"))
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
                    "norm": delta_norm(delta),
                }
                for name, delta in self.deltas.items()
            },
        }


def delta_norm(delta: Delta) -> float:
    """Return the Frobenius norm of a delta."""
    return delta.norm() if isinstance(delta, LowRank) else float(norm(delta.double()))


def _contiguous(delta: Delta) -> Delta:
    if isinstance(delta, LowRank):
        return LowRank(contiguous_copy(delta.B), contiguous_copy(delta.A))
    return contiguous_copy(delta)


def add_deltas(one: Delta, other: Delta) -> Delta:
    """Add two deltas of one weight; low-rank as long as the factors are smaller than the matrix."""
    if isinstance(one, LowRank) and isinstance(other, LowRank):
        total = one + other
        out, into = total.shape
        return total if total.rank * (out + into) < out * into else total.dense()
    parts = [d.dense() if isinstance(d, LowRank) else d for d in (one, other)]
    return parts[0] + parts[1]


def as_stored(delta: Delta, transposed: bool) -> Delta:
    """Return a delta ``[d_out, d_in]`` in the orientation of the stored weight."""
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
    exact = dense(delta, weight)
    total = float(norm(exact))
    realised = weight.to(exact.dtype) - before.to(weight.device, exact.dtype)
    return float(norm(realised - exact)) / total if total else 0.0


@torch.no_grad()
def _write(weight: nn.Parameter, overlay: overlays.Overlay, deltas: Mapping[str, Delta], name: str) -> None:
    """Set a weight to its base with some deltas, and read it back."""
    value = weight_with(overlay.base, deltas, weight.dtype, weight.device)
    if deltas and not torch.isfinite(value).all():
        raise EditError(f"weight {name!r} would overflow {weight.dtype}; use merge=False or float32")
    entry = overlays.Entry(deltas, content(value), value.dtype, value.device)
    overlay.journal = (*overlay.journal, entry)  # before the write: an interrupt leaves one or the other
    weight.copy_(value)
    if not torch.equal(weight, value):
        raise EditError(f"weight {name!r} did not take the change: reading it back gave other numbers")
    overlay.journal = (entry,)
