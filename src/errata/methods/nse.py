"""NSE: neuron-level sequential editing: values from the unedited model, deltas on few neurons.

Paper      Jiang et al., "Neuron-Level Sequential Editing for Large Language Models", ACL 2025,
           arXiv 2410.04045
Implements Values are sought on the original weights; per layer the input neurons with the largest summed
           activation until a share of it is reached; delta on those columns alone,
           R K_I^T (lambda C_II + K_p K_p^T + K K^T)^-1; passes over the requests that are still
           off their value by more than a bound and less than another, the first pass among them
Departs    The bounds (2.5 to 35 and 50 to 150 by model, plain: ``bounds: plain``) are in norms of the
           residual stream by default, since those norms differ by orders of magnitude. Solved in the
           dual, with C_II factorised anew for the chosen neurons. What later fits protect are the keys
           of all requests on the final weights, as in the authors' code.
Needs      Second moment of keys at each layer; context prefixes written by the model
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from errata.config import positive
from errata.edits.weight import WeightEdit, added
from errata.host.layout import Site
from errata.host.load import Host
from errata.linalg.solve import Metric
from errata.locate.contexts import Context
from errata.locate.problems import Problem, problems
from errata.locate.values import Value, ValueConfig, solve
from errata.locate.walk import Walk
from errata.methods._method import Method, Workspace, without
from errata.methods._spread import (
    Covariance,
    Lasting,
    Plan,
    SpreadConfig,
    covariance,
    prefixes_of,
    settle,
    spread,
)
from errata.types import Request


@dataclass(frozen=True)
class Config(Lasting, Covariance, SpreadConfig):
    """Settings of NSE."""

    share: float = 0.8
    """Share of the summed activation that the chosen neurons may hold; the one that would cross it is left out
    (code: 0.8 for GPT-J, 1 for GPT-2 XL and Llama 3 8B)."""
    passes: int = 2
    """How often to go over the requests at most (code: 3, of which two take effect)."""
    bounds: Literal["stream", "plain"] = "stream"
    """Unit of ``off`` and ``lost``: norms of the residual stream, or plain numbers (code)."""
    off: float = 0.1
    """A request is written in a pass if its state is further than this from its value, in the unit of ``bounds``
    (code: 35 for GPT-2 XL, 15 for GPT-J, 2.5 for Llama 3 8B, plain)."""
    lost: float = 4.0
    """... and nearer than this; beyond it is given up (code: 150, 100 and 50, plain)."""

    def problems(self) -> list[str]:
        """Check ranges."""
        found = [*super().problems(), *positive(self, "share", "passes", "off", "lost")]
        if self.share > 1:
            found.append(f"share: expected at most 1, found {self.share}")
        return found


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> WeightEdit:
    """Return the edit on chosen neurons, in one or more passes."""
    config = settle(host, config, requests, work)
    sites = [host.layout.site(layer) for layer in config.layers or ()]
    metrics = covariance(host, config, work)(sites)
    contexts = prefixes_of(host, config, work)
    known: list[Value] = []

    def sought(laid: list[Problem], settings: ValueConfig) -> list[Value]:
        if not known:
            direct = host.layout.adds_directly
            with without(work.after, host):
                known.extend(
                    solve(host, laid, layer=sites[-1].layer, where="block_out" if direct else "mlp_out",
                          config=settings, batch_size=work.batch_size)
                )  # fmt: skip
        return known

    def off(wanted: Tensor, now: Tensor) -> Tensor:
        distance = (wanted - now).norm(dim=1)
        size = torch.ones_like(distance)
        if config.bounds == "stream":
            size = torch.stack([v.stream for v in known]).norm(dim=1)
        return (distance > config.off * size) & (distance < config.lost * size)

    first = Plan(
        "nse", lambda _: metrics, history=True, sought=sought, contexts=contexts,
        chosen=lambda site, keys: _chosen(keys, config.share), live=off,
    )  # fmt: skip
    made = spread(host, requests, config, first, work)
    for _ in range(config.passes - 1):
        with made.on(host):
            more = spread(host, requests, config, first, work)
        if not more.deltas or more.norm() == 0:
            break
        deltas = {name: added(made.deltas[name], delta) for name, delta in more.deltas.items()}
        made = replace(made, deltas=deltas)
    return _with_final_keys(host, requests, made, sites, metrics, contexts, config)


def _with_final_keys(
    host: Host, requests: Sequence[Request], made: WeightEdit, sites: Sequence[Site],
    metrics: Mapping[Site, Metric], contexts: Sequence[Context], config: Config,
) -> WeightEdit:  # fmt: skip
    """Return the edit with the keys that later fits protect: those of all requests on the final weights."""
    laid = problems(host, requests, contexts, merge=config.merge)
    records = dict(made.records)
    with made.on(host):
        walk = Walk(host, laid, sites[0].layer)
        for site in sites:
            while walk.layer < site.layer:
                walk.advance()
            keys = walk.keys(site).mT
            achieved = made.deltas[site.parameter].to(keys.dtype) @ keys
            solved = metrics[site].solve(keys).to(keys.dtype)
            records[site.parameter] = replace(
                records[site.parameter], keys=keys, wanted=achieved, solved=solved,
                requests=tuple(p.members for p in laid), solves=False,
            )  # fmt: skip
    return replace(made, records=records)


def _chosen(keys: Tensor, share: float) -> Tensor:
    """Return the neurons with the largest summed activation that together hold no more than a share, sorted.

    One at least. The sum of all may differ from the last partial sum by rounding: a share of 1 takes all.
    """
    size = keys.double().abs().sum(1)
    order = size.argsort(descending=True)
    held = size[order].cumsum(0)
    count = int((held <= share * held[-1]).sum())
    return order[: max(1, count)].sort().values


METHOD = Method(
    name="nse",
    title="NSE",
    paper="Neuron-Level Sequential Editing for Large Language Models, ACL 2025, arXiv 2410.04045",
    config=Config,
    fit=fit,
    gives=WeightEdit,
    batch=True,
    sequential=True,
    needs=("second_moment", "contexts"),
)
