"""A network that reads an edit as text and writes, for each weight, a mask of its gradient and a shift of rank one.

Source     De Cao, Aziz and Titov, "Editing Factual Knowledge in Language Models", EMNLP 2021, arXiv 2104.08164
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence

from errata.training.factors import Change, Factors


@dataclass(frozen=True)
class ConditionalShape:
    """Sizes of a network."""

    embedding: int
    """Width of the model's word embeddings, which it reads."""
    encoder: int
    """Width of each direction of its recurrent encoder."""
    condition: int
    """Width of what an edit's text becomes."""
    head: int
    """Width of the hidden layer of each weight's head."""


class Head(nn.Module):
    """What is written for one weight ``[d_out, d_in]``: two vectors for either side, and a gate."""

    unit: Tensor
    """What the masked gradient is multiplied by ``[]``."""
    shift: Tensor
    """What the shift is multiplied by ``[]``."""

    def __init__(self, sizes: tuple[int, int], shape: ConditionalShape) -> None:
        super().__init__()
        self.sizes = sizes
        self.register_buffer("unit", torch.ones(()))
        self.register_buffer("shift", torch.ones(()))
        self.inner = parametrizations.weight_norm(nn.Linear(shape.condition, shape.head))
        self.outer = parametrizations.weight_norm(nn.Linear(shape.head, 2 * sum(sizes) + 1))

    def forward(self, condition: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return u softmax(r_a) ``[n, d_out]``, c_a ``[n, d_in]``, v softmax(r_b), c_b, and sigmoid(n) ``[n, 1]``.

        u and v are the units of the masked gradient and of the shift.
        """
        out, into = self.sizes
        written = self.outer(self.inner(condition).tanh())
        rows_a, columns_a, rows_b, columns_b, gate = written.split([out, into, out, into, 1], 1)
        return (
            self.unit * rows_a.softmax(1),
            columns_a,
            self.shift * rows_b.softmax(1),
            columns_b,
            gate.sigmoid(),
        )

    def columns_bias(self) -> Tensor:
        """Return the part of the bias that is added to c_a ``[d_in]``, a view."""
        out, into = self.sizes
        return self.outer.get_parameter("bias")[out : out + into]


class ConditionalEditor(nn.Module):
    """The encoder of edits, and a head for each weight."""

    multiplier: Tensor
    """Lagrange multiplier of the constraint that it is trained under ``[]``."""
    margin: Tensor
    """Bound of that constraint ``[]``."""

    def __init__(self, maps: Mapping[str, tuple[int, int]], shape: ConditionalShape) -> None:
        """Take the widths of output and input of each map; drawn from the global random state."""
        super().__init__()
        self.shape, self.names = shape, list(maps)
        self.register_buffer("multiplier", torch.zeros(()))
        self.register_buffer("margin", torch.zeros(()))
        self.encoder = nn.LSTM(shape.embedding, shape.encoder, batch_first=True, bidirectional=True)
        self.hidden = nn.Linear(2 * shape.encoder, shape.condition)
        self.condition = nn.Linear(shape.condition, shape.condition)
        self.heads = nn.ModuleList(Head(sizes, shape) for sizes in maps.values())

    def head(self, name: str) -> Head:
        """Return the head of a map."""
        head = self.heads[self.names.index(name)]
        assert isinstance(head, Head)
        return head

    def conditions(self, texts: Sequence[Tensor]) -> Tensor:
        """Return what texts, as word embeddings ``[tokens, d]`` each, become ``[n, condition]``."""
        lengths = torch.tensor([len(text) for text in texts])
        padded = pad_sequence(list(texts), batch_first=True)
        packed = pack_padded_sequence(padded, lengths, batch_first=True, enforce_sorted=False)
        _, (last, _) = self.encoder(packed)  # [2, n, encoder]
        return self.condition(self.hidden(torch.cat([last[0], last[1]], 1)).tanh())

    def changes(self, conditions: Tensor, factors: Mapping[str, Factors]) -> dict[str, Change]:
        """Return the change of each map by each edit, sigmoid(n) (u A * G + v B), as products ``[n, ...]``.

        With A = a c^T, A * (sum g h^T) = sum (a * g) (c * h)^T: as many products as G has, and one for B.
        """
        found = {}
        for name, one in factors.items():
            rows_a, columns_a, rows_b, columns_b, gate = self.head(name)(conditions)
            own = one.owner
            outer = torch.cat([(gate * rows_a)[own] * one.gradients, gate * rows_b])
            inner = torch.cat([columns_a[own] * one.keys, columns_b])
            owner = torch.cat([own, torch.arange(len(conditions), device=own.device)])
            order = owner.argsort(stable=True)
            found[name] = Change(outer[order], inner[order], owner[order])
        return found
