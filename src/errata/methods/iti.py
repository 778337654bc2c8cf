"""ITI: a few attention heads, those that a probe reads a behaviour from best, are shifted along it.

Paper      Li et al., "Inference-Time Intervention: Eliciting Truthful Answers from a Language Model", NeurIPS 2023,
           arXiv 2306.03341
Implements Sec. 3: a logistic probe of every head's output at the last token; the K heads with the best accuracy on
           held-out pairs; each one's output is shifted by alpha sigma u, u the unit difference of the sides' means
           (mass mean shift) or the probe's weight, sigma the standard deviation of the states along u
Departs    The shifts of a layer's heads are added behind attention's output map W_o, as the constant W_o (alpha sigma
           u): the same function. Heads without a map that can be read are left out, and layers that mix tokens by
           something else than attention, as state spaces do
Needs      Contrast pairs, four or more
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from errata.config import positive
from errata.edits.steer import SteerEdit
from errata.errors import ConfigError
from errata.host.attention import head_count
from errata.host.host import Host
from errata.host.layout import Site
from errata.linalg import steering
from errata.linalg.classifiers import accuracy, fit_logistic
from errata.methods import _steering
from errata.methods._method import Method, Workspace
from errata.types import Contrasts


@dataclass(frozen=True)
class Config(_steering.ReadConfig):
    """Settings of ITI."""

    layers: tuple[int, ...] | None = None
    """Blocks whose heads are candidates. None: all."""
    heads: int | None = None
    """K, how many heads are shifted. None: one of 20 (paper: 48 of 1,024 for LLaMA 7B), at least one."""
    strength: float = 15.0
    """alpha, in standard deviations (paper: 15)."""
    direction: Literal["means", "probe"] = "means"
    """What u is: the difference of the means, or the probe's weight."""
    held_out: float = 0.2
    """Share of the pairs that heads are chosen on, the probes being fitted on the others (paper: 0.2)."""

    def problems(self) -> list[str]:
        """Check ranges."""
        wrong = [*super().problems(), *positive(self, "heads")]
        if not 0 < self.held_out < 1:
            wrong.append(f"held_out: expected a share between 0 and 1, found {self.held_out}")
        return wrong


@dataclass(frozen=True)
class _Head:
    site: Site
    number: int
    accuracy: float
    shift: Tensor
    """sigma u ``[d_head]``, float64."""


def fit(host: Host, requests: Sequence[Contrasts], config: Config, work: Workspace) -> SteerEdit:
    """Return the shifts of the chosen heads, one vector a layer."""
    steps = _steering.start("iti", host, requests, config, work, None)
    pairs = len(steps.positives)
    if pairs < 4:
        raise ConfigError(
            f"iti fits probes on pairs and chooses heads on others: expected 4 pairs or more, found {pairs}"
        )
    sites = [
        site
        for layer in steps.layers
        if (site := host.layout.attn_out[layer]) is not None and not site.packed and head_count(host, site)
    ]
    if not sites:
        raise ConfigError("iti: no layer has an output map of attention that can be read")
    states = steps.pairs([site.name for site in sites], config.tokens, inputs=True)
    order = list(range(pairs))
    random.Random(f"iti {work.seed}").shuffle(order)
    held = min(pairs - 2, max(1, round(config.held_out * pairs)))
    count = head_count(host, sites[0]) or 1
    heads: list[_Head] = []
    for done, site in enumerate(sites):
        work.on_progress("probes", done, len(sites))
        heads += _probe(site, *states[site.name], order[held:], order[:held], count, config)
    wanted = config.heads or max(1, round(len(heads) / 20))
    if wanted > len(heads):
        raise ConfigError(f"iti: {wanted} heads are asked for, and the layers have {len(heads)}")
    chosen = sorted(heads, key=lambda one: -one.accuracy)[:wanted]  # stable: of equal ones the lowest
    shifted = []
    for site in sites:
        own = [head for head in chosen if head.site is site]
        if own:
            shifted.append(steps.site(site.name, "vector", {"values": _behind(host, site, own, count)[None]}))
    notes = [[head.site.layer, head.number, _steering.rounded(head.accuracy)] for head in chosen]
    return steps.edit(shifted, heads=notes)


def _probe(
    site: Site, one: Tensor, other: Tensor, fitted: Sequence[int], held: Sequence[int], count: int, config: Config
) -> list[_Head]:  # fmt: skip
    """Return every head of a site with its probe's held-out accuracy; states ``[pairs, d_in]`` of the two sides."""
    found = []
    parts = [side.reshape(len(side), count, -1) for side in (one, other)]  # [pairs, heads, d_head]
    labels = torch.tensor([1] * len(fitted) + [0] * len(fitted))
    held_labels = torch.tensor([1] * len(held) + [0] * len(held))
    for number in range(count):
        positive_states, negative_states = (part[:, number] for part in parts)
        probe = fit_logistic(torch.cat([positive_states[fitted], negative_states[fitted]]), labels, 2)
        right = accuracy(probe(torch.cat([positive_states[held], negative_states[held]])), held_labels)
        direction = (positive_states - negative_states).mean(0)
        if config.direction == "probe":
            direction = probe.weight[1] - probe.weight[0]
        if not float(direction.norm()) > 0:
            continue
        u = steering.unit(direction)
        sigma = (torch.cat([positive_states, negative_states]) @ u).std(correction=0)
        found.append(_Head(site, number, right, sigma * u))
    return found


def _behind(host: Host, site: Site, heads: Sequence[_Head], count: int) -> Tensor:
    """Return what the output map makes of the shifts ``[d]``, its bias left out."""
    inner = torch.zeros(count, site.d_in // count, dtype=torch.float64)
    for head in heads:
        inner[head.number] = head.shift
    weight = host.model.get_parameter(site.parameter).detach().to("cpu", torch.float64)
    return (weight.mT if site.transposed else weight) @ inner.reshape(-1)


METHOD = Method(
    name="iti",
    title="ITI",
    paper="Inference-Time Intervention: Eliciting Truthful Answers from a Language Model, arXiv 2306.03341",
    config=Config,
    fit=fit,
    gives=SteerEdit,
    takes="contrasts",
    batch=False,
    sequential=False,
)
