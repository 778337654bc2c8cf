"""Find the sites of a model by structure: modules, shapes and one traced forward. No family names.

* blocks: the longest list of like modules that carries most of the parameters;
* within a block, a child *mixes* positions if changing one position's input changes another's
  output: that is attention. What remains is position-wise: the feed-forward;
* a site is the last linear map of such a part that writes into the residual width, whatever it is
  called, wherever it sits; its orientation is read off numerically, so that square matrices and
  transposed storage need no special case;
* a packed weight cannot be read, so there the module itself is run: what it computes must be linear.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from errata.errors import HostError
from errata.host import hooks, locking
from errata.host.placement import is_packed, packed

Part = Literal["mlp_out", "attn_out"]


@dataclass(frozen=True)
class Site:
    """A linear map ``y = W x + b`` of a model that writes into the residual stream."""

    layer: int
    part: Part
    name: str
    """Dotted path of the module."""
    d_in: int
    d_out: int
    transposed: bool
    """Whether the weight is stored ``[d_in, d_out]``; False for a packed one, which is never written."""
    packed: bool = False
    """Whether the weight is quantised: it acts as ``[d_out, d_in]`` and is edited beside, not written."""

    @property
    def parameter(self) -> str:
        """Dotted path of the weight, also where a packed module calls it otherwise."""
        return f"{self.name}.weight"


@dataclass(frozen=True)
class Layout:
    """Where things are in a model."""

    blocks: tuple[str, ...]
    """Dotted paths of the blocks, from the input upwards."""
    width: int
    """Residual width d."""
    mlp_out: tuple[Site | None, ...]
    """Per block, the feed-forward's output projection; None where it cannot be edited."""
    attn_out: tuple[Site | None, ...]
    """Per block, attention's output projection."""
    adds_directly: bool
    """Whether what the feed-forward's projection writes reaches the residual stream unchanged; False
    where a norm stands between."""
    refused: str | None
    """Why feed-forward sites are missing."""

    def site(self, layer: int, part: Part = "mlp_out") -> Site:
        """Return a site. Raises HostError for a layer or part that is not there."""
        if not 0 <= layer < len(self.blocks):
            raise HostError(f"layer {layer} does not exist: the model has layers 0 to {len(self.blocks) - 1}")
        found = (self.mlp_out if part == "mlp_out" else self.attn_out)[layer]
        if found is None:
            raise HostError(f"layer {layer} has no editable {part}: {self.refused or 'none was found'}")
        return found

    @property
    def sites(self) -> list[Site]:
        """All editable sites."""
        return [site for site in (*self.mlp_out, *self.attn_out) if site is not None]


@locking.exclusive
def discover(model: nn.Module, probe: dict[str, Tensor]) -> Layout:
    """Find the layout of a model.

    ``probe`` is a batch of at least three token positions to run once. Raises HostError when the
    model has no list of blocks.
    """
    path, blocks = _blocks(model)
    trace = _Trace(model, blocks)
    with torch.no_grad(), hooks.frozen(model), trace.recording():
        model(**probe, use_cache=False)
    first = trace.block_inputs.get(0)
    if first is None:
        raise HostError("the model's blocks were not run by its forward pass; it has no known layout")
    width = first.shape[-1]
    mlp, attn, reasons = [], [], []
    with torch.no_grad(), hooks.frozen(model):
        for layer in range(len(blocks)):
            feed, mixing, reason = _sites(layer, f"{path}.{layer}", trace, width)
            mlp.append(feed)
            attn.append(mixing)
            reasons += [reason] if reason else []
        direct = _adds_directly(model, blocks, mlp, probe)
    return Layout(
        blocks=tuple(f"{path}.{i}" for i in range(len(blocks))),
        width=width,
        mlp_out=tuple(mlp),
        attn_out=tuple(attn),
        adds_directly=direct,
        refused=reasons[0] if reasons else None,
    )


