"""Unmerged deltas: a module's output gets delta @ input added, and its weight is not written.

Thin factors are applied one after the other and never multiplied out. All branches of a module are
summed with its output in float32 (float64 for float64 models), in an order that depends on the edits
alone, and cast once to the output's dtype. So nothing is lost to 16-bit weights, quantised weights can be
edited, and removing a branch needs no write.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from errata.edits import saving
from errata.edits.deltas import Delta
from errata.errors import EditError
from errata.host import hooks, passes, placement
from errata.host.base import BRANCHES, ModelHost
from errata.host.experts import Stack, stack_of
from errata.host.layout import linear_map
from errata.linalg.lowrank import LowRank


@dataclass
class Branches:
    """The unmerged deltas of one linear map; also the hook that applies them."""

    deltas: Mapping[str, Delta] = field(default_factory=dict[str, Delta])
    """By edit digest, oriented ``[d_out, d_in]``; replaced, never modified, as another thread may be reading."""
    stored: Mapping[str, Delta] = field(default_factory=dict[str, Delta])
    """The deltas that act on all rows, oriented as the weight is stored."""
    numbers: Mapping[str, int | None] = field(default_factory=dict[str, int | None])
    """Edit sets whose rows get each delta; None: all rows."""
    ready: dict[str, Delta] = field(default_factory=dict[str, Delta])
    """The deltas on the device and in the precision of the last call."""

    def __call__(self, inputs: Tensor, output: Tensor) -> Tensor:
        """Return the module's output ``[..., d_out]`` with all deltas applied to its input ``[..., d_in]``."""
        wide = torch.promote_types(torch.promote_types(inputs.dtype, output.dtype), torch.float32)
        with torch.autocast(output.device.type, enabled=False):
            key = inputs.to(output.device, wide)
            total = output.to(wide)
            for digest, delta in sorted(self.deltas.items()):
                members = self._members(digest, key)
                if members is None:
                    total = total + _product(self._ready(digest, delta, key), key)
                elif bool(members.any()):
                    change = _product(self._ready(digest, delta, key), key)
                    total = total + change * members.to(change).reshape(-1, *[1] * (change.ndim - 1))
        return total.to(output.dtype)

    def _members(self, digest: str, key: Tensor) -> Tensor | None:
        number = self.numbers.get(digest)
        if number is None:
            return None
        current = passes.routing() or passes.Routing()
        rows = current.by_rows(key)
        if rows is None and passes.routing() is not None:
            raise EditError(
                f"a module gets inputs of shape {list(key.shape)}, expected [rows, tokens, d_in]: an edit set needs to "
                "tell rows apart; place the edit for all rows"
            )
        if rows is None:
            return current.members(number, len(key))
        members = current.members(number, len(rows))
        return members if members is None or key.ndim == 3 else members.repeat_interleave(rows.shape[1])

    def _ready(self, digest: str, delta: Delta, key: Tensor) -> Delta:
        cached = self.ready.get(digest)
        tensor = cached.A if isinstance(cached, LowRank) else cached
        if cached is None or tensor is None or (tensor.device, tensor.dtype) != (key.device, key.dtype):
            cached = self.ready[digest] = delta.to(device=key.device, dtype=key.dtype)
        return cached


def _product(delta: Delta, key: Tensor) -> Tensor:
    if isinstance(delta, LowRank):
        return functional.linear(functional.linear(key, delta.A), delta.B)
    return functional.linear(key, delta)


def branches_of(model: nn.Module) -> dict[str, Branches]:
    """Return a model's unmerged deltas by parameter.

    Stored on the model, so that all hosts of it share them; do not modify.
    """
    return model.__dict__.get(BRANCHES, {})


def attach(
    model: nn.Module, name: str, digest: str, delta: Delta, stored: Delta, number: int | None = None
) -> None:
    """Add an unmerged delta ``[d_out, d_in]`` to the module of the weight ``name``.

    ``stored``: the delta as that weight is stored. ``number``: the edit set whose rows get it, None all rows.
    It counts as in place from the first statement on, so that :func:`detach` undoes an interrupted call too.
    """
    branches: dict[str, Branches] = model.__dict__.setdefault(BRANCHES, {})
    branch = branches.setdefault(name, Branches())
    branch.numbers = {**branch.numbers, digest: number}
    if number is None:  # a delta for some rows only is no part of the weight
        branch.stored = {**branch.stored, digest: stored}
    branch.deltas = {**branch.deltas, digest: delta}
    hooks.attach(model.get_submodule(_path(name)), branch)
    saving.watch(model)


