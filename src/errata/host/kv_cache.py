"""What a model's attention has computed of some tokens: keys and values, in one of two kinds of cache.

:class:`GrowingCache` is what the model itself makes, for rows that are continued token by token. :class:`FixedCache`
is for searches that run the same continuation many times: it stays as it is, several rows may continue one entry,
gradients pass through what is put behind it, and blocks that are not run need no entry.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

KeyValues = tuple[Tensor, Tensor]
"""Keys and values of one block, ``[rows, heads, length, head]`` each."""


@dataclass(frozen=True, eq=False)
class GrowingCache:
    """A transformers cache as the model returned it, with layers of whatever kind the model uses."""

    cache: Any

    def select(self, rows: Tensor | None) -> GrowingCache:
        """Return a copy with some rows ``[n]``, None all; this one stays as it is, whatever follows the copy."""
        cache = copy.copy(self.cache)
        cache.layers = [
            copy.copy(layer) for layer in self.cache.layers
        ]  # a layer replaces its tensors as it grows
        for layer in cache.layers:
            if rows is not None and layer.is_initialized:
                layer.batch_select_indices(rows.to(layer.keys.device))
        return GrowingCache(cache)

    def join(self, other: GrowingCache) -> GrowingCache:
        """Return the rows of both, padded on the left to one length; see :attr:`joinable`. Both stay as they are."""
        length = max(one.cache.get_seq_length() for one in (self, other))
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        for layer, own, new in zip(cache.layers, self.cache.layers, other.cache.layers, strict=True):
            layer.keys = torch.cat([_lengthened(one.keys, length) for one in (own, new)])
            layer.values = torch.cat([_lengthened(one.values, length) for one in (own, new)])
        return GrowingCache(cache)

    def without_first(self, columns: int) -> GrowingCache:
        """Return the same without its first columns, which no row reads; see :attr:`joinable`."""
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, columns:], layer.values[:, :, columns:]
        return GrowingCache(cache)

    @property
    def joinable(self) -> bool:
        """Whether it is one tensor of keys and one of values for each block, with a column for every token."""
        return all(type(layer) is DynamicLayer and layer.is_initialized for layer in self.cache.layers)

    @property
    def selectable(self) -> bool:
        """Whether rows can be taken out of it."""
        layers = getattr(self.cache, "layers", [None])
        return all(hasattr(layer, "batch_select_indices") for layer in layers)


@dataclass(frozen=True, eq=False)
class FixedCache:
    """Keys and values by block."""

    blocks: Mapping[int, KeyValues]

    def select(self, rows: Tensor) -> FixedCache:
        """Return a copy of some entries, named by their indices ``[n]``."""
        return FixedCache(
            {block: (k[rows.to(k.device)], v[rows.to(v.device)]) for block, (k, v) in self.blocks.items()}
        )

    def with_empty(self) -> FixedCache:
        """Append an entry of zeros."""
        return FixedCache(
            {block: (append_zeros(k), append_zeros(v)) for block, (k, v) in self.blocks.items()}
        )

    def followed_by(
        self, later: Mapping[int, KeyValues], columns: int, row: Tensor | None, length: int
    ) -> FixedCache:
        """Return the cache of each row with the first ``columns`` columns of ``later`` behind its entry.

        ``row`` ``[rows]``: which entry each row continues, None its own; ``length``: columns of this cache.
        """
        blocks: dict[int, KeyValues] = {}
        for block, (keys, values) in later.items():
            new = keys[:, :, :columns], values[:, :, :columns]
            earlier = self.blocks.get(block) if length else None
            if earlier is not None:
                own = [part if row is None else part[row.to(part.device)] for part in earlier]
                new = torch.cat([own[0], new[0]], 2), torch.cat([own[1], new[1]], 2)
            blocks[block] = new
        return FixedCache(blocks)


class FixedLayer(DynamicLayer):
    """One block's part of a :class:`FixedCache` in a pass: returns it before what comes in, and records the latter."""

    def __init__(
        self, prefix: KeyValues | None, row: Tensor | None, length: int, padding: Tensor | None
    ) -> None:
        """``padding``: bool ``[rows, 1, length, 1]``, where keys and values are no tokens' and are set to zero."""
        super().__init__()
        self.prefix, self.row, self.length, self.padding = prefix, row, length, padding
        self.new: KeyValues | None = None
        """Keys and values of the tokens that were run."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> KeyValues:
        """Return all keys and values ``[rows, heads, length, head]``, those of the prefix first."""
        if self.padding is not None:
            # a query with nothing to attend to may compute anything, NaN too; no other may see it
            padding = self.padding.to(key_states.device)
            key_states, value_states = (
                key_states.masked_fill(padding, 0),
                value_states.masked_fill(padding, 0),
            )
        self.new = (key_states, value_states)
        if not self.length:
            return key_states, value_states
        if self.prefix is None:
            raise RuntimeError("a block was run whose prefix was not kept")
        keys, values = self.prefix
        if self.row is not None:
            keys, values = (part[self.row.to(part.device)] for part in self.prefix)
        return torch.cat([keys, key_states], -2), torch.cat([values, value_states], -2)

    def get_seq_length(self) -> int:
        """Return the columns of the prefix."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many columns attention sees, and where they begin."""
        return self.length + query_length, 0


def as_cache(layers: Sequence[FixedLayer]) -> Cache:
    """Return layers as a model takes them."""
    return Cache(layers=list(layers))


def _lengthened(tensor: Tensor, length: int) -> Tensor:
    """Put zeros before the columns of keys or values ``[rows, heads, columns, head]`` up to a length."""
    return torch.nn.functional.pad(tensor, (0, 0, length - tensor.shape[2], 0))


def append_zeros(tensor: Tensor) -> Tensor:
    """Append one row of zeros ``[rows + 1, ...]``."""
    return torch.cat([tensor, torch.zeros_like(tensor[:1])])
