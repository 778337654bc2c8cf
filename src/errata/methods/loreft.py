"""ReFT: small maps of states, trained so that the model gives the positive answers; LoReFT and its simpler forms.

Paper      Wu et al., "ReFT: Representation Finetuning for Language Models", NeurIPS 2024, arXiv 2404.03592
Implements Eq. 2, LoReFT: h + R^T (W h + b - R h) with orthonormal rows R ``[r, d]``; Eq. 3, DiReFT:
           h + W2^T (W1 h + b). Of the authors' code (pyreft) also a constant inside a subspace, h + R^T b and
           h + R^T (b - R h). At the first and last tokens of the prompt, a map a layer; loss: negative
           log-likelihood of the positive answers
Departs    Maps start as the identity (authors' code: random W). Negative answers are not trained on. R is the Q of a
           free matrix, with positive diagonal of its triangle; dropout is left out
Needs      Contrast pairs; gradients
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from errata.config import positive
from errata.edits.steer import SteerEdit, Where
from errata.host import hooks
from errata.host.host import Host
from errata.linalg import steering
from errata.methods import _steering
from errata.methods._method import Method, Workspace
from errata.training.steering import lengths, log_likelihoods
from errata.training.tune import Stop, descend, seeded
from errata.types import Contrasts

Form = Literal["loreft", "direft", "add", "set"]


@dataclass(frozen=True)
class Config(_steering.SteerConfig):
    """Settings of ReFT."""

    layers: tuple[int, ...] | None = None
    """Blocks whose output is changed. None: all, as in the paper."""
    positions: Where = "ends"
    """Tokens that are changed; ends: the first and the last ``count`` of the prompt, as in the paper. See
    errata methods caa for the others."""
    count: int = 5
    """Tokens of positions first and ends (paper: 5 to 7)."""
    form: Form = "loreft"
    """loreft, direft, add (a constant R^T b) or set (coordinates in the subspace become b)."""
    rank: int = 4
    """r (paper: 4 to 8)."""
    steps: int = 12
    """Passes over the pairs (paper: 6 to 12)."""
    per_step: int = 16
    """Pairs per step (paper: 16 to 32)."""
    learning_rate: float = 4e-3
    """Adam's rate (paper: 9e-4 for 7B models on thousands of examples; authors' demonstrations: 4e-3)."""

    def problems(self) -> list[str]:
        """Check ranges."""
        return [*super().problems(), *positive(self, "rank", "steps", "per_step", "learning_rate")]


class _Map:
    """One layer's map, with its trainable tensors."""

    def __init__(self, form: Form, width: int, rank: int, like: Tensor) -> None:
        free = torch.empty(rank, width).normal_(0.0, width**-0.5)
        start = {
            "loreft": {"basis": free, "right": torch.zeros(rank, width), "bias": torch.zeros(rank)},
            "direft": {"left": torch.zeros(width, rank), "right": free, "bias": torch.zeros(rank)},
            "add": {"basis": free, "bias": torch.zeros(rank)},
            "set": {"basis": free, "bias": torch.zeros(rank)},
        }[form]
        self.form = form
        self.tensors = {name: t.to(like.device).requires_grad_() for name, t in start.items()}

    def payload(self) -> tuple[str, dict[str, Tensor]]:
        """Return form and tensors of the change, in their present state. LoReFT's ``right`` is W - R."""
        tensors = self.tensors
        if self.form == "direft":
            return "rank", {**tensors, "drop": torch.zeros(1, device=tensors["bias"].device)}
        basis = steering.orthonormal_rows(tensors["basis"])
        if self.form == "add":
            return "vector", {"values": (tensors["bias"] @ basis)[None]}
        if self.form == "set":
            return "projection", {"basis": basis, "target": tensors["bias"]}
        zero = torch.zeros(1, device=basis.device)
        return "rank", {"left": basis.mT, "right": tensors["right"], "bias": tensors["bias"], "drop": zero}


def fit(host: Host, requests: Sequence[Contrasts], config: Config, work: Workspace) -> SteerEdit:
    """Return the trained maps."""
    steps = _steering.start("loreft", host, requests, config, work, None)
    rank, width = min(config.rank, host.layout.width), host.layout.width
    answers, count = steps.positives, lengths(steps.positives)
    with hooks.frozen(host.model), seeded(host, work.seed):
        like = next(host.model.parameters())
        maps = {steps.block(layer): _Map(config.form, width, rank, like) for layer in steps.layers}
        parameters = [tensor for one in maps.values() for tensor in one.tensors.values()]
        optimizer = torch.optim.Adam(parameters, lr=config.learning_rate)

        def loss(indices: Sequence[int]) -> Tensor:
            changes = {path: _change(*one.payload()) for path, one in maps.items()}
            own = [answers[i] for i in indices]
            sums = log_likelihoods(host, own, changes, config.positions, config.count)
            return -sums / count[list(indices)].to(sums.device)

        outcome = descend(
            optimizer, loss, len(answers), steps=config.steps, stop=Stop(None), per_step=config.per_step,
            shuffle=work.seed, tick=lambda done, total: work.on_progress("training", done, total),
        )  # fmt: skip
        with torch.no_grad():
            sites = [steps.site(path, *one.payload()) for path, one in maps.items()]
    return steps.edit(sites, loss_before=float(outcome.start.mean()), **outcome.facts())


def _change(form: str, part: Mapping[str, Any]) -> Callable[[Tensor, Tensor], Tensor]:
    """Return what a map in training does to states; the same functions as the edit's."""

    def act(h: Tensor, owner: Tensor) -> Tensor:
        if form == "vector":
            return steering.along(h, part["values"][0], 1.0)
        if form == "projection":
            return steering.project(h, part["basis"], part["target"], 1.0)
        return steering.low_rank(h, part["left"], part["right"], part["bias"], part["drop"], 1.0)

    return act


METHOD = Method(
    name="loreft",
    title="ReFT",
    paper="ReFT: Representation Finetuning for Language Models, NeurIPS 2024, arXiv 2404.03592",
    config=Config,
    fit=fit,
    gives=SteerEdit,
    takes="contrasts",
    batch=False,
    sequential=False,
    needs=("gradients",),
)
