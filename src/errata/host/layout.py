"""Find the sites of a model by structure: modules, shapes and one traced forward. No family names.

* blocks: the list of modules that carries most of the parameters; they need not be of one class;
* within a block, a child *mixes* positions if changing one position's input changes another's
  output: that is attention, recurrence or convolution. What remains is position-wise: the feed-forward;
* experts are matrices stacked in one parameter, or siblings in a list; a dense part beside them, which
  every token runs through, is a site like any other. Stacked experts are one linear map of block keys, see
  :mod:`errata.host.experts`, and the feed-forward's site where no dense part stands beside them;
* a layer with an adapter is the layer below the adapter;
* a site is the last linear map of such a part that writes into the residual width, whatever it is
  called, wherever it sits; its orientation is read off numerically, so that square matrices and
  transposed storage need no special case;
* of a model whose blocks have one part only, which mixes positions, as Mamba's do, the site is that part's
  output projection;
* a packed weight cannot be read, so there the module itself is run: what it computes must be linear.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from errata.errors import HostError
from errata.host import hooks, locking
from errata.host.experts import stack_of
from errata.host.memory import ran_out
from errata.host.passes import Pass, run
from errata.host.placement import is_packed, packed, sharing

Part = Literal["mlp_out", "attn_out", "experts"]
DECODER, ENCODER = "decoder", "encoder"
ONLY_MIXES = "has no feed-forward: all of it mixes tokens, as attention or a recurrence does"


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
    leaf: str = "weight"
    """Name of the weight in its module."""
    experts: int = 0
    """How many experts the weight stacks; the site is then a map of block keys, ``d_in`` entries in as many blocks,
    and the weight is stored ``[experts, d_out, m]``, or transposed ``[experts, m, d_out]``. 0: none, a plain matrix."""

    @property
    def parameter(self) -> str:
        """Dotted path of the weight, also where a packed module calls it otherwise."""
        return f"{self.name}.{self.leaf}"


@dataclass(frozen=True)
class Layout:
    """Where things are in a model, or in one stack of it."""

    blocks: tuple[str, ...]
    """Dotted paths of the blocks, from the input upwards."""
    width: int
    """Residual width d."""
    mlp_out: tuple[Site | None, ...]
    """Per block, the feed-forward's output projection, or the mixer's in a model without feed-forwards; None where it
    cannot be edited."""
    attn_out: tuple[Site | None, ...]
    """Per block, attention's output projection."""
    adds_directly: bool
    """Whether what the feed-forward's projection writes reaches the residual stream unchanged; False
    where a norm comes between."""
    refused: str | None
    """Why feed-forward sites are missing."""
    stack: str = DECODER
    """Name of the stack that the blocks are of; a model of one stack calls it ``decoder``, also if it is an encoder."""
    encoder: Layout | None = None
    """The other stack of an encoder-decoder."""
    experts: tuple[Site | None, ...] = ()
    """Per block, its stacked experts, also where a dense part beside them is the feed-forward's site; empty where no
    block has any."""

    def of(self, stack: str) -> Layout:
        """Return the layout of a stack by name. Raises HostError where the model has no such stack."""
        if stack == self.stack:
            return self
        if self.encoder is not None and stack == self.encoder.stack:
            return self.encoder
        raise HostError(
            f"the model has no {stack} beside its {self.stack}" if self.encoder is None
            else f"unknown stack {stack!r}: the model has {self.stack} and {self.encoder.stack}"
        )  # fmt: skip

    def site(self, layer: int, part: Part = "mlp_out") -> Site:
        """Return a site. Raises HostError for a layer or part that is not there."""
        if not 0 <= layer < len(self.blocks):
            raise HostError(f"layer {layer} does not exist: the model has layers 0 to {len(self.blocks) - 1}")
        sites = {"mlp_out": self.mlp_out, "attn_out": self.attn_out, "experts": self.experts}[part]
        site = sites[layer] if sites else None
        if site is None:
            raise HostError(f"layer {layer} has no editable {part}: {self.refused or 'none was found'}")
        return site

    def feed_forward(self, layer: int) -> str:
        """Return the path of a block's feed-forward as a whole, whose input is as wide as the residual stream.

        Raises HostError for a layer that is not there, and where the feed-forward is no module of its own.
        """
        path = self.site(layer).name
        inside = path.removeprefix(f"{self.blocks[layer]}.").split(".")[:-1]
        if not inside:
            raise HostError(
                f"the feed-forward of layer {layer} is not a module of its own, so nothing can act on it as a whole"
            )
        return f"{self.blocks[layer]}.{inside[0]}"

    @property
    def sites(self) -> list[Site]:
        """All editable sites."""
        apart = [site for site in self.experts if site is not None and site.part == "experts"]
        own = [site for site in (*self.mlp_out, *self.attn_out, *apart) if site is not None]
        return own if self.encoder is None else [*own, *self.encoder.sites]


