"""How much of a concept probes read from hidden states, without and with an edit in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from errata.edits import Edit
from errata.errors import DataError
from errata.evaluation import likelihood
from errata.evaluation.metrics import perplexity
from errata.host.host import Host
from errata.host.states import LabelledRows, Tokens, labelled_rows, module_states
from errata.linalg.classifiers import accuracy, fit_logistic, fit_network
from errata.progress import OnProgress, ignore
from errata.types import Concept

NEUTRAL = 100
"""Texts that perplexity is measured on."""


@dataclass(frozen=True)
class SiteProbes:
    """Accuracy of fresh probes on held-out texts at one module, each fitted on states with the edit as it is then."""

    site: str
    majority: float
    """Share of the label that is most frequent among the texts fitted on: chance."""
    linear_before: float
    linear_after: float
    network_before: float
    network_after: float
    """The same of a network with one hidden layer: erasing is linear, and what it leaves shows here."""


@dataclass(frozen=True)
class Erasure:
    """What an edit takes of a concept, and its price."""

    fitted: int
    """Examples that probes are fitted on."""
    held_out: int
    """Examples that they are measured on."""
    sites: tuple[SiteProbes, ...]
    perplexity_before: float
    """Per token, of neutral texts."""
    perplexity_after: float

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)


def measure(
    host: Host, edit: Edit, fitted: Concept, held_out: Concept, modules: Sequence[str], *, tokens: Tokens = "last",
    texts: Sequence[str] | None = None, seed: int = 0, on_progress: OnProgress = ignore,
) -> Erasure:  # fmt: skip
    """Measure probes at modules and the perplexity of texts, without and with an edit; the host is left as it was.

    ``texts``: what perplexity is measured on; None: the host's neutral texts. Raises DataError for a host that has
    none, where none are given.
    """
    neutral = list(texts) if texts is not None else neutral_texts(host)
    parts = [labelled_rows(host, part, tokens) for part in (fitted, held_out)]
    classes = len(fitted.labels)
    before, price = _look(host, parts, modules), text_perplexity(host, neutral)
    with edit.on(host):
        after, price_after = _look(host, parts, modules), text_perplexity(host, neutral)
    counts = torch.bincount(parts[0].labels, minlength=classes)
    majority = float((parts[1].labels == int(counts.argmax())).double().mean())
    rows = list[SiteProbes]()
    for number, site in enumerate(modules):
        on_progress("probing", number, len(modules))
        scores = [_scores(parts, states[site], classes, seed) for states in (before, after)]
        (linear, network), (linear_after, network_after) = scores
        rows.append(SiteProbes(site, majority, linear, linear_after, network, network_after))
    return Erasure(len(parts[0].labels), len(parts[1].labels), tuple(rows), price, price_after)


def neutral_texts(host: Host) -> list[str]:
    """Return the host's own neutral texts. Raises DataError where it has none."""
    if host.resources.neutral_texts is None:
        raise DataError(
            f"{host.name} has no neutral texts to measure perplexity on: give a file of texts (--texts)"
        )
    return list(host.resources.neutral_texts(NEUTRAL))


def _look(host: Host, parts: Sequence[LabelledRows], modules: Sequence[str]) -> dict[str, list[Tensor]]:
    states = [module_states(host, part, modules) for part in parts]
    return {site: [part[site] for part in states] for site in modules}


def _scores(
    parts: Sequence[LabelledRows], states: Sequence[Tensor], classes: int, seed: int
) -> tuple[float, float]:
    """Return the held-out accuracy of a linear probe and of a network."""
    labels, held = parts[0].labels, parts[1].labels
    linear = fit_logistic(states[0], labels, classes)
    network = fit_network(states[0], labels, classes, seed=seed)
    return accuracy(linear(states[1]), held), accuracy(network(states[1]), held)


def text_perplexity(host: Host, texts: Sequence[str]) -> float:
    """Return the perplexity per token of some texts."""
    return perplexity.of_texts([torch.tensor(row) for row in likelihood.rolling(host, texts) if row])
