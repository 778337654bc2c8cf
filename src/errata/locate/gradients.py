"""What goes into linear maps and what the loss says at their outputs: one forward, one backward.

For a map y = W h + b the gradient with respect to W is the sum over tokens of g h^T, g the gradient
with respect to y. The pairs (h, g) say the same, token by token, in a + b numbers each; nothing of
the size of W is formed. The only things differentiated are zeros added to the chosen outputs at the
chosen tokens, so what stands below the lowest of these maps needs no graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from errata.errors import ConfigError, HostError
from errata.host import hooks
from errata.host.layout import DECODER, linear_modules
from errata.host.load import Host
from errata.host.memory import in_batches
from errata.host.tokens import Answer
from errata.registry import unknown

GROUPS = ("mlp", "mlp_in", "mlp_out")
Tokens = Literal["answer", "all"]

FLOAT16_LIFT = 1024.0
"""Factor on the loss of a float16 model, taken off again: gradients below 6e-8 would vanish."""

TOLERANCE = 2e-2
"""Relative error within which an output counts as W x + b; rounding in 16 bits stays below it."""


@dataclass(frozen=True)
class Pairs:
    """Inputs of one linear map and gradients at its output, a row a token; float32, on the CPU.

    float64 where the model is.
    """

    inputs: Tensor
    """h ``[n, a]``."""
    gradients: Tensor
    """g ``[n, b]``: of the summed negative log-likelihood of all targets, in nats per unit of output."""
    transposed: bool
    """Whether the weight is stored ``[a, b]``."""


# --- which maps -----------------------------------------------------------------------------


def linear_maps(host: Host, layer: int, stack: str = DECODER) -> list[str]:
    """List the linear maps of a block, by path inside the block."""
    block = host.model.get_submodule(host.layout.of(stack).blocks[layer])
    return [name for name, _ in linear_modules(block)]


def feed_forward(host: Host, layer: int) -> tuple[list[str], str]:
    """Return the paths, inside a block, of the feed-forward's maps into its hidden layer and out of it.

    The former are the linear maps beside the latter that have its width. Raises HostError where the
    block has no feed-forward that can be edited.
    """
    site = host.layout.site(layer)
    block = host.layout.blocks[layer]
    parent = site.name.removesuffix(".base_layer").rpartition(".")[0]
    beside = [
        f"{parent}.{name}"
        for name, module in linear_modules(host.model.get_submodule(parent))
        if name.removesuffix(".base_layer").count(".") == 0
        and f"{parent}.{name}" != site.name and _fills(module, site.d_in)
    ]  # fmt: skip
    inside = [name.removeprefix(f"{block}.") for name in (*beside, site.name)]
    return inside[:-1], inside[-1]


def named_maps(host: Host, layer: int, name: str) -> list[str]:
    """Return the paths, inside a block, of the maps that a name stands for: one of GROUPS, or the end of a path.

    Raises ConfigError for none.
    """
    maps = linear_maps(host, layer)
    if name in GROUPS:
        inner, outer = feed_forward(host, layer)
        found = {"mlp": [*inner, outer], "mlp_in": inner, "mlp_out": [outer]}[name]
    else:
        found = [path for path in maps if f".{path}".endswith(f".{name}")]
    if not found:
        raise ConfigError(unknown(name, [*GROUPS, *maps], f"linear map of layer {layer}"))
    return found


def own_layers(host: Host, entry: str, layers: tuple[int, ...] | None) -> tuple[int, ...]:
    """Return the layers of ``name@first-last``, else the common ones. Raises ConfigError for what is no range."""
    _, own, text = entry.partition("@")
    if not own:
        return layers or ()
    first, dash, last = text.partition("-")
    depth = len(host.layout.blocks)
    if first.isdecimal() and (last.isdecimal() if dash else not last):
        found = tuple(range(int(first), int(last or first) + 1))
        if found and found[-1] < depth:
            return found
    raise ConfigError(f"module {entry!r}: expected name@first-last with layers 0 to {depth - 1}")


def _fills(module: Any, width: int) -> bool:
    """Whether a map fills hidden layers of a width: one, or a gate and another in one weight."""
    return any(size % width == 0 for size in module.weight.shape)


# --- pairs ----------------------------------------------------------------------------------


def collect(
    host: Host,
    answers: Sequence[Answer],
    modules: Sequence[str],
    *,
    tokens: Tokens = "answer",
    batch_size: int = 10,
    on_rows: Callable[[int], None] = lambda done: None,
) -> dict[str, Pairs]:
    """Return, by module path, input and output gradient at tokens of prompts with answers.

    ``tokens``: those that predict the answer's, or all but the last. The loss of each is its own, so
    ``batch_size``, the rows run at once, changes nothing but rounding. Raises HostError for a module
    that computes anything but W x + b, once for every token.
    """
    done = 0

    def run(some: Sequence[Answer]) -> list[dict[str, Pairs]]:
        nonlocal done
        found = _run(host, some, modules, tokens)
        done += len(some)
        on_rows(done)
        return found

    with hooks.frozen(host.model):
        found = in_batches(answers, batch_size, run)
    return {name: _joined([row[name] for row in found]) for name in modules}


def _joined(rows: Sequence[Pairs]) -> Pairs:
    inputs, gradients = torch.cat([r.inputs for r in rows]), torch.cat([r.gradients for r in rows])
    return Pairs(inputs, gradients, rows[0].transposed)


def _run(
    host: Host, answers: Sequence[Answer], modules: Sequence[str], tokens: Tokens
) -> list[dict[str, Pairs]]:
    """Run some rows forward and back; one entry an answer."""
    # the answer's last token predicts nothing that is scored
    batch = host.batch([a.ids[:-1] for a in answers])
    starts = [a.start - 1 for a in answers]
    row, at = _places(starts, [len(a.target) for a in answers])
    goals = torch.tensor([t for a in answers for t in a.target], device=host.device)
    sizes = [len(a.ids) - 1 if tokens == "all" else len(a.target) for a in answers]
    line, place = _places([0] * len(answers) if tokens == "all" else starts, sizes)
    index = line * batch.ids.shape[1] + place
    taps = [_Tap(name, host.model.get_submodule(name), batch.ids.numel(), index) for name in modules]
    lift = FLOAT16_LIFT if host.dtype == torch.float16 else 1.0
    with torch.enable_grad(), ExitStack() as stack:
        for tap in taps:
            stack.enter_context(hooks.on_input(tap.module, tap.keep))
            stack.enter_context(hooks.on_output(tap.module, tap.lay))
        logits = host.forward_at(batch, row, at)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = functional.cross_entropy(wide, goals, reduction="sum")
        gradients = torch.autograd.grad(lift * loss, [tap.leaf() for tap in taps])
    found = [tap.pairs(g / lift, sizes) for tap, g in zip(taps, gradients, strict=True)]
    return [dict(zip(modules, parts, strict=True)) for parts in zip(*found, strict=True)]


def _places(first: Sequence[int], sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return row and position of so many tokens of each row, from a first one on."""
    row = [i for i, size in enumerate(sizes) for _ in range(size)]
    at = [start + j for start, size in zip(first, sizes, strict=True) for j in range(size)]
    return torch.tensor(row), torch.tensor(at)


