"""Settings that several methods share, and what makes a published run reproducible by settings alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from errata.linalg.solve import RIDGE


@dataclass(frozen=True)
class Stopping:
    """When a value search ends before its steps do."""

    stop: Literal["loss", "top"] = "loss"
    """Value search: end at ``stop_loss`` (ROME's and MEMIT's code), or also once the target was the first choice
    in every context (ENCORE)."""
    stop_loss: float = 0.05
    """Value search: loss in nats per target token below which it ends (ROME's and MEMIT's code: 0.05)."""
    top_count: int = 1
    """Value search, ``stop: top``: in how many evaluations the target must have been the first choice, in a row or
    not (ENCORE's paper: 1; its code: 4 for GPT-2 XL, 3 for Llama 2 7B, 2 for Llama 3 8B)."""
    top_bare: bool = True
    """Value search, ``stop: top``: whether the bare prompt is one of the contexts that must agree (ENCORE's code:
    no, the prefixed ones alone)."""


@dataclass(frozen=True)
class Inputs:
    """What a method otherwise makes itself."""

    prefixes: tuple[str, ...] | None = None
    """Context prefixes, each put before the prompt as it stands ("The old road. "), instead of sampled ones; the
    bare prompt comes first in any case. None: as many as ``contexts`` says, written by the model."""
    moments: str | None = None
    """File of second moments of keys to use instead of statistics taken here, {} in its name for the layer's number:
    .npz as ROME's and MEMIT's code writes them, or .safetensors with a matrix [m, m] per parameter."""


@dataclass(frozen=True)
class Ridge:
    """What keeps C invertible."""

    cov_ridge: float = RIDGE
    """Ridge on C in its mean diagonal entries (the authors' code of ROME, MEMIT and their relatives: 0)."""


def check_settings(config: Any) -> list[str]:
    """List complaints about these settings; for ``problems()``."""
    complaints = []
    count = getattr(config, "top_count", None)
    if count is not None and count < 1:
        complaints.append(f"top_count: expected 1 or more, complaints {config.top_count}")
    for name in ("stop_loss", "cov_ridge"):
        value = getattr(config, name, 0.0)
        if value is not None and not 0 <= value < float("inf"):
            complaints.append(f"{name}: expected 0 or more, complaints {value}")
    return complaints
