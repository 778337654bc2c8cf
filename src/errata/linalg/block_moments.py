"""Moments of vectors made of blocks, most of them zero: those of experts, of which each token takes a few.

The second moment is taken as block-diagonal, ``[E, m, m]``: what a change of one expert's weight costs does not depend
on the others. Each block's is the mean over all vectors, zeros included, so an expert that few tokens take is cheap to
change.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from errata.linalg.moments import Moments


@dataclass
class BlockMoments:
    """Running sums over vectors of E blocks of m entries."""

    count: int
    blocks: tuple[Moments, ...]
    """Sums over the vectors whose block is not zero, for each block."""

    @staticmethod
    def empty(blocks: int, width: int, device: torch.device | str = "cpu") -> BlockMoments:
        """Return the sums of no vectors of ``blocks`` blocks of ``width`` entries."""
        return BlockMoments(0, tuple(Moments.empty(width, device) for _ in range(blocks)))

    def update_(self, vectors: Tensor) -> None:
        """Add vectors ``[n, E m]``, each to the sums of those blocks that are not zero in it."""
        parts = vectors.detach().reshape(-1, len(self.blocks), len(self.blocks[0].total))
        self.count += len(parts)
        present = parts.any(2)  # [n, E]
        for number, block in enumerate(self.blocks):
            block.update_(parts[present[:, number], number])

    def to(self, device: torch.device | str) -> BlockMoments:
        """Return a copy on a device."""
        return BlockMoments(self.count, tuple(block.to(device) for block in self.blocks))

    @property
    def total(self) -> Tensor:
        """Sum of vectors, float64 ``[E m]``."""
        return torch.cat([block.total for block in self.blocks])

    @property
    def shares(self) -> Tensor:
        """Share of the vectors whose block is not zero, ``[E]``: how often each expert was taken."""
        return torch.tensor([block.count / max(1, self.count) for block in self.blocks])

    @property
    def second(self) -> Tensor:
        """Blocks of the uncentred second moment, mean over all vectors, ``[E, m, m]``.

        A block with n vectors, fewer than its m entries, is a mixture with the mean of all blocks, n / m its own
        share: what was hardly seen counts as used like the others.
        """
        second = torch.stack([block.second * (block.count / max(1, self.count)) for block in self.blocks])
        width = second.shape[-1]
        known = [min(1.0, block.count / width) for block in self.blocks]
        own = second.new_tensor(known)[:, None, None]
        return own * second + (1 - own) * second.mean(0)

    @property
    def effective_rank(self) -> float:
        """tr(C)^2 / ||C||_F^2 of the block-diagonal second moment."""
        traces, sizes = zip(*(_trace_and_size(block) for block in self.blocks), strict=True)
        return sum(traces) ** 2 / sum(sizes) if sum(sizes) else 0.0

    def remaining_error(self) -> float | None:
        """Estimate ||C_T - C||_F / ||C||_F from that of each block; None where a block in use has too few vectors."""
        used = [(block.remaining_error(), _trace_and_size(block)[1]) for block in self.blocks if block.count]
        total = sum(size for _, size in used)
        if not total or any(error is None for error, _ in used):
            return None
        return math.sqrt(sum((error or 0.0) ** 2 * size for error, size in used) / total)


def _trace_and_size(block: Moments) -> tuple[float, float]:
    """Return trace and squared norm of the sum of a block's outer products."""
    rank = block.effective_rank
    trace = sum(float(column[: column.shape[1]].diagonal().sum()) for column in block.columns)
    return trace, trace**2 / rank if rank else 0.0


AnyMoments = Moments | BlockMoments
"""Moments of plain vectors, or of vectors in blocks."""


def mixed(first: AnyMoments, second: AnyMoments, share: float) -> AnyMoments:
    """Return sums whose second moment is (1 - share) that of the first and share that of the second.

    Mean and second moment are those of the mixture, whatever the numbers of vectors; with blocks, so is each block's
    over all vectors. Nothing is known of its error. Raises ValueError for a share outside 0 to 1, or for moments of
    other vectors.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"a share from 0 to 1 was expected, found {share}")
    count = first.count + second.count
    scales = (1 - share) * count / max(1, first.count), share * count / max(1, second.count)
    if isinstance(first, BlockMoments) and isinstance(second, BlockMoments):
        pairs = zip(first.blocks, second.blocks, strict=True)
        return BlockMoments(count, tuple(_sum(*pair, *scales) for pair in pairs))
    if isinstance(first, Moments) and isinstance(second, Moments):
        return _sum(first, second, *scales)
    raise ValueError("moments of plain vectors and of vectors in blocks are not mixed")


def _sum(first: Moments, second: Moments, one: float, other: float) -> Moments:
    """Return the sum of two moments' sums, each times a factor."""
    if first.total.shape != second.total.shape:
        raise ValueError(f"vectors of {len(first.total)} and of {len(second.total)} entries are not mixed")
    pairs = zip(first.columns, second.columns, strict=True)
    columns = tuple(one * a + other * b.to(a.device) for a, b in pairs)
    total = one * first.total + other * second.total.to(first.total.device)
    return Moments(first.count + second.count, total, columns)
