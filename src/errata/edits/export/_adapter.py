"""Changes of linear maps as LoRA factors of one rank, which every program that reads adapters scales in the same way.

Programs differ in what they read of an adapter's ranks: some take each module's from patterns in its configuration,
some from the tensors, and scale by ``alpha / rank`` with one alpha. Factors of one rank for all modules, filled with
zeros where they need less, and ``lora_alpha`` equal to it mean the same to all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor
from torch.nn import functional

from errata.edits.deltas import Delta
from errata.edits.edit import Edit
from errata.edits.export import _verify as verifying
from errata.edits.export import _weights as weights
from errata.edits.memory import MemoryEdit
from errata.edits.weight import WeightEdit, delta_norm
from errata.errors import EditError, HostError
from errata.evaluation.check import answer_requests, compare_answers
from errata.host.base import ModelHost
from errata.host.host import Host
from errata.host.kinds import CAUSAL, ENCODER_DECODER
from errata.host.layout import stored_transposed
from errata.host.reopen import can_adapt, with_adapter
from errata.linalg.lowrank import LowRank, nearest, product_svd, without_noise
from errata.linalg.routines import norm
from errata.types import Request

WHAT = "a LoRA adapter"
TASKS = {CAUSAL: "CAUSAL_LM", ENCODER_DECODER: "SEQ_2_SEQ_LM"}
"""What PEFT calls the kinds of model. Not that of classifiers, for which it wants their head in the adapter, too."""
PREFIX = "base_model.model."
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
CLOSE = 1e-6
"""Largest relative difference of a change that was read back."""
MOST_ASKED = 200
"""Most requests that are asked again of an adapter that is an approximation."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """An edit as LoRA factors."""

    edit: Edit
    """As it was given."""
    exact: WeightEdit
    """The edit as changes of weights."""
    thin: WeightEdit
    """What the adapter does: the same, or an approximation of a rank."""
    factors: Mapping[str, LowRank]
    """By module, all of one rank."""
    ranks: Mapping[str, int]
    """By module, without the zeros."""
    lost: Mapping[str, float]
    """By tensor, the error of the approximation over the norm of the change."""

    @property
    def rank(self) -> int:
        """The rank of all factors."""
        return max(self.ranks.values())

    def facts(self, host: ModelHost) -> dict[str, Any]:
        """Return what is to be known about the adapter; of an approximation also how many requests still hold."""
        facts: dict[str, Any] = {
            "rank": self.rank, "ranks": dict(self.ranks), "lost": dict(self.lost), "base_model": host.name,
        }  # fmt: skip
        short = {name: 1 - share**2 for name, share in self.lost.items() if share > CLOSE}
        if short:
            facts["energy"] = short
            facts.update(self._asked_again(host))
        return facts

    def _asked_again(self, host: ModelHost) -> dict[str, Any]:
        """Return the share of requests that are answered with their target with the approximation, and without it."""
        asked = [one for one in self.exact.provenance.requests if isinstance(one, Request)][:MOST_ASKED]
        if not asked or not isinstance(host, Host):
            return {}
        shares: dict[str, float] = {}
        for name, edit in (("answered", self.thin), ("answered_exactly", self.exact)):
            with verifying.in_place(edit, host, merge=False):
                texts = answer_requests(host, asked)
            shares[name] = compare_answers(asked, texts, texts).answered / len(asked)
        return shares

    def config(self, host: ModelHost) -> dict[str, Any]:
        """Return the configuration that PEFT reads."""
        return {
            "peft_type": "LORA", "task_type": TASKS.get(host.kind), "base_model_name_or_path": host.name,
            "inference_mode": True, "r": self.rank, "lora_alpha": self.rank, "target_modules": sorted(self.factors),
            "fan_in_fan_out": bool(self.exact.transposed), "lora_dropout": 0.0, "bias": "none",
            "use_rslora": False, "use_dora": False, "init_lora_weights": True, "modules_to_save": None,
        }  # fmt: skip

    def files(self, host: ModelHost) -> dict[str, bytes]:
        """Return the two files of an adapter by their names; the same edit gives the same bytes."""
        tensors = {
            f"{PREFIX}{module}.lora_{part}.weight": value
            for module, one in self.factors.items()
            for part, value in (("A", one.A), ("B", one.B))
        }
        text = json.dumps(self.config(host), indent=2, ensure_ascii=False, sort_keys=True)
        return {WEIGHTS: save(tensors, metadata={"format": "pt"}), CONFIG: f"{text}\n".encode()}

    def write(self, folder: Path, host: ModelHost) -> None:
        """Write the two files of an adapter into a folder."""
        for name, content in self.files(host).items():
            (folder / name).write_bytes(content)

    def verify(self, folder: Path, host: ModelHost) -> dict[str, Any]:
        """Read the files and compare what they mean with the edit; where peft is installed, let it run them.

        Raises EditError where they differ.
        """
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if config != self.config(host):
            raise verifying.refuse_unlike(CONFIG)
        tensors: dict[str, Tensor] = load((folder / WEIGHTS).read_bytes())
        read: dict[str, LowRank] = {}
        for module in config["target_modules"]:
            a, b = (tensors.pop(f"{PREFIX}{module}.lora_{part}.weight", None) for part in "AB")
            if a is None or b is None or config["r"] != len(a) or not _finite(a, b):
                raise verifying.refuse_unlike(f"{module} in {WEIGHTS}")
            read[module] = LowRank(b * (config["lora_alpha"] / config["r"]), a)
        if tensors:
            raise verifying.refuse_unlike(f"{min(tensors)} in {WEIGHTS}")
        done: dict[str, Any] = {"compared": "factors, read back", "change": self.compare(read)}
        problem = can_adapt(host)
        if problem is not None:
            return {**done, "logits": f"not compared: {problem}"}
        reference = verifying.Reference.of(self._reference, host, merge=False)
        try:
            adapted = with_adapter(host, folder)
        except HostError as error:
            raise EditError(f"{error}; {verifying.WRITE_ANYWAY}") from error
        compared = reference.compare(adapted, host.dtype, lost={})
        return {
            **done,
            "compared": "factors, read back, and logits of the model with the adapter in peft",
            **compared,
        }

    @property
    def _reference(self) -> Edit:
        """The edit whose outputs the adapter has to give: as it was given, unless it was approximated."""
        return self.edit if max(self.lost.values()) <= CLOSE else self.thin

    def compare(self, read: Mapping[str, LowRank]) -> float:
        """Return the largest relative difference of changes by module, as they were read, from those of the edit.

        Raises EditError for one above :data:`CLOSE` beyond what the approximation lost.
        """
        if read.keys() != self.factors.keys():
            raise verifying.refuse_unlike("the list of modules")
        worst = 0.0
        for module, product in read.items():
            name = f"{module}.weight"
            share = _difference(product, self.exact.deltas[name])
            if not share <= CLOSE + 1.001 * self.lost[name]:
                raise verifying.refuse_unlike(f"the change of {name}")
            worst = max(worst, share)
        return worst


def adapter(edit: Edit, host: ModelHost, rank: int | None) -> Adapter:
    """Return an edit as LoRA factors. Raises EditError with the reason where it is none.

    ``rank``: the largest allowed; a change of a higher one first loses the directions that are rounding errors, and
    then the weakest. None: any, but no change that is not thin.
    """
    weights.refuse_pipeline(host, WHAT)
    taken = weights.check_kind(edit, WHAT)
    changed = weights.as_weights(taken, host, WHAT)
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
        factors[module], lost[name] = _factors(name, changed.deltas[name], rank)
    if not factors:
        raise EditError(f"the edit changes no weight, so there is nothing for {WHAT} to hold")
    ranks = {module: one.rank for module, one in factors.items()}
    thin = {f"{module}.weight": one for module, one in factors.items()}
    approximation = WeightEdit(thin, changed.transposed, changed.provenance)
    padded = {module: _padded(one, max(ranks.values())) for module, one in factors.items()}
    return Adapter(edit, changed, approximation, padded, ranks, lost)


def _check_module(name: str, edit: WeightEdit, host: ModelHost) -> str:
    """Return the module of a weight. Raises EditError where LoRA factors cannot act beside it."""
    path, _, leaf = name.rpartition(".")
    module = weights.submodule(host, path)
    transposed = stored_transposed(module)
    if leaf != "weight" or transposed is None:
        raise EditError(
            f"the edit changes {name} of a {type(module).__name__}, and {WHAT} changes the weights of linear maps; "
            f"export it to delta or to a checkpoint, or {weights.INSTEAD}"
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
                f"approximate it, with the error reported (--rank), export it to delta or to a checkpoint, or "
                f"{weights.INSTEAD}"
            )
        if delta.ndim != 2:
            raise EditError(
                f"the edit changes {name}, {list(delta.shape)}, which is no matrix; export it to delta or to a "
                "checkpoint"
            )
        return nearest(delta.float(), rank)
    limit = min(delta.shape) if rank is None else rank
    if delta.rank <= limit:
        return delta.to(torch.float32), 0.0
    thin = without_noise(delta)
    if thin.rank > limit:
        thin = thin.truncate(limit)[0].to(torch.float32)
    return thin, _difference(thin, delta)


def _padded(factors: LowRank, rank: int) -> LowRank:
    """Return factors in float32 in main memory, filled with zeros up to a rank."""
    more = rank - factors.rank
    left = functional.pad(factors.B.float().cpu(), (0, more))
    right = functional.pad(factors.A.float().cpu(), (0, 0, 0, more))
    return LowRank(left.contiguous(), right.contiguous())


def _difference(product: LowRank, delta: Delta) -> float:
    """Return the norm of the difference of a product from a change, over the norm of the change, in float64.

    For thin changes nothing is multiplied out.
    """
    total = delta_norm(delta)
    left, right = (part.double().cpu() for part in (product.B, product.A))
    if isinstance(delta, LowRank):
        both = LowRank(-left, right) + delta.to(torch.float64, device="cpu")
        apart = float(norm(product_svd(both.B, both.A)[2][1]))
    else:
        apart = float(norm(left @ right - delta.double().cpu()))
    return apart / total if total else apart


def _finite(*tensors: Tensor) -> bool:
    return all(bool(torch.isfinite(one).all()) for one in tensors)
