"""A side network beside a decoder: adapter blocks that read its hidden states, and what they add to its last one.

Source     Wang et al., "K-Adapter: Infusing Knowledge into Pre-Trained Models with Adapters", Findings of ACL 2021,
           arXiv 2002.01808
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

LAYER = (
    "attention", "attention_biases", "output", "output_biases", "attention_norm", "attention_norm_biases",
    "inner", "inner_biases", "outer", "outer_biases", "norm", "norm_biases",
)  # fmt: skip
"""Tensors of a transformer layer; the first two axes are those of the blocks and of the layers of a block."""
PARTS = ("down", "down_biases", *LAYER, "up", "up_biases", "fusion", "fusion_biases")
"""Tensors of a side network."""
EPSILON = 1e-5
"""Of its layer norms (authors' code)."""


def side_shapes(blocks: int, layers: int, d: int, width: int, inner: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of a side network, by name.

    ``blocks`` of ``layers`` transformer layers each, beside states of d entries; they compute with ``width``, and
    ``inner`` in their feed-forwards.
    """
    each = (blocks, layers)
    return {
        "down": (blocks, width, d), "down_biases": (blocks, width),
        "attention": (*each, 3 * width, width), "attention_biases": (*each, 3 * width),
        "output": (*each, width, width), "output_biases": (*each, width),
        "attention_norm": (*each, width), "attention_norm_biases": (*each, width),
        "inner": (*each, inner, width), "inner_biases": (*each, inner),
        "outer": (*each, width, inner), "outer_biases": (*each, width),
        "norm": (*each, width), "norm_biases": (*each, width),
        "up": (blocks, d, width), "up_biases": (blocks, d),
        "fusion": (d, 2 * d), "fusion_biases": (d,),
    }  # fmt: skip


def side_change(
    part: Mapping[str, Tensor], states: Sequence[Tensor], last: Tensor, tokens: Tensor, *, heads: int,
    earlier: Tensor | None = None, dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return what a side network adds to a decoder's last states ``[rows, length, d]``, and its keys and values.

    A block computes A = x + up(layers(down(x))) from x, one of ``states`` ``[rows, length, d]`` plus the A of the block
    before it; the final feature W [last; A] is last plus what is returned, so that ``fusion`` is W - [I, 0]. A token
    attends to itself and to earlier tokens of its row. ``tokens``: bool ``[rows, columns]``, of all columns so far,
    padding being False. ``earlier``: keys and values of the columns before these, as they are returned with these
    appended: ``[rows, columns, blocks, layers, 2, width]``.
    """
    length, count = last.shape[1], part["attention"].shape[1]
    columns = torch.arange(tokens.shape[1], device=last.device)
    own = columns[-length:, None]
    seen = (columns <= own) & tokens[:, None] | (columns == own)  # a row of padding must not divide by zero
    previous, kept = torch.zeros_like(last), list[Tensor]()
    for block, state in enumerate(states):
        x = state + previous
        hidden = functional.linear(x, part["down"][block], part["down_biases"][block])
        for layer in range(count):
            tensors = {name: part[name][block, layer] for name in LAYER}
            past = None if earlier is None else earlier[:, :, block, layer]
            hidden, pair = _layer(tensors, hidden, past, seen[:, None], heads, dropout)
            kept.append(pair)
        previous = x + functional.linear(hidden, part["up"][block], part["up_biases"][block])
    change = functional.linear(torch.cat([last, previous], -1), part["fusion"], part["fusion_biases"])
    history = torch.stack(kept, 2)
    return change, history.reshape(*history.shape[:2], len(states), count, *history.shape[3:])


def _layer(
    tensors: Mapping[str, Tensor], x: Tensor, past: Tensor | None, seen: Tensor, heads: int, dropout: float
) -> tuple[Tensor, Tensor]:
    """Return a layer's output ``[rows, length, width]``, and keys and values ``[rows, columns, 2, width]``."""
    query, *pair = functional.linear(x, tensors["attention"], tensors["attention_biases"]).chunk(3, -1)
    kept = torch.stack(pair, 2)
    kept = kept if past is None else torch.cat([past, kept], 1)
    q, k, v = (_split(t, heads) for t in (query, kept[:, :, 0], kept[:, :, 1]))
    scores = (q @ k.mT) / q.shape[-1] ** 0.5  # [rows, heads, length, columns]
    weights = functional.dropout(scores.masked_fill(~seen, -torch.inf).softmax(-1), dropout)
    mixed = functional.linear(
        (weights @ v).transpose(1, 2).flatten(2), tensors["output"], tensors["output_biases"]
    )
    x = _norm(x + functional.dropout(mixed, dropout), tensors, "attention_norm")
    inner = functional.gelu(functional.linear(x, tensors["inner"], tensors["inner_biases"]))
    outer = functional.linear(inner, tensors["outer"], tensors["outer_biases"])
    return _norm(x + functional.dropout(outer, dropout), tensors, "norm"), kept


def _norm(x: Tensor, tensors: Mapping[str, Tensor], name: str) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], tensors[name], tensors[f"{name}_biases"], EPSILON)


def _split(x: Tensor, heads: int) -> Tensor:
    """Return ``[rows, columns, width]`` by heads, ``[rows, heads, columns, width / heads]``."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)
