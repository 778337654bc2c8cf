"""Inputs of linear maps and loss gradients at their outputs, from one forward and one backward pass.

For a map y = W h + b the gradient with respect to W is the sum over tokens of g h^T, g the gradient
with respect to y. The pairs (h, g) hold the same information in a + b numbers per token; no tensor of
the size of W is formed. Gradients are taken with respect to zeros added to the chosen outputs at the
chosen tokens only, so the layers below the lowest of these maps need no graph.
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
from errata.host.host import Host
from errata.host.layout import DECODER, ENCODER, linear_modules
from errata.host.memory import in_batches
from errata.host.passes import Pass, Places
from errata.host.tokens import Answer
from errata.progress import ignore
from errata.registry import unknown

GROUPS = ("mlp", "mlp_in", "mlp_out")
Tokens = Literal["answer", "all"]
"""Tokens that are read: those that predict the answer, or all. Of what an encoder reads, and of what a classifier is
given, always all: no token there predicts an answer."""
Stacks = Literal["decoder", "encoder", "both"]
"""Stacks of an encoder-decoder; other models have one, called decoder."""

FLOAT16_LOSS_SCALE = 1024.0
"""Factor on the loss of a float16 model, divided out of its gradients: those below 6e-8 would underflow."""

CERTAIN = 1e-6
"""Least 1 - p that the gradient of a margin is divided by."""
TOLERANCE = 2e-2
"""Relative error up to which an output counts as W x + b; rounding in 16 bits stays below it."""


@dataclass(frozen=True)
class Pairs:
    """Inputs of one linear map and gradients at its output, one row per token; float32, on the CPU.

    float64 where the model is.
    """

    inputs: Tensor
    """h ``[n, a]``."""
    gradients: Tensor
    """g ``[n, b]``: of the summed negative log-likelihood of all targets, in nats per unit of output."""
    transposed: bool
    """Whether the weight is stored ``[a, b]``."""
    owner: Tensor
    """Which answer each row belongs to, int64 ``[n]``, in ascending order."""


# --- which maps -----------------------------------------------------------------------------


def linear_maps(host: Host, layer: int, stack: str = DECODER) -> list[str]:
    """List the linear maps of a block, by path inside the block."""
    block = host.model.get_submodule(host.layout.of(stack).blocks[layer])
    return [name for name, _ in linear_modules(block)]


def feed_forward(host: Host, layer: int, stack: str = DECODER) -> tuple[list[str], str]:
    """Return the paths, inside a block, of the feed-forward's maps into its hidden layer and out of it.

    The former are the linear maps of the same module that have the latter's width. Raises HostError where the
    block has no feed-forward that can be edited.
    """
    layout = host.layout.of(stack)
    site = layout.site(layer)
    if site.experts:
        raise HostError(
            f"layer {layer} stacks {site.experts} experts in {site.parameter}, and this needs plain linear maps, each "
            "a layer of its own: name other modules, such as those of its attention, or layers without stacked experts"
        )
    block = layout.blocks[layer]
    parent = site.name.removesuffix(".base_layer").rpartition(".")[0]
    siblings = [
        f"{parent}.{name}"
        for name, module in linear_modules(host.model.get_submodule(parent))
        if name.removesuffix(".base_layer").count(".") == 0
        and f"{parent}.{name}" != site.name and _fills(module, site.d_in)
    ]  # fmt: skip
    inside = [name.removeprefix(f"{block}.") for name in (*siblings, site.name)]
    return inside[:-1], inside[-1]


def named_maps(host: Host, layer: int, name: str, stack: str = DECODER) -> list[str]:
    """Return the paths, inside a block, of the maps that a name selects: one of GROUPS, or the end of a path.

    Raises ConfigError for a name that selects none.
    """
    maps = linear_maps(host, layer, stack)
    if name in GROUPS:
        inner, outer = feed_forward(host, layer, stack)
        paths = {"mlp": [*inner, outer], "mlp_in": inner, "mlp_out": [outer]}[name]
    else:
        paths = [path for path in maps if f".{path}".endswith(f".{name}")]
    if not paths:
        raise ConfigError(unknown(name, [*GROUPS, *maps], f"linear map of layer {layer}"))
    return paths


def own_layers(
    host: Host, entry: str, layers: tuple[int, ...] | None, stack: str = DECODER
) -> tuple[int, ...]:
    """Return the layers of ``name@first-last``, else ``layers``. Raises ConfigError for an invalid range."""
    _, own, text = entry.partition("@")
    if not own:
        return layers or ()
    first, dash, last = text.partition("-")
    depth = len(host.layout.of(stack).blocks)
    if first.isdecimal() and (last.isdecimal() if dash else not last):
        layer_range = tuple(range(int(first), int(last or first) + 1))
        if layer_range and layer_range[-1] < depth:
            return layer_range
    raise ConfigError(f"module {entry!r}: expected name@first-last with layers 0 to {depth - 1}")


def selected_maps(
    host: Host, entries: Sequence[str], layers: tuple[int, ...] | None, stack: str = DECODER
) -> list[str]:
    """Return the paths of the maps that entries select, each once, in the order of the model.

    ``entries``: names as of :func:`named_maps`, with layers of their own as of :func:`own_layers`, or in ``layers``.
    """
    blocks = host.layout.of(stack).blocks
    names = {
        f"{blocks[layer]}.{inside}"
        for entry in entries
        for layer in own_layers(host, entry, layers, stack)
        for inside in named_maps(host, layer, entry.partition("@")[0], stack)
    }
    return [name for name, _ in host.model.named_modules() if name in names]


def _fills(module: Any, width: int) -> bool:
    """Return whether a map's output is a hidden layer of this width, or a gate and a hidden layer in one weight."""
    return any(size % width == 0 for size in module.weight.shape)