@locking.exclusive
def discover(model: nn.Module, probe: Pass) -> Layout:
    """Find the layout of a model.

    ``probe``: at least three token positions to run; with a source of another length, the model is an
    encoder-decoder and both stacks are found. Raises HostError when the model has no list of blocks.
    """
    if probe.source is None:
        return _discover(model, _language_model(model), probe, DECODER)
    inner: Any = model
    stacks = {name: getattr(inner, f"get_{name}", None) for name in (ENCODER, DECODER)}
    parts: dict[str, Any] = {name: get() for name, get in stacks.items() if get is not None}
    if not all(isinstance(parts.get(name), nn.Module) for name in stacks):
        raise HostError(f"{type(model).__name__} does not say which of its modules are encoder and decoder")
    encoder, decoder = (_discover(model, parts[name], probe, name) for name in (ENCODER, DECODER))
    return replace(decoder, encoder=encoder)


def _language_model(model: nn.Module) -> nn.Module:
    """Return the part that reads and continues text, where a model has other towers beside it, as for images."""
    outer: Any = model
    config = getattr(model, "config", None)
    whole = getattr(config, "get_text_config", None)
    if whole is None or whole(decoder=True) is config:
        return model
    inner = outer.get_decoder() if hasattr(outer, "get_decoder") else None
    return inner if isinstance(inner, nn.Module) else model


def _discover(model: nn.Module, part: nn.Module, probe: Pass, stack: str) -> Layout:
    """Find the layout of the blocks inside a part of the model."""
    above = next((name for name, module in model.named_modules() if module is part), "")
    path, blocks = _blocks(part)
    path = f"{above}.{path}" if above else path
    trace = _Trace(model, blocks)
    with torch.no_grad(), hooks.frozen(model), trace.recording():
        run(model, probe)
    if probe.source is not None and stack == DECODER:
        trace.source = probe.source[0].shape[1]
    first = trace.block_inputs.get(0)
    if first is None:
        raise HostError("the model's blocks were not run by its forward pass; it has no known layout")
    width = first.shape[-1]
    mlp: list[Site | None] = []
    attn: list[Site | None] = []
    experts: list[Site | None] = []
    reasons: list[str] = []
    with torch.no_grad(), hooks.frozen(model):
        for layer in range(len(blocks)):
            feed, mixing, stacked, reason = _sites(layer, f"{path}.{layer}", trace, width)
            mlp.append(feed)
            experts.append(stacked)
            attn.append(mixing)
            reasons += [reason] if reason else []
        if all(attn) and all(reason.endswith(ONLY_MIXES) for reason in reasons) and not any(mlp):
            # the one part of a block writes all that the block adds, what is known of a token included
            mlp, attn = [site and replace(site, part="mlp_out") for site in attn], [None] * len(mlp)
            reasons = []
        for sites in (mlp, attn):
            reasons += _drop_shared(model, sites)
        direct = _adds_directly(model, blocks, mlp, probe)
    return Layout(
        blocks=tuple(f"{path}.{i}" for i in range(len(blocks))),
        width=width,
        mlp_out=tuple(mlp),
        attn_out=tuple(attn),
        adds_directly=direct,
        refused=reasons[0] if reasons else None,
        stack=stack,
        experts=tuple(experts) if any(experts) else (),
    )


