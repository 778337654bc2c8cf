"""Added neurons beside a feed-forward, as parameters that are trained: y + act(K x + b) V."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from errata.edits.memory import ACTIVATIONS
from errata.errors import ConfigError
from errata.host import hooks, tokens
from errata.host.host import Host

BATCH_TOKENS = 8192


@dataclass
class Slots:
    """Neurons that read a module's input and add to its output."""

    keys: Tensor
    """K ``[s, d_in]``."""
    biases: Tensor
    """b ``[s]``."""
    values: Tensor
    """V ``[s, d_out]``."""

    @staticmethod
    def none(d_in: int, d_out: int) -> Slots:
        """Return no neurons."""
        return Slots(torch.zeros(0, d_in), torch.zeros(0), torch.zeros(0, d_out))

    def joined(self, more: Slots) -> Slots:
        """Return these neurons and further ones."""
        pairs = ((self.keys, more.keys), (self.biases, more.biases), (self.values, more.values))
        return Slots(*(torch.cat([a.to(b.device), b]) for a, b in pairs))

    def detached(self) -> Slots:
        """Return a copy without gradients, on the CPU."""
        return Slots(*(t.detach().cpu().clone() for t in (self.keys, self.biases, self.values)))


@contextmanager
def beside_slots(
    host: Host, module: str, slots: Callable[[], Sequence[Slots]], activation: str
) -> Iterator[None]:
    """Add the outputs of neurons to a module's while inside; gradients reach them. ``slots`` returns groups of them."""
    layer, act, inputs = host.model.get_submodule(module), ACTIVATIONS[activation], list[Tensor]()

    def add(output: Tensor) -> Tensor:
        x = inputs.pop()
        for group in slots():
            if len(group.keys):
                own = group.keys
                output = output + (act(x.to(own) @ own.mT + group.biases) @ group.values).to(output)
        return output

    with hooks.on_input(layer, inputs.append), hooks.on_output(layer, add):
        yield


def inputs_of(host: Host, module: str, rows: Sequence[Sequence[int]]) -> Tensor:
    """Return what a module reads at every token of some rows, in their order, float32 ``[n, d_in]`` on the CPU."""
    return torch.cat(_read(host, module, rows, hooks.on_input))


def outputs_of(host: Host, module: str, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return what a module gives at every token of each row, float32 ``[tokens, d_out]`` on the CPU."""
    return _read(host, module, rows, hooks.on_output)


@torch.no_grad()
def _read(host: Host, module: str, rows: Sequence[Sequence[int]], hook: Callable[..., Any]) -> list[Tensor]:
    layer = host.model.get_submodule(module)
    parts: dict[int, Tensor] = {}
    for group in tokens.by_length(rows, BATCH_TOKENS):
        batch, states = host.batch([rows[i] for i in group]), list[Tensor]()
        with hook(layer, states.append):
            host.forward(batch, keep=1)
        if states[0].ndim != 3:
            raise ConfigError(
                f"{module} has states of shape {list(states[0].shape)}, expected [rows, tokens, d]: a memory needs to "
                "tell rows apart; choose another site"
            )
        mask = batch.mask.bool().to(states[0].device)
        parts.update({i: states[0][row, mask[row]].float().cpu() for row, i in enumerate(group)})
    return [parts[i] for i in range(len(rows))]