# --- pairs ----------------------------------------------------------------------------------


def collect(
    host: Host,
    answers: Sequence[Answer],
    modules: Sequence[str],
    *,
    tokens: Tokens = "answer",
    batch_size: int = 10,
    on_rows: Callable[[int], None] = ignore,
) -> dict[str, Pairs]:
    """Return, by module path, inputs and output gradients at tokens of prompts with answers.

    ``tokens``: the positions that predict the answer, or all but the last. A masked model reads a prompt once for every
    token of its answer, and each reading counts. Losses are summed, never averaged over rows, so ``batch_size``, the
    rows run at once, changes nothing but rounding. Raises HostError for a module that does not compute W x + b exactly
    once per token.
    """
    rows = collect_rows(host, answers, modules, tokens=tokens, batch_size=batch_size, on_rows=on_rows)
    return {name: _concatenate([row[name] for row in rows]) for name in modules}


def collect_rows(
    host: Host,
    answers: Sequence[Answer],
    modules: Sequence[str],
    *,
    tokens: Tokens = "answer",
    margin: bool = False,
    batch_size: int = 10,
    on_rows: Callable[[int], None] = ignore,
) -> list[dict[str, Pairs]]:
    """Return the same for each prompt with its answer apart.

    ``margin``: gradients of -log(p / (1 - p)), summed over answer tokens, in place of -log p; they do not vanish where
    the answer is certain.
    """
    finished = 0

    def run(batch: Sequence[Answer]) -> list[dict[str, Pairs]]:
        nonlocal finished
        rows = _run_batch(host, batch, modules, tokens, margin)
        finished += len(batch)
        on_rows(finished)
        return rows

    with hooks.frozen(host.model):
        return in_batches(answers, batch_size, run)


def _concatenate(rows: Sequence[Pairs]) -> Pairs:
    inputs, gradients = torch.cat([r.inputs for r in rows]), torch.cat([r.gradients for r in rows])
    owner = torch.cat([torch.full((len(row.inputs),), i) for i, row in enumerate(rows)])
    return Pairs(inputs, gradients, rows[0].transposed, owner)


def _run_batch(
    host: Host, answers: Sequence[Answer], modules: Sequence[str], tokens: Tokens, margin: bool = False
) -> list[dict[str, Pairs]]:
    """Run forward and backward passes over some answers; return pairs by module, one entry per answer."""
    # the answer's last token predicts nothing that is scored
    batch = host.batch([a.ids[:-1] for a in answers])
    row, at = _places([a.start - 1 for a in answers], [len(a.target) for a in answers])
    targets = torch.tensor([t for a in answers for t in a.target], device=host.device)
    request = host.as_pass(batch, at=(row, at))
    reads = _reads(host, request, row, len(answers), tokens)
    taps = [_Tap(name, host.model.get_submodule(name), reads[_stack_of(host, name)]) for name in modules]
    loss_scale = FLOAT16_LOSS_SCALE if host.dtype == torch.float16 else 1.0
    with torch.enable_grad(), ExitStack() as stack:
        for tap in taps:
            stack.enter_context(hooks.on_input(tap.module, tap.record_input))
            stack.enter_context(hooks.on_output(tap.module, tap.add_zeros))
        logits = host.run(request).logits
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = functional.cross_entropy(wide, targets, reduction="none")
        # d log(p / (1 - p)) = d log p / (1 - p)
        scales = -1 / torch.expm1(-losses.detach()).clamp_max(-CERTAIN) if margin else 1.0
        loss = (scales * losses).sum()
        gradients = torch.autograd.grad(loss_scale * loss, [tap.leaf() for tap in taps])
    by_module = [tap.pairs(g / loss_scale) for tap, g in zip(taps, gradients, strict=True)]
    return [dict(zip(modules, row_pairs, strict=True)) for row_pairs in zip(*by_module, strict=True)]


def _places(first: Sequence[int], sizes: Sequence[int]) -> Places:
    """Return row and position of ``sizes[i]`` consecutive tokens of each row i, starting at ``first[i]``."""
    row = [i for i, size in enumerate(sizes) for _ in range(size)]
    at = [start + j for start, size in zip(first, sizes, strict=True) for j in range(size)]
    return torch.tensor(row), torch.tensor(at)


