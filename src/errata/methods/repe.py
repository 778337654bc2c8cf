"""RepE: a reading vector, the first principal component of differences of states, is added, or projected off.

Paper      Zou et al., "Representation Engineering: A Top-Down Approach to AI Transparency", arXiv 2310.01405
Implements Sec. 3.1: linear artificial tomography on pairs: differences of states at the last token, their first
           principal component about 0, its sign by the labels; the cluster-mean reader. Sec. 3.2: linear combination
           h + c v, piecewise h + c sign(h.v) v, projection h - c (h.v) v / |v|^2. ``where: writers`` is directional
           ablation (Arditi et al., NeurIPS 2024, arXiv 2406.11717): one layer's vector is projected off all that the
           embedding, attention and feed-forwards write into the stream
Departs    v has the length of the mean difference along it, so that a strength of 1 moves states as far as the sides
           are apart (authors' code: unit length and a coefficient for each model). Projection has none
Needs      Contrast pairs
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from errata.edits.steer import SteerEdit, Steering
from errata.errors import ConfigError
from errata.host import hooks
from errata.host.host import Host
from errata.host.states import LabelledRows, module_states
from errata.linalg import steering
from errata.methods import _steering
from errata.methods._method import Method, Workspace
from errata.types import Contrasts

LEFT = 1e-4
"""Share of a state's norm along the vector up to which it counts as gone, in float32; 4 rounding steps in 16 bits."""


@dataclass(frozen=True)
class Config(_steering.ReadConfig):
    """Settings of RepE."""

    layers: tuple[int, ...] | None = None
    """Blocks whose output is steered. None: the one at 0.6 of the depth (authors' code: several of the upper half)."""
    reader: Literal["pca", "means"] = "pca"
    """Reading vector: the first principal component of the differences, or the difference of the sides' means."""
    operator: Literal["add", "piecewise", "project"] = "add"
    """What is done with it."""
    where: Literal["blocks", "writers"] = "blocks"
    """Where a projection acts: behind the blocks that the vectors are read at; or at the embedding and at every map
    that writes into the stream, which then has nothing of the one layer's vector anywhere."""

    def problems(self) -> list[str]:
        """Check ranges, and that the settings go together."""
        wrong = super().problems()
        if self.where == "writers" and self.operator != "project":
            wrong.append("where: writers is of operator=project")
        if self.where == "writers" and self.layers is not None and len(self.layers) != 1:
            wrong.append(
                f"layers: expected the one block that the vector is read at, found {list(self.layers)}"
            )
        return wrong


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
        if config.where == "writers":
            sites += [_projection(steps, path, unit) for path in _writers(host)]
        elif config.operator == "project":
            sites.append(_projection(steps, module, unit))
        else:
            form = "vector" if config.operator == "add" else "piecewise"
            sites.append(steps.site(module, form, {"values": (along.abs().mean() * unit)[None]}))
    edit = steps.edit(sites, explained=explained)
    if config.where == "writers":
        _check_gone(steps, edit)
    return edit


def _projection(steps: _steering.Fit, module: str, unit: Tensor) -> Steering:
    return steps.site(module, "projection", {"basis": unit[None], "target": torch.zeros(1)})


def _writers(host: Host) -> list[str]:
    """Return the paths of the embedding and of all maps that write into the stream."""
    embedding = host.model.get_input_embeddings()
    first = next(name for name, module in host.model.named_modules() if module is embedding)
    sites = (*host.layout.attn_out, *host.layout.mlp_out)
    return list(dict.fromkeys((first, *(site.name for site in sites if site is not None))))


def _check_gone(steps: _steering.Fit, edit: SteerEdit) -> None:
    """Raise ConfigError where the stream behind a block still has some of the vector at full strength."""
    host, basis = steps.host, edit.sites[0].payload["basis"].double()
    ids = steps.positives[0].ids
    row = LabelledRows((ids,), (tuple(range(len(ids))),), torch.zeros(len(ids)))
    with hooks.frozen(host.model), edit.with_strength(1.0).on(host):
        found = module_states(host, row, list(host.layout.blocks))
    left = max(LEFT, 4 * torch.finfo(host.dtype).eps)
    for path, states in found.items():
        wide = states.double().cpu()
        if float((wide @ basis.mT).abs().max()) > left * float(wide.norm(dim=-1).max()):
            raise ConfigError(
                f"where: more than the embedding and the maps that were found writes into the stream of {host.name}, "
                f"such as positions or a norm behind a map: the vector is still there behind {path}; use where=blocks"
            )


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
