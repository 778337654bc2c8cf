"""A feed-forward with more neurons: rows of its first matrix, columns of its last one, and the configuration's width.

    FFN(x) = W_out act(W_in x + b_in) + b_out          neuron k: row K_k of W_in, b_k of b_in, column V_k of W_out
    FFN(x) = W_out (act(G x + g) * (U x + u)) + b_out  neuron k: row K_k of G, b_k of g; row 0 of U, 1 of u; column V_k

What a feed-forward computes is found by computing it. A model whose feed-forward, or whose configuration, has no
place for the neurons is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from errata.errors import HostError
from errata.host.layout import Layout, linear_map, linear_modules
from errata.host.memory import ran_out

Activation = Callable[[Tensor], Tensor]
CLOSE = 1e-6
"""Largest difference of two outputs that count as the same, as a share of the largest output; in float64."""
INPUTS = 32
"""Random inputs that a feed-forward is tried on."""
WIDTHS = ("n_inner", "intermediate_size", "ffn_dim", "ffn_hidden_size")
"""Settings that may be empty where the width is a multiple of the residual stream's."""


@dataclass(frozen=True)
class Neurons:
    """Neurons beside a feed-forward: act(K x + b) V."""

    keys: Tensor
    """K ``[s, d]``."""
    biases: Tensor
    """b ``[s]``."""
    values: Tensor
    """V ``[s, d]``."""

    def to(self, dtype: torch.dtype, device: torch.device | None = None) -> Neurons:
        """Convert, and move."""
        return Neurons(*(t.to(device, dtype) for t in (self.keys, self.biases, self.values)))

    def outputs(self, inputs: Tensor, act: Activation) -> Tensor:
        """Return what they add for inputs ``[n, d]``, ``[n, d]``."""
        return act(inputs @ self.keys.mT + self.biases) @ self.values


@dataclass(frozen=True)
class FeedForward:
    """The linear maps of a feed-forward by their paths, and what it applies between them."""

    layer: int
    module: str
    first: str
    """What the activation is applied to: G where there is a gate, else W_in."""
    factor: str | None
    """U, what the activated is multiplied with; None without a gate."""
    last: str
    inner: int
    """Number of neurons."""
    activation: str

    @property
    def maps(self) -> tuple[str, ...]:
        """Paths of all linear maps."""
        return (self.first, *([self.factor] if self.factor else []), self.last)


@torch.no_grad()
def feed_forward(
    model: nn.Module, layout: Layout, layer: int, activations: Mapping[str, Activation]
) -> FeedForward:
    """Describe a layer's feed-forward. Raises HostError where it is none of the two forms.

    ``activations``: those to try, by name.
    """
    site, path = layout.site(layer), layout.feed_forward(layer)
    module = model.get_submodule(path)
    maps = {f"{path}.{name}" if name else path: linear for name, linear in linear_modules(module)}
    last = maps.pop(site.name, None)
    weight = next(iter(maps.values())).weight if maps else None
    if last is None or weight is None or site.packed:
        raise HostError(f"{path} is not made of linear maps whose weights can be read")
    sizes = {name: linear_map(linear, layout.width, weight) for name, linear in maps.items()}
    if len(sizes) == 1 and next(iter(sizes.values())) not in (None, (site.d_in, True), (site.d_in, False)):
        raise HostError(
            f"{next(iter(sizes))} holds more than the neurons' rows, as where a gate is part of it"
        )
    if len(sizes) > 2 or any(size is None or size[0] != site.d_in for size in sizes.values()):
        raise HostError(
            f"{path} has {len(sizes) + 1} linear maps, {', '.join(sizes)} among them; expected one or two from "
            f"{layout.width} to {site.d_in} and one back"
        )
    inner = _double(module)
    inputs = _inputs(layout.width)
    outputs = _run(inner, inputs, path)
    relative = {name: name.removeprefix(f"{path}.") for name in (*sizes, site.name)}
    for first, factor in _orders(list(sizes)):
        hidden = inner.get_submodule(relative[first])(inputs)
        scale = inner.get_submodule(relative[factor])(inputs) if factor else 1.0
        for name, act in activations.items():
            if _same(inner.get_submodule(relative[site.name])(act(hidden) * scale), outputs):
                return FeedForward(layer, path, first, factor, site.name, site.d_in, name)
    raise HostError(f"{path} applies none of {', '.join(activations)}, or computes more than its linear maps")


