"""Several processes that train one editor: each differentiates its share of a step, and all take the same step.

torchrun starts them, or whatever sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. Each holds the whole model and
the whole editor; what they exchange are gradients and losses, as numbers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, distributed

from errata.errors import ConfigError

T = TypeVar("T")
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Of the environment: what each process is told of the others."""


@dataclass(frozen=True)
class Workers:
    """The processes of a training, and which of them this one is."""

    rank: int = 0
    """Number of this process, from 0."""
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Return this process's part of some items: consecutive ones, none where there are fewer than processes."""
        size = -(-len(items) // self.count)
        return items[self.rank * size : (self.rank + 1) * size]

    def add_up_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors ``[...]`` of one type and device by their sums over all processes.

        Each process gets the same bits. Sums of two are those of one process that adds the two; the order of more is
        the backend's.
        """
        if self.count == 1 or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        distributed.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def rows(self, own: Sequence[tuple[float, ...]], count: int) -> list[tuple[float, ...]]:
        """Return what all processes recorded of ``count`` items, from what this one did of its share, in order."""
        if self.count == 1 or not count:
            return list(own)
        width = torch.tensor(len(own[0]) if own else 0)
        distributed.all_reduce(width, op=distributed.ReduceOp.MAX)
        table = torch.zeros(count, int(width), dtype=torch.float64)
        for number, row in zip(self.share(range(count)), own, strict=True):
            table[number] = torch.tensor(row, dtype=torch.float64)
        distributed.all_reduce(table)  # each row is of one process, and zero elsewhere
        return [tuple(row) for row in table.tolist()]

    def align_(self, tensors: Sequence[Tensor]) -> None:
        """Set tensors ``[...]`` to what they are in the first process."""
        if self.count == 1:
            return
        with torch.no_grad():
            for tensor in tensors:
                distributed.broadcast(tensor, 0)

    def agreed(self, facts: Mapping[str, float]) -> dict[str, float]:
        """Return the first process's facts, which have the same names in all."""
        if self.count == 1:
            return dict(facts)
        values = torch.tensor(list(facts.values()), dtype=torch.float64)
        distributed.broadcast(values, 0)
        return dict(zip(facts, values.tolist(), strict=True))


ALONE = Workers()


def started_by_torchrun() -> bool:
    """Tell whether the environment names other processes that train with this one."""
    return all(name in os.environ for name in VARIABLES) and os.environ["WORLD_SIZE"] != "1"


def device_of(device: str) -> str:
    """Return the device of this process: with ``auto`` or ``cuda`` and several processes, a GPU of its own.

    Raises ConfigError where the machine has fewer GPUs than processes.
    """
    if not started_by_torchrun() or device not in ("auto", "cuda") or not torch.cuda.is_available():
        return device
    local, most = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= most:
        raise ConfigError(
            f"process {local} of this machine has no GPU of its own, there are {most}: --device cpu"
        )
    return f"cuda:{local}"


@contextmanager
def joined() -> Iterator[Workers]:
    """Join the processes that the environment names while inside; alone where it names none.

    A process group that stands already is used, and left standing. Raises ConfigError where they cannot be joined.
    """
    if not (distributed.is_available() and started_by_torchrun()):
        yield ALONE
        return
    own = not distributed.is_initialized()
    if own:
        try:
            distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        except (ValueError, RuntimeError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                f"cannot join the processes named by {', '.join(VARIABLES)}: {first}"
            ) from error
    try:
        yield Workers(distributed.get_rank(), distributed.get_world_size())
    finally:
        if own:
            distributed.destroy_process_group()
