"""A PEFT adapter: the changes of linear maps as LoRA factors beside them, with scaling 1.

Written without peft; ``peft.PeftModel.from_pretrained(model, folder)`` opens it.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from errata.edits.deltas import Delta
from errata.edits.edit import Edit
from errata.edits.export import _weights as weights
from errata.edits.export._exporter import Exporter, Options, Plan
from errata.edits.memory import MemoryEdit
from errata.edits.weight import WeightEdit
from errata.errors import EditError
from errata.host.base import ModelHost
from errata.host.kinds import CAUSAL, ENCODER_DECODER
from errata.host.layout import stored_transposed
from errata.linalg.lowrank import LowRank, nearest

WHAT = "a PEFT adapter"
TASKS = {CAUSAL: "CAUSAL_LM", ENCODER_DECODER: "SEQ_2_SEQ_LM"}
"""What PEFT calls the kinds of model. Not that of classifiers, for which it wants their head in the adapter, too."""
PREFIX = "base_model.model."


def plan(edit: Edit, host: ModelHost, options: Options) -> Plan:
    """Make an adapter's tensors and its configuration."""
    taken = weights.check_kind(edit, WHAT)
    changed = weights.as_weights(taken, host)
    if changed is None:
        assert isinstance(taken, MemoryEdit)
        one = taken.interventions[0]
        raise EditError(
            f"the edit's {one.operation} at {one.module} adds no matrix to a linear map, which is all that {WHAT} can; "
            f"export it to a checkpoint, or {weights.INSTEAD}"
        )
    weights.refuse_adapters(host, WHAT)
    factors: dict[str, LowRank] = {}
    lost: dict[str, float] = {}
    for name in sorted(changed.deltas):
        module = _check_module(name, changed, host)
        factors[module], lost[name] = _factors(name, changed.deltas[name], options.rank)
    if not factors:
        raise EditError(f"the edit changes no weight, so there is nothing for {WHAT} to hold")
    ranks = {module: one.rank for module, one in factors.items()}
    config = _config(ranks, bool(changed.transposed), host)
    tensors = {
        f"{PREFIX}{module}.lora_{part}.weight": value.float().contiguous().cpu()
        for module, one in factors.items()
        for part, value in (("A", one.A), ("B", one.B))
    }
    facts = {"ranks": ranks, "lost": lost, "base_model": host.name}
    return Plan(facts, lambda folder: _write(folder, config, tensors))


def _check_module(name: str, edit: WeightEdit, host: ModelHost) -> str:
    """Return the module of a weight. Raises EditError where LoRA factors cannot act beside it."""
    path, _, leaf = name.rpartition(".")
    module = weights.submodule(host, path)
    transposed = stored_transposed(module)
    if leaf != "weight" or transposed is None:
        raise EditError(
            f"the edit changes {name} of a {type(module).__name__}, and {WHAT} changes the weights of linear maps; "
            f"export it to a checkpoint, or {weights.INSTEAD}"
        )
    if transposed != (name in edit.transposed):
        raise EditError(f"{name} is stored in another orientation than the edit expects")
    return path


def _factors(name: str, delta: Delta, rank: int | None) -> tuple[LowRank, float]:
    """Return a change as thin factors, and the relative error of that. Raises EditError for a wide change."""
    if isinstance(delta, Tensor):
        if rank is None:
            raise EditError(
                f"the edit changes all of {name}, {list(delta.shape)}, and {WHAT} holds thin factors; give a rank to "
                f"approximate it, with the error reported (--rank), export it to a checkpoint, or {weights.INSTEAD}"
            )
        if delta.ndim != 2:
            raise EditError(
                f"the edit changes {name}, {list(delta.shape)}, which is no matrix; export it to a checkpoint"
            )
        return nearest(delta, rank)
    if rank is None or delta.rank <= rank:
        return delta, 0.0
    thin, share = delta.truncate(rank)
    return thin, share**0.5


def _config(ranks: dict[str, int], transposed: bool, host: ModelHost) -> dict[str, Any]:
    """Return the adapter's configuration; alpha is the rank of each module, so that factors act as they are."""
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {module: rank for module, rank in ranks.items() if rank != usual}
    return {
        "peft_type": "LORA", "task_type": TASKS.get(host.kind), "base_model_name_or_path": host.name,
        "inference_mode": True, "r": usual, "lora_alpha": usual, "rank_pattern": others, "alpha_pattern": others,
        "target_modules": sorted(ranks), "fan_in_fan_out": transposed, "lora_dropout": 0.0, "bias": "none",
        "use_rslora": False, "use_dora": False, "init_lora_weights": True, "modules_to_save": None,
    }  # fmt: skip


def _write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    (folder / "adapter_model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    text = json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True)
    (folder / "adapter_config.json").write_text(f"{text}\n", encoding="utf-8")


EXPORTER = Exporter(
    name="peft",
    title="a LoRA adapter that peft opens",
    takes=(
        "weight edits whose changes of linear maps are low-rank; others with a rank, approximated",
        "memories that add low-rank matrices to linear maps on all prompts",
    ),
    plan=plan,
    options=frozenset({"rank", "foreign"}),
)
