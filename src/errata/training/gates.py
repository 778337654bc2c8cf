"""Hard-concrete gates: numbers in [0, 1] that are learned, and closed or fully open with positive probability.

Source     Louizos, Welling and Kingma, "Learning Sparse Neural Networks through L0 Regularization", ICLR 2018,
           arXiv 1712.01312; masks 1 + e z of features: Xu, Hou and Che, "Language Anisotropic Cross-Lingual Model
           Editing", Findings of ACL 2023, arXiv 2205.12677
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import log

import torch
from torch import Tensor, nn

from errata.training.hypernetwork import name_of

TEMPERATURE, LOW, HIGH = 2 / 3, -0.1, 1.1
"""Temperature, and the interval that the sigmoid is stretched to before it is clipped to [0, 1]."""
LARGEST = log(100.0)
"""Bound of the learned numbers, in both directions."""


class Gates(nn.Module):
    """Some gates, each with the logarithm of its odds."""

    def __init__(self, *shape: int, open_share: float, spread: float, generator: torch.Generator) -> None:
        """Draw the log odds around those of a share of open gates, with a standard deviation."""
        super().__init__()
        start = log(open_share) - log(1 - open_share)
        self.log_odds = nn.Parameter(start + spread * torch.randn(*shape, generator=generator))

    def values(self, noise: Tensor | None = None) -> Tensor:
        """Return the gates; ``noise``: uniform on (0, 1), a draw for each. None: what is used after training."""
        odds = self.log_odds.clamp(-LARGEST, LARGEST)
        if noise is None:
            smooth = torch.sigmoid(odds)
        else:
            smooth = torch.sigmoid((noise.log() - (-noise).log1p() + odds) / TEMPERATURE)
        return (smooth * (HIGH - LOW) + LOW).clamp(0, 1)

    def open_probability(self) -> Tensor:
        """Return the probability that each gate is not zero: its expected contribution to the L0 norm."""
        odds = self.log_odds.clamp(-LARGEST, LARGEST)
        return torch.sigmoid(odds - TEMPERATURE * log(-LOW / HIGH))


class FeatureMasks(nn.Module):
    """For each shape of map and each of some tags a mask 1 + e z over its inputs and outputs; z: gates, e: learned."""

    def __init__(
        self, sizes: Iterable[tuple[int, int]], tags: int, *, open_share: float, spread: float, seed: int
    ) -> None:
        """Take the widths of output and input of each shape, and how many tags there are."""
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.gates, self.scales = nn.ModuleDict(), nn.ParameterDict()
        for one in sorted(sizes):
            shape = tags, sum(one)
            self.gates[name_of(one)] = Gates(
                *shape, open_share=open_share, spread=spread, generator=generator
            )
            self.scales[name_of(one)] = nn.Parameter(torch.ones(*shape))

    def noise(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw what gates are sampled with ``[tags, d_in + d_out]``, by shape of map."""
        tiny = torch.finfo(torch.float32).tiny
        return {
            name: torch.rand(scale.shape, generator=generator).clamp(tiny, 1 - 1e-7).to(scale.device)
            for name, scale in self.scales.items()
        }

    def mask(self, sizes: tuple[int, int], noise: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the masks of a shape of map ``[tags, d_in + d_out]``; ``noise``: None after training."""
        name = name_of(sizes)
        drawn = None if noise is None else noise[name]
        return 1 + self.scales[name] * self.by_shape()[name].values(drawn)

    def by_shape(self) -> dict[str, Gates]:
        """Return the gates by shape of map."""
        return {name: gates for name, gates in self.gates.items() if isinstance(gates, Gates)}

    def open_share(self) -> Tensor:
        """Return the expected share of open gates ``[]``."""
        return torch.cat([gates.open_probability().flatten() for gates in self.by_shape().values()]).mean()
