"""What methods have in common that train adapters of the package peft and keep them as low-rank deltas."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from errata import extras
from errata.config import positive
from errata.edits.weight import Delta
from errata.errors import ConfigError, HostError
from errata.host import hooks
from errata.host.host import Host
from errata.linalg.lowrank import LowRank
from errata.locate.gradients import linear_maps
from errata.methods._method import Workspace, notes
from errata.methods._settings import at_least_zero
from errata.training.tune import Losses, Outcome, Stop, descend, rms, seeded

NAME = "errata"


@dataclass(frozen=True)
class AdapterConfig:
    """Settings of adapters and of their training."""

    layers: tuple[int, ...] | None = None
    """Layers with adapters. None: all (published)."""
    modules: tuple[str, ...] | None = None
    """Linear maps with adapters, by the ends of their names. None: those of peft for the family (published), or all."""
    variant: Literal["lora", "adalora"] = "lora"
    """LoRA, or AdaLoRA: 1.5 ``rank`` directions, the least important dropped from a tenth to 0.7 of the steps."""
    stack: Literal["decoder", "encoder"] = "decoder"
    """Which stack of an encoder-decoder the layers are of; other models have one, called decoder."""
    rank: int = 8
    """Directions per adapter (EasyEdit: 8)."""
    alpha: float = 32.0
    """Weight of an adapter; divided by the directions it starts with: LoRA's rank (EasyEdit: 32)."""
    dropout: float = 0.1
    """Dropout probability of an adapter's inputs during training (EasyEdit: 0.1)."""
    steps: int = 70
    """Maximum number of passes over the requests (EasyEdit: 50 for GPT-J, 70 for Llama 3 8B)."""
    learning_rate: float | None = None
    """Adam's rate, in the unit of ``scale``. None: 5e-4, chosen on the lab, where ten times as much overwrites every
    neighbour of a fact; 5e-3 in plain numbers and for AdaLoRA (EasyEdit: 5e-3)."""
    scale: Literal["weight", "published"] = "weight"
    """Unit of the rate of B (E in AdaLoRA): the weight's root mean square times sqrt(d_in), or plain numbers."""
    orthogonal: float = 0.5
    """AdaLoRA's penalty on factors that are not orthogonal (its paper's code: 0.5)."""
    stop_loss: float | None = None
    """LoRA stops once every request's loss, nats per target token, is below this; 0: never (EasyEdit). None: 0.05,
    chosen on the lab; never in plain numbers and for AdaLoRA."""
    per_step: int | None = None
    """Requests per Adam step, in the given order; one pass over all of them is one of ``steps``. None: all."""

    def problems(self) -> list[str]:
        """Check ranges."""
        names = ("rank", "alpha", "steps", "learning_rate", "per_step")
        complaints = [*positive(self, *names), *at_least_zero(self, "stop_loss")]
        if not 0 <= self.dropout < 1:
            complaints.append(f"dropout: expected a share from 0 to below 1, found {self.dropout}")
        if self.variant == "adalora" and self.stop_loss:
            complaints.append("stop_loss: AdaLoRA's schedule has to run to its end; omit it")
        return complaints


C = TypeVar("C", bound=AdapterConfig)


@dataclass(frozen=True)
class Trained:
    """Adapters after their training."""

    config: Any
    """The settings with all that they left open filled in."""
    deltas: dict[str, Delta]
    """By path of the weight ``[d_out, d_in]``; none of rank 0."""
    across: frozenset[str]
    """Weights among them that are stored transposed."""
    facts: dict[str, Any]
    """Loss and rank, for the provenance."""


def train_adapters(
    method: str,
    host: Host,
    config: C,
    work: Workspace,
    make: Callable[[C], Losses],
    *,
    shuffle: bool = False,
) -> Trained:
    """Train adapters until the losses that ``make`` returns are low; the model's modules are then as before.

    ``make`` is called on the frozen model, with all settings filled in. ``shuffle``: a new order in each pass.
    Raises ConfigError for layers or modules that there are not, HostError where peft finds no place for adapters.
    """
    peft = extras.need(method, "lora", "peft", "peft.utils")[0]
    config, names = _resolve(peft, host, config)
    with hooks.frozen(host.model), seeded(host, work.seed):
        losses = make(config)
        steps = config.steps * math.ceil(losses.count / (config.per_step or losses.count))
        with _adapters(host, names, _settings(peft, host, names, config, steps), peft) as tuner:
            layers = {name: host.model.get_submodule(name) for name in names}
            outcome = _train(method, losses, tuner, layers, config, work, shuffle=shuffle)
            factors = {f"{name}.weight": _delta(layer) for name, layer in layers.items()}
            across = frozenset(f"{name}.weight" for name, layer in layers.items() if layer.fan_in_fan_out)
    deltas: dict[str, Delta] = {name: delta for name, delta in factors.items() if delta.rank}
    facts = notes({**outcome.facts(), "rank": max(delta.rank for delta in factors.values())})
    return Trained(config, deltas, across & deltas.keys(), facts)


