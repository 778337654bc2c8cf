"""Angular Steering: states turn to an angle in a plane that holds the behaviour's direction; norms are kept.

Paper      Vu and Nguyen, "Angular Steering: Behavior Control via Rotation in Activation Space", NeurIPS 2025,
           arXiv 2510.26243
Implements h - P h + |P h| (cos t b1 + sin t b2), P the projector on the plane; b1 the difference of the sides' means,
           b2 the first principal component of such differences of all layers, made orthogonal to b1; the same plane at
           every steered layer; the adaptive form, which turns only states with h.b1 > 0
Departs    b1 is the difference at the layer of ``source`` (authors' code: chosen by similarity among layers). With a
           strength s below 1 a state turns that share of the shorter way
Needs      Contrast pairs; a model of two layers or more
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from errata.edits.steer import SteerEdit
from errata.errors import ConfigError
from errata.host.host import Host
from errata.linalg import steering
from errata.methods import _steering
from errata.methods._method import Method, Workspace
from errata.types import Contrasts


@dataclass(frozen=True)
class Config(_steering.ReadConfig):
    """Settings of Angular Steering."""

    layers: tuple[int, ...] | None = None
    """Blocks whose output is steered. None: all, as in the paper."""
    degrees: float = 0.0
    """Angle that states turn to, from b1: 0 is towards the behaviour, 180 away from it, 90 is without it."""
    source: int | None = None
    """Layer whose difference is b1. None: the one at 0.6 of the depth."""
    adaptive: bool = False
    """Whether only states are turned that show the behaviour already (h.b1 > 0)."""

    def problems(self) -> list[str]:
        """Check ranges."""
        finite = abs(self.degrees) < float("inf")
        return [*super().problems(), *([] if finite else [f"degrees: found {self.degrees}"])]


def fit(host: Host, requests: Sequence[Contrasts], config: Config, work: Workspace) -> SteerEdit:
    """Return the plane and the angle, for every steered layer."""
    steps = _steering.start("angular", host, requests, config, work, None)
    depth = len(host.layout.blocks)
    source = min(depth - 1, round(0.6 * depth)) if config.source is None else config.source
    if not -depth <= source < depth:
        raise ConfigError(f"source {source}: expected a layer from 0 to {depth - 1}")
    states = steps.pairs(list(host.layout.blocks), config.tokens)
    means = [(one - other).mean(0) for one, other in states.values()]
    # of unit length, so that the upper layers, whose states are longer, do not decide alone
    candidates = torch.stack([mean / mean.norm().clamp_min(1e-30) for mean in means])
    with _steering.explained("angular"):
        plane = steering.plane(means[source], candidates)
    payload = {"plane": plane, "degrees": torch.tensor([config.degrees])}
    sites = [
        steps.site(steps.block(layer), "angle", payload, aligned=config.adaptive) for layer in steps.layers
    ]
    return steps.edit(sites, source=source % depth)


METHOD = Method(
    name="angular",
    title="Angular Steering",
    paper="Angular Steering: Behavior Control via Rotation in Activation Space, NeurIPS 2025, arXiv 2510.26243",
    config=Config,
    fit=fit,
    gives=SteerEdit,
    takes="contrasts",
    batch=False,
    sequential=False,
    random=False,
)
