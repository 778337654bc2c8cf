"""The steps that concept erasers share: the sites, the states there with the lower erasers in place, and the edit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from errata.config import positive
from errata.edits.memory import Intervention, MemoryEdit
from errata.edits.routers.always import Always
from errata.errors import ConfigError
from errata.host import hooks
from errata.host.host import Host
from errata.host.states import LabelledRows, Tokens, labelled_rows, module_states, norm_readers
from errata.linalg.erasers import Eraser, cross_covariance, mean_square, one_hot
from errata.methods._method import Workspace, provenance
from errata.types import Concept


@dataclass(frozen=True)
class EraserConfig:
    """Settings that all erasers have."""

    layers: tuple[int, ...] | None = None
    """Blocks at which the concept is erased. None: all (concept scrubbing)."""
    where: Literal["block", "norms"] = "block"
    """What is erased from: the output of each block, or that of the norms before attention and feed-forward, as in the
    paper's concept scrubbing."""
    tokens: Tokens = "last"
    """Tokens that are examples of a label: the last one of each subject (of the text, where it has none), or all."""
    sequential: bool = True
    """Whether each eraser is fitted with the lower ones in place (concept scrubbing). False: all on the unedited model,
    which leaves what the lower ones moved."""

    centre: bool = True
    """Whether the mean of the examples stays where it is. False: states are erased about 0; that erases as exactly,
    moves the mean, and can be fused into maps without a bias."""

    def problems(self) -> list[str]:
        """Check ranges."""
        if self.layers is not None and (not self.layers or len(set(self.layers)) != len(self.layers)):
            return [f"layers: expected different layers, found {list(self.layers)}"]
        return []


@dataclass
class Scrubbing:
    """A fit from the lowest site upwards; filled site by site."""

    host: Host
    concept: Concept
    config: EraserConfig
    work: Workspace
    rows: LabelledRows
    sites: list[str]
    erasers: dict[str, Eraser] = field(default_factory=dict)
    notes: dict[str, list[float]] = field(default_factory=dict)

    @property
    def labels(self) -> Tensor:
        """Number of the label of each example, int64 ``[n]``."""
        return self.rows.labels

    @property
    def classes(self) -> int:
        """How many labels there are."""
        return len(self.concept.labels)

    @property
    def one_hot(self) -> Tensor:
        """Labels ``[n, classes]``."""
        return one_hot(self.labels, self.classes)

    def states(self, site: str) -> Tensor:
        """Return the states at a site ``[n, d]``, float64, with the erasers so far in place if they are to be."""
        self.work.on_progress("erasing", len(self.erasers), len(self.sites))
        changes = self.erasers if self.config.sequential else {}
        with hooks.frozen(self.host.model):
            return module_states(self.host, self.rows, [site], changes)[site].double()

    def add(self, site: str, states: Tensor, eraser: Eraser, **more: float) -> None:
        """Keep a site's eraser, and note its rank, the share of the variance it takes and what covariance is left.

        ``states``: those it was fitted on ``[n, d]``.
        """
        if not self.config.centre:
            eraser = replace(eraser, mean=torch.zeros_like(eraser.mean))
        after = eraser(states)
        variance = mean_square(states - states.mean(0))
        facts = {
            "rank": eraser.rank,
            "moved": mean_square(after - states) / variance if variance else 0.0,
            "covariance_left": float(cross_covariance(after, self.one_hot).abs().max()),
            **more,
        }
        for name, value in facts.items():
            self.notes.setdefault(name, []).append(float(f"{value:.6g}"))
        self.erasers[site] = eraser

    def edit(self, method: str) -> MemoryEdit:
        """Return all erasers as one edit. Raises ConfigError where none found anything to erase."""
        ranks = {site: eraser.rank for site, eraser in self.erasers.items()}
        if not any(ranks.values()):
            raise ConfigError(
                f"{method} found nothing linear of {self.concept.name} at {', '.join(ranks)}: nothing is to be erased"
            )
        record = provenance(
            method, self.host, (self.concept,), self.config, self.work,  # type: ignore[arg-type]
            sites=list(ranks), examples=len(self.labels), **self.notes,
        )  # fmt: skip
        interventions = tuple(
            Intervention(site, "erase", _payload(eraser), "all")
            for site, eraser in self.erasers.items()
            if eraser.rank
        )
        return MemoryEdit(interventions, Always(), record)


def start(
    method: str, host: Host, requests: Sequence[Any], config: EraserConfig, work: Workspace
) -> Scrubbing:
    """Tokenise the one concept that is asked for and list the sites, from the lowest.

    Raises ConfigError for other requests or layers that the model has not, HostError where norms are asked for and
    a block has none that linear maps read.
    """
    if len(requests) != 1 or not isinstance(requests[0], Concept):
        raise ConfigError(
            f"{method} takes one concept a fit, found {len(requests)} requests; fit each by itself"
        )
    concept: Concept = requests[0]
    depth = len(host.layout.blocks)
    chosen = tuple(range(depth)) if config.layers is None else config.layers
    layers = sorted(layer + depth if layer < 0 else layer for layer in chosen)
    if len(set(layers)) != len(layers) or not all(0 <= layer < depth for layer in layers):
        raise ConfigError(f"layers {list(chosen)}: expected some of 0 to {depth - 1}")
    with hooks.frozen(host.model):
        sites = [
            site for layer in layers
            for site in ([host.layout.blocks[layer]] if config.where == "block" else norm_readers(host, layer))
        ]  # fmt: skip
    return Scrubbing(host, concept, config, work, labelled_rows(host, concept, config.tokens), sites)


def _payload(eraser: Eraser) -> dict[str, Tensor]:
    """Return an eraser as the payload of one entry, float32."""
    parts = {"left": eraser.A, "right": eraser.B.mT, "mean": eraser.mean}
    return {name: tensor[None].to(torch.float32) for name, tensor in parts.items()}


def positive_fields(config: EraserConfig, *names: str) -> list[str]:
    """Return what is wrong with an eraser's settings, of which some must be positive."""
    return [*EraserConfig.problems(config), *positive(config, *names)]