def _orders(names: list[str]) -> Iterator[tuple[str, str | None]]:
    """Yield which map the activation may be applied to, and which one is its factor."""
    if len(names) == 1:
        yield names[0], None
    else:
        yield names[0], names[1]
        yield names[1], names[0]


@dataclass(frozen=True)
class Widening:
    """What was done to a model."""

    before: int
    """Neurons of each feed-forward before."""
    after: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the configuration that changed."""


@torch.no_grad()
def widen_(
    model: Any, layout: Layout, neurons: Mapping[int, Neurons], activations: Mapping[str, Activation],
    activation: str, *, multiple: int,
) -> Widening:  # fmt: skip
    """Add neurons to the feed-forwards of a model with an activation, by layer, in place.

    All feed-forwards get the same width, a multiple of ``multiple``; neurons without a use are zero. The tensors of the
    model are replaced, not written to. Raises HostError, with the model in no defined state, where its feed-forwards or
    its configuration have no place for the neurons, or where the wider feed-forward does not compute the sum.
    """
    described = [feed_forward(model, layout, layer, activations) for layer in range(len(layout.blocks))]
    inner = {one.inner for one in described}
    if len(inner) > 1:
        raise HostError(
            f"feed-forwards have different widths, {sorted(inner)}, so no one setting describes them"
        )
    biased = _needs_biases(model, described, neurons)
    for layer in neurons:
        if described[layer].activation != activation:
            raise HostError(
                f"the neurons apply {activation} and {described[layer].module} applies {described[layer].activation}; "
                f"fit the edit with activation={described[layer].activation}"
            )
    before = inner.pop()
    after = -(-(before + max(len(one.keys) for one in neurons.values())) // multiple) * multiple
    for one in described:
        module = model.get_submodule(one.module)
        own, inputs = neurons.get(one.layer), _inputs(layout.width)
        narrow = _double(module)
        if own is not None:
            inputs = torch.cat([inputs, _firing(own)])
        expected = _run(narrow, inputs, one.module)
        if own is not None:
            expected = expected + own.to(torch.float64, torch.device("cpu")).outputs(
                inputs, activations[activation]
            )
        _append(model, one, own, after - before, biased)
        if not _same(_run(_double(module), inputs, one.module), expected):
            raise HostError(f"{one.module} does not compute the sum of what it did and of the neurons")
    return Widening(before, after, _configure(model, before, after, biased))


def _needs_biases(model: nn.Module, described: list[FeedForward], neurons: Mapping[int, Neurons]) -> bool:
    """Whether biases have to be switched on. Raises HostError where the neurons need some and there can be none."""
    first = model.get_submodule(described[0].first)
    if described[0].factor is not None:
        if first.bias is not None:
            return False
        if not hasattr(text_config(model), "mlp_bias"):
            raise HostError(
                f"{described[0].module} has a gate and no biases, and {type(model.config).__name__} has no setting for "
                "them (mlp_bias): without biases a gated neuron cannot do what an added one does"
            )
        return True
    if first.bias is None and any(bool(one.biases.any()) for one in neurons.values()):
        raise HostError(f"the neurons have biases and {described[0].first} has none")
    return False


def _append(model: nn.Module, one: FeedForward, own: Neurons | None, count: int, biased: bool) -> None:
    """Append neurons to a feed-forward's maps, the missing ones as zeros."""
    first: Any = model.get_submodule(one.first)
    last: Any = model.get_submodule(one.last)
    width = last.weight.numel() // one.inner
    zeros = first.weight.new_zeros(count, width)
    keys, values, biases = zeros.clone(), zeros.clone(), zeros[:, 0].clone()
    if own is not None:
        used = len(own.keys)
        keys[:used], values[:used], biases[:used] = own.keys, own.values, own.biases
    if biased:
        for path in one.maps:
            module: Any = model.get_submodule(path)
            size = width if path == one.last else one.inner
            module.register_parameter("bias", parameter_like(module.weight.new_zeros(size), module.weight))
    _add_rows(first, keys, biases)
    if one.factor is not None:
        ones = biases.new_zeros(count)
        ones[: len(own.keys) if own is not None else 0] = 1.0
        _add_rows(model.get_submodule(one.factor), zeros, ones)
    turned = not isinstance(last, nn.Linear)
    last.weight = parameter_like(
        torch.cat([last.weight, values if turned else values.mT], 0 if turned else 1), last.weight
    )
    _set_size(last, ("in_features", "nx"), one.inner + count)