def detach(model: nn.Module, name: str, digest: str) -> None:
    """Remove a delta; for the last one, the hook is removed first."""
    branches: dict[str, Branches] = model.__dict__[BRANCHES]
    branch = branches[name]
    rest = {key: delta for key, delta in branch.deltas.items() if key != digest}
    if rest:
        branch.ready = {key: delta for key, delta in branch.ready.items() if key != digest}
        branch.deltas = rest
        return
    with contextlib.suppress(AttributeError):  # a module that was removed has no hook any more
        hooks.detach(model.get_submodule(_path(name)), branch)
    if len(branches) > 1:
        del branches[name]
    else:
        saving.unwatch(model)
        del model.__dict__[BRANCHES]


def for_module(host: ModelHost, name: str, delta: Delta, transposed: bool) -> Delta:
    """Return a delta as the module of a weight applies it, ``[d_out, d_in]``.

    ``transposed``: whether a dense delta is ``[d_out, d_in]`` while the weight is stored ``[d_in, d_out]``. Raises
    EditError if the module supports no unmerged delta: it is no linear map, is sharded, or has another shape.
    """
    module = _module(host, name)
    reason = placement.obstacle(host.model, name, beside=True)
    if reason is not None:
        raise EditError(f"the change of {name!r} cannot stay unmerged: {reason}")
    stack = stack_of(module)
    if stack is not None:
        return _for_experts(name, delta, stack)
    if len(delta.shape) != 2:
        raise EditError(
            f"the change of {name!r} cannot stay unmerged: its shape is {tuple(delta.shape)}, and a matrix is needed"
        )
    either = isinstance(delta, LowRank) or transposed  # else as stored, whichever way that is
    like = torch.empty(0, device=placement.runs_on(module), dtype=host.dtype)
    for stored in (False,) if either else (False, True):
        turned = delta.mT if stored and isinstance(delta, Tensor) else delta
        d_out, d_in = turned.shape
        linear = (d_out, False) if _plain(module, d_out, d_in) else linear_map(module, d_in, like)
        if linear is not None and linear[0] == d_out and (either or linear[1] == stored):
            return turned
    raise EditError(
        f"the change of {name!r} cannot stay unmerged: {type(module).__name__} does not compute W x + b with W of "
        f"shape {tuple(delta.shape)}; apply the edit with merge=True"
    )


def _for_experts(name: str, delta: Delta, stack: Stack) -> Delta:
    """Return a change of stacked experts as one of their block keys, ``[d_out, experts * m]``."""
    shape = stack.width, stack.experts * stack.inner
    if isinstance(delta, Tensor) and delta.ndim == 3:
        delta = stack.joined(delta)
    if name.rpartition(".")[2] != stack.leaf or tuple(delta.shape) != shape:
        raise EditError(
            f"the change of {name!r} cannot stay unmerged: its shape is {tuple(delta.shape)}, and beside stacked "
            f"experts a change of their output projection {stack.leaf} is needed, {shape}; apply it with merge=True"
        )
    return delta


def _plain(module: nn.Module, d_out: int, d_in: int) -> bool:
    return type(module) is nn.Linear and (module.out_features, module.in_features) == (d_out, d_in)


def _path(name: str) -> str:
    return name.rpartition(".")[0]


def _module(host: ModelHost, name: str) -> nn.Module:
    try:
        module = host.model.get_submodule(_path(name))
    except AttributeError as error:
        raise EditError(f"the host has no weight {name!r}, which the edit changes") from error
    weight = getattr(module, name.rpartition(".")[2], None)
    if not isinstance(weight, Tensor) and not placement.is_packed(module):
        raise EditError(f"the host has no weight {name!r}, which the edit changes")
    if stack_of(module) is not None:
        return module
    if name.rpartition(".")[2] != "weight" or isinstance(module, nn.Embedding):
        raise EditError(
            f"the change of {name!r} cannot stay unmerged: it is no linear map's weight; apply it merged"
        )
    if isinstance(weight, Tensor) and weight.ndim != 2:
        raise EditError(
            f"the change of {name!r} cannot stay unmerged: its shape is {list(weight.shape)}, and a "
            "linear map's weight has two axes; apply the edit with merge=True"
        )
    return module
