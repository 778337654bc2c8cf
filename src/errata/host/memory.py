"""Batches that give way: fewer items at a time when memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

A = TypeVar("A")
B = TypeVar("B")


def in_batches(items: Sequence[A], size: int, run: Callable[[Sequence[A]], list[B]]) -> list[B]:
    """Run items in batches of ``size``, halving it whenever memory runs out; results in order.

    Raises what ``run`` raised when even one item does not fit.
    """
    results: list[B] = []
    size = max(1, size)
    while len(results) < len(items):
        batch = items[len(results) : len(results) + size]
        try:
            part = run(batch)
        except (RuntimeError, MemoryError) as error:
            if len(batch) == 1 or not ran_out(error):
                raise
            size = len(batch) // 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            continue
        if len(part) != len(batch):
            raise ValueError(f"{len(batch)} items gave {len(part)} results")
        results += part
    return results


def share(device: torch.device) -> int:
    """Return how many bytes one batch may keep: a quarter of a GPU's free memory, a quarter GiB elsewhere."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free // 4
    return 1 << 28


def ran_out(error: BaseException) -> bool:
    """Whether an error means that memory ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
