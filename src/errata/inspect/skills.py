"""Skill neurons: feed-forward neurons whose activation alone tells what a text is labelled with.

Source     Wang et al., "Finding Skill Neurons in Pre-trained Transformer-based Language Models", EMNLP 2022, arXiv
           2211.07349, Sec. 3
What       A neuron says yes where its activation exceeds its mean over training texts. Its predictivity for a label
           is the accuracy of that on other texts, or of the opposite, whichever is larger: 0.5 or more.
Departs    No prompts are tuned: a neuron is read at the last token of what the label is about. The accuracy is
           balanced, the mean of the shares that are right with and without the label, and each of several labels is
           told from the rest. The best of thousands of neurons is good by chance on the texts it was chosen on, so
           the choice is measured on a third part of the texts, and beside it two controls: the best predictivity
           under shuffled labels, and a vote of as many random neurons of the same layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from errata.errors import ConfigError
from errata.host.host import Host
from errata.host.states import labelled_rows
from errata.inspect.neurons import sites
from errata.locate.keys import Place, capture
from errata.locate.neurons import Neuron
from errata.types import Concept

CONTROLS = 20
"""Draws of random neurons, and of shuffled labels."""


@dataclass(frozen=True, eq=False)
class Activated:
    """Activations of all feed-forward neurons at the labelled tokens of some texts."""

    values: Tensor
    """Layers side by side, float32 ``[n, neurons]``."""
    labels: Tensor
    """Number of each text's label, int64 ``[n]``."""


def activated(host: Host, concept: Concept) -> Activated:
    """Run a concept's texts and return the activations at each subject's last token, or text's without one."""
    every = sites(host)
    rows = labelled_rows(host, concept)
    found = capture(host, [Place(row) for row in rows.rows], every).keys
    return Activated(torch.cat([found[site].float() for site in every], 1), rows.labels)


def balanced(fires: Tensor, label: Tensor) -> Tensor:
    """Return the balanced accuracy of answers ``[n, m]`` to a yes or no ``[n]``, float32 ``[m]``.

    NaN where all or none of the texts have the label.
    """
    return (fires[label].float().mean(0) + (~fires[~label]).float().mean(0)) / 2


def predictivity(fires: Tensor, label: Tensor) -> Tensor:
    """Return the balanced accuracy of answers ``[n, m]`` or of their opposites, 0.5 or more ``[m]``."""
    return (balanced(fires, label) - 0.5).abs() + 0.5


@dataclass(frozen=True)
class Skill:
    """The neurons that tell one label best."""

    label: str
    neurons: tuple[Neuron, ...]
    """The best first."""
    fires: tuple[bool, ...]
    """Whether each is high with the label; low otherwise."""
    chosen: tuple[float, ...]
    """Predictivity on the texts they were chosen on."""
    held: tuple[float, ...]
    """Balanced accuracy, in the direction of the choice, on texts held out."""
    shuffled: float
    """Best predictivity of any neuron under shuffled labels, mean over draws."""
    vote: float
    """Balanced accuracy of these neurons' majority on texts held out."""
    random_vote: float
    """The same of as many random neurons of the same layers, mean over draws."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        rows = [
            {
                "neuron": f"{one.layer}.{one.index}",
                "fires": fires,
                "chosen": round(a, 4),
                "held_out": round(b, 4),
            }
            for one, fires, a, b in zip(self.neurons, self.fires, self.chosen, self.held, strict=True)
        ]
        return {
            "label": self.label, "neurons": rows, "shuffled": round(self.shuffled, 4), "vote": round(self.vote, 4),
            "random_vote": round(self.random_vote, 4),
        }  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Parts:
    """Whether each neuron exceeds its mean, on the texts to choose on and on those held out."""

    chosen_on: Tensor
    held: Tensor
    labels: tuple[Tensor, Tensor]
    widths: Sequence[int]

    def neuron(self, flat: int) -> Neuron:
        """Return a neuron by its number over all layers."""
        for layer, width in enumerate(self.widths):
            if flat < width:
                return Neuron(layer, flat)
            flat -= width
        raise IndexError(flat)

    def first(self, layer: int) -> int:
        """Return the number of a layer's first neuron."""
        return sum(self.widths[:layer])


def skills(host: Host, concept: Concept, *, count: int = 10, seed: int = 0) -> dict[str, Any]:
    """Return, as plain data, the neurons that tell each label of a concept, with their controls.

    A third of the subjects of each label sets the neurons' thresholds, a third chooses, a third measures. Of two
    labels, one is reported, as the other's neurons are the same. Raises RequestError for labels of too few subjects,
    HostError for layers without plain neurons.
    """
    if count < 1:
        raise ConfigError(f"expected 1 neuron or more, found {count}")
    rest, held = concept.split(1 / 3, seed=seed)
    training, choosing = rest.split(1 / 2, seed=seed + 1)
    train, dev, test = (activated(host, part) for part in (training, choosing, held))
    mean = train.values.mean(0)
    parts = _Parts(
        dev.values > mean, test.values > mean, (dev.labels, test.labels), [site.d_in for site in sites(host)]
    )
    labels = concept.labels[:1] if len(concept.labels) == 2 else concept.labels
    found = [
        _skill(parts, label, number, count, torch.Generator().manual_seed(seed))
        for number, label in enumerate(labels)
    ]
    return {
        "concept": concept.name, "texts": {"thresholds": len(training.texts), "choice": len(choosing.texts),
                                           "held_out": len(held.texts)},
        "neurons": sum(parts.widths), "skills": [one.to_dict() for one in found],
    }  # fmt: skip


def _skill(parts: _Parts, label: str, number: int, count: int, generator: torch.Generator) -> Skill:
    dev, test = (labels == number for labels in parts.labels)
    accuracy = balanced(parts.chosen_on, dev)
    order = ((accuracy - 0.5).abs() + 0.5).sort(descending=True, stable=True)  # of equals, the lowest first
    places: list[int] = order.indices[:count].tolist()
    up = accuracy[places] >= 0.5
    own = torch.where(up, parts.held[:, places], ~parts.held[:, places])
    shuffled = [
        float(predictivity(parts.chosen_on, dev[torch.randperm(len(dev), generator=generator)]).max())
        for _ in range(CONTROLS)
    ]
    chosen = [parts.neuron(one) for one in places]
    random_votes = []
    for _ in range(CONTROLS):
        drawn = _random(parts, Counter(one.layer for one in chosen), generator)
        sides = accuracy[drawn] >= 0.5
        random_votes.append(_vote(torch.where(sides, parts.held[:, drawn], ~parts.held[:, drawn]), test))
    return Skill(
        label, tuple(chosen), tuple(up.tolist()), tuple(order.values[:count].tolist()),
        tuple(balanced(own, test).tolist()), sum(shuffled) / CONTROLS, _vote(own, test), sum(random_votes) / CONTROLS,
    )  # fmt: skip


def _random(parts: _Parts, layers: Mapping[int, int], generator: torch.Generator) -> list[int]:
    """Return the numbers of random neurons, so many of each layer."""
    return [
        parts.first(layer) + one
        for layer, many in sorted(layers.items())
        for one in torch.randperm(parts.widths[layer], generator=generator)[:many].tolist()
    ]


def _vote(fires: Tensor, label: Tensor) -> float:
    """Return the balanced accuracy of the majority of answers ``[n, m]``; a tie counts as half."""
    share = fires.float().mean(1)
    yes = (share > 0.5).float() + 0.5 * (share == 0.5).float()
    return float((yes[label].mean() + (1 - yes[~label]).mean()) / 2)