def _resolve(peft: Any, host: Host, config: C) -> tuple[C, list[str]]:
    """Fill in layers and modules; return the paths of the linear maps they select."""
    layout = host.layout.of(config.stack)
    depth = len(layout.blocks)
    layers = tuple(range(depth)) if config.layers is None else config.layers
    layers = tuple(sorted({layer + depth if layer < 0 else layer for layer in layers}))
    if not layers or layers[0] < 0 or layers[-1] >= depth:
        raise ConfigError(f"layers {list(config.layers or ())}: expected some of 0 to {depth - 1}")
    every = [f"{layout.blocks[i]}.{name}" for i in layers for name in linear_maps(host, i, config.stack)]
    usual = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(host.family)
    endings = config.modules or tuple(usual if isinstance(usual, list) else ())
    by_ending = {end: {name for name in every if name.endswith(f".{end}")} for end in endings}
    endings_present = sorted({name.rpartition(".")[2] for name in every})
    missing = [end for end, names in by_ending.items() if not names]
    if config.modules and missing:
        raise ConfigError(
            f"no linear map of these layers is called {missing}; they have: {', '.join(endings_present)}"
        )
    targets = set().union(*by_ending.values()) or set(every)
    modules = tuple(end for end in endings if by_ending[end]) or tuple(endings_present)
    gentle = config.variant == "lora" and config.scale == "weight"
    defaults = dict(zip(("learning_rate", "stop_loss"), (5e-4, 0.05) if gentle else (5e-3, 0.0), strict=True))
    defaults = {name: value for name, value in defaults.items() if getattr(config, name) is None}
    config = replace(config, layers=layers, modules=modules, **defaults)
    return config, [name for name in every if name in targets]


def _settings(peft: Any, host: Host, names: list[str], config: AdapterConfig, steps: int) -> Any:
    """Convert the settings to peft's."""
    shared: dict[str, Any] = {
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": list(names),
        "fan_in_fan_out": not isinstance(host.model.get_submodule(names[0]), nn.Linear),
    }
    if config.variant == "lora":
        return peft.LoraConfig(r=config.rank, **shared)
    more = math.ceil(1.5 * config.rank)
    phases = {"tinit": steps // 10, "tfinal": 3 * steps // 10, "total_step": steps}
    return peft.AdaLoraConfig(init_r=more, target_r=config.rank, **phases, **shared)


@contextmanager
def _adapters(host: Host, names: list[str], settings: Any, peft: Any) -> Iterator[Any]:
    """Add adapters to linear maps inside the block; afterwards the original modules are restored."""
    if hasattr(host.model, "peft_config"):
        raise HostError("the model already has peft adapters; merge or unload them first")
    before = {name: host.model.get_submodule(name) for name in names}
    kind = peft.AdaLoraModel if isinstance(settings, peft.AdaLoraConfig) else peft.LoraModel
    try:
        try:
            tuner = kind(host.model, settings, NAME)
        except ValueError as error:
            raise HostError(f"peft cannot put adapters on this model: {error}") from error
        for name in names:
            for part in ("lora_A", "lora_B", "lora_E"):
                factors = getattr(host.model.get_submodule(name), part, None)
                if factors is not None:  # never trained in 16 bits
                    factors.to(torch.promote_types(before[name].weight.dtype, torch.float32))
        yield tuner
    finally:
        for name, module in before.items():
            parent, _, child = name.rpartition(".")
            setattr(host.model.get_submodule(parent), child, module)
        host.model.__dict__.pop("peft_config", None)


def _train(
    method: str, losses: Losses, tuner: Any, layers: dict[str, Any], config: AdapterConfig, work: Workspace,
    *, shuffle: bool,
) -> Outcome:  # fmt: skip
    """Optimise the adapters' factors."""
    adaptive, count = config.variant == "adalora", losses.count
    assert config.learning_rate is not None
    groups = []
    for layer in layers.values():
        weight = layer.get_base_layer().weight
        unit = 1.0 if config.scale == "published" else rms(weight) * layer.in_features**0.5
        for name, factor in layer.named_parameters():
            if factor.requires_grad:
                from_zero = name.startswith("lora_E" if adaptive else "lora_B")
                rate = config.learning_rate * (unit if from_zero else 1.0)
                groups.append({"params": [factor], "lr": rate})

    def run(indices: Sequence[int]) -> Tensor:
        training = torch.is_grad_enabled()
        for layer in layers.values():
            layer.lora_dropout.train(training)
        loss = losses(indices)
        penalised = adaptive and training and indices[0] < count  # once, not with companions again
        return loss + config.orthogonal * _skew(layers) if penalised else loss

    def allocate(step: int) -> None:
        for group in groups:
            for factor in group["params"]:  # peft reads every gradient, also of factors that got none
                factor.grad = torch.zeros_like(factor) if factor.grad is None else factor.grad
        tuner.update_and_allocate(step)

    return descend(
        torch.optim.Adam(groups), run, count, steps=config.steps, stop=Stop(config.stop_loss),
        per_step=config.per_step, shuffle=work.seed if shuffle else None, rows=work.batch_size,
        companions=losses.companions,
        after_step=allocate if adaptive else lambda step: None,
        tick=lambda *at: work.on_progress(method, *at),
    )  # fmt: skip


def _skew(layers: dict[str, Any]) -> Any:
    """Return ||F F^T - I||, AdaLoRA's deviation from orthogonality, mean over the factors F ``[r, d]``."""
    skews = []
    for layer in layers.values():
        for factor in (layer.lora_A[NAME], layer.lora_B[NAME].mT):  # [r, d]
            gram = factor @ factor.mT
            skews.append((gram - torch.eye(len(gram), device=gram.device, dtype=gram.dtype)).norm())
    return sum(skew.to(skews[0].device) for skew in skews) / len(skews)


def _delta(layer: Any) -> LowRank:
    """Return an adapter as a low-rank matrix ``[d_out, d_in]``, without the dropped directions."""
    a, b, factor = layer.lora_A[NAME], layer.lora_B[NAME], layer.scaling[NAME]
    if not hasattr(layer, "lora_E"):
        return LowRank(b.weight.detach() * factor, a.weight.detach())
    e = layer.lora_E[NAME].detach()  # [r, 1]
    active = e[:, 0] != 0
    factor = factor / (layer.ranknum[NAME].detach().to(e.dtype) + 1e-5)  # as in peft's layer
    return LowRank(b.detach()[:, active] * factor, (a.detach() * e)[active])
