"""Edits as changes of weights, and memories as added neurons: what an export makes of an edit, or why it cannot."""

from __future__ import annotations

from typing import Any

import torch

from errata.edits.deltas import Delta
from errata.edits.edit import Edit
from errata.edits.export._exporter import INSTEAD
from errata.edits.export._steering import check_steering, fold
from errata.edits.memory import Intervention, MemoryEdit
from errata.edits.routers.always import Always
from errata.edits.steer import SteerEdit
from errata.edits.weight import WeightEdit, add_deltas
from errata.errors import EditError, HostError
from errata.host import placement
from errata.host.base import ModelHost
from errata.host.kinds import TEXT_TO_IMAGE
from errata.host.layout import stored_transposed
from errata.host.wider import Neurons
from errata.linalg.lowrank import LowRank

MATRICES = ("lowrank", "dense")
"""Operations of a memory that add a matrix to a linear map."""


def check_kind(edit: Edit, what: str) -> WeightEdit | MemoryEdit | SteerEdit:
    """Return an edit that acts on every token of every prompt in a way that weights can. Raises EditError for others.

    ``what``: the export, with an article.
    """
    if isinstance(edit, SteerEdit):
        check_steering(edit, what)
        return edit
    if not isinstance(edit, (WeightEdit, MemoryEdit)):
        raise EditError(
            f"a {edit.kind} edit changes no weights, so there is nothing for {what} to hold; export it to prompts, or "
            f"{INSTEAD}"
        )
    if isinstance(edit, WeightEdit):
        return edit
    if not isinstance(edit.router, Always):
        raise EditError(
            f"the edit acts on prompts that its {edit.router.name} router accepts, and {what} has nothing that "
            f"decides; {INSTEAD}"
        )
    for one in edit.interventions:
        if one.positions != "all":
            raise EditError(
                f"the edit acts at {one.module} on some tokens of a prompt ({one.positions}), and {what} acts on all; "
                f"{INSTEAD}"
            )
    return edit


def as_weights(edit: WeightEdit | MemoryEdit | SteerEdit, host: ModelHost, what: str) -> WeightEdit | None:
    """Return an edit of :func:`check_kind` as changes of weights; None for a memory that is more than that.

    Raises EditError for numbers that are not finite, and for steering that the model's weights and biases cannot do.
    """
    if isinstance(edit, SteerEdit):
        folded = fold(edit, host, what)
        if folded.biases:
            raise EditError(
                f"{min(folded.biases)} has no bias, which the edit needs; where the configuration has a setting for "
                f"it, a checkpoint can hold the edit; {INSTEAD}"
            )
        return folded.change(edit)
    for name, part in edit.parts().items():
        if part.is_floating_point() and not bool(part.isfinite().all()):
            raise EditError(f"{name} of the edit holds NaN or infinite numbers; refused")
    if isinstance(edit, WeightEdit):
        return edit
    if any(one.operation not in MATRICES for one in edit.interventions):
        return None
    deltas: dict[str, Delta] = {}
    transposed: set[str] = set()
    for one in edit.interventions:
        change, stored = _matrix(one), stored_transposed(submodule(host, one.module))
        if stored is None:
            raise EditError(
                f"{one.module} is no linear map, so the edit's matrix cannot be part of its weight; {INSTEAD}"
            )
        name = f"{one.module}.weight"
        deltas[name] = add_deltas(deltas[name], change) if name in deltas else change
        if stored:
            transposed.add(name)
    return WeightEdit(deltas, frozenset(transposed), edit.provenance)


def _matrix(one: Intervention) -> Delta:
    """Return the matrix ``[d_out, d_in]`` that an intervention adds."""
    if one.operation == "dense":
        return one.payload["changes"][0]
    return LowRank(one.payload["left"][0], one.payload["right"][0])


def as_neurons(edit: MemoryEdit, host: Any) -> tuple[dict[int, Neurons], str]:
    """Return a memory's slots as neurons by layer, and what they apply.

    Takes an edit of :func:`check_kind`. Raises EditError for other interventions.
    """
    layers: dict[str, int] = {}
    for layer in range(len(host.layout.blocks)):
        try:
            layers[host.layout.feed_forward(layer)] = layer
        except HostError:
            continue  # reported where an edit needs it
    neurons: dict[int, Neurons] = {}
    for one in edit.interventions:
        if one.operation != "slots":
            raise EditError(
                f"the edit's {one.operation} at {one.module} is neither a change of weights nor added neurons, so no "
                f"checkpoint can hold it; {INSTEAD}"
            )
        if one.module not in layers:
            raise EditError(
                f"the edit's neurons read the input of {one.module}, and those of a wider feed-forward read what goes "
                f"into the whole of it: {', '.join(layers) or 'not a module of its own in this model'}; {INSTEAD}"
            )
        keys, biases, values = (one.payload[name][0] for name in ("keys", "biases", "values"))
        earlier = neurons.get(layers[one.module])
        if earlier is not None:
            keys, biases, values = (
                torch.cat(pair) for pair in zip(
                    (earlier.keys, earlier.biases, earlier.values), (keys, biases, values), strict=True
                )
            )  # fmt: skip
        neurons[layers[one.module]] = Neurons(keys, biases, values)
    activations = {one.activation for one in edit.interventions}
    if len(activations) > 1:
        raise EditError(
            f"the edit's neurons apply {', '.join(sorted(activations))}; a feed-forward applies one; {INSTEAD}"
        )
    return neurons, activations.pop()


def refuse_pipeline(host: ModelHost, what: str) -> None:
    """Raise EditError for a text-to-image pipeline, of which ``what`` would name single parts."""
    if host.kind == TEXT_TO_IMAGE:
        raise EditError(
            f"{host.name} is a text-to-image pipeline, of which {what} would name single parts; export it to a "
            "checkpoint, which diffusers opens as a whole"
        )


def submodule(host: ModelHost, path: str) -> Any:
    """Return a module by its path. Raises EditError where the host has none."""
    try:
        return host.model.get_submodule(path)
    except AttributeError as error:
        raise EditError(f"the host has no module {path!r}, at which the edit acts") from error


def refuse_adapters(host: ModelHost, what: str) -> None:
    """Raise EditError for a model with PEFT adapters, of which ``what`` would be."""
    if placement.adapters(host.model):
        raise EditError(
            f"{host.name} has PEFT adapters, and {what} would be of the model with them; merge or unload them first"
        )


def refuse_packed(host: ModelHost, what: str) -> None:
    """Raise EditError for a model with packed weights, which ``what`` cannot hold changed."""
    for path, module in host.model.named_modules():
        if placement.is_packed(module):
            raise EditError(
                f"{host.name} is quantised ({path}), and the change cannot be added to packed weights in {what}; "
                "open the model that it was made from, or export to peft"
            )
