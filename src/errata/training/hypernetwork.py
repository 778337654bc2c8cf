"""A network from gradients to changes of weights: low-rank residual blocks on the normalised factors of linear maps.

Source     Mitchell et al., "Fast Model Editing at Scale", ICLR 2022, arXiv 2110.11309; Tan, Zhang and Fu, "Massive
           Editing for Large Language Models via Meta Learning", ICLR 2024, arXiv 2311.04661
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from errata.linalg import routines
from errata.linalg.running import RESOLUTION, Running
from errata.training.factors import Factors

Form = Literal["inside", "outside"]
"""Where a block's scale s and shift o of each map are: ReLU(s (U V z + b) + o), as in MEND, or s ReLU(U V z + b) + o,
as in MALMEN."""


@dataclass(frozen=True)
class NetworkShape:
    """Sizes of a network."""

    rank: int
    """Of each block's linear map, at most the width of what it reads."""
    blocks: int
    form: Form


class Block(nn.Module):
    """One residual block, shared by maps of one shape but for a scale and a shift of each of them."""

    def __init__(self, width: int, maps: int, shape: NetworkShape, generator: torch.Generator) -> None:
        super().__init__()
        rank = min(shape.rank, width)
        self.form: Form = shape.form
        self.inner = nn.Parameter(torch.randn(rank, width, generator=generator) / width**0.5)
        self.outer = nn.Parameter(torch.zeros(width, rank))  # untrained, a block adds nothing
        self.bias = nn.Parameter(torch.zeros(width))
        self.scale = nn.Parameter(torch.ones(maps, width))
        self.shift = nn.Parameter(torch.zeros(maps, width))

    def forward(self, rows: Tensor, number: int) -> Tensor:
        """Return rows ``[n, m]`` of the map with a number, with what the block adds to them ``[n, m]``."""
        linear = rows @ self.inner.mT @ self.outer.mT + self.bias
        # clamped, for the gradient of ReLU is zero at zero, where a block begins
        if self.form == "inside":
            return rows + (self.scale[number] * linear + self.shift[number]).clamp(min=0)
        return rows + self.scale[number] * linear.clamp(min=0) + self.shift[number]


class ShapeNetwork(nn.Module):
    """The normaliser and the blocks of the maps of one shape."""

    mean: Tensor
    """``[d_in + d_out]``."""
    inverse: Tensor
    """One over the deviation, 0 for a constant entry ``[d_in + d_out]``."""

    def __init__(self, width: int, maps: int, shape: NetworkShape, generator: torch.Generator) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("inverse", torch.ones(width))
        self.blocks = nn.ModuleList(Block(width, maps, shape, generator) for _ in range(shape.blocks))

    def set_statistics_(self, running: Running) -> None:
        """Normalise by some statistics from here on. Raises ValueError for those of a single vector."""
        deviation = running.variance.sqrt()
        constant = deviation <= RESOLUTION * running.mean.abs()
        self.mean.copy_(running.mean)
        self.inverse.copy_(torch.where(constant, 0.0, 1 / deviation.clamp_min(1e-300)).clamp_max(1e30))

    def forward(self, rows: Tensor, number: int) -> Tensor:
        """Return rows ``[n, d_in + d_out]`` of the map with a number, normalised and through all blocks."""
        rows = (rows - self.mean) * self.inverse
        for block in self.blocks:
            rows = block(rows, number)
        return rows


