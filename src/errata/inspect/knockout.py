"""Attention knockout: from which tokens, and at which layers, the last token has to read.

Source     Geva et al., "Dissecting Recall of Factual Associations in Auto-Regressive Language Models", EMNLP 2023,
           arXiv 2304.14767, Sec. 5
What       Attention from the last token to a set of tokens is cut, in all heads, at a window of layers, before the
           softmax. What is reported is the relative change of the answer's probability.
Departs    The other tokens cannot see the last one, so their keys and values stay as they are in the clean run: the
           last token alone is run again, twice for every window (once inside it with those keys masked, once above).
           One of the published scripts normalises twice; here the remaining weights are renormalised, which masking
           does. The window is a fifth of the depth unless set (the paper: 9 of 48 layers).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from errata.errors import ConfigError, HostError, RequestError
from errata.host.host import Host
from errata.host.prefix import Prefix
from errata.inspect.facts import Fact
from errata.inspect.tracing import PROBABILITY, reading
from errata.linalg import resampling
from errata.locate.patching import Patcher, Recording, require_plain, window
from errata.progress import OnCount, ignore

SUBJECT, REST, SELF = "subject", "other tokens", "last token"
SETS = (SUBJECT, REST, SELF)
"""Which keys the last token may no longer read: the subject's, those of the tokens that are neither, its own."""


@dataclass(frozen=True, eq=False)
class Knockout:
    """What cutting attention does to one fact."""

    fact: Fact
    width: int
    clean: float
    """The answer's probability."""
    cut: Tensor
    """The same with each set cut around each layer, float32 ``[sets, layers]``."""

    @property
    def change(self) -> Tensor:
        """Return the relative change of the probability ``[sets, layers]``."""
        return self.cut / self.clean - 1

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        change = {
            name: [round(v, 6) for v in row] for name, row in zip(SETS, self.change.tolist(), strict=True)
        }
        return {**self.fact.to_dict(), "window": self.width, "clean": round(self.clean, 6), "change": change}


def sets_of(fact: Fact) -> dict[str, tuple[int, ...]]:
    """Return the tokens of each set; the first token of the row, which heads rest on, counts as one of the others."""
    last = len(fact.ids) - 1
    subject = tuple(at for at in fact.place if at != last)
    return {SUBJECT: subject, REST: tuple(at for at in range(last) if at not in fact.place), SELF: (last,)}


class Cutter:
    """Cuts attention from the last token of rows on a host."""

    def __init__(self, host: Host, *, longest: int) -> None:
        """``longest``: tokens of the longest row. Raises HostError where keys cannot be left out exactly."""
        require_plain(host, "attention knockout")
        self.patcher = Patcher(host, longest=longest)
        if not self.patcher.reuse:
            raise HostError(
                f"{host.name} keeps no plain keys and values of earlier tokens to cut ({host.family})"
            )
        if "position_ids" not in host.accepts or getattr(host.text_config, "alibi", False):
            # positions that are counted in the mask would move with the tokens that are masked
            raise HostError(
                f"{host.name} takes positions from its attention mask ({host.family}), so cutting a token would move "
                "the others: look at it with causal tracing"
            )
        self.depth = self.patcher.depth

    def probabilities(
        self, ids: Sequence[int], answer: int, sets: Sequence[Sequence[int]], layers: range
    ) -> Tensor:
        """Return the answer's probability with each of some sets of tokens cut at some layers, float32 ``[sets]``.

        Raises RequestError for a set that leaves nothing to read.
        """
        return self._cut(self.patcher.record([ids], kinds=()), answer, sets, layers)

    @torch.no_grad()
    def _cut(self, clean: Recording, answer: int, sets: Sequence[Sequence[int]], layers: range) -> Tensor:
        last = clean.length - 1
        if any(len(set(one)) == clean.length for one in sets):
            raise RequestError("attention cannot be cut from all tokens at once")
        rows = torch.zeros(len(sets), dtype=torch.long, device=clean.batch.ids.device)
        whole = self.patcher.prefix(clean, last).share(rows) if last else None
        if whole is None or whole.cache is None:
            raise RequestError("the prompt is a single token, which has none to read from")
        batch = clean.batch.select(rows).columns(last)
        below = clean.outputs["hidden", layers[0] - 1][rows][:, last:] if layers and layers[0] else None
        if layers:
            keys = whole.masks().clone()
            own = batch.mask.clone()
            for row, one in enumerate(sets):
                keys[row, [at for at in one if at < last]] = 0
                own[row, 0] = 0 if last in one else 1
            cut = Prefix(keys, whole.cache.select(rows))
            ran = self.patcher.runner.run(
                replace(batch, mask=own), cut.at_depth(layers[0], below), keep=[layers[-1]],
                stop=self.patcher.runner.blocks[layers[-1]],
            )  # fmt: skip
            depth, states = layers[-1] + 1, ran.states[layers[-1]]
        else:
            depth, states = 0, None
        place = torch.arange(len(sets), device=rows.device), torch.zeros_like(rows)
        logits = self.patcher.runner.run(batch, whole.at_depth(depth, states), at=place).logits
        assert logits is not None
        return reading(answer)(logits.float()).cpu()[:, PROBABILITY]

    def fact(self, fact: Fact, *, width: int | None = None) -> Knockout:
        """Cut each set of a fact's tokens around each layer."""
        width = max(1, self.depth // 5) if width is None else width
        clean = self.patcher.record([fact.ids], kinds=())
        sets = list(sets_of(fact).values())
        rows = [
            self._cut(clean, fact.answer, sets, window(layer, width, self.depth))
            for layer in range(self.depth)
        ]
        probability = float(reading(fact.answer)(clean.logits)[0, PROBABILITY])
        return Knockout(fact, width, probability, torch.stack(rows, 1))


def answered(host: Host, facts: Sequence[Fact]) -> list[Fact]:
    """Return the facts that the host knows. Raises ConfigError where it knows none."""
    known = [one for one in facts if one.known]
    if not known:
        raise ConfigError(f"{host.name} gives the expected answer to none of the {len(facts)} prompts")
    return known


def knockout(
    host: Host, facts: Sequence[Fact], *, width: int | None = None, on_fact: OnCount = ignore
) -> list[Knockout]:
    """Cut attention in some facts; the host is left as it was."""
    cutter = Cutter(host, longest=max(len(one.ids) for one in facts))
    found = []
    for number, one in enumerate(facts, 1):
        found.append(cutter.fact(one, width=width))
        on_fact(number, len(facts))
    return found


def averaged(found: Sequence[Knockout]) -> dict[str, Any]:
    """Return mean relative changes by set and layer with 95 % intervals over facts, as plain data."""
    changes = torch.stack([one.change for one in found])
    low, high = resampling.mean_interval(changes)
    rows = {"change": changes.mean(0), "low": low, "high": high}
    sets = {
        name: {key: [round(v, 6) for v in values[i].tolist()] for key, values in rows.items()}
        for i, name in enumerate(SETS)
    }
    return {"facts": len(found), "window": found[0].width, "sets": sets}
