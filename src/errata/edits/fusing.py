"""Turn an eraser that acts on norms into a change of the weights that read them, where that is exact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from errata.edits.memory import Intervention, MemoryEdit
from errata.edits.routers.always import Always
from errata.edits.weight import Delta, WeightEdit
from errata.errors import EditError
from errata.host import hooks
from errata.host.host import Host
from errata.host.layout import stored_transposed
from errata.host.states import norm_readers
from errata.linalg.lowrank import LowRank
from errata.linalg.routines import norm

UNSEEN = 1e-6
"""A constant below this share of a map's bias-free output is no change of it."""


def fuse(edit: MemoryEdit, host: Host) -> WeightEdit:
    """Return a weight edit with the same effect: W <- W (I - A B^T) and b <- b + W A B^T mean for each reading map.

    The edit must erase what norms give, at every token. Raises EditError where it does something else, where a map
    has no bias to take the constant (fit with ``centre=False``), for packed weights and for a host with edits in place.
    """
    if host.placed:
        raise EditError(
            f"edit {host.placed[0]} is in place on the host: take it off, and fuse on the unedited model"
        )
    deltas, transposed = dict[str, Delta](), set[str]()
    for one in edit.interventions:
        _check(edit, one)
        for path in _readers(host, one.module):
            module = host.model.get_submodule(path)
            changes, stored = _changes(module, path, one.payload)
            deltas |= changes
            if stored:
                transposed.add(f"{path}.weight")
    record = replace(edit.provenance, parents=(edit.digest,), notes={**edit.provenance.notes, "fused": True})
    return WeightEdit(deltas, frozenset(transposed), record)


def _check(edit: MemoryEdit, one: Intervention) -> None:
    always = isinstance(edit.router, Always) and not edit.reads
    if one.operation != "erase" or one.positions != "all" or one.entries != 1 or not always:
        raise EditError(
            f"edit {edit.digest} does not erase the same at every token of every text ({one.operation} at "
            f"{one.module}): only erasers can be fused into weights"
        )


def _readers(host: Host, module: str) -> tuple[str, ...]:
    """Return the paths of the linear maps that read a norm."""
    for layer, block in enumerate(host.layout.blocks):
        if module.startswith(f"{block}."):
            with hooks.frozen(host.model):
                paths = norm_readers(host, layer).get(module)
            if paths:
                return paths
    raise EditError(
        f"{module} is no norm that linear maps read as it is, so erasing there cannot be fused into weights: fit with "
        "where=norms"
    )


def _changes(module: nn.Module, path: str, payload: Mapping[str, Tensor]) -> tuple[dict[str, Delta], bool]:
    """Return the changes of a map's weight and bias, and whether the weight is stored ``[d_in, d_out]``."""
    stored = stored_transposed(module)
    parameters = dict(module.named_parameters(recurse=False))
    weight = parameters.get("weight")
    if stored is None or weight is None or not weight.is_floating_point():
        raise EditError(
            f"{path} has no plain weight that could be changed (a packed one?); keep the eraser beside it"
        )
    left, right, mean = (payload[name][0].double() for name in ("left", "right", "mean"))
    wide = weight.detach().cpu().double()
    moved = (wide.mT if stored else wide) @ left  # [d_out, k]
    changes: dict[str, Delta] = {f"{path}.weight": LowRank((-moved).float(), right.float())}
    constant = moved @ (right @ mean)  # [d_out]
    if "bias" in parameters:
        changes[f"{path}.bias"] = constant.float()
    elif float(norm(constant)) > UNSEEN * float(norm(moved) * norm(right)):
        raise EditError(
            f"{path} has no bias, which the mean of the examples would have to go into: fit with centre=false, which "
            "erases as exactly and moves the mean, or keep the eraser beside the weights"
        )
    return changes, stored


def difference(host: Host, one: MemoryEdit, other: WeightEdit, texts: tuple[str, ...]) -> float:
    """Return the largest difference of two edits' logits on some texts, as a share of the largest logit."""
    batch = host.batch([host.encode(text).ids for text in texts])
    logits = list[Tensor]()
    for edit in (one, other):
        with torch.no_grad(), edit.on(host):
            logits.append(host.forward(batch).float()[batch.mask.bool()])
    return float((logits[0] - logits[1]).abs().max() / logits[0].abs().max())
