"""Laplace deletion: unlearn answers by one step that a Laplace approximation of the posterior gives.

Paper      Tanno et al., "Repairing Neural Networks by Leaving the Right Past Behind", NeurIPS 2022, arXiv 2207.04806
Implements the posterior without some examples, p(w | D) over their likelihood, with p(w | D) a Gaussian around the
           weights: its mean lies at H^-1 times the sum of the gradients of those examples' losses, H the Fisher
           information (Sec. 3). Influence functions take the same step with the Hessian of all
Departs    The authors published no code; this follows the paper. H is diagonal, of kept texts alone, and damped. The
           likelihood of what is deleted has no lower bound, so the step is as long as answers need to cost
           ``forgotten`` nats per token. Which examples cause a failure, the paper's other half, is asked of
           ``errata attribute``. Of the weights, feed-forward output projections of the middle third of the layers
           change. What is forgotten and retained: see ``errata unlearn``.
Needs      Gradients
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from errata.edits.weight import WeightEdit
from errata.host.host import Host
from errata.methods._deletion import DeletionConfig, delete
from errata.methods._method import Method, Workspace
from errata.training.deletion import newton
from errata.types import Request


@dataclass(frozen=True)
class Config(DeletionConfig):
    """Settings of Laplace deletion."""


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> WeightEdit:
    """Return the dense edit that takes the requests' present answers out of the posterior."""
    return delete("laplace", host, requests, config, work, newton)


METHOD = Method(
    name="laplace",
    title="Laplace deletion",
    paper="Repairing Neural Networks by Leaving the Right Past Behind, NeurIPS 2022, arXiv 2207.04806",
    config=Config,
    fit=fit,
    gives=WeightEdit,
    batch=True,
    sequential=True,
    needs=("gradients",),
    forgets=True,
)
