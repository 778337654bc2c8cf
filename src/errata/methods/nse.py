"""NSE: neuron-level sequential editing: values from the unedited model, deltas on few neurons.

Paper      Jiang et al., "Neuron-Level Sequential Editing for Large Language Models", ACL 2025,
           arXiv 2410.04045
Implements Values are sought on the original weights; per layer the input neurons with the largest summed
           activation until a share of it is reached; delta on those columns alone,
           R K_I^T (lambda C_II + K_p K_p^T + K K^T)^-1; further passes over the requests that are still
           off their value by more than a bound and less than another
Departs    The bounds (2.5 to 35 and 50 to 150 by model, plain) are in norms of the residual stream, since
           those norms differ by orders of magnitude. Solved in the dual, with C_II factorised anew for
           the chosen neurons.
Needs      Second moment of keys at each layer; context prefixes written by the model
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from errata.config import positive
from errata.edits.weight import WeightEdit, added
from errata.host.load import Host
from errata.locate.problems import Problem
from errata.locate.values import Value, ValueConfig, solve
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
    """Share of the summed activation that the chosen neurons must hold (code: 0.8 for GPT-J, else 1)."""
    passes: int = 2
    """How often to go over the requests at most (code: 3, of which two take effect)."""
    off: float = 0.1
    """A request is gone over again if its state is further than this from its value, in stream norms
    (code: 2.5 to 35, plain)."""
    lost: float = 4.0
    """... and nearer than this; beyond it is given up (code: 50 to 150, plain)."""

    def problems(self) -> list[str]:
        """Check ranges."""
        found = [*super().problems(), *positive(self, "share", "passes", "off", "lost")]
        if self.share > 1:
            found.append(f"share: expected at most 1, found {self.share}")
        return found


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> WeightEdit:
    """Return the edit on chosen neurons, in one or more passes."""
    config = settle(host, config)
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
        size = torch.stack([v.stream for v in known]).norm(dim=1)
        distance = (wanted - now).norm(dim=1)
        return (distance > config.off * size) & (distance < config.lost * size)

    first = Plan(
        "nse", lambda _: metrics, history=True, sought=sought, contexts=contexts,
        chosen=lambda site, keys: _chosen(keys, config.share),
    )  # fmt: skip
    made = spread(host, requests, config, first, work)
    for _ in range(config.passes - 1):
        with made.on(host):
            more = spread(host, requests, config, replace(first, live=off), work)
        if not more.deltas or more.norm() == 0:
            break
        deltas = {name: added(made.deltas[name], delta) for name, delta in more.deltas.items()}
        made = replace(made, deltas=deltas)
    return made


def _chosen(keys: Tensor, share: float) -> Tensor:
    """Return the neurons with the largest summed activation that together hold a share of it, sorted."""
    size = keys.abs().sum(1)
    order = size.argsort(descending=True)
    held = size[order].cumsum(0) / size.sum().clamp_min(1e-300)
    return order[: min(int((held < share).sum()) + 1, len(size))].sort().values


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
