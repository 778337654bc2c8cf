"""SimNPO: NPO without a reference model, normalised by the answers' length.

Paper      Fan et al., "Simplicity Prevails: Rethinking Negative Preference Optimization for LLM Unlearning", 2024,
           arXiv 2410.07163
Implements minimise -2/beta log sigmoid(beta (NLL per token - margin)) of the answers to forget (Eq. 3), plus the loss
           of what is retained
Departs    An answer is left alone from ``forgotten`` nats per token on. The authors weight the forget loss, here
           ``retain`` is the weight of the other one. Of the weights, feed-forward output projections of the middle
           third of the layers change. What is forgotten and retained: see ``errata unlearn``.
Needs      Gradients
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from errata.config import positive
from errata.edits.weight import WeightEdit
from errata.host.host import Host
from errata.methods._method import Method, Workspace
from errata.methods._settings import at_least_zero
from errata.methods._unlearn import UnlearnConfig, unlearn
from errata.training.forget import simnpo
from errata.types import Request


@dataclass(frozen=True)
class Config(UnlearnConfig):
    """Settings of SimNPO."""

    beta: float = 2.5
    """Inverse temperature (authors' code for TOFU: 2.5 at 5 % of the authors, 4.5 at 10 %)."""
    margin: float = 0.0
    """Nats per token that count as half forgotten (authors' code: 0)."""

    def problems(self) -> list[str]:
        """Check ranges."""
        return [*super().problems(), *positive(self, "beta"), *at_least_zero(self, "margin")]


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> WeightEdit:
    """Return the dense edit that makes the requests' present answers improbable per token."""
    return unlearn("simnpo", host, requests, config, work, simnpo(config.beta, config.margin))


METHOD = Method(
    name="simnpo",
    title="SimNPO",
    paper="Simplicity Prevails: Rethinking Negative Preference Optimization for LLM Unlearning, 2024, arXiv 2410.07163",
    config=Config,
    fit=fit,
    gives=WeightEdit,
    batch=True,
    sequential=True,
    needs=("gradients",),
    forgets=True,
)