def _blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    found = [
        (sum(p.numel() for p in module.parameters()), name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and len({type(child) for child in module}) == 1
        and any(_is_linear(leaf) for leaf in module[0].modules())
    ]
    if not found:
        raise HostError("found no list of blocks in the model: it has no editable site")
    # a mixture's list of experts lies inside a block, so the outermost list holds more parameters
    _, name, module = max(found, key=lambda item: item[0])
    return name, module


def _is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    wide = isinstance(weight, Tensor) and weight.ndim == 2
    return (wide or is_packed(module)) and not isinstance(module, nn.Embedding)


@torch.no_grad()
def linear_map(module: Any, d_in: int, like: Tensor) -> tuple[int, bool] | None:
    """Return d_out and whether the weight is stored ``[d_in, d_out]``, if a module computes W x + b.

    Runs it on random inputs of the dtype and device of ``like``, past all hooks. A packed weight has no
    stored orientation: False. None for any other module, and where inputs are not ``d_in`` wide.
    """
    generator = torch.Generator().manual_seed(0)
    one, two = torch.randn(2, 4, d_in, generator=generator)
    inputs = torch.stack([one, two, one + two, torch.zeros_like(one)]).to(like)  # [4, 4, d_in]
    try:
        outputs = module.forward(inputs)
    except (RuntimeError, TypeError, ValueError, IndexError, AssertionError):
        return None  # takes something else
    if not isinstance(outputs, Tensor) or outputs.shape[:-1] != inputs.shape[:-1]:
        return None
    weight = getattr(module, "weight", None)
    if not is_packed(module) and isinstance(weight, Tensor) and weight.ndim == 2 and not weight.is_meta:
        stored = _stored(module, inputs, outputs)
        return None if stored is None else (outputs.shape[-1], stored)
    said = outputs.float()
    gap = (said[0] + said[1] - said[2] - said[3]).abs().max()
    if not float(gap) < 5e-2 * float(said.abs().max()):  # eight-bit inputs are linear to a per cent
        return None
    return outputs.shape[-1], not (is_packed(module) or isinstance(module, nn.Linear))


def _stored(module: Any, inputs: Tensor, outputs: Tensor) -> bool | None:
    """Whether a weight is stored ``[d_in, d_out]``, found by computing it both ways; None for neither."""
    weight, bias = module.weight, getattr(module, "bias", None)
    for transposed in _orientations(module):
        stored = weight.mT if transposed else weight
        if stored.shape == (outputs.shape[-1], inputs.shape[-1]):
            said = functional.linear(inputs.float(), stored.float(), None if bias is None else bias.float())
            scale = outputs.float().abs().max().clamp_min(1e-6)
            if float((said - outputs.float()).abs().max() / scale) < 2e-2:
                return transposed
    return None


class _Trace:
    """What each linear map and each direct child of a block saw and said in one forward."""

    def __init__(self, model: nn.Module, blocks: nn.ModuleList) -> None:
        self.blocks = blocks
        self.block_inputs: dict[int, Tensor] = {}
        self.calls: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self.io: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self.order: list[nn.Module] = []

    def recording(self) -> Any:
        from contextlib import ExitStack

        stack = ExitStack()
        for layer, block in enumerate(self.blocks):
            stack.enter_context(hooks.on_input(block, self._keep_input(layer)))
            for child in block.modules():
                handle = child.register_forward_hook(self._record, with_kwargs=True)
                stack.callback(handle.remove)
        return stack

    def _keep_input(self, layer: int) -> Any:
        def keep(hidden: Tensor) -> None:
            self.block_inputs[layer] = hidden

        return keep

    def _record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        self.calls[module] = (args, kwargs)
        if _is_linear(module) and args and isinstance(out, Tensor):
            self.io[module] = (args[0].clone(), out.clone())  # some families add in place afterwards
            self.order.append(module)


def _sites(layer: int, path: str, trace: _Trace, width: int) -> tuple[Site | None, Site | None, str | None]:
    """Find a block's feed-forward and attention output projections, or say why there is none."""
    block: Any = trace.blocks[layer]
    mixing = {child for _, child in block.named_children() if _mixes(child, trace)}
    under_mixing = {leaf for child in mixing for leaf in child.modules()}
    names = {module: f"{path}.{name}" for name, module in block.named_modules()}
    linear = [m for m in trace.order if m in names]
    attn = [m for m in linear if m in under_mixing and _writes(m, trace, width)]
    feed = [m for m in linear if m not in under_mixing and _writes(m, trace, width)]
    stacked = [n for n, p in block.named_parameters() if p.ndim == 3 or (p.ndim > 3 and packed(p))]
    attn_site = _site(attn[-1], layer, "attn_out", names, trace) if attn else None
    if stacked:
        return None, attn_site, f"{path}.{stacked[0]} holds stacked experts, not one weight"
    if len({id(m) for m in feed}) > 1 and _is_mixture(block, feed):
        return None, attn_site, f"{path} routes between several experts, not one weight"
    if not feed:
        odd = _unreadable(block, names)
        return None, attn_site, odd or f"{path} has no linear map into the residual width {width}"
    site = _site(feed[-1], layer, "mlp_out", names, trace)
    if site is None:
        return None, attn_site, f"{names[feed[-1]]} does not compute W x + b, or passes no gradient on"
    return site, attn_site, None


def _unreadable(block: nn.Module, names: dict[nn.Module, str]) -> str | None:
    for name, parameter in block.named_parameters():
        if not parameter.dtype.is_floating_point:
            return f"{names[block]}.{name} is packed as {str(parameter.dtype).removeprefix('torch.')}"
    return None


def _is_mixture(block: nn.Module, feed: list[Any]) -> bool:
    """Whether the candidates are siblings in a list, as experts are."""
    lists = [m for m in block.modules() if isinstance(m, nn.ModuleList)]
    return any(sum(leaf in set(feed) for leaf in group.modules()) > 1 for group in lists)


def _writes(module: Any, trace: _Trace, width: int) -> bool:
    return trace.io[module][1].shape[-1] == width


def _mixes(child: nn.Module, trace: _Trace) -> bool:
    """Whether changing the first position's input changes what a module says at the last."""
    if child not in trace.calls or not any(_is_linear(leaf) for leaf in child.modules()):
        return False
    args, kwargs = trace.calls[child]
    pool = [*args, *kwargs.values()]
    hidden = next((v for v in pool if isinstance(v, Tensor) and v.is_floating_point() and v.ndim >= 2), None)
    if hidden is None:
        return False
    changed = hidden.clone()
    # not a multiple of the old value: a norm in front would undo that
    changed[..., 0, :] = changed[..., 0, :].flip(-1) + 1.0

    def last(value: Tensor) -> Tensor:
        swap = [value if v is hidden else v for v in args]
        keyed = {k: value if v is hidden else v for k, v in kwargs.items()}
        out = hooks.first_tensor(child(*swap, **keyed))
        return out.reshape(*hidden.shape[:-1], -1)[..., -1, :]

    return not torch.equal(last(hidden), last(changed))


def _site(module: Any, layer: int, part: Part, names: dict[nn.Module, str], trace: _Trace) -> Site | None:
    """Describe a linear map, with its orientation found by computing it both ways."""
    inputs, outputs = trace.io[module]
    d_in, d_out = inputs.shape[-1], outputs.shape[-1]
    if is_packed(module):
        found = linear_map(module, d_in, inputs)
        if found is None or found[0] != d_out or not _passes_gradients(module, inputs):
            return None
        return Site(layer, part, names[module], d_in, d_out, transposed=False, packed=True)
    stored = None if module.weight.is_meta else _stored(module, inputs, outputs)
    return None if stored is None else Site(layer, part, names[module], d_in, d_out, stored)


def _passes_gradients(module: nn.Module, inputs: Tensor) -> bool:
    """Whether a packed module's output depends on its input also for autograd; some kernels cut that."""
    with torch.enable_grad():
        leaf = inputs.detach().clone().requires_grad_(True)
        said = module.forward(leaf)
        if not said.requires_grad:
            return False
        (gradient,) = torch.autograd.grad(said.float().sum(), leaf, allow_unused=True)
    return gradient is not None and bool(gradient.abs().max() > 0)


def _orientations(module: nn.Module) -> Iterator[bool]:
    """Try the declared orientation first; for symmetric weights both would pass."""
    declared = not isinstance(module, nn.Linear)
    yield declared
    yield not declared


def _adds_directly(
    model: nn.Module, blocks: nn.ModuleList, mlp: list[Site | None], probe: dict[str, Tensor]
) -> bool:
    """Whether adding to the projection's output adds the same to the block's output."""
    site = next((s for s in mlp if s is not None), None)
    if site is None:
        return False
    block, seen = blocks[site.layer], []
    # as large as the stream, whose own rounding would drown a small shift in 16 bits
    shift = torch.linspace(-1, 1, site.d_out)

    def note(hidden: Tensor) -> None:
        seen.append(hidden.float())

    def push(hidden: Tensor) -> Tensor:
        return hidden + (shift * unit).to(hidden)

    with hooks.on_output(block, note):
        model(**probe, use_cache=False)
        unit = float(seen[0].square().mean().sqrt())
        with hooks.on_output(model.get_submodule(site.name), push):
            model(**probe, use_cache=False)
    moved = (seen[1] - seen[0]) / unit
    # the median: a few entries of the stream may be huge, and rounded accordingly
    return bool((moved - shift.to(moved)).abs().median() < 0.05)
