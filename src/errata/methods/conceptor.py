"""Conceptor steering: states pass through the soft projection onto what the positive answers' states vary in.

Paper      Postmus and Abreu, "Steering Large Language Models using Conceptors: Improving Addition-Based Activation
           Engineering", arXiv 2410.16314
Implements h <- beta C h with C = R (R + aperture^-2 I)^-1, R the second moment of states (Sec. 3); Boolean algebra of
           conceptors, here C AND NOT D for the two sides (``poles=contrast``)
Departs    R is divided by its mean diagonal, so that an aperture means the same at every layer and model. With a
           strength s below 1 a state moves that share of the way to beta C h
Needs      Contrast pairs; more tokens of answers than states have entries, or their span is all that passes
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from errata.config import positive
from errata.edits.steer import SteerEdit
from errata.host.host import Host
from errata.linalg import steering
from errata.methods import _steering
from errata.methods._method import Method, Workspace
from errata.types import Contrasts


@dataclass(frozen=True)
class Config(_steering.SteerConfig):
    """Settings of conceptor steering."""

    layers: tuple[int, ...] | None = None
    """Blocks whose output is steered. None: the one at 0.4 of the depth."""
    aperture: float = 10.0
    """How much passes: 0 nothing, infinite the whole span of the states."""
    beta: float = 1.0
    """What the outcome is multiplied by."""
    poles: Literal["positive", "both", "contrast"] = "positive"
    """Whose states R is of: the positive answers'; both sides', pooled; or the positive conceptor AND NOT the negative
    one."""

    def problems(self) -> list[str]:
        """Check ranges."""
        return [*super().problems(), *positive(self, "aperture", "beta")]


def fit(host: Host, requests: Sequence[Contrasts], config: Config, work: Workspace) -> SteerEdit:
    """Return the conceptors as low-rank maps that replace states."""
    steps = _steering.start("conceptor", host, requests, config, work, 0.4)
    states = steps.tokens([steps.block(layer) for layer in steps.layers], "all")
    sites, quotas, ranks = [], [], []
    for module, (one, _, other, _) in states.items():
        c = _conceptor(one, other, config)
        left, right = steering.factors(c)
        payload = {
            "left": config.beta * left, "right": right, "bias": torch.zeros(len(right)), "drop": torch.ones(1)
        }  # fmt: skip
        sites.append(steps.site(module, "rank", payload))
        quotas.append(_steering.rounded(float(c.trace()) / len(c)))
        ranks.append(len(right))
    return steps.edit(sites, quotas=quotas, ranks=ranks)


def _conceptor(one: Tensor, other: Tensor, config: Config) -> Tensor:
    """Return C ``[d, d]`` of the states of the positive and the negative side."""
    pooled = torch.cat([one, other])
    unit = _second(pooled).diagonal().mean()
    if config.poles == "both":
        return steering.conceptor(_second(pooled) / unit, config.aperture)
    c = steering.conceptor(_second(one) / unit, config.aperture)
    if config.poles == "positive":
        return c
    d = steering.conceptor(_second(other) / unit, config.aperture)
    return steering.conceptor_and(c, steering.conceptor_not(d))


def _second(states: Tensor) -> Tensor:
    return states.mT @ states / len(states)


METHOD = Method(
    name="conceptor",
    title="Conceptors",
    paper="Steering Large Language Models using Conceptors, arXiv 2410.16314",
    config=Config,
    fit=fit,
    gives=SteerEdit,
    takes="contrasts",
    batch=False,
    sequential=False,
    random=False,
)
