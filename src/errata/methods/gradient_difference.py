"""Gradient difference: unlearn answers by raising their loss while that of other texts is kept low.

Paper      Liu et al., "Continual Learning and Private Unlearning", CoLLAs 2022, arXiv 2203.12817; GradDiff of TOFU,
           Maini et al., arXiv 2401.06121
Implements minimise -gamma NLL(forget) + alpha NLL(retain), each a mean over tokens, then over rows (TOFU, Sec. 3.2)
Departs    An answer is left alone from ``forgotten`` nats per token on. The form whose retain loss is a divergence from
           the unedited model is left out. Of the weights, feed-forward output projections of the middle third of the
           layers change. What is forgotten and retained: see ``errata unlearn``.
Needs      Gradients
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from errata.config import positive
from errata.edits.weight import WeightEdit
from errata.host.host import Host
from errata.methods._method import Method, Workspace
from errata.methods._unlearn import UnlearnConfig, unlearn
from errata.training.forget import ascent
from errata.types import Request


@dataclass(frozen=True)
class Config(UnlearnConfig):
    """Settings of gradient difference."""

    forget: float = 1.0
    """gamma, the weight of the loss to raise (TOFU: 1)."""

    def problems(self) -> list[str]:
        """Check ranges."""
        return [*super().problems(), *positive(self, "forget")]


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> WeightEdit:
    """Return the dense edit that raises the loss of the requests' present answers and keeps that of texts."""

    def objective(mean: Tensor, tokens: Tensor, reference: Tensor) -> Tensor:
        return config.forget * ascent(mean, tokens, reference)

    return unlearn("gradient_difference", host, requests, config, work, objective)


METHOD = Method(
    name="gradient_difference",
    title="GradDiff",
    paper="Continual Learning and Private Unlearning, CoLLAs 2022, arXiv 2203.12817",
    config=Config,
    fit=fit,
    gives=WeightEdit,
    batch=True,
    sequential=True,
    needs=("gradients",),
    forgets=True,
)
