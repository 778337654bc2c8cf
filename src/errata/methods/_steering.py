"""The steps that steering methods share: the layers, the states of contrast pairs there, and the edit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from errata.config import positive
from errata.edits.steer import SteerEdit, Steering, Where
from errata.errors import ConfigError
from errata.host import hooks
from errata.host.host import Host
from errata.host.states import LabelledRows, module_states
from errata.host.tokens import Answer
from errata.methods._method import Workspace, provenance
from errata.types import Contrasts

Tokens = Literal["last", "first", "all"]


@dataclass(frozen=True)
class SteerConfig:
    """Settings that all steering methods have."""

    layers: tuple[int, ...] | None = None
    """Blocks whose output is steered. None: the method's own choice."""
    positions: Where = "all"
    """Tokens that are steered: all; prompt; generated (behind the prompt); after (the prompt's last one and all later
    ones); last (the prompt's last one); first (its first count); ends (its first and its last count)."""
    count: int = 1
    """Tokens of positions first and ends."""
    strength: float = 1.0
    """What every change is multiplied by, in the method's own unit. errata steer chooses it by measurement."""
    keep_norm: bool = False
    """Whether steered states get their norm back."""

    def problems(self) -> list[str]:
        """Check ranges."""
        wrong = positive(self, "count")
        if self.layers is not None and (not self.layers or len(set(self.layers)) != len(self.layers)):
            wrong.append(f"layers: expected different layers, found {list(self.layers)}")
        if not abs(self.strength) < float("inf"):
            wrong.append(f"strength: expected a finite number, found {self.strength}")
        return wrong


@dataclass(frozen=True)
class ReadConfig(SteerConfig):
    """Settings of methods that read states of the answers."""

    tokens: Tokens = "last"
    """Tokens of an answer whose states are read: the last one (the letter of a multiple choice), the first one, or all
    of them, averaged."""
    alone: bool = False
    """Whether answers are read without their prompts: what their states then differ in is the answers' own."""
    behind: str = ""
    """Text behind every answer when states are read, as a line's end or a chat template's end of a turn. Its last token
    is the last one: there the state is about what comes next."""


@dataclass(frozen=True)
class Fit:
    """A fit in progress."""

    method: str
    host: Host
    contrasts: Contrasts
    config: SteerConfig
    work: Workspace
    layers: tuple[int, ...]
    positives: tuple[Answer, ...]
    """Each pair's prompt with its positive answer."""
    negatives: tuple[Answer, ...]

    def block(self, layer: int) -> str:
        """Return the path of a block."""
        return self.host.layout.blocks[layer]

    def tokens(
        self, modules: Sequence[str], tokens: Tokens, *, inputs: bool = False
    ) -> dict[str, tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Return, by module, states of the positive answers ``[n, d]`` and the pair of each ``[n]``, then of the
        negative ones; float64. ``inputs``: what modules get instead of what they give.
        """
        answers = (*self.positives, *self.negatives)
        spans = {"last": lambda a: (len(a.ids) - 1,), "first": lambda a: (a.start,),
                 "all": lambda a: tuple(range(a.start, len(a.ids)))}  # fmt: skip
        positions = tuple(spans[tokens](answer) for answer in answers)
        count = len(self.positives)
        side = [int(i >= count) for i, own in enumerate(positions) for _ in own]
        owner = torch.tensor([i % count for i, own in enumerate(positions) for _ in own])
        rows = LabelledRows(tuple(answer.ids for answer in answers), positions, torch.tensor(side))
        with hooks.frozen(self.host.model):
            found = module_states(self.host, rows, modules, inputs=inputs)
        one, other = rows.labels == 0, rows.labels == 1
        return {
            path: (states[one].double(), owner[one], states[other].double(), owner[other])
            for path, states in found.items()
        }

    def pairs(
        self, modules: Sequence[str], tokens: Tokens, *, inputs: bool = False
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Return, by module, the mean state of each pair's positive and of its negative answer ``[pairs, d]`` each."""
        count = len(self.positives)
        return {
            path: (_means(one, own, count), _means(other, others, count))
            for path, (one, own, other, others) in self.tokens(modules, tokens, inputs=inputs).items()
        }

    def site(self, module: str, form: Any, payload: Mapping[str, Tensor], **more: Any) -> Steering:
        """Return what is done at a module, at the tokens that the settings name; ``payload`` ``[...]`` by name."""
        options = {"positions": self.config.positions, "count": self.config.count, **more}
        float32 = {name: tensor.detach().to("cpu", torch.float32) for name, tensor in payload.items()}
        return Steering(module, form, float32, keep_norm=self.config.keep_norm, **options)

    def edit(self, sites: Sequence[Steering], config: object = None, **notes: Any) -> SteerEdit:
        """Return the edit; ``notes``: what is recorded of the fit beside sites and number of pairs.

        ``config``: the method's settings, where they are not those of this fit.
        """
        record = provenance(
            self.method, self.host, (self.contrasts,), config or self.config, self.work,  # type: ignore[arg-type]
            sites=[one.module for one in sites], pairs=len(self.positives), **notes,
        )  # fmt: skip
        return SteerEdit(tuple(sites), record, self.config.strength)


def start(
    method: str, host: Host, requests: Sequence[Any], config: SteerConfig, work: Workspace, share: float | None
) -> Fit:  # fmt: skip
    """Tokenise the contrast pairs and choose the layers. ``share``: the one at this share of the depth; None: all.

    Raises ConfigError for other requests or layers that the model has not.
    """
    if len(requests) != 1 or not isinstance(requests[0], Contrasts):
        raise ConfigError(
            f"{method} takes one set of contrast pairs a fit, found {len(requests)} requests; fit each by itself"
        )
    contrasts: Contrasts = requests[0]
    depth = len(host.layout.blocks)
    own = tuple(range(depth)) if share is None else (min(depth - 1, round(share * depth)),)
    chosen = own if config.layers is None else config.layers
    layers = tuple(sorted(layer + depth if layer < 0 else layer for layer in chosen))
    if len(set(layers)) != len(layers) or not all(0 <= layer < depth for layer in layers):
        raise ConfigError(f"layers {list(chosen)}: expected some of 0 to {depth - 1}")
    alone, behind = (config.alone, config.behind) if isinstance(config, ReadConfig) else (False, "")
    more = host.encode(behind, special=False).ids if behind else ()
    sides = [
        tuple(
            _followed(host.encode_answer("" if alone else pair.prompt, answer), more)
            for pair, answer in zip(contrasts.pairs, answers, strict=True)
        )
        for answers in ([p.positive for p in contrasts.pairs], [p.negative for p in contrasts.pairs])
    ]  # fmt: skip
    return Fit(method, host, contrasts, config, work, layers, *sides)


@contextmanager
def explained(method: str) -> Iterator[None]:
    """Have what a computation cannot be done with refused as the method's error."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"{method}: {error}") from error


def mean_norm(states: Tensor) -> float:
    """Return the mean norm of states ``[n, d]``, the unit that strengths can be compared in."""
    return float(f"{float(states.norm(dim=-1).mean()):.6g}")


def rounded(value: float) -> float:
    """Return a number to record."""
    return float(f"{value:.6g}")


def _followed(answer: Answer, more: tuple[int, ...]) -> Answer:
    return Answer((*answer.ids, *more), answer.start)


def _means(states: Tensor, owner: Tensor, count: int) -> Tensor:
    total = states.new_zeros(count, states.shape[1]).index_add(0, owner, states)
    return total / torch.bincount(owner, minlength=count)[:, None]
