"""LyapLock: refit all edits at every step under a price on preserved knowledge that adapts to its loss.

Paper      Wang et al., "LyapLock: Bounded Knowledge Preservation in Sequential Large Language Model
           Editing", EMNLP 2025, arXiv 2505.15702
Implements Virtual queue Z(t+1) = max(Z + a (PL - D) + b, Z_max) over the preservation loss
           PL = tr((W - W0) C (W - W0)^T); at each step all requests so far are fitted against the
           unedited weights with lambda multiplied by a Z. Settings as in the paper: a = 1/sqrt(D), b = 0,
           Z starts at Z_max = sqrt(D), D = alpha times the first step's loss, so that a Z starts at 1.
           One queue a layer, as in the authors' code
Departs    Written as what it is: one ridge regression of all (key, absolute value) pairs for each step's
           lambda, solved from stored keys in the dual. Lambda multiplies the mean moment of keys, as in
           MEMIT; the paper speaks of the plain sum over 100,000 sampled keys, the authors' code takes
           1,000 times their mean (``cov_weight: 1000``).
Needs      Second moment of keys at each layer; context prefixes written by the model
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from errata.config import positive
from errata.edits.records import Record
from errata.edits.weight import WeightEdit
from errata.errors import ConfigError
from errata.host.layout import Site
from errata.host.load import Host
from errata.linalg.lowrank import LowRank
from errata.methods._method import Method, Workspace
from errata.methods._spread import Covariance, Lasting, Plan, SpreadConfig, covariance, settle, spread
from errata.types import Request


@dataclass(frozen=True)
class Config(Lasting, Covariance, SpreadConfig):
    """Settings of LyapLock."""

    cov_weight: float | None = None
    """lambda, how many keys of the corpus weigh against the edits. None: MEMIT's where published, else the rule
    below (authors' code: 1,000)."""
    cov_relative: float = 0.3
    """lambda in key widths m where cov_weight is None and none is published (chosen on the lab)."""
    remember: Literal["wanted", "achieved"] = "wanted"
    """What later steps hold earlier requests to: the value that was sought for each, or what the weights gave at its
    key once it was written, W_new K (authors' code: achieved)."""
    alpha: float = 60.0
    """Budget D of the preservation loss, in losses of the first step (paper: 60)."""

    def problems(self) -> list[str]:
        """Check ranges."""
        return [*super().problems(), *positive(self, "alpha")]


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> WeightEdit:
    """Return the edit for these requests and all before them; it replaces the one it goes on from."""
    config = settle(host, config, requests, work)
    if config.stabilise:
        raise ConfigError("lyaplock solves for all edits anew at each step; stabilise does not apply to it")
    sites = [host.layout.site(layer) for layer in config.layers or ()]
    metrics = covariance(host, config, work)(sites)
    state: dict[str, Tensor] = dict(work.after.state) if work.after else {}

    prices = {
        s: float(state.get(f"{s.parameter}.price", torch.ones(1)))
        for s in sites  # a Z of the paper
    }

    def total(site: Site, record: Record) -> LowRank:
        # a dearer C is a smaller C^-1 K: nothing is factorised again
        return replace(record, price=prices[site]).delta()

    made = spread(host, requests, config, Plan("lyaplock", lambda _: metrics, total=total), work)
    records: dict[str, Record] = {}
    for site in sites:
        delta = made.deltas[site.parameter]
        assert isinstance(delta, LowRank)
        record = replace(made.records[site.parameter], price=prices[site])
        if config.remember == "achieved":  # no longer what the delta was solved for
            record = replace(record, wanted=delta.to(record.keys.dtype) @ record.keys, solves=False)
        records[site.parameter] = record
        loss = metrics[site].energy(delta)
        budget = state.setdefault(f"{site.parameter}.budget", torch.tensor([config.alpha * loss]))
        # with a = 1 / sqrt(D): a Z(t+1) = max(a Z + (PL - D) / D, 1)
        price = prices[site] + loss / float(budget) - 1
        state[f"{site.parameter}.price"] = torch.tensor([max(price, 1.0)])
    return replace(made, records=records, state=state)


METHOD = Method(
    name="lyaplock",
    title="LyapLock",
    paper="LyapLock: Bounded Knowledge Preservation in Sequential Editing, EMNLP 2025, arXiv 2505.15702",
    config=Config,
    fit=fit,
    gives=WeightEdit,
    batch=True,
    sequential=True,
    cumulative=True,
    needs=("second_moment", "contexts"),
)