def _blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    lists = [
        (sum(p.numel() for p in module.parameters()), name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and all(any(_is_linear(leaf) for leaf in child.modules()) for child in module)
    ]
    if not lists:
        raise HostError("found no list of blocks in the model: it has no editable site")
    # a mixture's list of experts lies inside a block, so the outermost list holds more parameters
    _, name, module = max(lists, key=lambda item: item[0])
    return name, module


def _is_linear(module: nn.Module) -> bool:
    """Whether a module has a matrix of its own; one that is computed from others cannot be written."""
    weight = module._parameters.get("weight")
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
    except (RuntimeError, TypeError, ValueError, IndexError, AssertionError) as error:
        if ran_out(error):
            raise
        return None  # takes something else
    if not isinstance(outputs, Tensor) or outputs.shape[:-1] != inputs.shape[:-1]:
        return None
    weight = getattr(module, "weight", None)
    if not is_packed(module) and isinstance(weight, Tensor) and weight.ndim == 2 and not weight.is_meta:
        stored = _stored(module, inputs, outputs)
        return None if stored is None else (outputs.shape[-1], stored)
    values = outputs.float()
    gap = (values[0] + values[1] - values[2] - values[3]).abs().max()
    if not float(gap) < 5e-2 * float(values.abs().max()):  # eight-bit inputs are linear to a per cent
        return None
    return outputs.shape[-1], not (is_packed(module) or isinstance(module, nn.Linear))


def stored_transposed(module: nn.Module) -> bool | None:
    """Whether a linear layer stores its weight ``[d_in, d_out]``, as GPT-2's do; None for any other module."""
    from transformers.pytorch_utils import Conv1D

    return True if isinstance(module, Conv1D) else False if isinstance(module, nn.Linear) else None


def _stored(module: Any, inputs: Tensor, outputs: Tensor) -> bool | None:
    """Whether a weight is stored ``[d_in, d_out]``, found by computing it both ways; None for neither."""
    weight, bias = module.weight, getattr(module, "bias", None)
    for transposed in _orientations(module):
        stored = weight.mT if transposed else weight
        if stored.shape == (outputs.shape[-1], inputs.shape[-1]):
            product = functional.linear(
                inputs.float(), stored.float(), None if bias is None else bias.float()
            )
            scale = outputs.float().abs().max().clamp_min(1e-6)
            if float((product - outputs.float()).abs().max() / scale) < 2e-2:
                return transposed
    return None


class _Trace:
    """What each linear map and each direct child of a block read and returned in one forward pass."""

    def __init__(self, model: nn.Module, blocks: nn.ModuleList) -> None:
        self.blocks = blocks
        self.block_inputs: dict[int, Tensor] = {}
        self.calls: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self.io: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self.order: list[nn.Module] = []
        self.positions = 0
        """How many tokens were run."""
        self.source: int | None = None
        """How many tokens an encoder read whose states these blocks look at."""

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
            self.positions = hidden.shape[:-1].numel()

        return keep

    def _record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        self.calls[module] = (args, kwargs)
        if _is_linear(module) and args and isinstance(out, Tensor):
            self.io[module] = (args[0].clone(), out.clone())  # some families add in place afterwards
            self.order.append(module)


def _sites(
    layer: int, path: str, trace: _Trace, width: int
) -> tuple[Site | None, Site | None, Site | None, str | None]:
    """Find a block's feed-forward and attention output projections and its experts, or why there is no feed-forward."""
    block: Any = trace.blocks[layer]
    names = {module: f"{path}.{name}" for name, module in block.named_modules()}
    added = _adapter_parts(block)
    linear = [m for m in trace.order if m in names and m not in added and _writes(m, trace, width)]
    across = _across(block, trace)
    linear = [m for m in linear if m not in across]
    under = _mixing(block, trace, skip=1)
    if not any(m not in under for m in linear) and under:
        # a feed-forward may look at the token before, as RWKV's does; attention looks further back
        under = _mixing(block, trace, skip=2) or under
    attn = [m for m in linear if m in under]
    feed = [m for m in linear if m not in under]
    attn_site = _site(attn[-1], layer, "attn_out", names, trace) if attn else None
    stacks = [(n, m) for n, m, p in _stacks(block) if m not in under]
    experts = _experts(layer, [m for _, m in stacks], names, width)
    dense = _dense(block, feed, trace)
    if not dense:
        if experts is not None:
            return experts, attn_site, experts, None
        if stacks:
            reason = (
                f"{path}.{stacks[0][0]} stacks experts in a form that is not known: it must compute sum_e g_e W_e k_e "
                "from hidden states, expert numbers and weights, with plain floating-point weights"
            )
        elif feed:
            reason = f"{path} routes between several experts, each a module of its own, not one weight"
        else:
            reason = _nothing(block, path, names, trace, width, bool(attn))
        return None, attn_site, None, reason
    experts = experts and replace(experts, part="experts")
    # of several the widest: a block may end with a small map beside the feed-forward's, as Gemma 4's does
    last = max(reversed(dense), key=lambda module: trace.io[module][0].shape[-1])
    blocked = _rescaled(block, last, names)
    site = None if blocked else _site(last, layer, "mlp_out", names, trace)
    if site is None:
        odd = f"{names[last]} does not compute W x + b, or passes no gradient on"
        return None, attn_site, experts, blocked or odd
    return site, attn_site, experts, None


def _experts(layer: int, modules: list[nn.Module], names: dict[nn.Module, str], width: int) -> Site | None:
    """Describe a block's stacked experts; None where there are none, or not one module of them in a known form."""
    found = {module: stack_of(module) for module in modules}
    (module, stack), *others = [(m, s) for m, s in found.items() if s and s.width == width] or [(None, None)]
    if module is None or stack is None or others:
        return None
    d_in, turned = stack.experts * stack.inner, stack.transposed
    return Site(layer, "mlp_out", names[module], d_in, width, turned, leaf=stack.leaf, experts=stack.experts)


def _mixing(block: nn.Module, trace: _Trace, skip: int) -> set[nn.Module]:
    """Return what lies under the children whose output at a token depends on tokens ``skip`` or more before it."""
    mixing = [child for child in _parts(block, trace) if _mixes(child, trace, skip)]
    return {leaf for child in mixing for leaf in child.modules()}


def _parts(block: nn.Module, trace: _Trace) -> Iterator[nn.Module]:
    """List a block's children, those of a mere list in the list's place."""
    for child in block.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield child


def _across(block: nn.Module, trace: _Trace) -> set[nn.Module]:
    """Return what lies under the children whose output depends on an encoder's states."""
    if trace.source is None:
        return set()
    looking = [child for child in _parts(block, trace) if _looks_across(child, trace, trace.source)]
    return {leaf for child in looking for leaf in child.modules()}


def _looks_across(child: nn.Module, trace: _Trace, source: int) -> bool:
    """Whether a module takes states of as many tokens as the encoder read."""
    args, kwargs = trace.calls.get(child, ((), {}))
    return any(
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.ndim == 3
        and value.shape[1] == source
        for value in (*args, *kwargs.values())
    )


def _stacks(block: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Name parameters that stack several matrices; kernels of convolutions and mere vectors are none."""
    for path, module in block.named_modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            plain = parameter.ndim == 3 and min(parameter.shape) > 1
            if plain or (parameter.ndim > 3 and packed(parameter)):
                yield f"{path}.{name}" if path else name, module, parameter


def _dense(block: nn.Module, feed: list[Any], trace: _Trace) -> list[Any]:
    """Leave the candidates that every token runs through: no siblings in a list, as experts are."""
    lists = [m for m in block.modules() if isinstance(m, nn.ModuleList)]
    siblings = {
        leaf
        for group in lists
        if len([1 for child in group if any(leaf in set(feed) for leaf in child.modules())]) > 1
        for leaf in group.modules()
    }
    count = trace.positions
    dense = [m for m in feed if m not in siblings and trace.io[m][0].shape[:-1].numel() == count]
    # a square map that runs last may be a mere gate, as RWKV's; what narrows or widens is the projection
    return [m for m in dense if trace.io[m][0].shape[-1] != trace.io[m][1].shape[-1]] or dense


def linear_modules(block: nn.Module) -> list[tuple[str, Any]]:
    """List the linear maps of a block that have a plain weight of their own, by path; no adapter's."""
    added = _adapter_parts(block)
    return [
        (name, m) for name, m in block.named_modules()
        if m not in added and m._parameters.get("weight") is not None and _is_linear(m)
    ]  # fmt: skip


def _adapter_parts(block: nn.Module) -> set[nn.Module]:
    """Return the modules that adapters add to layers (PEFT): all but the layers themselves."""
    wrapped = [m for m in block.modules() if isinstance(getattr(m, "base_layer", None), nn.Module)]
    parts = {leaf for wrapper in wrapped for leaf in wrapper.modules()}
    for wrapper in wrapped:
        base: Any = wrapper.base_layer
        if not isinstance(getattr(base, "base_layer", None), nn.Module):
            parts -= set(base.modules())
    return parts


def _rescaled(block: nn.Module, module: nn.Module, names: dict[nn.Module, str]) -> str | None:
    """Say why a layer below an adapter cannot be edited; None where it can, or has no adapter."""
    for wrapper in block.modules():
        inside = module is not wrapper and module in set(wrapper.modules())
        if inside and len(getattr(wrapper, "lora_magnitude_vector", None) or ()):
            return (
                f"{names[wrapper]} carries a DoRA adapter, which rescales its layer by the norm of the weight, so "
                "that a change of the weight does not act as it would alone: merge the adapter first "
                "(peft: model.merge_and_unload()), or edit a layer without one"
            )
    return None


def _nothing(
    block: nn.Module, path: str, names: dict[nn.Module, str], trace: _Trace, width: int, mixes: bool
) -> str:
    """Say why a block has no candidate."""
    for module in block.modules():
        base = getattr(module, "base_layer", None)
        if (
            isinstance(base, nn.Module)
            and _is_linear(base)
            and base not in trace.io
            and module in trace.calls
        ):
            return (
                f"{names[module]} computes with its adapter in place of the layer below it: merge the adapter "
                "first (peft: model.merge_and_unload())"
            )
        if "parametrizations" in module._modules:
            return f"{names[module]} computes its weight from other tensors, so the weight cannot be written"
    odd = _unreadable(block, names)
    if odd is None and mixes:
        return f"{path} {ONLY_MIXES}"
    return odd or f"{path} has no linear map into the residual width {width}"


def _drop_shared(model: nn.Module, sites: list[Site | None]) -> list[str]:
    """Take out sites whose weight is also another layer's, in place; return why."""
    reasons = []
    for site in [site for site in sites if site is not None and not site.packed]:
        pair = sharing(model, [site.parameter])
        if pair is not None:
            sites[site.layer] = None
            reasons.append(f"{pair[0]} is also {pair[1]}: an edit of one changes the other")
    return reasons


def _unreadable(block: nn.Module, names: dict[nn.Module, str]) -> str | None:
    for name, parameter in block.named_parameters():
        if not parameter.dtype.is_floating_point:
            return f"{names[block]}.{name} is packed as {str(parameter.dtype).removeprefix('torch.')}"
    return None


def _writes(module: Any, trace: _Trace, width: int) -> bool:
    return trace.io[module][1].shape[-1] == width


def _mixes(child: nn.Module, trace: _Trace, skip: int) -> bool:
    """Whether a module's output at the last token depends on tokens ``skip`` or more before it."""
    if child not in trace.calls or not any(_is_linear(leaf) for leaf in child.modules()):
        return False
    args, kwargs = trace.calls[child]
    pool = [*args, *kwargs.values()]
    hidden = next((v for v in pool if isinstance(v, Tensor) and v.is_floating_point() and v.ndim >= 2), None)
    if hidden is None:
        return False
    changed = hidden.clone()
    # not a multiple of the old value: a norm in front would undo that
    changed[..., :-skip, :] = changed[..., :-skip, :].flip(-1) + 1.0

    def last(value: Tensor) -> Tensor:
        swap = [value if v is hidden else v for v in args]
        keyed = {k: value if v is hidden else v for k, v in kwargs.items()}
        out = hooks.first_tensor(child(*swap, **keyed))
        return out.reshape(*hidden.shape[:-1], -1)[..., -1, :].float()

    before = last(hidden)
    # tokens that are routed to experts together share a product, whose last bits depend on all of them
    loose = max(1e-5, 4 * torch.finfo(hidden.dtype).eps) * float(before.abs().max())
    return bool((last(changed) - before).abs().max() > loose)


def _site(module: Any, layer: int, part: Part, names: dict[nn.Module, str], trace: _Trace) -> Site | None:
    """Describe a linear map, with its orientation found by computing it both ways."""
    inputs, outputs = trace.io[module]
    d_in, d_out = inputs.shape[-1], outputs.shape[-1]
    if is_packed(module):
        linear = linear_map(module, d_in, inputs)
        if linear is None or linear[0] != d_out or not _passes_gradients(module, inputs):
            return None
        return Site(layer, part, names[module], d_in, d_out, transposed=False, packed=True)
    stored = None if module.weight.is_meta else _stored(module, inputs, outputs)
    return None if stored is None else Site(layer, part, names[module], d_in, d_out, stored)


def _passes_gradients(module: nn.Module, inputs: Tensor) -> bool:
    """Whether a packed module's output depends on its input also for autograd; some kernels cut that."""
    with torch.enable_grad():
        leaf = inputs.detach().clone().requires_grad_(True)
        output = module.forward(leaf)
        if not output.requires_grad:
            return False
        (gradient,) = torch.autograd.grad(output.float().sum(), leaf, allow_unused=True)
    return gradient is not None and bool(gradient.abs().max() > 0)


def _orientations(module: nn.Module) -> Iterator[bool]:
    """Try the declared orientation first; for symmetric weights both would pass."""
    declared = not isinstance(module, nn.Linear)
    yield declared
    yield not declared


def _adds_directly(model: nn.Module, blocks: nn.ModuleList, mlp: list[Site | None], probe: Pass) -> bool:
    """Whether adding to the projection's output adds the same to the block's output, in every kind of block."""
    kinds: dict[Any, Site] = {}
    for site in mlp:
        if site is not None:
            within = site.name.split(f".{site.layer}.", 1)[-1]
            kinds.setdefault((type(blocks[site.layer]), within, site.d_in), site)
    return bool(kinds) and all(_direct(model, blocks[s.layer], s, probe) for s in kinds.values())


def _direct(model: nn.Module, block: nn.Module, site: Site, probe: Pass) -> bool:
    """Whether adding to one projection's output adds the same to its block's output."""
    states: list[Tensor] = []
    # as large as the stream, whose own rounding would drown a small shift in 16 bits
    shift = torch.linspace(-1, 1, site.d_out)

    def note(hidden: Tensor) -> None:
        states.append(hidden.float())

    def push(hidden: Tensor) -> Tensor:
        return hidden + (shift * unit).to(hidden)

    with hooks.on_output(block, note):
        run(model, probe)
        unit = float(states[0].square().mean().sqrt())
        with hooks.on_output(model.get_submodule(site.name), push):
            run(model, probe)
    moved = (states[1] - states[0]) / unit
    # the median: a few entries of the stream may be huge, and rounded accordingly
    return bool((moved - shift.to(moved)).abs().median() < 0.05)
