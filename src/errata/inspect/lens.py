"""Lenses: what the model would answer if it stopped at a layer, read with its own final norm and output head.

Source     Logit lens: nostalgebraist, "interpreting GPT: the logit lens", 2020. Tuned lens: Belrose et al., arXiv
           2303.08112. Saturation: Geva et al., EMNLP 2022, arXiv 2203.14680, Sec. 5; early exit by confidence:
           Schuster et al., arXiv 2207.07061.
What       A state is put in place of the last block's output and the model's own forward does the rest: norm, head,
           scale and cap of whatever family, each applied once. The tuned lens puts a learned affine map before that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from errata.errors import ConfigError
from errata.host import hooks
from errata.host.host import Host
from errata.host.prefix import PrefixRunner, plain_prefix, split_rows
from errata.host.tokens import Side
from errata.locate.patching import require_plain

READ_ROWS = 512
"""States that are read at once."""

Translate = Callable[[int, Tensor], Tensor]
"""Maps states ``[n, d]`` of a layer, 0 for the word embeddings, to states of the last block."""


def plain(layer: int, states: Tensor) -> Tensor:
    """Return states ``[n, d]`` as they are: the logit lens."""
    return states


class Lens:
    """Reads states of a host; layer 0 is what the first block reads, layer l the output of block l - 1."""

    def __init__(self, host: Host, translate: Translate = plain) -> None:
        """``translate``: what comes before the norm. Raises HostError for a host that is no causal language model."""
        require_plain(host, "a lens")
        self.host, self.translate, self.runner = host, translate, PrefixRunner(host)
        self.depth = len(self.runner.blocks)
        self.states([(0,)])  # how blocks return their states is read off a first run

    @torch.no_grad()
    def states(self, rows: Sequence[Sequence[int]], *, side: Side = "right") -> list[Tensor]:
        """Return each row's states at every layer ``[layers + 1, tokens, d]``."""
        batch = self.host.batch(rows, side=side)
        inputs: list[Tensor] = []
        with (
            hooks.frozen(self.host.model),
            hooks.on_input(self.runner.blocks[0], lambda t: inputs.append(t.detach().clone())),
        ):
            ran = self.runner.run(batch, plain_prefix(), keep=range(self.depth), stop=self.runner.blocks[-1])
        layers = [inputs[0], *(ran.states[block] for block in range(self.depth))]
        lengths = [len(row) for row in rows]
        parts = [split_rows(layer.to(layers[-1].device), lengths, batch) for layer in layers]
        return [torch.stack(own) for own in zip(*parts, strict=True)]

    def read(self, layer: int, states: Tensor) -> Tensor:
        """Return the logits of states ``[n, d]`` of a layer, float32 at least ``[n, vocab]``; gradients pass."""
        return self.head(self.translate(layer, states))

    def head(self, states: Tensor) -> Tensor:
        """Return the logits of states ``[n, d]`` as if the last block gave them, ``[n, vocab]``; gradients pass."""
        with hooks.frozen(self.host.model):
            return torch.cat([self.runner.head(part) for part in states.split(READ_ROWS)])

    @torch.no_grad()
    def look(self, ids: Sequence[int], answer: int | None = None) -> Reading:
        """Read every layer at every token of a row; ``answer`` None: the model's first choice at its end."""
        states = self.states([ids])[0]
        logs = torch.stack([self.read(layer, own).log_softmax(-1).cpu() for layer, own in enumerate(states)])
        token = int(logs[-1, -1].argmax()) if answer is None else answer
        return Reading(tuple(ids), token, logs)


@dataclass(frozen=True, eq=False)
class Reading:
    """What a lens reads of one row."""

    ids: tuple[int, ...]
    answer: int
    logs: Tensor
    """Log probabilities of the next token, float32 ``[layers + 1, tokens, vocab]``."""

    @property
    def top(self) -> Tensor:
        """Return the first choices, int64 ``[layers + 1, tokens]``."""
        return self.logs.argmax(-1)

    @property
    def saturation(self) -> Tensor:
        """Return the first layer from which on the first choice is the final one, int64 ``[tokens]``."""
        return saturation(self.top)

    @property
    def rank(self) -> Tensor:
        """Return the answer's rank at the last token, 0 for the first choice, int64 ``[layers + 1]``."""
        last = self.logs[:, -1]
        return (last > last[:, self.answer, None]).sum(-1)

    def to_dict(self, host: Host) -> dict[str, Any]:
        """Return it as plain data: choices by layer and token, and the answer's curve at the last token."""
        final, last = self.logs[-1], self.logs[:, -1]

        def text(token: int) -> str:
            return str(host.tokenizer.decode([token]))

        return {
            "tokens": [text(token) for token in self.ids],
            "top": [[text(int(token)) for token in row] for row in self.top],
            "probability": [[round(float(value), 6) for value in row] for row in self.logs.exp().amax(-1)],
            "divergence": [
                [round(float(value), 6) for value in row] for row in (final.exp() * (final - self.logs)).sum(-1)
            ],
            "saturation": self.saturation.tolist(),
            "answer": {
                "token": text(self.answer), "id": self.answer, "rank": self.rank.tolist(),
                "probability": [round(float(value), 6) for value in last[:, self.answer].exp()],
            },
        }  # fmt: skip


def saturation(top: Tensor) -> Tensor:
    """Return the first layer from which on first choices ``[layers, n]`` are the last layer's, int64 ``[n]``."""
    differs = top != top[-1]
    places = torch.arange(1, len(top) + 1, device=top.device)[:, None]
    return (differs * places).amax(0)


@torch.no_grad()
def exits(
    lens: Lens, rows: Sequence[Sequence[int]], *, confidence: float = 0.9, batch_rows: int = 8
) -> dict[str, Any]:  # fmt: skip
    """Measure, over the tokens of some rows, where first choices settle, and what leaving early would cost.

    A token is left at the first layer whose first choice has at least ``confidence``. Raises ConfigError without rows.
    """
    if not rows:
        raise ConfigError("early exit is measured on texts, and there are none")
    settled: list[Tensor] = []
    left: list[Tensor] = []
    agree: list[Tensor] = []
    layers: list[Tensor] = []
    for begin in range(0, len(rows), batch_rows):
        states = torch.cat(lens.states(rows[begin : begin + batch_rows]), 1)  # [layers + 1, tokens, d]
        best = [lens.read(layer, own).softmax(-1).max(-1) for layer, own in enumerate(states)]
        top, sure = (
            torch.stack([getattr(one, name).cpu() for one in best]) for name in ("indices", "values")
        )
        sure[-1] = 1.0  # the last layer is always left
        at = (sure >= confidence).int().argmax(0)
        settled.append(saturation(top))
        left.append(at)
        agree.append(top.gather(0, at[None])[0] == top[-1])
        layers.append((top == top[-1]).float())
    tokens = torch.cat(settled)
    same = torch.cat(layers, 1).mean(1)
    return {
        "tokens": len(tokens), "confidence": confidence, "layers": lens.depth,
        "agreement_by_layer": [round(float(value), 4) for value in same],
        "settled_by_layer": [round(float((tokens <= layer).float().mean()), 4) for layer in range(lens.depth + 1)],
        "mean_layers_saved": round(float((lens.depth - torch.cat(left)).float().mean()), 4),
        "agreement": round(float(torch.cat(agree).float().mean()), 4),
    }  # fmt: skip
