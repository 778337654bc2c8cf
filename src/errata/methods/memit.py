"""MEMIT: write many facts at once, spread over several feed-forward layers by least squares.

Paper      Meng et al., "Mass-Editing Memory in a Transformer", ICLR 2023, arXiv 2210.07229
Implements Eq. 14 and Algorithm 1: values z at the top layer's block output; then per layer, upwards,
           delta = R K^T (lambda C + K K^T)^-1 with R the remaining residual over the layers left
Departs    Solved in the dual: rank of each delta <= number of requests, no m x m solve per batch.
           lambda: the papers' numbers (15,000 to 20,000) are one to three times the key width m of
           their models, so elsewhere the default is a multiple of m, chosen on the lab; published
           values are used where known. So it is with rate and clamp.
           Where a norm stands between the feed-forward and the residual stream, a residual cannot be
           spread linearly; such hosts are edited at one layer, with the value at that layer's site.
Needs      Second moment of keys at each layer; context prefixes written by the model
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from errata.config import positive
from errata.edits.weight import Delta, WeightEdit
from errata.errors import ConfigError
from errata.host.load import Host
from errata.linalg.solve import update
from errata.locate.keys import subject_keys
from errata.locate.values import optimise
from errata.methods._method import (
    Method,
    Workspace,
    notes,
    open_search,
    provenance,
    resolve_layers,
    resolved,
    search,
)
from errata.types import Request


@dataclass(frozen=True)
class Config:
    """Settings of MEMIT."""

    layers: tuple[int, ...] | None = None
    """Layers to write, the value search at the last. None: published for known models, else from depth."""
    steps: int = 25
    """Value search: Adam steps at most (paper's code: 20 to 25)."""
    learning_rate: float | None = None
    """Value search: Adam's rate, in the unit of ``scale``. None: published for known models, else 0.5
    (paper's code: 0.5, plain; 0.1 for Llama 3)."""
    clamp: float | None = None
    """Value search: largest shift, in the unit of ``scale``. None: published for known models, else 1.5
    (paper's code: 0.75; other code up to 4)."""
    scale: Literal["stream", "site", "published"] | None = None
    """Value search: unit of rate and clamp: the residual stream above the layer, the vector that is shifted,
    or as published (rate plain, clamp in norms of that vector). None: published for known models, else stream."""
    decay: float = 0.5
    """Value search: weight of the shift's norm (paper's code: 0.5)."""
    kl: float = 0.0625
    """Value search: weight of the divergence at "{subject} is a" (paper's code: 0.0625)."""
    contexts: int = 5
    """How many sampled prefixes; together they count as much as the bare prompt (paper's code: 5)."""
    context_tokens: int = 10
    """Their length in tokens (paper's code: 10)."""
    cov_weight: float | None = None
    """lambda, how many keys of the corpus weigh against the edits. None: published, else the rule below."""
    cov_relative: float = 0.1
    """lambda in key widths m where cov_weight is None and none is published (papers: 1 to 3 for their models)."""
    tokens: int = 100_000
    """Token budget of the second moments (paper: 100,000 articles)."""

    def problems(self) -> list[str]:
        """Check ranges."""
        numbers = (
            "steps",
            "learning_rate",
            "clamp",
            "tokens",
            "cov_weight",
            "cov_relative",
            "context_tokens",
        )
        return positive(self, *numbers)


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> WeightEdit:
    """Return the edit that makes the host complete every request with its target."""
    config = _resolve(host, config)
    assert config.layers is not None and config.cov_weight is not None
    sites = [host.layout.site(layer) for layer in config.layers]
    top = sites[-1]
    direct = host.layout.adds_directly
    contexts = work.contexts(host, [(config.contexts, config.context_tokens)], "half_bare")
    values = optimise(
        host, requests, contexts, layer=top.layer, where="block_out" if direct else "mlp_out",
        config=search(config),
    )  # fmt: skip
    metrics = work.metrics(host, sites, config.tokens)
    transposed = frozenset(site.parameter for site in sites if site.transposed)
    trace = {
        "loss": max(v.loss for v in values),
        "steps": max(v.steps for v in values),
        "shift": max(float(v.shift.norm() / v.start.norm()) for v in values),
    }
    record = provenance("memit", host, requests, config, work, **notes(trace))
    deltas: dict[str, Delta] = {}
    for i, site in enumerate(sites):
        with WeightEdit(dict(deltas), transposed, record).on(host):  # layers below as edited so far
            keys = subject_keys(host, requests, [site], contexts).keys[site]  # [n, m]
            now = subject_keys(host, requests, [top], contexts[:1])
        current = now.hidden[top.layer] if direct else now.values[top]  # [n, d]
        wanted = torch.stack([v.target for v in values])
        residual = (wanted - current) / (len(sites) - i)
        metric = metrics[site].weighted(config.cov_weight)
        deltas[site.parameter] = update(keys.mT, residual.mT, metric, gamma=1.0)
    return WeightEdit(deltas, transposed, record)


def _resolve(host: Host, config: Config) -> Config:
    """Fill in layers and lambda. Raises ConfigError for several layers where they cannot share."""
    direct = host.layout.adds_directly
    known = host.published if direct else None
    layers = resolve_layers(
        host, config.layers or (known.memit if known else None), _band if direct else lambda d: (d // 5,)
    )
    if not direct and len(layers) > 1:
        raise ConfigError(
            "this model normalises what the feed-forward writes, so memit cannot share a residual "
            f"between layers {list(layers)}; name one layer"
        )
    weight = config.cov_weight
    if weight is None and known is not None:
        weight = known.cov_weight
    if weight is None:
        weight = config.cov_relative * host.layout.site(min(layers)).d_in
    filled = open_search(config, known.memit_search if known else None)
    return resolved(config, layers=layers, cov_weight=weight, **filled)


def _band(depth: int) -> tuple[int, ...]:
    """Layers from an eighth to three tenths of the depth, as the papers' bands lie."""
    first, last = depth // 8, max(depth // 8, round(0.3 * depth))
    return tuple(range(first, min(last, depth - 1) + 1))


METHOD = Method(
    name="memit",
    title="MEMIT",
    paper="Mass-Editing Memory in a Transformer, ICLR 2023, arXiv 2210.07229",
    config=Config,
    fit=fit,
    gives=WeightEdit,
    batch=True,
    sequential=True,
    needs=("second_moment", "contexts"),
)
