"""Activation patching between two prompts that differ in their subject, exactly and by gradients.

Source     Exact: Zhang and Nanda, arXiv 2309.16042; Wang et al., arXiv 2211.00593. By gradients: attribution patching,
           Syed et al., arXiv 2310.10348, and integrated along the inputs, Hanna et al., arXiv 2403.17806.
What       A pair has two prompts of one template and of equally many tokens, and the answer of each. Patching a state
           of one run into the other moves the difference of the two answers' logits. *Denoising* puts clean states
           into the run about the other subject (is the state sufficient?), *noising* the reverse (is it necessary?).
           To first order the effect is (a_clean - a_corrupted) . dM/da; the gradient is the mean over points on the
           straight path between the two prompts' word embeddings. All cells then cost a pass and a gradient for each
           point, in place of a pass each.
Departs    Points are midpoints, whose error falls with the square of their number; the code's are on the left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from errata.errors import ConfigError, RequestError
from errata.host import hooks
from errata.host.host import Host
from errata.inspect import facts
from errata.inspect.facts import Fact
from errata.linalg import resampling
from errata.locate.neurons import Rule, path_points
from errata.locate.patching import Kind, Patch, Patcher, Read, Recording, require_plain
from errata.progress import OnCount, ignore
from errata.types import Request

Direction = Literal["denoise", "noise"]
SMALLEST = 0.1
"""Nats between the two runs below which effects are not divided by that difference."""


@dataclass(frozen=True)
class Pair:
    """Two prompts that differ in their subject, token by token beside each other."""

    clean: Fact
    other: Fact

    @property
    def read(self) -> Read:
        """Return what maps logits ``[rows, vocab]`` to the clean answer's less the other's ``[rows, 1]``."""
        return lambda logits: (logits[:, self.clean.answer] - logits[:, self.other.answer])[:, None]


@dataclass(frozen=True, eq=False)
class Swap:
    """What patching between a pair does."""

    pair: Pair
    clean: float
    """Difference of the answers' logits after the clean prompt, in nats."""
    other: float
    """After the other prompt."""
    positions: tuple[int, ...]
    effects: dict[Kind, Tensor]
    """In nats, towards the run that states are taken from ``[layers, positions]``; NaN for cells that were not run."""

    @property
    def normalised(self) -> dict[Kind, Tensor] | None:
        """Return effects as shares of the difference between the two runs; None where that is too small."""
        span = self.clean - self.other
        return None if abs(span) < SMALLEST else {kind: one / span for kind, one in self.effects.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            **self.pair.clean.to_dict(), "swapped": self.pair.other.to_dict(), "clean_difference": round(self.clean, 6),
            "swapped_difference": round(self.other, 6), "positions": list(self.positions),
            "maps": {
                kind: {"effect": [[None if v != v else round(v, 6) for v in row] for row in effect.tolist()]}
                for kind, effect in self.effects.items()
            },
        }  # fmt: skip


def pair(host: Host, prompt: str, subject: str, other: str, *, answer: str | None = None) -> Pair:
    """Pair a prompt with itself about another subject; ``answer`` None: the host's own first choice.

    The other prompt's answer is the host's first choice. Raises RequestError for subjects of unequally many tokens, or
    where tokens across a subject's border put it elsewhere, and where both prompts have the same answer.
    """
    request = Request(prompt, subject, answer or "?")
    head, tail = request.template
    second = Request(f"{head}{{}}{tail}", other, "?")
    clean, swapped = facts.facts(host, [request, second], answers=[answer, None])
    if len(clean.ids) != len(swapped.ids):
        raise RequestError(
            f"{subject!r} has {len(clean.place)} tokens and {other!r} has {len(swapped.place)}: states can be swapped "
            "between subjects of equally many tokens; choose another"
        )
    if clean.place != swapped.place:
        raise RequestError(
            f"{subject!r} and {other!r} stand on different tokens, since some are shared with the words beside them: "
            "choose another subject, or put spaces around it"
        )
    if clean.answer == swapped.answer:
        raise RequestError(f"both prompts are answered with {clean.answer_text!r}: choose another subject")
    return Pair(clean, swapped)


