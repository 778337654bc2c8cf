"""Gradient ascent: unlearn answers by raising their loss.

Paper      Jang et al., "Knowledge Unlearning for Mitigating Privacy Risks in Language Models", ACL 2023,
           arXiv 2210.01504; the baseline GA of TOFU (arXiv 2401.06121) and MUSE (arXiv 2407.06460)
Implements minimise minus the mean negative log-likelihood of the answers to forget (Eq. 1)
Departs    An answer is left alone from ``forgotten`` nats per token on: the loss has no lower bound, and the papers
           stop by a count of epochs or by an attack's success. Of the weights, feed-forward output projections of the
           middle third of the layers change, not all. What is forgotten: see ``errata unlearn``.
Needs      Gradients
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from errata.edits.weight import WeightEdit
from errata.host.host import Host
from errata.methods._method import Method, Workspace
from errata.methods._unlearn import UnlearnConfig, unlearn
from errata.training.forget import ascent
from errata.types import Request


@dataclass(frozen=True)
class Config(UnlearnConfig):
    """Settings of gradient ascent."""

    retain: float = 0.0
    """Weight of the mean loss of the retained texts (papers: none; with it, this is gradient_difference)."""


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> WeightEdit:
    """Return the dense edit that raises the loss of the requests' present answers."""
    return unlearn("gradient_ascent", host, requests, config, work, ascent)


METHOD = Method(
    name="gradient_ascent",
    title="GA",
    paper="Knowledge Unlearning for Mitigating Privacy Risks in Language Models, ACL 2023, arXiv 2210.01504",
    config=Config,
    fit=fit,
    gives=WeightEdit,
    batch=True,
    sequential=True,
    needs=("gradients",),
    forgets=True,
)
