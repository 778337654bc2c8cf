"""A learned scope classifier that reads an entry's fact and the prompt together (a cross-encoder).

Source     Mitchell et al., "Memory-Based Model Editing at Scale", ICML 2022, arXiv 2206.06520, Sec. 3.2
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from errata.edits.names import NameTable
from errata.edits.routers._router import Question, Reading, Router
from errata.edits.routers.fulltext import FullText
from errata.host.pairs import PairReader


@dataclass(frozen=True, eq=False)
class Cross(Router):
    """Accepts rows that are in an entry's scope with a probability sigmoid(b + w h - |P h|^2) above the threshold.

    h is what is read of the entry's fact and the prompt together, see :func:`errata.host.pairs.read_pairs`. Each pair
    costs a pass, so only the ``candidates`` entries that are nearest to a prompt are read with it, by the words in
    common or by sentence vectors, or those whose subject it names; the others have a probability of 0.
    """

    name: ClassVar[str] = "cross"
    reads: ClassVar[frozenset[Reading]] = frozenset({"text", "vectors", "pairs"})
    per_entry: ClassVar[tuple[str, ...] | None] = ("statements", "phrases", "keys")
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
    recall: Literal["words", "names", "vectors"] = "words"
    """What is nearest: the highest BM25, or cosine of sentence vectors; or the newest whose subject is named."""
    phrases: tuple[str, ...] | None = None
    """By entry, the subject that a prompt must contain with ``names``; None for the others."""
    keys: Tensor | None = None
    """Sentence vector of each fact ``[entries, d]``, with ``vectors``; None for the others."""
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

    def __post_init__(self) -> None:
        super().__post_init__()
        found_by = {"names": self.phrases, "vectors": self.keys}.get(self.recall, self.statements)
        if self.statements and (found_by is None or len(found_by) != len(self.statements)):
            raise ValueError(
                f"recall by {self.recall} needs what each of the {len(self.statements)} facts is found by"
            )

    @cached_property
    def reader(self) -> PairReader:
        """How pairs are read."""
        return PairReader(self.template, self.layer, self.model)

    @cached_property
    def passages(self) -> FullText:
        """The facts, for recall by words."""
        return FullText(self.statements)

    @cached_property
    def table(self) -> NameTable:
        """The subjects, for recall by names."""
        return NameTable(self.phrases or ())

    def scores(self, question: Question) -> Tensor:
        """Return probability less threshold ``[rows, entries]``."""
        texts = question.texts()
        probabilities = torch.zeros(len(texts), len(self.statements))
        pairs = [(row, entry) for row, near in enumerate(self.nearest(question)) for entry in near]
        if pairs:
            facts, prompts = [self.statements[entry] for _, entry in pairs], [texts[row] for row, _ in pairs]
            row, entry = torch.tensor(pairs).unbind(1)
            read = question.pairs(facts, prompts).cpu()
            probabilities[row, entry] = torch.sigmoid(self.logits(read))
        return probabilities.to(question.inputs.device) - self.threshold

    def nearest(self, question: Question) -> list[list[int]]:
        """Return the entries that are read with each row's prompt, at most ``candidates``."""
        count, texts = len(self.statements), question.texts()
        if self.recall == "names":
            return [self.table.named(text)[-self.candidates :] for text in texts]
        if count <= self.candidates:
            return [list(range(count)) for _ in texts]
        if self.keys is None:
            scores = self.passages.scores(question)
        else:
            vectors = question.vectors()
            scores = vectors @ self.keys.to(vectors).mT
        order = scores.cpu().sort(dim=1, descending=True, stable=True).indices[:, : self.candidates]
        return [[int(entry) for entry in row] for row in order]

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
