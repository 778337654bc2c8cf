"""Experts stacked in one parameter: what such a module computes, read as one linear map of block keys.

    y = sum_e g_e (W_e k_e + b_e)          k_e = act(first map of expert e applied to x), g_e the router's weight
      = W_cat kappa + bias                 W_cat = [W_1 ... W_E], kappa = [g_1 k_1; ...; g_E k_E]

An expert that a token is not routed to has a block of zeros in kappa. The router reads the layer's input, so kappa does
not depend on W_cat: as a site, the module is a linear map with input kappa ``[E m]`` and weight W_cat ``[d, E m]``.
What a module computes is found by computing it, with the expert numbers and weights that it is called with, whatever
made them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from errata.host.memory import ran_out
from errata.host.placement import packed

_KEPT = "_errata_stack"
"""Where a module keeps what was found out about it."""
TOKENS, ROUTED = 6, 2
"""Random tokens that a module is tried on, and experts of each."""


@dataclass(frozen=True)
class Stack:
    """A module of stacked experts, by the names of its parameters."""

    experts: int
    """E."""
    inner: int
    """m, entries of one expert's key."""
    width: int
    """d, entries of the output."""
    first: str
    """Parameter of the first map, gate included."""
    leaf: str
    """Parameter of the map into the residual stream."""
    first_turned: bool
    """Whether the first map is stored ``[E, d, f m]`` rather than ``[E, f m, d]``."""
    transposed: bool
    """Whether the last one is stored ``[E, m, d]`` rather than ``[E, d, m]``."""
    gated: bool
    """Whether the first map holds a gate, too: f = 2, else 1."""

    def keys(self, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """Return kappa ``[tokens, E m]`` of a call of the module, float32 at least."""
        hidden, index, weight = _arguments(args, kwargs)
        tokens, _ = index.shape
        wide = torch.promote_types(hidden.dtype, torch.float32)
        first, bias = getattr(module, self.first), getattr(module, f"{self.first}_bias", None)
        rows, experts, values = list[Tensor](), list[Tensor](), list[Tensor]()
        for expert in index.unique().tolist():
            if expert >= self.experts:  # marks a token of another device
                continue
            row, slot = (index == expert).nonzero(as_tuple=True)
            matrix = first[expert] if self.first_turned else first[expert].mT
            inner = hidden[row].to(matrix.device) @ matrix
            inner = inner if bias is None else inner + bias[expert]
            key = self._activate(module, inner)
            rows.append(row.to(matrix.device))
            experts.append(torch.full_like(rows[-1], expert))
            values.append(key.to(wide) * weight[row, slot].to(key.device, wide)[:, None])
        kappa = torch.zeros(tokens, self.experts, self.inner, dtype=wide, device=first.device)
        if rows:
            where = torch.cat(rows), torch.cat(experts)
            kappa = kappa.index_put(where, torch.cat(values), accumulate=True)
        return kappa.flatten(1)

    def _activate(self, module: Any, inner: Tensor) -> Tensor:
        if not self.gated:
            return module.act_fn(inner)
        own = getattr(module, "_apply_gate", None)
        if own is not None:
            return own(inner)
        gate, up = inner.chunk(2, dim=-1)
        return module.act_fn(gate) * up

    def joined(self, weight: Tensor) -> Tensor:
        """Return W_cat ``[d, E m]`` of the stored weight ``[E, ...]``."""
        return weight.flatten(0, 1).mT if self.transposed else weight.transpose(0, 1).flatten(1)

    def bias(self, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | float:
        """Return what the experts' biases add to the output of a call ``[tokens, d]``; 0.0 without biases."""
        biases = getattr(module, f"{self.leaf}_bias", None)
        if biases is None:
            return 0.0
        _, index, weight = _arguments(args, kwargs)
        known = (index < self.experts).to(weight.dtype)
        return (biases[index.clamp_max(self.experts - 1)] * (weight * known)[..., None]).sum(1)


def _arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states ``[tokens, d]``, expert numbers and their weights ``[tokens, k]`` of a call."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    floats = [tensor for tensor in tensors if tensor.is_floating_point()]
    numbers = [tensor for tensor in tensors if not tensor.is_floating_point()]
    if len(floats) != 2 or len(numbers) != 1 or floats[1].shape != numbers[0].shape:
        raise TypeError(
            f"expected hidden states, expert numbers and weights, found {len(tensors)} tensors of shapes "
            f"{[list(tensor.shape) for tensor in tensors]}"
        )
    return floats[0], numbers[0], floats[1]


def stack_of(module: nn.Module) -> Stack | None:
    """Return how a module stacks experts, found by running it past all hooks; None where it does not.

    None also for packed weights and for those on the meta device, and where what it computes is no such sum.
    """
    if not any(p is not None and p.ndim == 3 for p in module._parameters.values()):
        return None
    if _KEPT not in module.__dict__:
        module.__dict__[_KEPT] = _find(module)
    return module.__dict__[_KEPT]


@torch.no_grad()
def _find(module: Any) -> Stack | None:
    if any(packed(weight) or weight.is_meta for weight in module.parameters(recurse=False)):
        return None
    for stack in _candidates(module):
        try:
            if _computes(module, stack):
                return stack
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, AssertionError) as error:
            if ran_out(error):
                raise
            continue  # takes or computes something else
    return None


def _candidates(module: nn.Module) -> Iterator[Stack]:
    """Yield the readings that shapes allow; a square or repeated size allows several."""
    stacked = [(name, p) for name, p in module.named_parameters(recurse=False) if p.ndim == 3]
    for leaf, last in stacked:
        experts = last.shape[0]
        for name, first in stacked:
            if name == leaf or first.shape[0] != experts:
                continue
            for transposed in (False, True):
                width, inner = (last.shape[2], last.shape[1]) if transposed else last.shape[1:]
                for factor in (2, 1):
                    for turned in (transposed, not transposed):
                        shape = (width, factor * inner) if turned else (factor * inner, width)
                        if tuple(first.shape[1:]) == shape and experts != width:
                            yield Stack(experts, inner, width, name, leaf, turned, transposed, factor == 2)


def _computes(module: Any, stack: Stack) -> bool:
    """Whether a module's output is W_cat kappa and the biases, for random tokens and routes.

    Computed expert by expert: a wide copy of all of them may not fit beside the model.
    """
    weight = getattr(module, stack.leaf)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, stack.width, generator=generator).to(weight)
    routed = min(ROUTED, stack.experts)
    index = torch.stack(
        [torch.randperm(stack.experts, generator=generator)[:routed] for _ in range(TOKENS)]
    ).to(weight.device)
    gates = torch.rand(TOKENS, routed, generator=generator).add(0.1).to(weight)
    call = hidden, index, gates
    output = module.forward(*call)
    if not isinstance(output, Tensor) or output.shape != hidden.shape:
        return False
    kappa = stack.keys(module, call, {})
    keys = kappa.unflatten(1, (stack.experts, stack.inner))  # [tokens, E, m]
    expected = torch.zeros_like(hidden, dtype=kappa.dtype) + stack.bias(module, call, {})
    for expert in index.unique().tolist():
        own = weight[expert].to(kappa.dtype)
        expected += keys[:, expert] @ (own if stack.transposed else own.mT)
    close = 2e-2 if weight.element_size() < 4 else 1e-4
    return float((output - expected).abs().max()) <= close * float(output.abs().max()) > 0
