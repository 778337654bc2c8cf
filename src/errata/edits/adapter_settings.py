"""What a PEFT adapter's configuration says: its scale and its modules, or why it is not taken."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from errata.errors import EditError

REFUSED = {
    "use_dora": "DoRA scales whole columns of the weight, which is no added matrix",
    "modules_to_save": "whole modules are saved beside the factors; import a merged checkpoint instead",
    "lora_bias": "the factors have biases",
    "trainable_token_indices": "embeddings of single tokens are changed",
    "target_parameters": "parameters that are no linear maps' weights are changed",
    "layer_replication": "layers are repeated",
    "megatron_config": "the model is built for Megatron",
    "alora_invocation_tokens": "the adapter acts on some tokens only",
    "arrow_config": "a router decides between adapters",
    "exclude_modules": "modules are excluded by name; list those that are changed in target_modules",
}
"""Settings that ask for more than factors, and what they mean."""
KNOWN = {
    "peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "r", "lora_alpha",
    "rank_pattern", "alpha_pattern", "target_modules", "fan_in_fan_out", "lora_dropout", "bias", "use_rslora",
    "init_lora_weights", "auto_mapping", "peft_version", "layers_to_transform", "layers_pattern",
    "megatron_core", "qalora_group_size",
    "ensure_weight_tying",
}  # fmt: skip
"""Settings that are taken, or mean nothing once an adapter is trained."""
INITIAL = (True, False, None, "gaussian")
"""Ways to begin a training that leave the base model's weights as they are."""


@dataclass(frozen=True)
class AdapterSettings:
    """The part of ``adapter_config.json`` that says what the factors mean."""

    rank: int
    alpha: float
    ranks: Mapping[str, Any]
    """By pattern of a module's name."""
    alphas: Mapping[str, Any]
    modules: tuple[str, ...] | str
    """Names, or endings of names, or one regular expression."""
    rank_stabilised: bool
    """Whether the scale is alpha over the square root of the rank."""
    is_whole: bool
    """Whether every linear map that :meth:`targets` names has factors."""
    base_model: str
    raw: Mapping[str, Any]
    path: Path

    @classmethod
    def read(cls, config: Mapping[str, Any], path: Path) -> AdapterSettings:
        """Check a configuration. Raises EditError with the reason for one that asks for more than factors."""
        if config.get("peft_type") != "LORA":
            raise EditError(
                f"{path} is of type {config.get('peft_type')!r:.80}; only LoRA adapters are imported"
            )
        for name, reason in REFUSED.items():
            if config.get(name):
                raise EditError(f"{path} sets {name}: {reason}")
        if config.get("bias", "none") != "none":
            raise EditError(
                f"{path} sets bias to {config['bias']!r:.80}: biases of the model were trained, too"
            )
        start = config.get("init_lora_weights", True)
        if not isinstance(start, (bool, str, type(None))) or start not in INITIAL:
            raise EditError(
                f"{path} sets init_lora_weights to {start!r:.80}: such a training changes the base model's weights, so "
                "the factors belong to other weights than the model's; convert the adapter (peft: "
                "path_initial_model_for_weight_conversion) or import a merged checkpoint"
            )
        unknown = sorted(
            name for name in config if name not in KNOWN and name not in REFUSED and config[name]
        )
        if unknown:
            raise EditError(
                f"{path} sets {unknown[0]!r:.80}, of which it is not known what it does to the factors"
            )
        modules = config.get("target_modules")
        if not isinstance(modules, str):
            if not isinstance(modules, list) or not all(
                isinstance(one, str) for one in cast("list[Any]", modules)
            ):
                raise EditError(f"{path}: target_modules is no list of names")
            modules = tuple(cast("list[str]", modules))
        whole = isinstance(modules, tuple) and config.get("layers_to_transform") is None
        return cls(
            _positive(config.get("r"), "r", path, whole=True), _positive(config.get("lora_alpha"), "lora_alpha", path),
            _patterns(config, "rank_pattern", path), _patterns(config, "alpha_pattern", path), modules,
            bool(config.get("use_rslora")), whole, str(config.get("base_model_name_or_path") or "")[:200], config, path,
        )  # fmt: skip

    def targets(self, module: str) -> bool:
        """Whether an adapter of these settings changes a module."""
        if self.modules == "all-linear":
            return True
        if isinstance(self.modules, str):
            try:
                return re.fullmatch(self.modules, module) is not None
            except re.error as error:
                raise EditError(f"{self.path}: target_modules is no regular expression: {error}") from error
        return any(module == one or module.endswith(f".{one}") for one in self.modules)

    def scale(self, module: str, rank: int) -> float:
        """Return what a module's product of factors is multiplied by.

        Raises EditError where its factors have another rank than the settings say.
        """
        expected = self._of(self.ranks, module, self.rank)
        if expected != rank:
            raise EditError(
                f"{self.path} says that {module!r:.120} has rank {expected}, and its factors have {rank}"
            )
        return self._of(self.alphas, module, self.alpha) / (rank**0.5 if self.rank_stabilised else rank)

    def _of(self, patterns: Mapping[str, Any], module: str, usual: Any) -> Any:
        """Return the value of the first pattern that a module's name ends in, as PEFT looks it up."""
        for pattern, value in patterns.items():
            try:
                found = re.match(rf"(.*\.)?({pattern})$", module) is not None
            except re.error as error:
                raise EditError(f"{self.path}: {pattern!r:.80} is no regular expression: {error}") from error
            if found:
                return value
        return usual


def _patterns(config: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    value: Any = config.get(name) or {}
    if not isinstance(value, dict):
        raise EditError(f"{path}: {name} is no object")
    patterns = cast("dict[str, Any]", value)
    return {key: _positive(one, name, path, whole=name == "rank_pattern") for key, one in patterns.items()}


def _positive(value: Any, name: str, path: Path, *, whole: bool = False) -> Any:
    fine = (
        isinstance(value, int if whole else (int, float)) and not isinstance(value, bool) and 0 < value < 1e9
    )
    if not fine:
        raise EditError(
            f"{path}: {name} is {value!r:.80}, expected a positive {'whole ' if whole else ''}number"
        )
    return value
