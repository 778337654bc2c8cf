"""EMMET: MEMIT's batches under ROME's equality constraint, softened.

Paper      Gupta et al., "A Unified Framework for Model Editing", EMNLP Findings 2024, arXiv 2403.14236
Implements delta = R (K^T C^-1 K + damping I)^-1 K^T C^-1, values and layers as in MEMIT; one layer by
           default, as in the paper's main comparison
Departs    Solved in the dual. With the weight w that the authors' code puts on C, the solution is
           MEMIT's with lambda = w * damping, so that the default weight is MEMIT's lambda over the
           damping. The damping enters for more than one request only, as in the authors' code
           (other code adds it always: ``damp_single``); one request is then fitted exactly, as ROME does.
Needs      Second moment of keys at the layer; context prefixes written by the model
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from errata.config import positive
from errata.edits.weight import WeightEdit
from errata.host.load import Host
from errata.methods._method import Method, Workspace, resolve_layers, resolved
from errata.methods._spread import Covariance, Plan, SpreadConfig, covariance, settle, spread
from errata.types import Request


@dataclass(frozen=True)
class Config(Covariance, SpreadConfig):
    """Settings of EMMET."""

    damping: float = 0.1
    """gamma, added to the diagonal of K^T C^-1 K for more than one request (paper: 0.1)."""
    damp_single: bool = False
    """Whether the damping is added for one request too (EasyEdit: yes)."""
    cov_weight: float | None = None
    """w on C. None: MEMIT's lambda over the damping (authors' code: 1000 for GPT-2 XL, else 1; EasyEdit:
    10,000 to 100,000)."""

    def problems(self) -> list[str]:
        """Check ranges."""
        return [*super().problems(), *positive(self, "damping")]


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> WeightEdit:
    """Return the edit that gives every request its value, up to the damping."""
    known = host.published if host.layout.adds_directly else None
    one = config.layers or ((known.rome,) if known else None)
    layers = resolve_layers(host, one, lambda depth: (depth // 5,))
    own = config.cov_weight is not None
    config = settle(host, resolved(config, layers=layers), requests, work)
    assert config.cov_weight is not None
    if not own:
        config = resolved(config, cov_weight=config.cov_weight / config.damping)
    damped = len(requests) > 1 or config.damp_single
    gamma = config.damping if damped else 0.0
    plan = Plan("emmet", covariance(host, config, work), gamma=gamma)
    return spread(host, requests, config, plan, work)


METHOD = Method(
    name="emmet",
    title="EMMET",
    paper="A Unified Framework for Model Editing, EMNLP Findings 2024, arXiv 2403.14236",
    config=Config,
    fit=fit,
    gives=WeightEdit,
    batch=True,
    sequential=True,
    needs=("second_moment", "contexts"),
)