class _Tap:
    """One linear map in one pass: reads its input, and adds to its output zeros that have a gradient."""

    def __init__(self, name: str, module: Any, count: int, index: Tensor) -> None:
        self.name, self.module = name, module
        self.count, self.index = count, index
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.zeros: list[Tensor] = []

    def _flat(self, tensor: Tensor) -> Tensor:
        """Return a tensor one row a token. Raises HostError where a module sees only some tokens."""
        flat = tensor.reshape(-1, tensor.shape[-1])
        if len(flat) != self.count or self.zeros:
            raise HostError(
                f"{self.name} does not run once for every token (routed or shared): choose other modules"
            )
        return flat

    def keep(self, inputs: Tensor) -> None:
        """Take the input."""
        self.inputs.append(self._flat(inputs.detach())[self.index.to(inputs.device)])

    def lay(self, output: Tensor) -> Tensor:
        """Return the output with zeros added at the chosen tokens."""
        flat, index = self._flat(output), self.index.to(output.device)
        said = flat[index].to(torch.promote_types(flat.dtype, torch.float32))  # [n, b]
        zeros = torch.zeros_like(said).requires_grad_(True)
        self.outputs.append(said.detach())
        self.zeros.append(zeros)
        # not in place: some families add to an output later on
        return flat.index_put((index,), (said + zeros).to(flat.dtype)).reshape(output.shape)

    def leaf(self) -> Tensor:
        """Return the zeros. Raises HostError for a module that the pass did not run."""
        if not self.zeros:
            raise HostError(f"{self.name} is not run by the model's forward pass: choose other modules")
        return self.zeros[0]

    def pairs(self, gradients: Tensor, sizes: Sequence[int]) -> list[Pairs]:
        """Return input and gradient, split into rows. Raises HostError for numbers that are not finite."""
        stored = _transposed(self.name, self.module, self.inputs[0], self.outputs[0])
        inputs = self.inputs[0].to(gradients.dtype)
        if not (torch.isfinite(gradients).all() and torch.isfinite(inputs).all()):
            raise HostError(
                f"input or gradient at {self.name} is not finite in {self.module.weight.dtype}: "
                "load the model in float32 or bfloat16"
            )
        split = zip(inputs.cpu().split(list(sizes)), gradients.cpu().split(list(sizes)), strict=True)
        return [Pairs(h, g, stored) for h, g in split]


def _transposed(name: str, module: Any, inputs: Tensor, outputs: Tensor) -> bool:
    """Say whether a weight is stored ``[a, b]``, by computing; for square ones the declared way first."""
    inputs, outputs = inputs[:8], outputs[:8]
    weight, bias = module.weight.detach(), getattr(module, "bias", None)
    declared = not isinstance(module, nn.Linear)
    for transposed in (declared, not declared):
        stored = weight.mT if transposed else weight
        # packed weights have a type of their own
        if (*stored.shape, stored.dtype) != (outputs.shape[-1], inputs.shape[-1], inputs.dtype):
            continue
        said = functional.linear(inputs, stored, None if bias is None else bias.detach()).to(outputs)
        error = (said - outputs).abs().max() / outputs.abs().max().clamp_min(1e-6)
        if not error > TOLERANCE:  # NaN passes: numbers that are not finite have a message of their own
            return transposed
    raise HostError(f"{name} does not compute W x + b (wrapped or packed weight): choose other modules")
