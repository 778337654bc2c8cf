"""The tuned lens: an affine map for each layer, before the model's own head, learned on a host and kept as an artefact.

Source     Belrose et al., "Eliciting Latent Predictions from Transformers with the Tuned Lens", arXiv 2303.08112
What       logits = head(norm(h + A h + b)), A and b of each layer trained towards the model's own distribution:
           KL(final || lens), the mean over tokens, summed over layers. At A = 0, b = 0 it is the logit lens.
Departs    It begins at the ridge regression of the last block's output on the layer's, which is a closed form over one
           pass and most of the way; then Adam. A layer's gradient depends on no other, so nothing is clipped over all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from errata.checksum import checksum
from errata.edits.artefact import Artefact
from errata.errors import ConfigError
from errata.host.host import Host
from errata.inspect.lens import Lens
from errata.linalg import routines
from errata.progress import OnProgress, ignore
from errata.training.loop import NO_FILES, Loop, TrainingFiles, train

NAME = "tuned_lens"
HELD = 0.1
"""Share of the rows that validate."""
BATCH_ROWS = 16
"""Rows of text that are run at once outside training."""
RIDGE = 1e-3
"""Of the mean squared state."""


@dataclass(frozen=True)
class Settings:
    """How a lens is trained. Raises ConfigError for settings out of range."""

    steps: int = 100
    """Steps of Adam behind the ridge regression; 0: that alone."""
    rows: int = 8
    """Rows of text in a step."""
    rate: float = 3e-4
    """Learning rate, which falls to nothing along half a cosine."""

    def __post_init__(self) -> None:
        if self.steps < 0 or self.rows < 1 or self.rate <= 0:
            raise ConfigError("a lens needs 0 steps or more, 1 row or more in a step, and a rate above 0")


class Maps(nn.Module):
    """The affine maps of all layers but the last block's output, which is read as it is."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.zeros(layers, width, width))
        self.bias = nn.Parameter(torch.zeros(layers, width))

    def translate(self, layer: int, states: Tensor) -> Tensor:
        """Return states ``[n, d]`` of a layer as states of the last block."""
        if layer >= len(self.matrix):
            return states
        return _translated(states, self.matrix[layer], self.bias[layer])


def _translated(states: Tensor, matrix: Tensor, bias: Tensor) -> Tensor:
    return states + states @ matrix.to(states).mT + bias.to(states)


def fixed_rows(host: Host, texts: Iterable[str], *, tokens: int, length: int = 64) -> list[tuple[int, ...]]:
    """Return rows of at most ``length`` tokens, cut from texts, of about ``tokens`` in all.

    Raises ConfigError for texts of fewer than ten rows.
    """
    limit = length if host.window is None else min(length, host.window)
    rows: list[tuple[int, ...]] = []
    total = 0
    for text in texts:
        ids = host.encode(text).ids
        for begin in range(0, len(ids), limit):
            row = ids[begin : begin + limit]
            if len(row) > 1:
                rows.append(row)
                total += len(row)
        if total >= tokens:
            break
    if len(rows) < 10:
        raise ConfigError(f"a lens is fitted on ten rows of text or more, found {len(rows)}")
    return rows


