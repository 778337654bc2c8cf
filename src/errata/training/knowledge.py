"""Train maps from sentence vectors to neurons beside feed-forwards: each sentence has a key and a value at a layer."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from errata.edits.routers._router import Question
from errata.edits.routers.fulltext import FullText
from errata.edits.routers.reranked import nearest_by_words
from errata.host.host import Host
from errata.host.prefix import ROWS
from errata.progress import OnCount, ignore
from errata.training.slots import beside_row_slots
from errata.training.tune import Line, Losses
from errata.training.whole import WholeTraining, train_weights

PARTS = ("key_weights", "key_biases", "value_weights", "value_biases")


@dataclass
class Projections:
    """phi_k = W_k e + b_k and phi_v = W_v e + b_v of each layer, for a sentence vector e ``[d_e]``."""

    key_weights: Tensor
    """``[layers, d, d_e]``."""
    key_biases: Tensor
    """``[layers, d]``."""
    value_weights: Tensor
    """``[layers, d, d_e]``."""
    value_biases: Tensor
    """``[layers, d]``."""

    @staticmethod
    def random(layers: int, width: int, d_e: int, *, key_start: float, value_start: float) -> Projections:
        """Return normal weights of two standard deviations, and biases of zero."""
        weights = [start * torch.randn(layers, width, d_e) for start in (key_start, value_start)]
        return Projections(weights[0], torch.zeros(layers, width), weights[1], torch.zeros(layers, width))

    def tensors(self) -> dict[str, Tensor]:
        """Return the weights ``[layers, d, d_e]`` and biases ``[layers, d]`` by name."""
        return {name: getattr(self, name) for name in PARTS}

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> Projections:
        """Return projections from their tensors ``[layers, d, d_e]`` and ``[layers, d]``."""
        return Projections(*(tensors[name] for name in PARTS))

    def neurons(self, vectors: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return for each layer the keys and values ``[..., d]`` of sentences with vectors ``[..., d_e]``."""
        return [
            (functional.linear(vectors, wk, bk), functional.linear(vectors, wv, bv))
            for wk, bk, wv, bv in zip(
                self.key_weights, self.key_biases, self.value_weights, self.value_biases, strict=True
            )
        ]


def mean_embeddings(table: Tensor, rows: Sequence[Sequence[int]]) -> Tensor:
    """Return the mean embedding of each row's ids ``[n, d]``; ``table`` ``[vocab, d]``. A row without ids is zero."""
    if not rows:
        return table.new_zeros(0, table.shape[1])
    ids = torch.tensor([token for row in rows for token in row], dtype=torch.long, device=table.device)
    starts = torch.tensor([0, *map(len, rows[:-1])], device=table.device).cumsum(0)
    return functional.embedding_bag(ids, table, starts, mode="mean")


@dataclass(frozen=True)
class Row:
    """A prompt with its answer, and the sentences that may be found for it."""

    line: Line
    own: int
    """Number of the sentence that belongs to the prompt."""
    candidates: tuple[int, ...]
    """Sentences with the most in common by words, the first the nearest."""
    weight: float = 1.0
    """Of the row's loss."""


@dataclass(frozen=True)
class SentencePrompt:
    """A prompt that belongs to a sentence, with the answer that it should have beside it."""

    own: int
    """Number of the sentence."""
    prompt: str
    answer: str
    weight: float = 1.0
    """Of the row's loss."""


def rows_with(
    host: Host, asked: Sequence[SentencePrompt], texts: Sequence[str], candidates: int
) -> list[Row]:
    """Return prompts with their answers as the model reads them, and the sentences that are near by words."""
    words, found = FullText(tuple(texts)), list[list[int]]()
    for first in range(0, len(asked), ROWS):
        prompts = [one.prompt for one in asked[first : first + ROWS]]
        empty = torch.zeros(len(prompts), 0)
        scores = words.scores(Question(empty, empty, lambda prompts=prompts: prompts))
        found += nearest_by_words(scores, candidates)
    rows: list[Row] = []
    for one, near in zip(asked, found, strict=True):
        answer = host.encode_answer(one.prompt, one.answer)
        places = tuple(range(answer.start - 1, len(answer.ids) - 1))
        rows.append(Row(Line(answer.ids[:-1], places, answer.target), one.own, tuple(near), one.weight))
    return rows


