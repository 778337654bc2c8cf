"""CAA: the mean difference between states of contrasting answers is added to the residual stream.

Paper      Rimsky et al., "Steering Llama 2 via Contrastive Activation Addition", ACL 2024, arXiv 2312.06681
Implements Sec. 3: at one layer, v = mean over pairs of h(prompt, positive answer) - h(prompt, negative answer) at the
           answer's last token; strength times v is added
Departs    Tokens behind the prompt are steered by ``positions=generated``, as in the paper; the default is all. Answers
           may be longer than the paper's letters, and states averaged over them (``tokens=all``, which is DiffMean of
           AxBench, arXiv 2501.17148)
Needs      Contrast pairs
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from errata.edits.steer import SteerEdit
from errata.errors import ConfigError
from errata.host.host import Host
from errata.methods import _steering
from errata.methods._method import Method, Workspace
from errata.types import Contrasts


@dataclass(frozen=True)
class Config(_steering.ReadConfig):
    """Settings of CAA."""

    layers: tuple[int, ...] | None = None
    """Blocks whose output is steered. None: the one at 0.4 of the depth (paper: 13 of 32 and 14 of 40 for Llama 2)."""


def fit(host: Host, requests: Sequence[Contrasts], config: Config, work: Workspace) -> SteerEdit:
    """Return the mean differences as vectors."""
    steps = _steering.start("caa", host, requests, config, work, 0.4)
    states = steps.pairs([steps.block(layer) for layer in steps.layers], config.tokens)
    sites, lengths, norms = [], [], []
    for module, (one, other) in states.items():
        vector = (one - other).mean(0)
        if not float(vector.norm()) > 0:
            raise ConfigError(f"caa: the two sides have the same mean state at {module}; read other tokens")
        sites.append(steps.site(module, "vector", {"values": vector[None]}))
        lengths.append(_steering.rounded(float(vector.norm())))
        norms.append(_steering.mean_norm(one))
    return steps.edit(sites, lengths=lengths, state_norms=norms)


METHOD = Method(
    name="caa",
    title="CAA",
    paper="Steering Llama 2 via Contrastive Activation Addition, ACL 2024, arXiv 2312.06681",
    config=Config,
    fit=fit,
    gives=SteerEdit,
    takes="contrasts",
    batch=False,
    sequential=False,
    random=False,
)
