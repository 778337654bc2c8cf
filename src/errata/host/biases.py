"""Biases for linear maps that have none, where a setting of the configuration gives them a place.

Which setting that is, and which maps it concerns, is found by building the model's class with it, without memory: no
family is known by name. Maps that it concerns as well get zeros, which change nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from errata.errors import HostError
from errata.host.wider import parameter_like, shapes_of, text_config

Shapes = Mapping[str, tuple[int, ...]]


@torch.no_grad()
def give_biases_(model: Any, values: Mapping[str, Tensor]) -> dict[str, bool]:
    """Give linear maps a bias ``[d_out]``, by their paths, in place; return the settings that were switched on.

    Raises HostError, with the model unchanged, where no setting of its configuration gives one of them a bias.
    """
    settings, shapes = _settings(model, [f"{path}.bias" for path in values])
    for name, shape in shapes.items():
        path = name.removesuffix(".bias")
        module = model.get_submodule(path)
        value = values.get(path, module.weight.new_zeros(shape))
        module.register_parameter("bias", parameter_like(value.to(module.weight), module.weight))
    for name in settings:
        setattr(text_config(model), name, True)
    return settings


def _settings(model: Any, wanted: list[str]) -> tuple[dict[str, bool], Shapes]:
    """Return settings that give wanted biases a place, and the shapes of all biases that a model then has more."""
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found: dict[str, bool] = {}
    more: dict[str, tuple[int, ...]] = {}
    for name in wanted:
        if name in more:
            continue
        trials = (
            (key, _more(model, own, {**found, key: True})) for key in _switches(model) if key not in found
        )
        chosen = next(((key, shapes) for key, shapes in trials if name in shapes), None)
        if chosen is None:
            raise HostError(
                f"{name.removesuffix('.bias')} has no bias, and {type(model.config).__name__} has no setting that "
                "gives it one"
            )
        found[chosen[0]] = True
        more = dict(chosen[1])
    return found, more


def _switches(model: Any) -> list[str]:
    """Return the settings about biases that are off."""
    return [name for name, value in vars(text_config(model)).items() if "bias" in name and value is False]


def _more(model: Any, own: Shapes, settings: Mapping[str, bool]) -> Shapes:
    """Return the biases that a model has more with some settings; none where anything else differs."""
    trial = copy.deepcopy(model.config)
    for name, value in settings.items():
        setattr(trial.get_text_config(decoder=True), name, value)
    shapes = shapes_of(type(model), trial)
    if shapes is None or any(shapes.get(name) != shape for name, shape in own.items()):
        return {}
    more = {name: shape for name, shape in shapes.items() if name not in own}
    return more if all(name.endswith(".bias") and len(shape) == 1 for name, shape in more.items()) else {}