class Hypernetwork(nn.Module):
    """From the factors of some maps to as many rows each of pseudo-inputs and pseudo-gradients."""

    def __init__(self, maps: Mapping[str, tuple[int, int]], shape: NetworkShape, *, seed: int) -> None:
        """Take the widths of each map's output and input; at the start the network only normalises."""
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.maps, self.form = dict(maps), shape.form
        self.names = [name_of(sizes) for sizes in self.maps.values()]
        shared = {name: self.names.count(name) for name in self.names}
        sizes = dict(zip(self.names, self.maps.values(), strict=True))
        self.networks = nn.ModuleDict(
            {name: ShapeNetwork(sum(sizes[name]), count, shape, generator) for name, count in shared.items()}
        )
        numbers = [self.names[:i].count(name) for i, name in enumerate(self.names)]
        self.places = dict(zip(self.maps, zip(self.names, numbers, strict=True), strict=True))

    def forward(self, factors: Mapping[str, Factors]) -> dict[str, tuple[Tensor, Tensor]]:
        """Return each map's pseudo-inputs ``[n, d_in]`` and pseudo-gradients ``[n, d_out]``."""
        return {name: self.of(name, one) for name, one in factors.items()}

    def of(self, name: str, factors: Factors) -> tuple[Tensor, Tensor]:
        """Return a map's pseudo-inputs ``[n, d_in]`` and pseudo-gradients ``[n, d_out]``."""
        shape, number = self.places[name]
        rows = torch.cat([factors.keys, factors.gradients], 1)
        inner, outer = self.networks[shape](rows, number).tensor_split([factors.keys.shape[1]], 1)
        return inner, outer

    def set_statistics_(self, batches: Sequence[Callable[[], Mapping[str, Factors]]]) -> dict[str, float]:
        """Normalise by the factors of some batches from here on; return each map's mean squared norm of inputs.

        Raises ValueError where a shape of map has fewer than two rows.
        """
        running = {name: Running.empty(len(net.mean)) for name, net in self._each()}
        energies, counts = dict.fromkeys(self.maps, 0.0), dict.fromkeys(self.maps, 0)
        for batch in batches:
            for name, one in batch().items():
                running[self.places[name][0]].update_(torch.cat([one.keys, one.gradients], 1).cpu())
                energies[name] += float(one.keys.double().square().sum())
                counts[name] += len(one.keys)
        with torch.no_grad():
            for name, net in self._each():
                net.set_statistics_(running[name])
        return {name: energies[name] / max(1, counts[name]) for name in self.maps}

    def _each(self) -> list[tuple[str, ShapeNetwork]]:
        return [(name, net) for name, net in self.networks.items() if isinstance(net, ShapeNetwork)]


class Damping(nn.Module):
    """Makes smaller what a map's inputs have in common, so that a change at some inputs acts less at all others.

    Along each of the directions with the largest second moments s, an input is multiplied by sqrt(e / (s + e)).
    """

    directions: Tensor
    """Orthonormal rows ``[k, d_in]``."""
    left: Tensor
    """What an input is multiplied by along each ``[k]``."""

    def __init__(self, width: int, count: int) -> None:
        """Until moments are set, inputs stay as they are."""
        super().__init__()
        self.register_buffer("directions", torch.zeros(min(count, width), width))
        self.register_buffer("left", torch.ones(min(count, width)))

    def set_moments_(self, moments: Tensor, floor: float) -> float:
        """Damp by second moments ``[d_in, d_in]`` from here on; return what is left of the mean squared norm.

        ``floor``: e, relative to the mean of all moments.
        """
        values, vectors = routines.eigh(moments.double())
        least = floor * moments.diagonal().double().mean()
        chosen = values[-len(self.left) :].clamp(min=0)
        shares = least / (chosen + least)
        self.left.copy_(shares.sqrt())
        self.directions.copy_(vectors[:, -len(self.left) :].mT)
        return float(1 - (chosen * (1 - shares)).sum() / moments.diagonal().double().sum())

    def forward(self, rows: Tensor) -> Tensor:
        """Return inputs ``[n, d_in]``, damped."""
        along = (rows @ self.directions.mT) * (1 - self.left)
        return rows - along @ self.directions


def name_of(sizes: tuple[int, int]) -> str:
    """Return the name of a map's shape."""
    return f"{sizes[0]}x{sizes[1]}"
