"""NPO: unlearn answers as dispreferred ones, relative to the unedited model.

Paper      Zhang et al., "Negative Preference Optimization: From Catastrophic Collapse to Effective Unlearning",
           COLM 2024, arXiv 2404.05868
Implements minimise -2/beta log sigmoid(beta (NLL - NLL of the unedited model)) of the answers to forget, sums over
           their tokens (Eq. 3), plus the loss of what is retained (NPO+RT). Its gradient is that of gradient ascent
           times a weight that goes to 0 as an answer becomes improbable
Departs    An answer is left alone from ``forgotten`` nats per token on. The divergence from the unedited model as
           retain loss (NPO+KL) is left out. Of the weights, feed-forward output projections of the middle third of
           the layers change. What is forgotten and retained: see ``errata unlearn``.
Needs      Gradients
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from errata.config import positive
from errata.edits.weight import WeightEdit
from errata.host.host import Host
from errata.methods._method import Method, Workspace
from errata.methods._unlearn import UnlearnConfig, unlearn
from errata.training.forget import npo
from errata.types import Request


@dataclass(frozen=True)
class Config(UnlearnConfig):
    """Settings of NPO."""

    beta: float = 0.1
    """Inverse temperature; towards 0 it is gradient ascent (paper: 0.1)."""

    def problems(self) -> list[str]:
        """Check ranges."""
        return [*super().problems(), *positive(self, "beta")]


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> WeightEdit:
    """Return the dense edit that makes the requests' present answers less probable than they were."""
    return unlearn("npo", host, requests, config, work, npo(config.beta))


METHOD = Method(
    name="npo",
    title="NPO",
    paper="Negative Preference Optimization: From Catastrophic Collapse to Effective Unlearning, COLM 2024, "
    "arXiv 2404.05868",
    config=Config,
    fit=fit,
    gives=WeightEdit,
    batch=True,
    sequential=True,
    needs=("gradients",),
    forgets=True,
)