@dataclass(frozen=True)
class _Read:
    """Which tokens of what a stack is given in a pass are read."""

    count: int
    """Tokens that it is given, padding too."""
    index: Tensor
    """Those that are read, int64 ``[n]``, in the order of the answers."""
    sizes: list[int]
    """How many of them belong to each answer."""


def _reads(host: Host, request: Pass, row: Tensor, answers: int, tokens: Tokens) -> dict[str, _Read]:
    """Return what is read of each stack; ``row``: the answer of each token that is predicted ``[t]``."""

    def read(mask: Tensor, owner: Tensor, places: Places | None) -> _Read:
        rows, columns = mask.cpu().nonzero(as_tuple=True) if places is None else places
        sizes = torch.bincount(owner[rows], minlength=answers).tolist()
        return _Read(mask.numel(), rows * mask.shape[1] + columns, sizes)

    assert request.mask is not None
    owner = row if host.fills else torch.arange(answers)  # where places are filled, each has a row of its own
    found = {DECODER: read(request.mask, owner, request.at if tokens == "answer" else None)}
    if request.source is not None:
        found[ENCODER] = read(request.source[1], torch.arange(answers), None)
    return found


def _stack_of(host: Host, name: str) -> str:
    """Return which stack a module is in."""
    encoder = host.layout.encoder
    return (
        ENCODER
        if encoder is not None and name.startswith(tuple(f"{b}." for b in encoder.blocks))
        else DECODER
    )


class _Tap:
    """One linear map in one pass: records its input, and adds zeros that require a gradient to its output."""

    def __init__(self, name: str, module: Any, read: _Read) -> None:
        self.name, self.module, self.read = name, module, read
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.zeros: list[Tensor] = []

    def _flat(self, tensor: Tensor) -> Tensor:
        """Return a tensor as one row per token. Raises HostError where a module sees only some tokens."""
        flat = tensor.reshape(-1, tensor.shape[-1])
        if len(flat) != self.read.count or self.zeros:
            raise HostError(
                f"{self.name} does not run once for every token (routed or shared): choose other modules"
            )
        return flat

    def record_input(self, inputs: Tensor) -> None:
        """Record the input at the chosen tokens."""
        self.inputs.append(self._flat(inputs.detach())[self.read.index.to(inputs.device)])

    def add_zeros(self, output: Tensor) -> Tensor:
        """Return the output with zeros added at the chosen tokens."""
        flat, index = self._flat(output), self.read.index.to(output.device)
        outputs_at = flat[index].to(torch.promote_types(flat.dtype, torch.float32))  # [n, b]
        zeros = torch.zeros_like(outputs_at).requires_grad_(True)
        self.outputs.append(outputs_at.detach())
        self.zeros.append(zeros)
        # not in place: some families modify an output in place afterwards
        return flat.index_put((index,), (outputs_at + zeros).to(flat.dtype)).reshape(output.shape)

    def leaf(self) -> Tensor:
        """Return the added zeros. Raises HostError for a module that the pass did not run."""
        if not self.zeros:
            raise HostError(f"{self.name} is not run by the model's forward pass: choose other modules")
        return self.zeros[0]

    def pairs(self, gradients: Tensor) -> list[Pairs]:
        """Return inputs and gradients, split by answer. Raises HostError for non-finite numbers."""
        transposed = _is_transposed(self.name, self.module, self.inputs[0], self.outputs[0])
        inputs = self.inputs[0].to(gradients.dtype)
        if not (torch.isfinite(gradients).all() and torch.isfinite(inputs).all()):
            raise HostError(
                f"input or gradient at {self.name} is not finite in {self.module.weight.dtype}: "
                "load the model in float32 or bfloat16"
            )
        sizes = self.read.sizes
        rows = zip(inputs.cpu().split(sizes), gradients.cpu().split(sizes), strict=True)
        return [Pairs(h, g, transposed, torch.zeros(len(h), dtype=torch.long)) for h, g in rows]


def _is_transposed(name: str, module: Any, inputs: Tensor, outputs: Tensor) -> bool:
    """Return whether a weight is stored ``[a, b]``: computes W x + b, in the module type's usual layout first."""
    inputs, outputs = inputs[:8], outputs[:8]
    weight, bias = module.weight.detach(), getattr(module, "bias", None)
    likely_transposed = not isinstance(module, nn.Linear)
    for transposed in (likely_transposed, not likely_transposed):
        matrix = weight.mT if transposed else weight
        # packed weights have another dtype
        if (*matrix.shape, matrix.dtype) != (outputs.shape[-1], inputs.shape[-1], inputs.dtype):
            continue
        shape = functional.linear(inputs, matrix, None if bias is None else bias.detach()).to(outputs)
        error = (shape - outputs).abs().max() / outputs.abs().max().clamp_min(1e-6)
        if not error > TOLERANCE:  # NaN passes: non-finite numbers raise an error of their own
            return transposed
    raise HostError(f"{name} does not compute W x + b (wrapped or packed weight): choose other modules")
