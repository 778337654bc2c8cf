"""ActAdd: the difference of the states of two short texts, token by token, is added to the first tokens of a prompt.

Paper      Turner et al., "Steering Language Models With Activation Engineering", arXiv 2308.10248
Implements Sec. 3.2: one pair of texts, the shorter one padded with spaces to the length p of the longer; at one layer,
           strength times the difference of the states at each of the p tokens is added to a prompt's first p tokens
Departs    States are those of a block's output (the paper: its input). A prompt shorter than p gets the first vectors
Needs      A contrast pair; its prompt may be empty, so that the answers are the two texts
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from errata.config import positive
from errata.edits.steer import SteerEdit
from errata.errors import ConfigError
from errata.host import hooks
from errata.host.host import Host
from errata.host.states import LabelledRows, module_states
from errata.methods import _steering
from errata.methods._method import Method, Workspace
from errata.types import Contrasts


@dataclass(frozen=True)
class Config:
    """Settings of ActAdd."""

    layers: tuple[int, ...] | None = None
    """Blocks whose output is steered. None: the one at an eighth of the depth (paper: 6 of 48 for GPT-2 XL)."""
    pair: int = 1
    """Number of the contrast pair whose answers are the two texts, counted from 1."""
    strength: float = 4.0
    """What the differences are multiplied by (paper: 1 to 15)."""
    keep_norm: bool = False
    """Whether steered states get their norm back."""

    def problems(self) -> list[str]:
        """Check ranges."""
        shared = _steering.SteerConfig(self.layers, strength=self.strength).problems()
        return [*positive(self, "pair"), *shared]


def fit(host: Host, requests: Sequence[Contrasts], config: Config, work: Workspace) -> SteerEdit:
    """Return a vector for each of the first tokens."""
    settings = _steering.SteerConfig(
        config.layers, "first", strength=config.strength, keep_norm=config.keep_norm
    )
    steps = _steering.start("actadd", host, requests, settings, work, 1 / 8)
    if config.pair > len(steps.positives):
        raise ConfigError(f"actadd: pair {config.pair} of {len(steps.positives)} does not exist")
    texts = [side[config.pair - 1].ids for side in (steps.positives, steps.negatives)]
    length = max(map(len, texts))
    space = host.encode(" ", special=False).ids
    fill = space[0] if len(space) == 1 else host.pad_id
    rows = tuple((*ids, *[fill] * (length - len(ids))) for ids in texts)
    every = LabelledRows(rows, (tuple(range(length)),) * 2, torch.zeros(2 * length))
    with hooks.frozen(host.model):
        states = module_states(host, every, [steps.block(layer) for layer in steps.layers])
    differences = {module: both[:length] - both[length:] for module, both in states.items()}
    sites = [
        steps.site(module, "vector", {"values": values}, count=length)
        for module, values in differences.items()
    ]
    lengths = [[_steering.rounded(float(v.norm())) for v in values] for values in differences.values()]
    return steps.edit(sites, lengths=lengths, tokens=length, config=config)


METHOD = Method(
    name="actadd",
    title="ActAdd",
    paper="Steering Language Models With Activation Engineering, arXiv 2308.10248",
    config=Config,
    fit=fit,
    gives=SteerEdit,
    takes="contrasts",
    batch=False,
    sequential=False,
    random=False,
)