def pairs(known: Sequence[Fact]) -> list[Pair]:
    """Pair each fact with the next one, around, of its template and length that has another answer."""
    found = []
    for place, one in enumerate(known):
        for other in (*known[place + 1 :], *known[:place]):
            same = (
                other.template == one.template and len(other.ids) == len(one.ids) and other.place == one.place
            )
            if same and other.answer != one.answer:
                found.append(Pair(one, other))
                break
    return found


class Swapper:
    """Patches between pairs on a host, exactly or by gradients."""

    def __init__(self, host: Host, longest: int, kinds: Sequence[Kind] = ("hidden",)) -> None:
        """``longest``: tokens of the longest prompt.

        Raises HostError for a host that is no causal language model, ConfigError without kinds.
        """
        require_plain(host, "activation patching")
        if not kinds:
            raise ConfigError("activation patching needs one kind of states or more, found none")
        self.host, self.kinds, self.patcher = host, tuple(kinds), Patcher(host, longest=longest)

    def _runs(self, one: Pair, direction: Direction) -> tuple[Recording, Recording]:
        """Return the run that is patched, and the one that states are taken from."""
        clean, other = (self.patcher.record([side.ids], kinds=self.kinds) for side in (one.clean, one.other))
        return (other, clean) if direction == "denoise" else (clean, other)

    def _swap(
        self, one: Pair, base: Recording, donor: Recording, effects: dict[Kind, Tensor], direction: Direction
    ) -> Swap:
        ends = [float(one.read(run.logits)[0, 0]) for run in (base, donor)]
        other, clean = ends if direction == "denoise" else ends[::-1]
        return Swap(one, clean, other, _positions(one), effects)

    def exact(
        self, one: Pair, *, direction: Direction = "denoise", only: Mapping[Kind, Tensor] | None = None
    ) -> Swap:
        """Run the model once for every cell, or for those that ``only`` says, bool ``[layers, positions]`` by kind."""
        base, donor = self._runs(one, direction)
        positions = _positions(one)
        places = [
            (kind, layer, column) for kind in self.kinds for layer in range(self.patcher.depth)
            for column in range(len(positions)) if only is None or bool(only[kind][layer, column])
        ]  # fmt: skip
        cells = [(Patch(kind, layer, (positions[column],)),) for kind, layer, column in places]
        nothing = torch.full((self.patcher.depth, len(positions)), float("nan"))
        effects: dict[Kind, Tensor] = {kind: nothing.clone() for kind in self.kinds}
        if cells:
            moved = (
                self.patcher.run(base, donor, cells, one.read)[:, 0, 0] - one.read(base.logits).cpu()[0, 0]
            )
            for (kind, layer, column), value in zip(places, moved.tolist(), strict=True):
                effects[kind][layer, column] = value if direction == "denoise" else -value
        return self._swap(one, base, donor, effects, direction)

    def attribute(
        self, one: Pair, *, points: int = 5, rule: Rule = "midpoint", direction: Direction = "denoise"
    ) -> Swap:
        """Estimate every cell's effect from the gradients at ``points`` points of the path.

        ``left`` with one point is the gradient in the run that is patched (attribution patching).
        """
        base, donor = self._runs(one, direction)
        slopes = self._slopes(one, base, donor, path_points(points, rule))
        columns = list(_positions(one))
        effects: dict[Kind, Tensor] = {}
        for kind in self.kinds:
            rows = []
            for layer in range(self.patcher.depth):
                gap = donor.outputs[kind, layer][0].float() - base.outputs[kind, layer][0].float()
                rows.append((gap.cpu() * slopes[kind, layer]).sum(-1)[columns])
            effect = torch.stack(rows)
            effects[kind] = effect if direction == "denoise" else -effect
        return self._swap(one, base, donor, effects, direction)

    def _slopes(
        self, one: Pair, base: Recording, donor: Recording, points: Tensor
    ) -> dict[tuple[Kind, int], Tensor]:  # fmt: skip
        """Return the mean gradient of the difference at every output ``[length, d]``, float32 on the CPU."""
        start, stop = base.embeddings.float(), donor.embeddings.float()
        path = start + points.to(start)[:, None, None] * (stop - start)  # [points, length, d]
        leaves: dict[tuple[Kind, int], Tensor] = {}
        rows = torch.zeros(len(points), dtype=torch.long, device=base.batch.ids.device)
        batch = base.batch.select(rows)
        last = torch.full_like(rows, base.length - 1)
        model = self.host.model

        def tap(key: tuple[Kind, int]):
            def add(output: Tensor) -> Tensor:
                leaves[key] = torch.zeros(output.shape, device=output.device).requires_grad_(True)
                return output + leaves[key].to(output.dtype)

            return add

        with hooks.frozen(model), torch.enable_grad(), ExitStack() as stack:
            embedding = model.get_input_embeddings()
            stack.enter_context(hooks.on_output(embedding, lambda tensor: path.to(tensor)))
            for kind in self.kinds:
                for layer in range(self.patcher.depth):
                    stack.enter_context(hooks.on_output(self.patcher.module(kind, layer), tap((kind, layer))))
            line = torch.arange(len(points), device=rows.device)
            logits = self.host.forward_at(batch, line, last)
            total = one.read(logits.to(torch.promote_types(logits.dtype, torch.float32))).sum()
            gradients = torch.autograd.grad(total, list(leaves.values()))
        shape = (len(points), base.length, -1)
        return {key: slope.reshape(shape).mean(0).cpu() for key, slope in zip(leaves, gradients, strict=True)}

    def fast(self, one: Pair, *, share: float = 0.05, points: int = 5) -> tuple[Swap, Swap]:
        """Estimate all cells, and run the ``share`` of them with the largest estimates exactly; return both."""
        estimate = self.attribute(one, points=points)
        every = torch.cat([effect.abs().flatten() for effect in estimate.effects.values()])
        bound = every.topk(max(1, round(share * len(every)))).values[-1]
        only = {kind: effect.abs() >= bound for kind, effect in estimate.effects.items()}
        return estimate, self.exact(one, only=only)


