"""Copies of a model that share its weights: to have a variant of a model without a second one in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn


def sharing_copy(model: nn.Module) -> Any:
    """Return a copy of a model, configuration included, with the parameters and buffers of the original.

    Nothing may be written into them; :func:`replace_` gives the copy tensors of its own. The copy has the hooks of the
    original, as they are when it is made.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, dict(shared))


def replace_(
    model: nn.Module, make: Callable[[Tensor], Tensor], names: Collection[str] | None = None
) -> None:
    """Give a model new parameters, ``make(old)`` of the shape ``[...]`` of each; tied ones stay tied.

    ``names``: the parameters to replace; None: all.
    """
    chosen = {
        id(parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if names is None or name in names
    }
    new: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is None or id(old) not in chosen:
                continue
            if id(old) not in new:
                new[id(old)] = nn.Parameter(make(old.detach()), requires_grad=old.requires_grad)
            module._parameters[name] = new[id(old)]


def cast_(model: nn.Module, dtype: torch.dtype) -> None:
    """Give a model floating parameters of a dtype; buffers stay as they are, as when a checkpoint is opened in it."""
    replace_(model, lambda old: old.to(dtype) if old.is_floating_point() else old)
