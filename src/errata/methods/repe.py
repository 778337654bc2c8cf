"""RepE: a reading vector, the first principal component of differences of states, is added, or projected off.

Paper      Zou et al., "Representation Engineering: A Top-Down Approach to AI Transparency", arXiv 2310.01405
Implements Sec. 3.1: linear artificial tomography on pairs: differences of states at the last token, their first
           principal component about 0, its sign by the labels; the cluster-mean reader. Sec. 3.2: linear combination
           h + c v, piecewise h + c sign(h.v) v, projection h - c (h.v) v / |v|^2
Departs    v has the length of the mean difference along it, so that a strength of 1 moves states as far as the sides
           are apart (authors' code: unit length and a coefficient for each model). Projection has none
Needs      Contrast pairs
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from errata.edits.steer import SteerEdit
from errata.host.host import Host
from errata.linalg import steering
from errata.methods import _steering
from errata.methods._method import Method, Workspace
from errata.types import Contrasts


@dataclass(frozen=True)
class Config(_steering.ReadConfig):
    """Settings of RepE."""

    layers: tuple[int, ...] | None = None
    """Blocks whose output is steered. None: the one at 0.6 of the depth (authors' code: several of the upper half)."""
    reader: Literal["pca", "means"] = "pca"
    """Reading vector: the first principal component of the differences, or the difference of the sides' means."""
    operator: Literal["add", "piecewise", "project"] = "add"
    """What is done with it."""


def fit(host: Host, requests: Sequence[Contrasts], config: Config, work: Workspace) -> SteerEdit:
    """Return the reading vectors."""
    steps = _steering.start("repe", host, requests, config, work, 0.6)
    sites, explained = [], []
    for module, (one, other) in steps.pairs(
        [steps.block(layer) for layer in steps.layers], config.tokens
    ).items():
        differences = one - other
        with _steering.explained("repe"):
            unit = (
                steering.principal(differences) if config.reader == "pca"
                else steering.unit(differences.mean(0))
            )  # fmt: skip
        along = differences @ unit
        explained.append(_steering.rounded(float(along.square().sum() / differences.square().sum())))
        if config.operator == "project":
            sites.append(steps.site(module, "projection", {"basis": unit[None], "target": torch.zeros(1)}))
        else:
            form = "vector" if config.operator == "add" else "piecewise"
            sites.append(steps.site(module, form, {"values": (along.abs().mean() * unit)[None]}))
    return steps.edit(sites, explained=explained)


METHOD = Method(
    name="repe",
    title="RepE",
    paper="Representation Engineering: A Top-Down Approach to AI Transparency, arXiv 2310.01405",
    config=Config,
    fit=fit,
    gives=SteerEdit,
    takes="contrasts",
    batch=False,
    sequential=False,
    random=False,
)
