"""PUMA: unlearn answers by one step, with others weighted so that their loss stays where it is.

Paper      Wu et al., "PUMA: Performance Unchanged Model Augmentation for Training Data Removal", AAAI 2022,
           arXiv 2203.00846
Implements examples are deleted by H^-1 times the sum of their gradients less weighted gradients of kept ones; the
           weights are the smallest for which a criterion of performance, here the kept texts' mean loss, does not move
           to first order
Departs    The paper asks for weights that are sparse, which a solver for constrained problems finds; here they have
           the least norm, in closed form. H is the diagonal Fisher information of kept texts, damped. The step is as
           long as answers need to cost ``forgotten`` nats per token: that they do is not given by the paper's
           construction. Of the weights, feed-forward output projections of the middle third of the layers change.
           What is forgotten and retained: see ``errata unlearn``.
Needs      Gradients
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from errata.edits.weight import WeightEdit
from errata.host.host import Host
from errata.methods._deletion import DeletionConfig, delete
from errata.methods._method import Method, Workspace
from errata.training.deletion import unchanging
from errata.types import Request


@dataclass(frozen=True)
class Config(DeletionConfig):
    """Settings of PUMA."""


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> WeightEdit:
    """Return the dense edit that deletes the requests' present answers and leaves other texts' loss where it is."""
    return delete("puma", host, requests, config, work, unchanging)


METHOD = Method(
    name="puma",
    title="PUMA",
    paper="PUMA: Performance Unchanged Model Augmentation for Training Data Removal, AAAI 2022, arXiv 2203.00846",
    config=Config,
    fit=fit,
    gives=WeightEdit,
    batch=True,
    sequential=True,
    needs=("gradients",),
    forgets=True,
)
