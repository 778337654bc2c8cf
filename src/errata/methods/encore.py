"""ENCORE: stop each search at the first success, and bound the growth of the edited weights.

Paper      Gupta et al., "Lifelong Sequential Knowledge Editing without Model Degradation", ACL Findings
           2025, arXiv 2502.01636
Implements Most-probable early stopping: a search ends once the target is the first choice in every
           context; delta = R K^T (lambda C + K_p K_p^T + mu I + K K^T)^-1, mu the Frobenius penalty
Departs    Solved in the dual, M from one eigendecomposition for any mu. The paper's mu was not at hand;
           the default is a share of lambda's mean eigenvalue, a unit that carries over between models.
Needs      Second moment of keys at each layer with its eigenvectors; context prefixes
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from errata.config import positive
from errata.edits.weight import WeightEdit
from errata.host.layout import Site
from errata.host.load import Host
from errata.linalg.solve import Metric
from errata.methods._method import Method, Workspace
from errata.methods._spread import Covariance, Lasting, Plan, SpreadConfig, settle, spread
from errata.types import Request


@dataclass(frozen=True)
class Config(Lasting, Covariance, SpreadConfig):
    """Settings of ENCORE."""

    stop: Literal["loss", "top"] = "top"
    """Value search: stop once the target is the first choice in every context (paper), or at a loss of 0.05."""
    penalty: float = 0.02
    """mu, the price of the change's squared norm, in mean eigenvalues of lambda C (chosen on the lab)."""

    def problems(self) -> list[str]:
        """Check ranges."""
        return [*super().problems(), *positive(self, "penalty")]


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> WeightEdit:
    """Return the edit under a price on its norm."""
    config = settle(host, config)

    def metric(sites: Sequence[Site]) -> Mapping[Site, Metric]:
        weight = config.cov_weight
        assert weight is not None
        made = {}
        for site, (eigen, name) in work.spectra(host, sites, config.tokens).items():
            price = config.penalty * weight * float(eigen.values.clamp_min(0).mean())
            made[site] = Metric.of_eigen(eigen.values, eigen.vectors, weight=weight, add=price, name=name)
        return made

    return spread(host, requests, config, Plan("encore", metric, history=True), work)


METHOD = Method(
    name="encore",
    title="ENCORE",
    paper="Lifelong Sequential Knowledge Editing without Model Degradation, ACL Findings 2025, arXiv 2502.01636",
    config=Config,
    fit=fit,
    gives=WeightEdit,
    batch=True,
    sequential=True,
    needs=("second_moment", "eigenvectors", "contexts"),
)
