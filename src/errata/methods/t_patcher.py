"""T_PATCHER: a few neurons are added to the last feed-forward for every request, which fire on its mistake alone.

Paper      Huang et al., "Transformer-Patcher: One Mistake worth One Neuron", ICLR 2023, arXiv 2301.09785
Implements Sec. 3: patches y + act(q K^T + b) V of the feed-forward's output; edit loss, activation loss l_a and
           memory losses l_m1, l_m2 (Eqs. 7-10), with S(z; k) the mean of the k largest exp(z); a patch starts at
           K = q / |q|^2, b = 0, as the authors' code does. One patch for each token of the target, five at most
Departs    A patch is a neuron without a gate, whatever the feed-forward's own (the paper's models have none). The
           memory is of texts that the model writes, or of the given corpus, where the authors take questions of the
           training set. No batch of copies of the request: there is no dropout to average
Needs      Texts of the model's own, or a corpus
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from errata.config import positive
from errata.edits.memory import ACTIVATIONS, Intervention, MemoryEdit
from errata.edits.routers.always import Always
from errata.host import hooks
from errata.host.host import Host
from errata.methods._memory import earlier_slots, editable_layer, slot_edit
from errata.methods._method import Method, Workspace, check_requests, notes, provenance, without
from errata.methods._settings import at_least_zero
from errata.training.rows import RowAdam, RowPlateau, clip_rows
from errata.training.slots import Slots, row_inputs
from errata.training.tune import Line, lay_out, seeded
from errata.training.upper import Change, UpperRows, rows_at_once
from errata.types import Request

BATCH = 64
"""Requests trained at once, at most: each has products with all of the memory."""


@dataclass(frozen=True)
class Config:
    """Settings of T_PATCHER."""

    layer: int | None = None
    """Layer whose feed-forward gets the patches. None: the last one (paper)."""
    most: int = 5
    """Patches per request at most, one for each token of the target (authors' code: 5)."""
    activation: Literal["relu", "gelu", "gelu_tanh", "silu"] = "relu"
    """What a patch applies to its key's product (paper: the feed-forward's own, GELU)."""
    steps: int = 2000
    """Adam steps at most (authors' code: 2000)."""
    least_steps: int = 100
    """Steps before it is checked whether training may end (authors' code: 100)."""
    check_every: int = 25
    """Steps between checks (authors' code: 25)."""
    learning_rate: float = 0.01
    """Adam's rate (authors' code: 0.01), halved while the loss does not fall."""
    weight_decay: float = 0.01
    """Adam's L2 penalty (authors' code: 0.01)."""
    amplify: float = 10.0
    """Initial scale of a patch's random value (authors' code: 10)."""
    activation_weight: float = 1.0
    """Weight of the activation loss (paper: 1)."""
    memory_weight: float = 10.0
    """Weight of the memory losses (authors' code: 5 for FEVER, 10 for zsRE)."""
    beta: float = -3.0
    """Pre-activation that memories are to be below (authors' code: -3)."""
    gamma: float = 3.0
    """How far memories are to be below the request's own pre-activation (authors' code: 3)."""
    memory: int = 40_000
    """Inputs of the feed-forward that are remembered (authors' code: 40,000)."""
    text_tokens: int = 64
    """Tokens of each text that the memory is read from."""
    top: tuple[int, int] = (5, 1000)
    """How many of the largest terms count in the activation loss and the memory losses (authors' code: 5 and 1000)."""
    together: bool = False
    """Whether all requests of a fit are trained at once: each beside the patches of earlier fits alone, with the inputs
    of all others in its memory. False: one after another, each beside those before it (paper)."""

    def problems(self) -> list[str]:
        """Check ranges."""
        names = ("most", "steps", "check_every", "learning_rate", "memory", "text_tokens", "amplify")
        weights = ("least_steps", "weight_decay", "activation_weight", "memory_weight")
        complaints = [*positive(self, *names), *at_least_zero(self, *weights)]
        return complaints + ([] if min(self.top) > 0 else ["top: expected two positive numbers"])


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> MemoryEdit:
    """Return the patches of all requests so far."""
    check_requests("t_patcher", requests)
    layer = editable_layer(host, config.layer, 1.0)
    config = replace(config, layer=layer)
    module = host.layout.feed_forward(layer)
    slots, owners = earlier_slots(work.after, module, host.layout.width)
    queries = work.after.state["queries"] if work.after else torch.zeros(0, host.layout.width)
    first = len(work.after.provenance.requests) if work.after else 0
    texts = min(-(-config.memory // config.text_tokens), 640)
    memory = work.text_inputs(host, module, texts, config.text_tokens)[: config.memory]
    facts = {"loss": 0.0, "steps": 0}
    with without(work.after, host), hooks.frozen(host.model), seeded(host, work.seed + first):
        lines = [lay_out(host, request, "target") for request in requests]
        states = row_inputs(host, module, [line.ids for line in lines])
        reads = [x[list(line.at[: config.most])] for x, line in zip(states, lines, strict=True)]
        starts = [torch.randn(len(own), host.layout.width) for own in reads]
        trained: dict[int, Slots] = {}
        for numbers in _groups(lines, host, config, work):
            others = [(i, q) for i, q in enumerate(reads) if config.together or i < numbers[0]]
            known = torch.cat([memory, queries, *(q for _, q in others)])
            of = [-1] * (len(memory) + len(queries)) + [i for i, q in others for _ in q]
            own = torch.tensor(of) == torch.tensor(numbers)[:, None]
            earlier = slots if config.together else _joined(slots, trained)
            rows = UpperRows(host, [lines[i] for i in numbers], module, layer, whole=True)
            batch = _Batch(rows, [reads[i] for i in numbers], earlier, known, own, config)
            trained.update(zip(numbers, batch.run([starts[i] for i in numbers]), strict=True))
            facts = {name: max(value, batch.facts[name]) for name, value in facts.items()}
            work.on_progress("patches", len(trained), len(requests))
    slots = _joined(slots, trained)
    owners = [*owners, *(first + i for i, q in enumerate(reads) for _ in q)]
    record = provenance("t_patcher", host, requests, config, work, **notes({**facts, "patches": len(owners)}))
    intervention = Intervention(module, "slots", slot_edit(slots), "all", config.activation)
    state = {"owners": torch.tensor(owners), "queries": torch.cat([queries, *reads])}
    return MemoryEdit((intervention,), Always(), record, state)


def _joined(slots: Slots, trained: Mapping[int, Slots]) -> Slots:
    """Return patches and those of requests by number, in their order."""
    for number in sorted(trained):
        slots = slots.joined(trained[number])
    return slots


def _groups(lines: Sequence[Line], host: Host, config: Config, work: Workspace) -> list[list[int]]:
    """Group requests that are trained at once: each alone, or together those with as many patches."""
    if not config.together:
        return [[i] for i in range(len(lines))]
    longest = max(len(line.ids) for line in lines)
    size = work.batch_size or min(BATCH, rows_at_once(host, config.layer or 0, longest))
    counts = [min(len(line.at), config.most) for line in lines]
    same = [[i for i, own in enumerate(counts) if own == count] for count in sorted(set(counts))]
    return [group[i : i + size] for group in same for i in range(0, len(group), size)]


class _Batch:
    """Requests whose patches, as many for each, are trained at once; none of them knows the others' patches."""

    def __init__(
        self, rows: UpperRows, queries: Sequence[Tensor], earlier: Slots, memory: Tensor, own: Tensor,
        config: Config,
    ) -> None:  # fmt: skip
        """Take what the feed-forward reads where a token of each target is predicted, ``[s, d]`` each.

        ``memory`` ``[m, d]``; ``own``: which of it are a request's own queries, bool ``[n, m]``.
        """
        device = rows.host.device
        self.rows, self.config = rows, config
        self.queries = q = torch.stack(list(queries)).to(device)  # [n, s, d]
        self.memory, self.own = memory.to(device), own.to(device) if own.any() else None
        self.earlier = Slots(*(t.to(device) for t in (earlier.keys, earlier.biases, earlier.values)))
        self.keys = nn.Parameter(q / q.square().sum(2, keepdim=True))
        self.biases = nn.Parameter(torch.zeros(q.shape[:2], device=device))
        self.scale = nn.Parameter(torch.full((*q.shape[:2], 1), config.amplify, device=device))
        self.facts: dict[str, Any] = {}

    def run(self, starts: Sequence[Tensor]) -> list[Slots]:
        """Train from initial values ``[s, d]``; return each request's patches, on the CPU."""
        config, count = self.config, len(starts)
        self.values = nn.Parameter(torch.stack(list(starts)).to(self.keys.device))
        parameters = [self.keys, self.biases, self.values, self.scale]
        optimizer = RowAdam(parameters, config.learning_rate, config.weight_decay)
        plateau, best_memory = RowPlateau(count), torch.full((count,), float("inf"))
        running, step, loss = torch.arange(count), 0, torch.zeros(count)
        for step in range(1, config.steps + 1):
            edit, memory, activation = self._losses(running.tolist())
            total = edit + config.activation_weight * activation + config.memory_weight * memory
            gradients = torch.autograd.grad(total.sum(), parameters)
            optimizer.step_(clip_rows(gradients, 5.0))
            loss[running] = edit.detach().cpu()
            if step >= config.least_steps and step % config.check_every == 0:
                optimizer.rates[running] *= plateau.factors(running, total.detach().cpu())
                now, numbers = memory.detach().cpu(), running.tolist()
                with torch.no_grad():
                    correct = self.rows.correct(numbers, self.rows.logits(numbers, self._change(numbers)))
                finished = correct & (now > best_memory[running] - 1e-3)
                best_memory[running[correct]] = now[correct]
                optimizer.rates[running[finished]] = 0
                running = running[~finished]
                if not len(running):
                    break
        self.facts = {"loss": float(loss.max()), "steps": step}
        parts = (self.keys, self.biases, self.values * self.scale)
        return [Slots(*(part[i] for part in parts)).detached() for i in range(count)]

    def _change(self, running: Sequence[int]) -> Change:
        """Add each request's patches to its row, and those of requests before it."""
        keys, biases, values, earlier = self.keys, self.biases, self.values * self.scale, self.earlier
        act = ACTIVATIONS[self.config.activation]

        def change(inputs: Tensor, output: Tensor, _: Tensor) -> Tensor:
            x = inputs.to(keys)
            if len(earlier.keys):
                output = output + (act(x @ earlier.keys.mT + earlier.biases) @ earlier.values).to(output)
            own = act(x @ keys[running].mT + biases[running][:, None])
            return output + (own @ values[running]).to(output)

        return change

    def _losses(self, running: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the losses of edit, memory and activation ``[n]``."""
        config, keys, biases = self.config, self.keys[running], self.biases[running]
        edit = self.rows.losses(running, self.rows.logits(running, self._change(running)))
        own = (self.queries[running] * keys).sum(2) + biases  # [n, s]
        other = self._largest_products(running, keys, config.top[1]) + biases[..., None]  # [n, s, k]
        memory = _largest(other - config.beta, config.top[1])
        memory = memory + _largest(other - own[..., None] + config.gamma, config.top[1])
        return edit, memory, _largest(-own, config.top[0])

    def _largest_products(self, running: Sequence[int], keys: Tensor, count: int) -> Tensor:
        """Return the largest products of each key ``[n, s, d]`` with memories: what losses look at ``[n, s, k]``."""
        flat = keys.flatten(0, 1)
        few = 4 * len(flat) * count < len(self.memory)  # cheaper to compute again than to go back through all
        with torch.set_grad_enabled(not few):
            products = (self.memory @ flat.mT).mT if few else flat @ self.memory.mT
            products = products.reshape(*keys.shape[:2], -1)
        others, seen = products.detach(), products.shape[2]
        if self.own is not None:
            others = others.masked_fill(self.own[running][:, None], float("-inf"))
            seen -= int(self.own[0].sum())
        nearest = others.topk(min(count, seen), sorted=False).indices
        return (self.memory[nearest] @ keys[..., None])[..., 0] if few else products.gather(2, nearest)


def _largest(values: Tensor, count: int) -> Tensor:
    """Return S(z; k) of each request: the mean of the k largest exp(z) of its entries ``[n, ...]``."""
    flat = values.flatten(1)
    largest = flat.topk(count, sorted=False).values if count < flat.shape[1] else flat
    return largest.exp().mean(1)


METHOD = Method(
    name="t_patcher",
    title="T-Patcher",
    paper="Transformer-Patcher: One Mistake worth One Neuron, ICLR 2023, arXiv 2301.09785",
    config=Config,
    fit=fit,
    undo="latest",
    gives=MemoryEdit,
    batch=True,
    sequential=True,
    cumulative=True,
)
