"""Steering as changes of weights: what of it weights can do exactly, and why they cannot do the rest.

    at a linear map     y -> y + M y + c            W -> W + M W, b -> b + M b + c
    at an embedding     e -> e + M e + c            every row
    behind a block      h -> h + c                  b -> b + c of the map that writes last into the stream

A change of all of the stream behind a block that is more than a vector acts on what passes by every weight of the
block. What depends on the token, or on the state in another way than by a matrix, no weight does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from errata.edits.deltas import Delta
from errata.edits.export._exporter import INSTEAD
from errata.edits.steer import SteerEdit, Steering
from errata.edits.weight import WeightEdit
from errata.errors import EditError
from errata.host.base import ModelHost
from errata.host.layout import stored_transposed
from errata.linalg.lowrank import LowRank

AFFINE = ("vector", "rank", "projection", "rotation")
"""Forms that are h + M h + c."""


@dataclass(frozen=True)
class Affine:
    """A change y + M y + c of a map's output ``[d]``, in float64."""

    left: Tensor
    """M is left @ right - drop: ``[d, r]``."""
    right: Tensor
    """``[r, d]``."""
    drop: float
    """Share of the output that is taken off."""
    constant: Tensor
    """c ``[d]``."""

    @property
    def linear(self) -> bool:
        """Whether there is an M."""
        return bool(self.left.numel()) or self.drop != 0

    def times(self, outputs: Tensor) -> Tensor:
        """Return M of outputs in columns ``[d, n]``."""
        return self.left @ (self.right @ outputs) - self.drop * outputs


