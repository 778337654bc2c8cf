"""Added neurons beside a feed-forward, as parameters that are trained: y + act(K x + b) V."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

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


@contextmanager
def beside_row_slots(
    host: Host, modules: Sequence[str], neurons: Sequence[tuple[Tensor, Tensor]], activation: str
) -> Iterator[None]:
    """Add to modules' outputs what neurons of each row's own give, at all of its tokens: y + act(K x) V.

    ``neurons``: for each module keys ``[rows, s, d_in]`` and values ``[rows, s, d_out]``; gradients reach them.
    """
    act = ACTIVATIONS[activation]
    with ExitStack() as stack:
        for module, (keys, values) in zip(modules, neurons, strict=True):
            layer, inputs = host.model.get_submodule(module), list[Tensor]()

            def add(
                output: Tensor, inputs: list[Tensor] = inputs, keys: Tensor = keys, values: Tensor = values
            ) -> Tensor:
                return output + (act(inputs.pop().to(keys) @ keys.mT) @ values).to(output)

            stack.enter_context(hooks.on_input(layer, inputs.append))
            stack.enter_context(hooks.on_output(layer, add))
        yield


def inputs_of(host: Host, module: str, rows: Sequence[Sequence[int]]) -> Tensor:
    """Return what a module reads at every token of some rows, in their order, float32 ``[n, d_in]`` on the CPU."""
    return torch.cat(row_inputs(host, module, rows))


def row_inputs(host: Host, module: str, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return the same for each row ``[tokens, d_in]``."""
    return [inputs for inputs, _ in _activations(host, module, rows)]


def outputs_of(host: Host, module: str, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return what a module gives at every token of each row, float32 ``[tokens, d_out]`` on the CPU.

    Raises ConfigError for a module that does not tell rows apart, where no memory can be.
    """
    return [outputs for _, outputs in _activations(host, module, rows, apart=True)]


def last_activations(host: Host, module: str, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return a module's input ``[n, d_in]`` and output ``[n, d_out]`` at the last token of each row."""
    ends = [(inputs[-1], outputs[-1]) for inputs, outputs in _activations(host, module, rows)]
    inputs, outputs = zip(*ends, strict=True)
    return torch.stack(inputs), torch.stack(outputs)


@torch.no_grad()
def _activations(
    host: Host, module: str, rows: Sequence[Sequence[int]], *, apart: bool = False
) -> list[tuple[Tensor, Tensor]]:
    """Return a module's input and output of each row ``[tokens, d]``; nothing is run above it."""
    layer = host.model.get_submodule(module)
    parts: dict[int, tuple[Tensor, Tensor]] = {}
    for group in tokens.by_length(rows, BATCH_TOKENS):
        batch, seen = host.batch([rows[i] for i in group]), list[Tensor]()
        with (
            hooks.on_input(layer, seen.append), hooks.on_output(layer, seen.append),
            hooks.stop_after(layer), suppress(hooks.Stopped),
        ):  # fmt: skip
            host.forward(batch, keep=1)
        if apart and seen[1].ndim != 3:
            raise ConfigError(
                f"{module} has states of shape {list(seen[1].shape)}, expected [rows, tokens, d]: a memory needs to "
                "tell rows apart; choose another site"
            )
        inputs, outputs = (part.reshape(*batch.ids.shape, -1).float().cpu() for part in seen)
        mask = batch.mask.bool().cpu()
        parts.update({i: (inputs[row, mask[row]], outputs[row, mask[row]]) for row, i in enumerate(group)})
    return [parts[i] for i in range(len(rows))]
