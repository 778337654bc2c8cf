"""Differences: by name, what to add to each weight, whole, with how that is done in plain PyTorch.

The exact form of any change of weights, of whatever rank, also of biases and norms. What was written is added to a copy
of the model as its README says, and compared with the edit in place.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from errata.edits.deltas import dense, weight_with
from errata.edits.edit import Edit
from errata.edits.export import _verify as verifying
from errata.edits.export import _weights as weights
from errata.edits.export._exporter import Exporter, Options, Plan
from errata.edits.weight import WeightEdit, as_stored
from errata.errors import EditError
from errata.host import sharing
from errata.host.base import ModelHost
from errata.host.reopen import viewing

WHAT = "a file of differences"
VERSION = 1
TENSORS, FACTS, README = "delta.safetensors", "delta.json", "README.md"
TEXT = """# Differences of weights

`{tensors}` holds, by the name of each changed weight, what to add to it: float32 (float64 for a model in float64), in
the weight's own shape. The differences belong to the model `{model}` with the fingerprint `{host}`
(`{facts}` says the same); added to any other model they make no sense.

```python
import torch
from safetensors.torch import load_file

model = ...  # the model, opened as you always do, say with transformers
weights = dict(model.named_parameters())
with torch.no_grad():
    for name, change in load_file("{tensors}").items():
        weight = weights[name]
        weight.copy_(weight + change.to(weight.device))  # added in float32, rounded once
```

To take it back, keep the weights' own values before: subtracting leaves rounding errors.
"""


def plan(edit: Edit, host: ModelHost, options: Options) -> Plan:
    """Make the tensors and the documents."""
    taken = weights.check_kind(edit, WHAT)
    weights.refuse_adapters(host, WHAT)
    weights.refuse_packed(host, WHAT)
    changed = weights.as_weights(taken, host, WHAT)
    if changed is None:
        raise EditError(
            f"the edit adds neurons, which are more than differences of weights; export it to a checkpoint, or "
            f"{weights.INSTEAD}"
        )
    if not changed.deltas:
        raise EditError(f"the edit changes no weight, so there is nothing for {WHAT} to hold")
    lost = changed.trial(host, foreign=True)  # raises for what cannot be written
    tensors = {name: _whole(name, changed, host) for name in sorted(changed.deltas)}
    document = _document(edit, host, tensors)
    text = TEXT.format(
        tensors=TENSORS, facts=FACTS, model=host.name, host=edit.provenance.host
    )  # fmt: skip

    def write(folder: Path) -> None:
        (folder / TENSORS).write_bytes(save(tensors, metadata={"format": "pt"}))
        facts = json.dumps(document, indent=2, ensure_ascii=False, sort_keys=True)
        (folder / FACTS).write_text(f"{facts}\n", encoding="utf-8")
        (folder / README).write_text(text, encoding="utf-8")

    facts = {"weights": len(tensors), "bytes": sum(one.nbytes for one in tensors.values()), "lost": lost}
    return Plan(facts, write, lambda folder: _verify(folder, edit, changed, host, document))


def _whole(name: str, edit: WeightEdit, host: ModelHost) -> Tensor:
    """Return a change as it is stored, in the shape of its weight ``[...]``."""
    weight = host.model.get_parameter(name)
    change = dense(as_stored(edit.deltas[name], name in edit.transposed), weight.detach())
    return change.cpu().contiguous().clone()


def _document(edit: Edit, host: ModelHost, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {
        "format": "errata delta", "version": VERSION, "edit": edit.digest, "method": edit.provenance.method,
        "host": edit.provenance.host, "host_name": host.name, "model_type": host.family,
        "tensors": {
            name: {
                "shape": list(one.shape), "norm": float(one.double().square().sum().sqrt()),
                "sha256": hashlib.sha256(one.numpy().tobytes()).hexdigest(),
            } for name, one in tensors.items()
        },
    }  # fmt: skip


def _verify(
    folder: Path, edit: Edit, changed: WeightEdit, host: ModelHost, document: dict[str, Any]
) -> dict[str, Any]:
    """Add what was written to a copy of the model that shares the other weights. Raises EditError where it differs."""
    if json.loads((folder / FACTS).read_text(encoding="utf-8")) != json.loads(json.dumps(document)):
        raise verifying.refuse_unlike(FACTS)
    read: dict[str, Tensor] = load((folder / TENSORS).read_bytes())
    if read.keys() != changed.deltas.keys():
        raise verifying.refuse_unlike(f"the list of tensors in {TENSORS}")
    model = sharing.sharing_copy(host.model)
    sharing.replace_(model, Tensor.clone, set(read))
    with torch.no_grad():
        for name, change in read.items():
            weight, own = model.get_parameter(name), host.model.get_parameter(name).detach()
            weight.copy_(weight + change.to(weight.device))
            delta = as_stored(changed.deltas[name], name in changed.transposed)
            if not torch.equal(weight, weight_with(own, {"": delta}, own.dtype, own.device)):
                raise verifying.refuse_unlike(f"the change of {name}")
    merged = changed is edit
    reference = verifying.Reference.of(edit, host, merge=None if merged else False)
    lost = {} if merged or host.dtype == torch.float32 else changed.trial(host, foreign=True)
    compared = reference.compare(viewing(host, model), host.dtype, lost=lost)
    return {
        "compared": "weights with the differences added, and their logits",
        **compared,
        "weights": len(read),
    }


EXPORTER = Exporter(
    name="delta",
    title="differences of whole weights, for plain PyTorch",
    takes=(
        "weight edits of any rank, also of biases and norms",
        "memories that add matrices to linear maps on all prompts",
    ),
    plan=plan,
)
