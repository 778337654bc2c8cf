"""How a model with unmerged edits is saved: with a warning, and with the edits, where they can be merged.

``save_pretrained`` writes weights only. So that the saved model gives the same outputs as the live one, unmerged
edits are merged in what is written, rounded as weights are; a warning says so, and also what could not be merged.
``state_dict`` stays as it is, for it may be loaded into this very model again, and warns.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from errata.edits.deltas import weight_with
from errata.edits.frames import stack_level
from errata.errors import EditError
from errata.host import locking, placement
from errata.host.base import BRANCHES

SAVE = "save_pretrained"
CALLERS = ("errata", "torch", "transformers")
"""Packages whose frames a warning is not about."""
INSTEAD = "revert it and apply it again with merge=True to have it in the weights"


class _Save:
    """Replaces a model's ``save_pretrained`` while it has unmerged edits."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self.model
        with locking.of(model).shared:
            if len(args) < 3 and kwargs.get("state_dict") is None:
                values, missing = _merged(model)
                _warn(values, missing)
                state = dict(_Watch.plain(model))
                kwargs["state_dict"] = {**state, **values}
            else:
                _warn({}, list(_unmerged(model)))
            return getattr(type(model), SAVE)(model, *args, **kwargs)


class _Watch:
    """Warns when a state dict is taken of a model with unmerged edits; an object, so that copies have one."""

    quiet = False

    def __call__(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        names = list(_unmerged(module))
        if names and not self.quiet:
            warnings.warn(
                f"an unmerged edit of {_names(names)} is not in this state dict: {INSTEAD}",
                stacklevel=stack_level(*CALLERS),
            )

    @staticmethod
    def plain(model: nn.Module) -> Mapping[str, Tensor]:
        """Return a model's state dict without the warning."""
        watches = [hook for hook in _hooks(model).values() if isinstance(hook, _Watch)]
        for watch in watches:
            watch.quiet = True
        try:
            return model.state_dict()
        finally:
            for watch in watches:
                watch.quiet = False


def watch(model: nn.Module) -> None:
    """Have the model saved with its unmerged edits."""
    if not any(isinstance(hook, _Watch) for hook in _hooks(model).values()):
        # PyTorch does not document what a hook is
        model.register_state_dict_pre_hook(_Watch())  # pyright: ignore[reportUnknownMemberType]
    if hasattr(type(model), SAVE) and SAVE not in model.__dict__:
        model.__dict__[SAVE] = _Save(model)


def unwatch(model: nn.Module) -> None:
    """Have the model saved as it was before :func:`watch`."""
    if isinstance(model.__dict__.get(SAVE), _Save):
        del model.__dict__[SAVE]
    hooks = _hooks(model)
    for key in [key for key, hook in hooks.items() if isinstance(hook, _Watch)]:
        hooks.pop(key, None)


def _hooks(model: nn.Module) -> dict[int, object]:
    """Return what is called before a state dict is taken, by number; PyTorch has no public list of these."""
    return model.__dict__["_state_dict_pre_hooks"]


def _unmerged(model: nn.Module) -> Mapping[str, Any]:
    return model.__dict__.get(BRANCHES, {})


@torch.no_grad()
def _merged(model: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """Return weights with their unmerged deltas added, and the names of those that cannot be written."""
    values: dict[str, Tensor] = {}
    missing: list[str] = []
    for name, branch in _unmerged(model).items():
        if placement.obstacle(model, name) is not None:
            missing.append(name)
            continue
        weight = model.get_parameter(name)
        value = weight_with(weight.detach(), branch.stored, weight.dtype, weight.device)
        if not torch.isfinite(value).all():
            raise EditError(f"the unmerged edit of {name!r} would overflow {weight.dtype} in the saved model")
        values[name] = value
    return values, missing


def _warn(values: Mapping[str, Tensor], missing: list[str]) -> None:
    if values:
        dtypes = ", ".join(sorted({str(value.dtype).removeprefix("torch.") for value in values.values()}))
        warnings.warn(
            f"the model has an unmerged edit of {_names(list(values))}; in the saved model it is merged, rounded to "
            f"{dtypes}: revert it first to save the model without it, and save the edit itself with edit.save(path)",
            stacklevel=stack_level(*CALLERS),
        )
    if missing:
        warnings.warn(
            f"an unmerged edit of {_names(missing)} is not in the saved model, whose weight cannot be "
            "written: save the edit itself with edit.save(path) and apply it again after loading",
            stacklevel=stack_level(*CALLERS),
        )


def _names(names: list[str]) -> str:
    rest = f" and {len(names) - 1} other weights" if len(names) > 1 else ""
    return f"{names[0]}{rest}"