@dataclass
class Folded:
    """A steering edit as changes of weights and biases."""

    deltas: dict[str, Delta] = field(default_factory=dict[str, Delta])
    """By parameter, those of biases ``[d]``."""
    transposed: set[str] = field(default_factory=set[str])
    biases: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Biases ``[d]`` of linear maps that have none, by their paths."""

    def change(self, edit: SteerEdit) -> WeightEdit:
        """Return the changes of what the model has."""
        return WeightEdit(self.deltas, frozenset(self.transposed & set(self.deltas)), edit.provenance)


def check_steering(edit: SteerEdit, what: str) -> None:
    """Raise EditError for steering that no weight does, with the reason; ``what``: the export, with an article."""
    for one in edit.sites:
        at = f"the edit steers at {one.module}"
        if one.positions != "all":
            raise EditError(f"{at} some tokens ({one.positions}), and {what} acts on all; {INSTEAD}")
        if one.keep_norm:
            raise EditError(f"{at} and gives states their norm back, which no linear map does; {INSTEAD}")
        if one.form not in AFFINE or one.aligned:
            form = f"{one.form}, aligned" if one.aligned else one.form
            raise EditError(
                f"{at} by an amount that depends on the state ({form}), and {what} has only weights and biases; "
                f"{INSTEAD}"
            )


@torch.no_grad()
def fold(edit: SteerEdit, host: ModelHost, what: str) -> Folded:
    """Return what :func:`check_steering` let pass as changes of weights. Raises EditError where it is none."""
    for name, part in edit.parts().items():
        if not bool(part.isfinite().all()):
            raise EditError(f"{name} of the edit holds NaN or infinite numbers; refused")
    folded = Folded()
    blocks = dict(zip(host.layout.blocks, range(len(host.layout.blocks)), strict=True))
    for one in sorted(
        edit.sites, key=lambda one: one.module in blocks
    ):  # maps first: a block adds to their biases
        if one.module in blocks:
            _fold_block(folded, one, blocks[one.module], edit.strength, host, what)
        else:
            _fold_map(folded, one, edit.strength, host, what)
    return folded


def _fold_block(
    folded: Folded, one: Steering, layer: int, strength: float, host: ModelHost, what: str
) -> None:
    """Add a vector behind a block to the bias of the map that writes last into the stream."""
    if one.form != "vector":
        raise EditError(
            f"the edit changes all of the stream behind {one.module} ({one.form}), also what passes by the weights of "
            f"the block, and {what} has only weights; steer at the maps that write into the stream "
            f"(repe: operator=project, where=writers), or {INSTEAD}"
        )
    site = host.layout.mlp_out[layer]
    module = None if site is None else host.model.get_submodule(site.name)
    if site is None or stored_transposed(module) is None:  # type: ignore[arg-type]
        raise EditError(
            f"no one linear map of {one.module} writes last into the stream, so that {what} has no bias for the "
            f"vector; {INSTEAD}"
        )
    if not host.layout.adds_directly:
        raise EditError(
            f"a norm stands between {site.name} and the stream, so that no bias of {what} adds the vector as it is; "
            f"{INSTEAD}"
        )
    _add_bias(folded, site.name, strength * one.payload["values"][0].double(), host)


def _fold_map(folded: Folded, one: Steering, strength: float, host: ModelHost, what: str) -> None:
    """Change a linear map, or an embedding, so that it gives the steered output."""
    module = host.model.get_submodule(one.module)
    stored, act = stored_transposed(module), _affine(one, strength)
    name = f"{one.module}.weight"
    if isinstance(module, nn.Embedding):
        _refuse_tied(name, host)
        rows = module.weight.detach().double().cpu()  # [vocab, d]
        if act.drop:
            folded.deltas[name] = (act.times(rows.mT).mT + act.constant).float()
        else:
            ones = torch.cat([rows @ act.right.mT, rows.new_ones(len(rows), 1)], 1)
            folded.deltas[name] = LowRank(ones.float(), torch.cat([act.left.mT, act.constant[None]]).float())
        return
    if stored is None:
        raise EditError(
            f"{one.module} is neither a block, a linear map nor an embedding, so that {what} has no weight for what "
            f"the edit does there; {INSTEAD}"
        )
    if act.linear:
        weight = module.weight.detach().double().cpu()
        weight = weight.mT if stored else weight  # [d, d_in]
        thin = act.drop == 0
        folded.deltas[name] = (
            LowRank(act.left.float(), (act.right @ weight).float()) if thin else act.times(weight).float()
        )
        if stored:
            folded.transposed.add(name)
    bias = getattr(module, "bias", None)
    own = act.constant.new_zeros(1) if bias is None else bias.detach().double().cpu()
    _add_bias(folded, one.module, act.constant + (0 if bias is None else act.times(own[:, None])[:, 0]), host)


def _add_bias(folded: Folded, path: str, change: Tensor, host: ModelHost) -> None:
    """Add to a map's bias, there or not; a change by zeros asks for none."""
    if not bool(change.any()):
        return
    if getattr(host.model.get_submodule(path), "bias", None) is None:
        folded.biases[path] = folded.biases.get(path, torch.zeros_like(change)) + change
        return
    name = f"{path}.bias"
    earlier = folded.deltas.get(name)
    assert earlier is None or isinstance(earlier, Tensor)
    folded.deltas[name] = change.float() if earlier is None else (earlier.double() + change).float()


def _refuse_tied(name: str, host: ModelHost) -> None:
    """Raise EditError where an embedding's weight is also that of the output."""
    head = host.model.get_output_embeddings()
    if head is not None and head.weight is host.model.get_parameter(name):
        raise EditError(
            f"{name} is also the output's weight (tie_word_embeddings), which the edit does not change; {INSTEAD}"
        )


def _affine(one: Steering, strength: float) -> Affine:
    """Return what a site does, of a form in :data:`AFFINE`."""
    part: Mapping[str, Tensor] = {name: tensor.double().cpu() for name, tensor in one.payload.items()}
    width = one.width
    none = torch.zeros(width, 0, dtype=torch.float64)
    if one.form == "vector":
        return Affine(none, none.mT, 0.0, strength * part["values"][0])
    if one.form == "rank":
        left = strength * part["left"]
        return Affine(left, part["right"], strength * float(part["drop"]), left @ part["bias"])
    if one.form == "projection":
        basis = part["basis"]
        return Affine(-strength * basis.mT, basis, 0.0, strength * basis.mT @ part["target"])
    angle = math.radians(strength * float(part["degrees"]))
    turn = torch.tensor(
        [[math.cos(angle) - 1, -math.sin(angle)], [math.sin(angle), math.cos(angle) - 1]], dtype=torch.float64
    )
    plane = part["plane"]
    return Affine(plane.mT @ turn, plane, 0.0, torch.zeros(width, dtype=torch.float64))
