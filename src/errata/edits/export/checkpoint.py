"""A checkpoint: the folder of a model that has the edit in its weights, as transformers opens it.

* changes of weights are merged, as ``apply_`` does it, in the dtype of the checkpoint;
* a memory that adds matrices to linear maps on all prompts is a change of weights;
* a memory that adds neurons to feed-forwards on all prompts is a model with wider feed-forwards, see
  :mod:`errata.host.wider`;
* steering that weights and biases can do is a change of these, see :mod:`errata.edits.export._steering`; a bias that
  is missing is switched on in the configuration where there is a setting for it.

What was written is opened by transformers as a second model in memory. Its weights must be, bit by bit, the host's with
the change of weights merged, and its logits those of the host with the edit in place.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from errata.edits.deltas import weight_with
from errata.edits.edit import Edit
from errata.edits.export import _verify as verifying
from errata.edits.export import _weights as weights
from errata.edits.export._exporter import Exporter, Options, Plan
from errata.edits.export._steering import fold
from errata.edits.memory import ACTIVATIONS, MemoryEdit
from errata.edits.steer import SteerEdit
from errata.edits.weight import WeightEdit, as_stored
from errata.errors import EditError, HostError
from errata.host import files, placement, sharing, wider
from errata.host.base import ModelHost
from errata.host.biases import give_biases_
from errata.host.kinds import TEXT_TO_IMAGE
from errata.host.open import DTYPES
from errata.host.reopen import reopen
from errata.linalg.routines import norm

PAD_TO = 64
"""Multiple of which the width of a feed-forward is by default; matrix products are fast for it."""
WHAT = "a checkpoint"


def plan(edit: Edit, host: ModelHost, options: Options) -> Plan:
    """Make the model of the checkpoint, beside the host's, which shares what is unchanged."""
    model = host.model
    obstacle = host.checkpoint_obstacle()
    if obstacle is not None:
        raise EditError(f"{host.name} cannot be written as a checkpoint: {obstacle}")
    taken = weights.check_kind(edit, WHAT)
    weights.refuse_adapters(host, WHAT)
    weights.refuse_packed(host, WHAT)
    placement.refuse_away(model)
    changed, biases = _as_weights(taken, host)
    if changed is not None and options.pad_to is not None:
        raise EditError(
            "pad_to is the width of feed-forwards that get neurons, and this edit adds none; leave it out"
        )
    shadow = sharing.sharing_copy(model)
    if options.dtype is not None:
        sharing.cast_(shadow, DTYPES[options.dtype])
    dtype = next(p.dtype for p in shadow.parameters() if p.is_floating_point())
    facts: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "model_type": host.family}
    if host.kind == TEXT_TO_IMAGE:
        facts["library"] = "diffusers"
    if changed is not None:
        facts["lost"] = _merge(changed, host, shadow) if changed.deltas else {}
        facts.update(_give_biases(biases, shadow, facts["lost"]) if biases else {})
    else:
        assert isinstance(taken, MemoryEdit)
        facts.update(_widen(taken, host, shadow, options.pad_to or PAD_TO))
    written = [
        shadow
    ]  # given up once it is written, so that it is not in memory beside the one that is compared

    def verify(folder: Path) -> dict[str, Any]:
        return _verify(folder, edit, changed, biases, host, dtype, facts["lost"])

    return Plan(facts, lambda folder: _write(folder, written.pop(), host), verify)


def _as_weights(
    taken: WeightEdit | MemoryEdit | SteerEdit, host: ModelHost
) -> tuple[WeightEdit | None, Mapping[str, Tensor]]:
    """Return an edit as changes of weights, None for added neurons, and biases ``[d]`` by linear maps without one."""
    if not isinstance(taken, SteerEdit):
        return weights.as_weights(taken, host, WHAT), {}
    folded = fold(taken, host, WHAT)
    return folded.change(taken), folded.biases


def _give_biases(biases: Mapping[str, Tensor], shadow: Any, lost: dict[str, float]) -> dict[str, Any]:
    """Add biases to a copy of the host's model, with what rounding loses of them; return what is to be known."""
    try:
        settings = give_biases_(shadow, biases)
    except HostError as error:
        raise EditError(f"{error}; {weights.INSTEAD}") from error
    for path, value in biases.items():
        name = f"{path}.bias"
        lost[name] = _share(value, shadow.get_parameter(name).detach())
    return {"biases": sorted(biases), "settings": dict(settings)}


def _verify(
    folder: Path, edit: Edit, changed: WeightEdit | None, biases: Mapping[str, Tensor], host: ModelHost,
    dtype: torch.dtype, lost: Mapping[str, float],
) -> dict[str, Any]:  # fmt: skip
    """Open the written folder and compare it with the host. Raises EditError where they differ."""
    merged = changed is edit and dtype == host.dtype
    reference = verifying.Reference.of(edit, host, merge=None if merged else False)
    try:
        exported = reopen(host, folder)
        _compare_tokens(folder, host)
    except HostError as error:
        raise EditError(f"{error}; {verifying.WRITE_ANYWAY}") from error
    weights = _compare_weights(exported.model, changed, biases, host)
    compared = reference.compare(exported, dtype, host.dtype, lost={} if merged else lost)
    library = "diffusers" if host.kind == TEXT_TO_IMAGE else "transformers"
    return {"compared": f"logits of the folder opened by {library}", **compared, "weights": weights}