def _add_rows(module: Any, rows: Tensor, biases: Tensor) -> None:
    """Append outputs to a linear map: rows ``[n, d_in]`` and biases ``[n]``, where it has some."""
    turned = not isinstance(module, nn.Linear)
    weight = torch.cat([module.weight, rows.mT if turned else rows], 1 if turned else 0)
    module.weight = parameter_like(weight, module.weight)
    if module.bias is not None:
        module.bias = parameter_like(torch.cat([module.bias, biases.to(module.bias)]), module.bias)
    _set_size(module, ("out_features", "nf"), weight.shape[1 if turned else 0])


def parameter_like(value: Tensor, like: Tensor) -> nn.Parameter:
    """Return a parameter of its own memory with a value ``[...]``, trainable as another one."""
    return nn.Parameter(value.contiguous(), requires_grad=like.requires_grad)


def _set_size(module: nn.Module, names: tuple[str, ...], size: int) -> None:
    for name in names:
        if hasattr(module, name):
            setattr(module, name, size)


# --- the configuration ------------------------------------------------------------------------


def text_config(model: Any) -> Any:
    """Return the part of a model's configuration that describes its language model."""
    return model.config.get_text_config(decoder=True)


def _configure(model: Any, before: int, after: int, biased: bool) -> dict[str, Any]:
    """Set the configuration to the new width; return the settings that changed.

    The right setting is the one with which a model of the same class has weights of these names and shapes. Raises
    HostError where there is none.
    """
    changes: dict[str, Any] = {"mlp_bias": True} if biased else {}
    own = vars(text_config(model))
    names = [name for name, value in own.items() if type(value) is int and value == before]
    names += [name for name in WIDTHS if name in own and own[name] is None]
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in names:
        trial = copy.deepcopy(model.config)
        settings = {name: after, **changes}
        for key, value in settings.items():
            setattr(trial.get_text_config(decoder=True), key, value)
        if shapes_of(type(model), trial) == shapes:
            for key, value in settings.items():
                setattr(text_config(model), key, value)
            return settings
    raise HostError(
        f"no setting of {type(model.config).__name__} makes the feed-forwards {after} neurons wide instead of {before}"
    )


def shapes_of(kind: Any, config: Any) -> dict[str, tuple[int, ...]] | None:
    """Return the shapes of the weights of a model with a configuration; None where there is no such model."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        try:
            model = kind(config)
        except (RuntimeError, ValueError, TypeError, AssertionError, ZeroDivisionError):
            return None  # the setting is another one, such as the width of the residual stream
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


# --- trying it out ------------------------------------------------------------------------------


def _double(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).cpu().double().eval()


def _inputs(width: int) -> Tensor:
    return torch.randn(INPUTS, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _firing(own: Neurons) -> Tensor:
    """Return inputs ``[n, d]`` that neurons fire on."""
    keys = own.keys[:INPUTS].double().cpu()
    strength = 2 + own.biases[:INPUTS].double().cpu().abs()
    return (
        strength[:, None]
        * functional.normalize(keys, dim=1)
        / keys.norm(dim=1, keepdim=True).clamp_min(1e-12)
    )


def _run(module: nn.Module, inputs: Tensor, path: str) -> Tensor:
    try:
        outputs = module(inputs[None])
    except (RuntimeError, TypeError, ValueError) as error:
        if ran_out(error):
            raise
        raise HostError(f"{path} cannot be run by itself, so its form is not known") from error
    if not isinstance(outputs, Tensor):
        raise HostError(f"{path} returns {type(outputs).__name__}, expected one tensor")
    return outputs[0]


def _same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    return float((one - other).abs().max()) <= CLOSE * float(other.abs().max())
