"""Which experts the tokens of texts are routed to, in a model that stacks experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from errata.host import hooks
from errata.host.experts import Stack, stack_of
from errata.host.kinds import CAUSAL
from errata.host.text import TextHost
from errata.host.tokens import by_length

Routes = tuple[tuple[int, ...], ...]
"""Per layer with experts and token, the set of experts: bit e is set where expert e is one of them."""
BATCH_TOKENS = 4096
WORD = 62
"""Experts in a word of bits."""


def mixtures(model: nn.Module) -> dict[str, tuple[nn.Module, Stack]]:
    """Return a model's modules of stacked experts by path, in the order of its layers; empty for most models."""
    found = {name: (module, stack_of(module)) for name, module in model.named_modules()}
    return {name: (module, stack) for name, (module, stack) in found.items() if stack is not None}


@torch.no_grad()
def routed(host: TextHost, rows: Sequence[Sequence[int]]) -> list[Routes]:
    """Return the experts of each token of some rows, with what is in place; empty where the model stacks none."""
    modules = mixtures(host.model) if host.kind == CAUSAL else {}
    found: list[Routes] = [()] * len(rows)
    for group in by_length(rows, BATCH_TOKENS) if modules else ():
        batch, taken = host.batch([rows[i] for i in group]), dict[str, Tensor]()
        with ExitStack() as stack:
            for name, (module, _) in modules.items():
                stack.enter_context(hooks.on_call(module, _keep(taken, name)))
            host.forward(batch, keep=1)
        own = batch.mask.bool().cpu()
        layers = [taken[name].unflatten(0, (len(group), -1)) for name in modules if name in taken]
        for line, i in enumerate(group):
            found[i] = tuple(_sets(layer[line][own[line]]) for layer in layers)
    return found


def _keep(into: dict[str, Tensor], name: str) -> Callable[[hooks.Call], None]:
    def act(call: hooks.Call) -> None:
        tensors = (value for value in (*call[0], *call[1].values()) if isinstance(value, Tensor))
        into[name] = next(tensor for tensor in tensors if not tensor.is_floating_point()).cpu()

    return act


def _sets(index: Tensor) -> tuple[int, ...]:
    """Return each token's set of experts as a number, from their numbers ``[tokens, k]``."""
    sets = [0] * len(index)
    for first in range(0, int(index.max()) + 1, WORD):  # a word of 64 bits at a time
        here = (index >= first) & (index < first + WORD)
        words = torch.where(here, torch.ones_like(index) << (index - first).clamp(0, WORD), 0).sum(1)
        sets = [total | word << first for total, word in zip(sets, words.tolist(), strict=True)]
    return tuple(sets)
