"""How the next token of a row is chosen from its logits."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from errata.errors import HostError
from errata.host.generation_settings import departures
from errata.host.host import Host

PENALTY = "repetition_penalty"


@dataclass(frozen=True)
class Sampling:
    """How one row's tokens are drawn."""

    temperature: float = 0.0
    """0: always the most probable token."""
    top_p: float = 1.0
    """Share of the probability that the most probable tokens drawn from have together."""
    seed: int = 0

    def generator(self, prompt: Sequence[int]) -> torch.Generator:
        """Return the row's own source of random numbers: what is drawn depends on seed and prompt alone."""
        digest = hashlib.sha256(f"{self.seed} {tuple(prompt)}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:6], "big"))

    def draw(self, logits: Tensor, generator: torch.Generator) -> int:
        """Draw one token by its logits ``[vocab]``."""
        ordered = (logits.double().cpu() / self.temperature).softmax(-1).sort(descending=True)
        bounds = ordered.values.cumsum(-1)
        kept = int((bounds < self.top_p).sum()) + 1  # the least tokens that have the share together
        bounds = bounds[:kept]
        thrown = torch.rand((), generator=generator, dtype=torch.float64) * bounds[-1]
        return int(ordered.indices[int(torch.searchsorted(bounds, thrown).clamp_max(len(bounds) - 1))])


def penalty_of(host: Host) -> float:
    """Return the repetition penalty of a model's generation settings, 1 for none.

    Raises HostError for other settings that change greedy text, as these are not followed here.
    """
    found: dict[str, Any] = departures(host)
    others = {name: value for name, value in found.items() if name != PENALTY}
    if others:
        listed = ", ".join(f"{name}={value!r}" for name, value in others.items())
        raise HostError(
            f"{host.name} asks in its generation settings for {listed}, which errata serve does not follow: take them "
            "out of generation_config.json, or serve an exported checkpoint with another server"
        )
    return float(found.get(PENALTY, 1.0))


def penalised(logits: Tensor, ids: Sequence[int], penalty: float) -> Tensor:
    """Return logits ``[vocab]`` with those of tokens that are in a text made smaller.

    Positive ones are divided by the penalty, negative ones multiplied (Keskar et al. 2019, arXiv 1909.05858), as
    transformers does.
    """
    seen = torch.tensor(sorted(set(ids)), device=logits.device)
    chosen = logits[seen]
    return logits.index_put((seen,), torch.where(chosen < 0, chosen * penalty, chosen / penalty))