@dataclass
class _Task:
    """Training of the maps: see :class:`errata.training.loop.Task`."""

    lens: Lens
    maps: Maps
    train_rows: Sequence[tuple[int, ...]]
    held: Sequence[tuple[int, ...]]

    @property
    def count(self) -> int:
        """How many rows there are."""
        return len(self.train_rows)

    @torch.no_grad()
    def _read(self, rows: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
        """Return states ``[layers + 1, tokens, d]`` and the model's log probabilities ``[tokens, vocab]``."""
        states = torch.cat(self.lens.states(rows), 1)
        return states, self.lens.read(self.lens.depth, states[-1]).log_softmax(-1)

    def differentiate(
        self, step: int, examples: Sequence[int]
    ) -> tuple[Mapping[str, float], Sequence[Tensor]]:
        """Return the loss of a step and the gradients of both parameters, layer by layer: one graph at a time."""
        states, final = self._read([self.train_rows[i] for i in examples])
        parameters = self.maps.matrix, self.maps.bias
        gradients = [torch.zeros_like(parameter) for parameter in parameters]
        total = 0.0
        for layer in range(self.lens.depth):
            with torch.enable_grad():
                own = [parameter[layer].detach().requires_grad_() for parameter in parameters]
                logits = self.lens.head(_translated(states[layer], *own))
                loss = _divergence(final, logits).mean()
                parts = torch.autograd.grad(loss, own)
            for gradient, part in zip(gradients, parts, strict=True):
                gradient[layer] = part
            total += float(loss.detach())
        return {"loss": total}, gradients

    @torch.no_grad()
    def by_layer(self) -> list[float]:
        """Return the divergence of each layer on the rows that are held out, mean over tokens, nats."""
        sums = torch.zeros(self.lens.depth, dtype=torch.float64)
        for first in range(0, len(self.held), BATCH_ROWS):
            states, final = self._read(self.held[first : first + BATCH_ROWS])
            for layer in range(self.lens.depth):
                sums[layer] += float(_divergence(final, self.lens.read(layer, states[layer])).sum())
        return (sums / sum(map(len, self.held))).tolist()

    def validate(self) -> Mapping[str, float]:
        """Return the negative divergence on the rows that are held out."""
        return {"score": -sum(self.by_layer())}


def _divergence(final: Tensor, logits: Tensor) -> Tensor:
    """Return KL(final || lens) of log probabilities and logits ``[n, vocab]``, nats ``[n]``."""
    return (final.exp() * (final - logits.log_softmax(-1))).sum(-1)


@torch.no_grad()
def ridge_(lens: Lens, maps: Maps, rows: Sequence[tuple[int, ...]], *, batch_rows: int = BATCH_ROWS) -> None:
    """Set the maps to the ridge regression of the last block's output on each layer's, over the tokens of some rows."""
    layers, width = maps.bias.shape
    square = torch.zeros(layers, width + 1, width + 1, dtype=torch.float64)
    cross = torch.zeros(layers, width + 1, width, dtype=torch.float64)
    for begin in range(0, len(rows), batch_rows):
        states = torch.cat(lens.states(rows[begin : begin + batch_rows]), 1).double().cpu()
        ones = torch.ones(layers, states.shape[1], 1, dtype=torch.float64)
        keys = torch.cat([states[:-1], ones], 2)  # [layers, n, d + 1]
        square += keys.mT @ keys
        cross += keys.mT @ (states[-1:] - states[:-1])
    for layer in range(layers):
        weight = RIDGE * float(square[layer].diagonal()[:-1].mean())
        penalty = weight * torch.eye(width + 1, dtype=torch.float64)
        penalty[-1, -1] = 0
        solution = routines.solve(square[layer] + penalty, cross[layer])  # [d + 1, d]
        maps.matrix[layer] = solution[:-1].mT
        maps.bias[layer] = solution[-1]


def fit(
    host: Host, rows: Sequence[tuple[int, ...]], settings: Settings, *, seed: int = 0,
    where: TrainingFiles = NO_FILES, on_progress: OnProgress = ignore,
) -> Artefact:  # fmt: skip
    """Train a lens on rows of tokens, a tenth of them held out, and return it; the host is left as it was.

    Goes on from a checkpoint to the same bits. The card holds the divergence from the model's own distribution on the
    rows held out, by layer: of the logit lens, of the ridge regression, and of the lens. Raises HostError for a host
    that is no causal language model.
    """
    maps = Maps(len(host.layout.blocks), host.layout.width).to(host.device)
    lens = Lens(host, maps.translate)
    held = max(1, round(HELD * len(rows)))
    task = _Task(lens, maps, rows[held:], rows[:held])
    card: dict[str, Any] = {
        "rows": len(rows),
        "tokens": sum(map(len, rows)),
        "seed": seed,
        "steps": settings.steps,
    }
    card["logit_lens"] = [round(value, 5) for value in task.by_layer()]
    ridge_(lens, maps, rows[held:])
    card["ridge"] = [round(value, 5) for value in task.by_layer()]
    if settings.steps:
        key = checksum({"settings": vars(settings), "rows": [list(row) for row in rows], "seed": seed,
                        "host": host.fingerprint}, {})  # fmt: skip
        optimizer = torch.optim.Adam(maps.parameters(), lr=settings.rate)
        loop = Loop(
            settings.steps, settings.rows, None, 0, "cosine", max(1, settings.steps // 4), settings.steps + 1
        )
        start = {name: tensor.detach().clone() for name, tensor in maps.state_dict().items()}
        facts = train(maps, optimizer, loop, task, key=key, seed=seed, where=where, on_progress=on_progress)
        if -facts["score"] > sum(card["ridge"]):  # a short training may not get back to where it began
            maps.load_state_dict(start)
    card["tuned_lens"] = [round(value, 5) for value in task.by_layer()]
    tensors = {name: tensor.detach().cpu() for name, tensor in maps.state_dict().items()}
    return Artefact(NAME, host.fingerprint, tensors, {"layers": len(maps.bias)}, card)


def lens_of(host: Host, artefact: Artefact) -> Lens:
    """Return the lens of an artefact. Raises EditError for one of another kind or host."""
    artefact.check(NAME, host.fingerprint)
    maps = Maps(*artefact.tensors["bias"].shape)
    maps.load_state_dict(dict(artefact.tensors))
    maps.to(host.device).requires_grad_(False)
    return Lens(host, maps.translate)