def _positions(one: Pair) -> tuple[int, ...]:
    """Return the tokens from the subject's first one on; those before it are the same in both runs."""
    return tuple(range(one.clean.place[0], len(one.clean.ids)))


def agreement(estimates: Sequence[Swap], exact: Sequence[Swap]) -> dict[str, Any]:
    """Compare estimates with exact effects over all cells of all pairs, by kind, with 95 % intervals over pairs.

    Pearson's and Spearman's correlation.
    """
    found: dict[str, Any] = {}
    for kind in exact[0].effects:
        one = [swap.effects[kind].flatten() for swap in estimates]
        two = [swap.effects[kind].flatten() for swap in exact]

        def both(picked: Tensor, one: list[Tensor] = one, two: list[Tensor] = two) -> Tensor:
            first, second = (torch.cat([side[i] for i in picked.tolist()]) for side in (one, two))
            return torch.tensor(
                [f(first, second) for f in (resampling.correlation, resampling.rank_correlation)]
            )

        pearson, spearman = both(torch.arange(len(one))).tolist()
        low, high = resampling.interval(resampling.resampled(len(one), both, resamples=500))
        found[kind] = {
            "cells": sum(len(part) for part in two), "pearson": round(pearson, 4), "spearman": round(spearman, 4),
            "pearson_interval": [round(float(low[0]), 4), round(float(high[0]), 4)],
            "spearman_interval": [round(float(low[1]), 4), round(float(high[1]), 4)],
        }  # fmt: skip
    return found


def measure(
    host: Host, known: Sequence[Fact], kinds: Sequence[Kind] = ("hidden",), *, points: int = 5,
    on_pair: OnCount = ignore,
) -> dict[str, Any]:  # fmt: skip
    """Pair facts that the host knows, and measure how well estimates agree with exact effects, as plain data.

    Raises ConfigError where no two facts make a pair.
    """
    found = pairs([one for one in known if one.known])
    if not found:
        raise ConfigError(
            f"no two of the {len(known)} facts have one template, equally many tokens and different answers: take more"
        )
    swapper = Swapper(host, max(len(one.clean.ids) for one in found), kinds)
    estimates, exact = [], []
    for number, one in enumerate(found, 1):
        estimates.append(swapper.attribute(one, points=points))
        exact.append(swapper.exact(one))
        on_pair(number, len(found))
    return {"pairs": len(found), "points": points, "agreement": agreement(estimates, exact)}
