"""A checkpoint: the folder of a model that has the edit in its weights, as transformers opens it.

* changes of weights are merged, as ``apply_`` does it, in the dtype of the checkpoint;
* a memory that adds matrices to linear maps on all prompts is a change of weights;
* a memory that adds neurons to feed-forwards on all prompts is a model with wider feed-forwards, see
  :mod:`errata.host.wider`.
"""

from __future__ import annotations

import copy
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from errata.edits.edit import Edit
from errata.edits.export import _weights as weights
from errata.edits.export._exporter import Exporter, Options, Plan
from errata.edits.memory import ACTIVATIONS, MemoryEdit
from errata.edits.weight import WeightEdit
from errata.errors import EditError, HostError
from errata.host import files, placement, sharing, wider
from errata.host.base import ModelHost
from errata.host.open import DTYPES
from errata.linalg.routines import norm

PAD_TO = 64
"""Multiple of which the width of a feed-forward is by default; matrix products are fast for it."""
WHAT = "a checkpoint"


def plan(edit: Edit, host: ModelHost, options: Options) -> Plan:
    """Make the model of the checkpoint, beside the host's, which shares what is unchanged."""
    model = host.model
    if not hasattr(model, "save_pretrained") or not type(model).__module__.startswith("transformers."):
        raise EditError(
            f"{host.name} is a {type(model).__name__}, which transformers does not open by itself"
        )
    taken = weights.check_kind(edit, WHAT)
    weights.refuse_adapters(host, WHAT)
    weights.refuse_packed(host, WHAT)
    placement.refuse_away(model)
    changed = weights.as_weights(taken, host)
    if changed is not None and options.pad_to is not None:
        raise EditError(
            "pad_to is the width of feed-forwards that get neurons, and this edit adds none; leave it out"
        )
    shadow = sharing.sharing_copy(model)
    if options.dtype is not None:
        sharing.cast_(shadow, DTYPES[options.dtype])
    dtype = str(next(p.dtype for p in shadow.parameters() if p.is_floating_point())).removeprefix("torch.")
    facts: dict[str, Any] = {"dtype": dtype, "model_type": host.family}
    if changed is not None:
        facts["lost"] = _merge(changed, host, shadow)
    else:
        assert isinstance(taken, MemoryEdit)
        facts.update(_widen(taken, host, shadow, options.pad_to or PAD_TO))

    return Plan(facts, lambda folder: _write(folder, shadow, host))


def _write(folder: Path, shadow: Any, host: ModelHost) -> None:
    """Write a model with what prepares its inputs. Raises EditError where transformers refuses to save it."""
    try:
        shadow.save_pretrained(folder)
    except ValueError as error:  # as for settings of generation that contradict each other
        raise EditError(f"transformers cannot save {host.name}: {files.first_line(error)}") from error
    for path in files.processor_files(host.name):
        shutil.copyfile(path, folder / path.name)
    if host.tokenizer is not None:
        host.tokenizer.save_pretrained(folder)


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
    ),
    plan=plan,
    options=frozenset({"dtype", "pad_to", "foreign"}),
)