def _compare_weights(
    model: Any, changed: WeightEdit | None, biases: Mapping[str, Tensor], host: ModelHost
) -> int:
    """Return how many weights are bit by bit what they should be; wider ones are compared by logits alone.

    ``biases``: of linear maps of the host without one; where there are some, all others that it lacks are zero.

    Raises EditError for one that is not.
    """
    equal = 0
    found = dict(model.named_parameters())
    for name, own in host.model.named_parameters():
        weight = found.pop(name, None)
        if weight is None or (weight.shape != own.shape and changed is not None):
            raise verifying.refuse_unlike(f"weight {name} of the checkpoint")
        if weight.shape != own.shape:
            continue
        expected = own.detach().to(weight.dtype)
        if changed is not None and name in changed.deltas:
            delta = as_stored(changed.deltas[name], name in changed.transposed)
            expected = weight_with(expected, {"": delta}, weight.dtype, weight.device)
        if not torch.equal(weight.to(expected.device), expected):
            raise verifying.refuse_unlike(f"weight {name} of the checkpoint")
        equal += 1
    for name in sorted(found) if changed is not None else ():
        own = biases.get(name.removesuffix(".bias"), torch.zeros(1)) if biases else None
        bias = found[name].detach().cpu()
        if own is None or not torch.equal(bias, own.to(bias.dtype).expand_as(bias)):
            raise verifying.refuse_unlike(f"weight {name} of the checkpoint")
        equal += 1
    return equal


def _compare_tokens(folder: Path, host: ModelHost) -> None:
    """Raise EditError where the written tokenizer gives other ids than the host's."""
    if host.tokenizer is None:
        return
    tokenizer = host.tokenizer_in(folder)
    for text in verifying.NEUTRAL:
        if tokenizer(text)["input_ids"] != host.tokenizer(text)["input_ids"]:
            raise EditError(
                f"the written tokenizer gives other ids for {text!r} than the host's; {verifying.WRITE_ANYWAY}"
            )


def _write(folder: Path, shadow: Any, host: ModelHost) -> None:
    """Write a model with what prepares its inputs. Raises EditError where transformers refuses to save it."""
    try:
        host.write_checkpoint(shadow, folder)
    except ValueError as error:  # as for settings of generation that contradict each other
        raise EditError(f"{host.name} cannot be saved: {files.first_line(error)}") from error


def _merge(edit: WeightEdit, host: ModelHost, shadow: Any) -> dict[str, float]:
    """Apply an edit to a copy of the host's model; return the share of each change that rounding lost."""
    sharing.replace_(shadow, Tensor.clone, set(edit.deltas))
    view = copy.copy(host)
    view.model = shadow
    lost = edit.trial(view, foreign=True)
    if lost and min(lost.values()) >= 1 and edit.norm() > 0:
        raise EditError(
            f"every entry of the change is lost in {view.dtype} rounding; export with dtype float32"
        )
    return dict(edit.apply_(view, foreign=True, merge=True).lost)


def _widen(edit: MemoryEdit, host: ModelHost, shadow: Any, multiple: int) -> dict[str, Any]:
    """Add a memory's neurons to a copy of the host's model; return what is to be known about it."""
    neurons, activation = weights.as_neurons(edit, host)
    lost: dict[str, float] = {}
    rounded: dict[int, wider.Neurons] = {}
    for layer, own in neurons.items():
        site = shadow.get_submodule(host.layout.site(layer).name)
        rounded[layer] = own.to(site.weight.dtype, site.weight.device)
        for part in fields(own):
            lost[f"layer {layer} {part.name}"] = _share(
                getattr(own, part.name), getattr(rounded[layer], part.name)
            )
    try:
        done = wider.widen_(shadow, host.layout, rounded, ACTIVATIONS, activation, multiple=multiple)
    except HostError as error:
        raise EditError(f"{error}; or {weights.INSTEAD}") from error
    return {
        "neurons": {str(layer): len(own.keys) for layer, own in neurons.items()},
        "width": {"before": done.before, "after": done.after}, "settings": dict(done.settings), "lost": lost,
    }  # fmt: skip


def _share(exact: Tensor, rounded: Tensor) -> float:
    total = float(norm(exact.double()))
    return float(norm(rounded.to(exact.device, torch.float64) - exact.double())) / total if total else 0.0


EXPORTER = Exporter(
    name="checkpoint",
    title="a model's folder that transformers opens",
    takes=(
        "weight edits, merged",
        "memories that add neurons to feed-forwards on all prompts (t_patcher, calinet), as wider feed-forwards: "
        "without a gate, or where the configuration has mlp_bias",
        "memories that add matrices to linear maps on all prompts",
        "steering at all tokens: a vector behind a block as a bias, where the model has it or its configuration can; "
        "vectors, projections and rotations at maps into the stream",
    ),
    plan=plan,
    options=frozenset({"dtype", "pad_to", "foreign"}),
    card=True,
)
