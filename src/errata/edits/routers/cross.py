"""A learned scope classifier that reads an entry's fact and the prompt together (a cross-encoder).

Source     Mitchell et al., "Memory-Based Model Editing at Scale", ICML 2022, arXiv 2206.06520, Sec. 3.2
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from errata.edits.routers._router import Question, Reading, Router
from errata.edits.routers.fulltext import FullText
from errata.host.pairs import PairReader


@dataclass(frozen=True, eq=False)
class Cross(Router):
    """Accepts rows that are in an entry's scope with a probability sigmoid(b + w h - |P h|^2) above the threshold.

    h is what is read of the entry's fact and the prompt together, see :func:`errata.host.pairs.read_pairs`. Each pair
    costs a pass, so only the ``candidates`` entries that are nearest to a prompt are read with it, by the words in
    common or by sentence vectors; the others have a probability of 0.
    """

    name: ClassVar[str] = "cross"
    reads: ClassVar[frozenset[Reading]] = frozenset({"text", "vectors", "pairs"})
    per_entry: ClassVar[tuple[str, ...] | None] = ("statements", "keys")
    statements: tuple[str, ...]
    """By entry, its fact as a statement."""
    weight: Tensor
    """w ``[d]``."""
    projection: Tensor
    """P ``[k, d]``."""
    bias: float = 0.0
    """b."""
    threshold: float = 0.5
    """Least probability."""
    candidates: int = 8
    """Entries that are read with a prompt at most."""
    recall: Literal["words", "vectors"] = "words"
    """What is nearest: the highest BM25, or cosine of sentence vectors."""
    keys: Tensor | None = None
    """Sentence vector of each fact ``[entries, d]``, to recall by; None: by words."""
    encoder: str | None = None
    """Name or folder of the sentence encoder; None: the host's own hidden states."""
    encoder_digest: str = ""
    """Checksum of the encoder's files; an encoder with another one is refused. Empty: the host itself."""
    model: str | None = None
    """Name or folder of the cross-encoder; None: the host reads the pairs."""
    model_digest: str = ""
    """Checksum of the cross-encoder's files; one with another is refused. Empty: the host itself."""
    template: str = "New fact: {fact}\n{prompt}"
    """What the host reads."""
    layer: int = 0
    """Block of the host whose states are compared."""

    @cached_property
    def reader(self) -> PairReader:
        """How pairs are read."""
        return PairReader(self.template, self.layer, self.model)

    @cached_property
    def passages(self) -> FullText:
        """The facts, for recall by words."""
        return FullText(self.statements)

    def scores(self, question: Question) -> Tensor:
        """Return probability less threshold ``[rows, entries]``."""
        texts = question.texts()
        probabilities = torch.zeros(len(texts), len(self.statements))
        near = self.nearest(question)  # [rows, candidates]
        if near.numel():
            row = torch.arange(len(texts)).repeat_interleave(near.shape[1])
            entry = near.flatten()
            facts, prompts = [self.statements[i] for i in map(int, entry)], [texts[i] for i in map(int, row)]
            read = question.pairs(facts, prompts).cpu()
            probabilities[row, entry] = torch.sigmoid(self.logits(read))
        return probabilities.to(question.inputs.device) - self.threshold

    def nearest(self, question: Question) -> Tensor:
        """Return the entries that are read with each row's prompt, int64 ``[rows, candidates]``."""
        count, rows = len(self.statements), len(question.texts())
        if count <= self.candidates:
            return torch.arange(count).expand(rows, count)
        if self.keys is None:
            scores = self.passages.scores(question)
        else:
            vectors = question.vectors()
            scores = vectors @ self.keys.to(vectors).mT
        return scores.cpu().sort(dim=1, descending=True, stable=True).indices[:, : self.candidates]

    def logits(self, read: Tensor) -> Tensor:
        """Return b + w h - |P h|^2 of what was read of pairs ``[n, d]``, float32 ``[n]``."""
        return head_logits(read, self.weight.to(read), self.projection.to(read), self.bias)

    def facts(self) -> dict[str, Any]:
        """Return everything but tensors, as plain data; without vectors that are not there."""
        return {name: value for name, value in super().facts().items() if name != "keys"}


def head_logits(read: Tensor, weight: Tensor, projection: Tensor, bias: Tensor | float) -> Tensor:
    """Return b + w h - |P h|^2 ``[n]`` of pairs as they were read, h ``[n, d]``; w ``[d]``, P ``[k, d]``."""
    return bias + read @ weight - (read @ projection.mT).square().sum(1)


ROUTER = Cross