@dataclass(frozen=True)
class Pool:
    """Sentences that are found for prompts, and where their neurons are."""

    host: Host
    modules: Sequence[str]
    """Feed-forwards by path."""
    depth: int
    """Blocks from the bottom that have none."""
    sentences: Sequence[Sequence[int]]
    """Ids."""
    table: Tensor
    """The host's word embeddings ``[vocab, d_e]``."""
    most: int
    """Sentences that a row gets at most."""
    activation: str


class RowLosses:
    """The loss of rows whose sentences have neurons beside the feed-forwards of some layers."""

    def __init__(self, pool: Pool, rows: Sequence[Row], alone: Callable[[int], bool]) -> None:
        """Take rows; ``alone`` says of one by its number whether it finds nothing but its own sentence this time.

        Requires a frozen model.
        """
        self.pool, self.rows, self.alone = pool, rows, alone
        self.queries = mean_embeddings(pool.table, [row.line.ids[: row.line.at[0] + 1] for row in rows])
        self.losses = Losses(pool.host, [row.line for row in rows], depth=pool.depth)

    def __call__(self, projections: Projections, table: Tensor, indices: Sequence[int]) -> Tensor:
        """Return the weighted loss of some rows, nats per target token ``[n]``; gradients reach all that is given.

        ``table``: word embeddings of the sentences ``[vocab, d_e]``.
        """
        most = self.pool.most
        found = [self._found(table, index) for index in indices]
        vectors = torch.stack([functional.pad(v, (0, 0, 0, most - len(v))) for v in found])  # [n, most, d_e]
        counts = torch.tensor([len(v) for v in found], device=vectors.device)
        real = (torch.arange(most, device=vectors.device) < counts[:, None])[..., None]
        neurons = [(keys, values * real) for keys, values in projections.neurons(vectors)]
        with beside_row_slots(self.pool.host, self.pool.modules, neurons, self.pool.activation):
            losses = self.losses(indices)
        return losses * torch.tensor([self.rows[i].weight for i in indices]).to(losses)

    def _found(self, table: Tensor, index: int) -> Tensor:
        """Return the vectors of the sentences that a row finds ``[k, d_e]``."""
        row = self.rows[index]
        numbers = [row.own] if self.alone(index) else list(row.candidates)
        vectors = mean_embeddings(table, [self.pool.sentences[i] for i in numbers])
        scores = vectors.detach() @ self.queries[index].to(vectors)
        return vectors[scores.sort(descending=True, stable=True).indices[: self.pool.most]]


@dataclass(frozen=True)
class Plan:
    """How projections are trained."""

    rounds: WholeTraining
    warmup: int
    """Steps in which the rate rises from zero."""
    beta2: float
    weight_decay: float
    alone: float
    """Share of the rows that find their own sentence only: drawn anew in training, always the same where held out."""
    embeddings: bool
    """Whether the sentences' word embeddings are trained as well."""


def train(
    pool: Pool, projections: Projections, trained: Sequence[Row], held: Sequence[Row], plan: Plan, *, seed: int,
    tick: OnCount = ignore,
) -> tuple[dict[str, Tensor], dict[str, float]]:  # fmt: skip
    """Return trained projections by name, with ``embeddings`` ``[vocab, d_e]`` where they are trained; and losses.

    Requires a frozen model.
    """
    draw = random.Random(f"alone {seed}")
    losses = RowLosses(pool, trained, lambda _: draw.random() < plan.alone)
    held_losses = RowLosses(pool, held, lambda row: random.Random(f"{seed} {row}").random() < plan.alone)
    device = pool.table.device
    weights = {name: t.to(device, copy=True).requires_grad_() for name, t in projections.tensors().items()}
    table = pool.table.clone().requires_grad_(plan.embeddings)
    maps = Projections.of(weights)
    variables = [*weights.values(), *([table] if plan.embeddings else [])]
    optimizer = torch.optim.AdamW(
        variables, lr=plan.rounds.learning_rate, betas=(0.9, plan.beta2), weight_decay=plan.weight_decay
    )
    rising = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / (plan.warmup + 1))
    )

    def held_loss() -> float:
        parts = torch.arange(len(held)).split(ROWS)
        return float(torch.cat([held_losses(maps, table, part.tolist()) for part in parts]).mean())

    facts = train_weights(
        optimizer, lambda indices: losses(maps, table, indices).mean(), len(trained),
        held_loss if held else None, plan.rounds, random.Random(f"rows {seed}"),
        after_step=lambda _: rising.step(), tick=tick,
    )  # fmt: skip
    results = {**weights, **({"embeddings": table} if plan.embeddings else {})}
    return {name: tensor.detach().cpu() for name, tensor in results.items()}, facts
