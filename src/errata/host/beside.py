"""Low-rank changes beside a model's linear maps, y + B (A x) at each, while a block of code runs.

No weight is written, and gradients reach the factors. They act on passes of the thread that put them there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from errata.errors import HostError
from errata.host import hooks

Factors = Mapping[str, tuple[Tensor, Tensor]]
"""By path of a linear map, B ``[d_out, r]`` and A ``[r, d_in]``."""


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


@contextmanager
def low_rank_beside(
    model: nn.Module, factors: Factors, *, scale: float = 1.0, drop: Callable[[Tensor], Tensor] = _as_it_is
) -> Iterator[None]:
    """Add ``scale`` B (A x) to the output of each map while inside; ``drop`` is applied to x and to A x."""
    with ExitStack() as stack:
        for path, (outer, inner) in factors.items():
            module, inputs = model.get_submodule(path), list[Tensor]()
            stack.enter_context(hooks.on_input(module, inputs.append))
            stack.enter_context(hooks.on_output(module, _adder(inputs, outer, inner, scale, drop)))
        yield


def _adder(
    inputs: list[Tensor], outer: Tensor, inner: Tensor, scale: float, drop: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    def add(output: Tensor) -> Tensor:
        x = inputs.pop()
        inside = drop(drop(x.to(inner.dtype)) @ inner.to(x.device).mT)
        return output + scale * (inside @ outer.to(x.device).mT).to(output.dtype)

    return add


def start_factors(
    model: nn.Module, maps: Sequence[str], run: Callable[[], object], rank: int, *, start: float | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return trainable B of zeros and random A of each map, on its device; ``run`` runs the model once, for the widths.

    ``start``: standard deviation of A's entries; None: uniform within 1 / sqrt(d_in), as LoRA's. Raises HostError for
    a map that the model does not call.
    """
    read: dict[str, list[Tensor]] = {path: [] for path in maps}
    given: dict[str, list[Tensor]] = {path: [] for path in maps}
    with torch.no_grad(), ExitStack() as stack:
        for path in maps:
            module = model.get_submodule(path)
            stack.enter_context(hooks.on_input(module, read[path].append))
            stack.enter_context(hooks.on_output(module, given[path].append))
        run()
    uncalled = next((path for path in maps if not read[path]), None)
    if uncalled is not None:
        raise HostError(
            f"{uncalled} is not called as a layer: the model reads its weight directly, so nothing can act beside it; "
            "choose other linear maps"
        )
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for path in maps:
        x, y = read[path][0], given[path][0]
        bound = 1 / math.sqrt(x.shape[-1])
        inner = torch.empty(rank, x.shape[-1])
        inner = inner.uniform_(-bound, bound) if start is None else inner.normal_(0.0, start)
        outer = torch.zeros(y.shape[-1], rank, device=y.device)
        factors[path] = outer.requires_grad_(), inner.to(y.device).requires_grad_()
    return factors
