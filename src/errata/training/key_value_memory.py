"""Train a key-value memory beside frozen feed-forwards: documents become rows that prompts attend to.

Source     Cheng et al., "Decouple Knowledge from Parameters for Plug-and-Play Language Modeling", Findings of ACL 2023,
           arXiv 2305.11564
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from errata.edits.attention import attend, pooled
from errata.host import hooks
from errata.host.host import Host
from errata.progress import OnProgress
from errata.training.slots import outputs_of
from errata.training.tune import Line, check_finite, rms

PROMPTS = 256
"""Prompts over which the residual stream is measured at most."""


@dataclass(frozen=True)
class MemoryShape:
    """Sizes of a memory."""

    width: int
    """Of the host's residual stream."""
    key_width: int
    """Numbers that keys and queries have."""
    heads: int
    """Heads of the attention over rows."""
    null_row: bool
    """Whether attention may also go to a row that adds nothing."""


class MemoryLayer(nn.Module):
    """What one layer has: the query of a prompt, and attention over the rows that it finds."""

    size: Tensor
    """Root mean square ``[]`` of the residual stream, which what the layer adds is multiplied by."""

    def __init__(self, shape: MemoryShape, size: float = 1.0) -> None:
        super().__init__()
        width, inner = shape.width, shape.heads * max(1, shape.width // shape.heads)
        self.register_buffer("size", torch.tensor(size))
        self.pool = nn.Linear(width, width, bias=False)
        self.pool_vector = nn.Parameter(torch.randn(width) / width**0.5)
        self.query = nn.Linear(width, shape.key_width, bias=False)
        self.norm = nn.BatchNorm1d(shape.key_width)
        self.token = nn.Linear(width, inner, bias=False)
        self.key = nn.Linear(width, inner, bias=False)
        self.value = nn.Linear(width, inner, bias=False)
        self.output = nn.Linear(inner, width, bias=False)
        self.betas = nn.Parameter(torch.ones(shape.heads))
        self.null_logits = nn.Parameter(torch.zeros(shape.heads if shape.null_row else 0))
        for linear in (self.pool, self.query, self.token, self.key, self.value):
            nn.init.orthogonal_(linear.weight)
        nn.init.zeros_(self.output.weight)  # untrained, the layer adds nothing

    def queries(self, states: Tensor, mask: Tensor) -> Tensor:
        """Return the query of each prompt ``[rows, key_width]`` by its states ``[rows, length, d]``.

        In training mode normalised over the batch, else by running statistics.
        """
        return self.norm(self.query(pooled(states, mask, self.pool.weight, self.pool_vector)))

    def added(self, states: Tensor, values: Tensor, cosines: Tensor) -> Tensor:
        """Return what is added ``[rows, length, d]``, for rows' values ``[rows, n, d]`` and cosines ``[rows, n]``."""
        return attend(states, self.key(values), self.value(values), cosines, self.attention())

    def attention(self) -> dict[str, Tensor]:
        """Return the tensors that :func:`errata.edits.attention.attend` takes ``[...]``."""
        return {
            "token_map": self.token.weight, "output_map": self.size * self.output.weight, "betas": self.betas,
            "null_logits": self.null_logits,
        }  # fmt: skip

    def shared(self) -> dict[str, Tensor]:
        """Return all tensors of an ``attend`` operation ``[...]``, the normalisation as part of the query's map."""
        norm = self.norm
        assert norm.running_mean is not None and norm.running_var is not None
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        tensors = {
            "pool_map": self.pool.weight, "pool_vector": self.pool_vector,
            "query_map": scale[:, None] * self.query.weight, "query_bias": norm.bias - scale * norm.running_mean,
            **self.attention(),
        }  # fmt: skip
        return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


class KnowledgeMemory(nn.Module):
    """The encoder of documents and the layers that attend to their rows."""

    scale: Tensor
    """What word embeddings are multiplied by ``[]``, for a root mean square of 1."""

    def __init__(self, shape: MemoryShape, sizes: Sequence[float], scale: float = 1.0) -> None:
        """Take the ``size`` of each layer."""
        super().__init__()
        width = shape.width
        self.register_buffer("scale", torch.tensor(scale))
        self.pool = nn.Linear(width, width, bias=False)
        self.pool_vector = nn.Parameter(torch.randn(width) / width**0.5)
        self.to_key = nn.Linear(width, shape.key_width, bias=False)
        self.to_value = nn.Linear(width, width, bias=False)
        for linear in (self.pool, self.to_key, self.to_value):
            nn.init.orthogonal_(linear.weight)
        self.layers = nn.ModuleList(MemoryLayer(shape, size) for size in sizes)

    def encode(self, embeddings: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys ``[n, key_width]`` and values ``[n, d]`` of documents, by their words ``[n, length, d]``."""
        document = pooled(self.scale * embeddings, mask, self.pool.weight, self.pool_vector)
        return self.to_key(document), self.to_value(document)

    def each(self) -> list[MemoryLayer]:
        """Return the layers."""
        return [layer for layer in self.layers if isinstance(layer, MemoryLayer)]


@dataclass(frozen=True)
class Document:
    """A fact as training sees it."""

    ids: tuple[int, ...]
    """Of its text."""
    inside: tuple[Line, ...]
    """Prompts that it answers, with the answer."""
    outside: tuple[Line, ...]
    """Prompts that it does not answer, with what the host says by itself."""
    variants: tuple[Document, ...] = ()
    """The same with other targets, without prompts that it does not answer: what it says has then to be read."""

    def drawn(self, draw: random.Random) -> Document:
        """Return this document or one of its variants, each as often."""
        chosen = draw.choice((self, *self.variants))
        return replace(chosen, outside=self.outside)


@dataclass(frozen=True)
class KnowledgeTraining:
    """Settings of the training."""

    rows: int
    """Rows that a prompt attends to."""
    steps: int
    """Steps of AdamW."""
    per_step: int
    """Documents in a step: they are the memory then."""
    prompts: int
    """Prompts of either sort for each of them."""
    learning_rate: float
    """AdamW's at its highest."""
    gate_rate: float
    """The same for the betas and null logits, numbers that have far to go."""
    warmup: int
    """Steps in which the rate rises from zero; it falls linearly to zero in the others."""
    clip: float
    """Norm that gradients are cut to."""
    retrieval_weight: float
    """Weight of the cross-entropy of a prompt's own document among those of a step, by the inner products."""
    every: int
    """Steps between evaluations on the held-out documents."""

    def share(self, done: int) -> float:
        """Return the share of the rate after some steps."""
        falling = (self.steps - done) / max(1, self.steps - self.warmup)
        return min((done + 1) / max(1, self.warmup), falling)


def embeddings_of(host: Host, documents: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return the host's word embeddings of documents, float32 ``[n, length, d]``, and where they are words."""
    longest = max(map(len, documents))
    ids = torch.tensor([[*ids, *[ids[0]] * (longest - len(ids))] for ids in documents], device=host.device)
    mask = torch.tensor([[i < len(ids) for i in range(longest)] for ids in documents], device=host.device)
    return host.model.get_input_embeddings()(ids).detach().float(), mask


def sizes_of(host: Host, layers: Sequence[int], documents: Sequence[Document]) -> list[float]:
    """Return the root mean square of the residual stream behind each layer, over some of the prompts."""
    rows = [line.ids for document in documents for line in (*document.inside, *document.outside)][:PROMPTS]
    blocks = [host.layout.blocks[layer] for layer in layers]
    return [rms(torch.cat(outputs_of(host, block, rows))) for block in blocks]


@contextmanager
def beside_memory(
    host: Host, modules: Sequence[str], memory: KnowledgeMemory, knowledge: tuple[Tensor, Tensor], rows: int,
    prompts: Tensor,
) -> Iterator[list[Tensor]]:  # fmt: skip
    """Add what a memory says to the outputs of modules while inside; gradients reach the memory.

    ``knowledge``: keys ``[n, key_width]`` and values ``[n, d]``; ``prompts``: where each row of a pass has its prompt,
    bool ``[rows, length]``. Gives a list that the inner products of each module ``[rows, n]`` are appended to.
    """
    keys, values = knowledge
    found: list[Tensor] = []
    with ExitStack() as stack:
        for layer, path in zip(memory.each(), modules, strict=True):
            module, inputs = host.model.get_submodule(path), list[Tensor]()

            def add(output: Tensor, layer: MemoryLayer = layer, inputs: list[Tensor] = inputs) -> Tensor:
                states = inputs.pop().float()
                queries = layer.queries(states, prompts)
                products = queries @ keys.mT
                best = products.detach().topk(min(rows, len(keys)), dim=1).indices
                cosines = functional.cosine_similarity(queries[:, None], keys[best], dim=-1)
                found.append(products)
                return output + layer.added(states, values[best], cosines).to(output.dtype)

            stack.enter_context(hooks.on_input(module, inputs.append))
            stack.enter_context(hooks.on_output(module, add))
        yield found


class KnowledgeLoss:
    """The loss of a memory on documents and their prompts."""

    def __init__(
        self, host: Host, modules: Sequence[str], memory: KnowledgeMemory, plan: KnowledgeTraining
    ) -> None:
        self.host, self.modules, self.memory, self.plan = host, modules, memory, plan

    def __call__(
        self, documents: Sequence[Document], draw: random.Random | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return nats per answer token, and those of retrieval, where the documents are all there is.

        ``draw`` chooses the prompts, and how many rows they attend to, as a memory may have few; None: the first
        prompts, and all rows.
        """
        chosen = [
            (line, number, inside)
            for number, document in enumerate(documents)
            for inside, lines in ((True, document.inside), (False, document.outside))
            for line in self._some(lines, draw)
        ]
        count = self.plan.rows
        if draw is not None:  # reading is learnt where there is one row, choosing where there are several
            count = draw.choice((1, draw.randint(1, count)))
        knowledge = self.memory.encode(*embeddings_of(self.host, [document.ids for document in documents]))
        lines = [line for line, _, _ in chosen]
        batch = self.host.batch([line.ids for line in lines])
        ends = torch.tensor([line.at[0] for line in lines], device=batch.ids.device)
        prompts = torch.arange(batch.ids.shape[1], device=batch.ids.device)[None] <= ends[:, None]
        row = torch.tensor([i for i, line in enumerate(lines) for _ in line.at])
        at = torch.tensor([place for line in lines for place in line.at])
        targets = torch.tensor([token for line in lines for token in line.targets])
        with beside_memory(self.host, self.modules, self.memory, knowledge, count, prompts) as products:
            logits = self.host.forward_at(batch, row, at).float()
        answers = functional.cross_entropy(logits, targets.to(logits.device))
        own = [(i, number) for i, (_, number, inside) in enumerate(chosen) if inside]
        asked, right = (torch.tensor(part, device=logits.device) for part in zip(*own, strict=True))
        retrieval = torch.stack([functional.cross_entropy(p[asked], right) for p in products]).mean()
        return answers, retrieval

    def _some(self, lines: Sequence[Line], draw: random.Random | None) -> Sequence[Line]:
        count = min(self.plan.prompts, len(lines))
        return lines[:count] if draw is None else draw.sample(list(lines), count)

    @torch.no_grad()
    def held_out(self, documents: Sequence[Document]) -> float:
        """Return the mean of the loss in groups of documents, with running statistics."""
        self.memory.eval()
        size = self.plan.per_step
        groups = [documents[first : first + size] for first in range(0, len(documents), size)]
        losses = [float(self(group)[0]) for group in groups]
        self.memory.train()
        return sum(loss * len(group) for loss, group in zip(losses, groups, strict=True)) / len(documents)


def train_knowledge(
    host: Host, modules: Sequence[str], memory: KnowledgeMemory, documents: Sequence[Document],
    held: Sequence[Document], plan: KnowledgeTraining, *, seed: int, on_progress: OnProgress,
) -> dict[str, float]:  # fmt: skip
    """Train a memory in place, each step with the documents of that step as its rows; return steps and losses.

    With ``held`` documents the memory is in the end that of the least loss on them, else the last. Wants a frozen host.
    """
    loss_of, draw = KnowledgeLoss(host, modules, memory, plan), random.Random(f"knowledge {seed}")
    parameters = list(memory.parameters())
    gates = [gate for layer in memory.each() for gate in (layer.betas, layer.null_logits)]
    others = [p for p in parameters if not any(p is gate for gate in gates)]
    optimizer = torch.optim.AdamW(
        [{"params": others}, {"params": gates, "lr": plan.gate_rate, "weight_decay": 0.0}],
        lr=plan.learning_rate,
    )
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, plan.share)
    best, kept = float("inf"), dict[str, Tensor]()
    facts: dict[str, float] = {}
    memory.train()
    for step in range(1, plan.steps + 1):
        chosen = draw.sample(list(documents), min(plan.per_step, len(documents)))
        answers, retrieval = loss_of([document.drawn(draw) for document in chosen], draw)
        check_finite(answers.detach()[None], step - 1)
        total = answers + plan.retrieval_weight * retrieval
        for parameter, gradient in zip(
            parameters, torch.autograd.grad(total, parameters, allow_unused=True), strict=True
        ):
            parameter.grad = gradient
        nn.utils.clip_grad_norm_(parameters, plan.clip)
        optimizer.step()
        rates.step()
        facts = {"loss": float(answers.detach()), "retrieval_loss": float(retrieval.detach())}
        on_progress("memory", step, plan.steps)
        if not held or (step % plan.every and step < plan.steps):
            continue
        now = loss_of.held_out(held)
        if now < best:
            best, kept = now, {name: tensor.clone() for name, tensor in memory.state_dict().items()}
    if kept:
        memory.load_state_dict(kept)
    memory.eval()
    for parameter in parameters:
        parameter.grad = None
        parameter.requires_grad_(False)
    return {"steps": plan.steps, **facts, **({"held_out_loss": best} if kept else {})}


def rows_of(
    host: Host, memory: KnowledgeMemory, documents: Sequence[Sequence[int]]
) -> tuple[Tensor, list[Mapping[str, Tensor]]]:
    """Return documents as rows: keys ``[n, key_width]``, and for each layer projected keys and values ``[n, inner]``.

    Each is encoded by itself, so that its row does not depend on the others.
    """
    with torch.no_grad():
        encoded = [memory.encode(*embeddings_of(host, [ids])) for ids in documents]
        keys = torch.cat([key for key, _ in encoded]).cpu()
        layers: list[Mapping[str, Tensor]] = [
            {
                "keys": torch.cat([layer.key(value) for _, value in encoded]).cpu(),
                "values": torch.cat([layer.value(value) for _, value in encoded]).cpu(),
            }
            for layer in memory.each()
        ]
    return keys, layers
