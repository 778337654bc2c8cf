"""RePS: a steering vector trained by preference, to bring a behaviour when added and to take it off when nulled.

Paper      Wu et al., "Improved Representation Steering for Language Models", NeurIPS 2025, arXiv 2505.20809
Implements Reference-free preference steering, both directions. Towards: states h + a v with a drawn from ``factors``,
           the positive answer preferred; away: h - relu(h.v) v / |v|^2, the negative one preferred. Loss
           -log sigma(c / |y_w| log p(y_w) - 1 / |y_l| log p(y_l)) with c = max(1, log p_ref(y_l) - log p_ref(y_w)),
           p_ref the unsteered model
Departs    v has unit length, and factors are in mean norms of the layer's states (authors' code: plain numbers chosen
           for Gemma, 2 to 20); a strength of 1 is the middle factor. No bias in the nulling, no dropout
Needs      Contrast pairs; gradients
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from errata.config import positive
from errata.edits.steer import SteerEdit
from errata.host import hooks
from errata.host.host import Host
from errata.methods import _steering
from errata.methods._method import Method, Workspace
from errata.training.steering import Change, lengths, log_likelihoods
from errata.training.tune import Stop, descend, seeded
from errata.types import Contrasts


@dataclass(frozen=True)
class Config(_steering.SteerConfig):
    """Settings of RePS."""

    layers: tuple[int, ...] | None = None
    """Blocks whose output is steered, each with a vector of its own. None: the one at 0.5 of the depth (paper: 10 of 26
    and 20 of 42 for Gemma 2)."""
    factors: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    """Factors a that training draws from, in mean norms of the layer's states."""
    steps: int = 12
    """Passes over the pairs (paper: 18)."""
    per_step: int = 8
    """Pairs per step (paper: 6)."""
    learning_rate: float = 0.02
    """Adam's rate, on a vector of unit length (authors' code: 0.08 on a free one)."""

    def problems(self) -> list[str]:
        """Check ranges."""
        wrong = [*super().problems(), *positive(self, "steps", "per_step", "learning_rate")]
        if not self.factors or not all(0 < factor < float("inf") for factor in self.factors):
            wrong.append(f"factors: expected positive numbers, found {list(self.factors)}")
        return wrong


def fit(host: Host, requests: Sequence[Contrasts], config: Config, work: Workspace) -> SteerEdit:
    """Return the trained vectors."""
    steps = _steering.start("reps", host, requests, config, work, 0.5)
    blocks = [steps.block(layer) for layer in steps.layers]
    read = steps.tokens(blocks, "all")
    norms = {path: _steering.mean_norm(torch.cat([one, other])) for path, (one, _, other, _) in read.items()}
    with hooks.frozen(host.model), seeded(host, work.seed):
        device = next(host.model.parameters()).device
        free = {path: torch.empty(host.layout.width).normal_().to(device).requires_grad_() for path in blocks}
        with torch.no_grad():
            for vector in free.values():
                vector.div_(vector.norm())
        loss = _Loss(steps, config, free, norms)
        outcome = descend(
            torch.optim.Adam(list(free.values()), lr=config.learning_rate), loss, len(steps.positives),
            steps=config.steps, stop=Stop(None), per_step=config.per_step, shuffle=work.seed,
            tick=lambda done, total: work.on_progress("training", done, total),
        )  # fmt: skip
    middle = sorted(config.factors)[len(config.factors) // 2]
    sites = []
    for path, vector in free.items():
        values = middle * norms[path] * functional.normalize(vector.detach(), dim=0)
        sites.append(steps.site(path, "vector", {"values": values[None]}))
    facts = {**outcome.facts(), "loss_before": float(outcome.start.mean())}
    return steps.edit(sites, state_norms=list(norms.values()), factor=middle, **facts)


class _Loss:
    """The loss of some pairs, in both directions."""

    def __init__(
        self, fit: _steering.Fit, config: Any, free: dict[str, Tensor], norms: dict[str, float]
    ) -> None:
        self.fit, self.config, self.free, self.norms = fit, config, free, norms
        self.generator = torch.Generator().manual_seed(fit.work.seed)
        self.sizes = [lengths(side) for side in (fit.positives, fit.negatives)]
        with torch.no_grad():
            self.reference = [
                torch.cat([log_likelihoods(fit.host, side[i : i + 64], {}).cpu() for i in range(0, len(side), 64)])
                for side in (fit.positives, fit.negatives)
            ]  # fmt: skip

    def __call__(self, indices: Sequence[int]) -> Tensor:
        """Return the loss of each pair ``[n]``."""
        factors = torch.tensor(self.config.factors)
        drawn = factors[torch.randint(len(factors), (len(indices),), generator=self.generator)]
        towards = self._preference(indices, {p: self._add(p, drawn) for p in self.free}, preferred=0)
        away = self._preference(indices, {p: self._null(p) for p in self.free}, preferred=1)
        return towards + away

    def _preference(self, indices: Sequence[int], changes: dict[str, Change], *, preferred: int) -> Tensor:
        own = list(indices)
        scores: list[Tensor] = []
        for side in (preferred, 1 - preferred):
            answers = (self.fit.positives, self.fit.negatives)[side]
            sums = log_likelihoods(
                self.fit.host, [answers[i] for i in own], changes, self.config.positions, self.config.count
            )
            scores.append(sums / self.sizes[side][own].to(sums.device))
        scale = (self.reference[1 - preferred][own] - self.reference[preferred][own]).clamp_min(1.0)
        return -functional.logsigmoid(scale.to(scores[0].device) * scores[0] - scores[1])

    def _add(self, path: str, drawn: Tensor) -> Change:
        def act(h: Tensor, owner: Tensor) -> Tensor:
            factor = self.norms[path] * drawn.to(h)[owner][:, None]
            return h + factor * functional.normalize(self.free[path], dim=0).to(h)

        return act

    def _null(self, path: str) -> Change:
        def act(h: Tensor, owner: Tensor) -> Tensor:
            unit = functional.normalize(self.free[path], dim=0).to(h)
            return h - functional.relu(h @ unit)[:, None] * unit

        return act


METHOD = Method(
    name="reps",
    title="RePS",
    paper="Improved Representation Steering for Language Models, NeurIPS 2025, arXiv 2505.20809",
    config=Config,
    fit=fit,
    gives=SteerEdit,
    takes="contrasts",
    batch=False,
    sequential=False,
    needs=("gradients",),
)
