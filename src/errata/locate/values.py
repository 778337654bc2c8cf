"""Find the value a place should give: gradient descent on a shift of one vector at one token.

Every problem is its own; they share forward passes. Adam works entry by entry, so a batch of problems
with one sum of losses, one clamp and one stop each is exactly as many separate runs. What the shift
cannot reach is computed once: blocks below it, tokens before it (kept as attention keys and values, the
beginnings that rows share only once), and the head only where a prediction counts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from errata.host import hooks
from errata.host.load import Host
from errata.host.memory import in_batches, share
from errata.host.partial import Partial, Past, Tokens, align, can_reuse, longer, nothing_before, wide
from errata.locate.contexts import Context
from errata.locate.problems import Line, Problem, Span, alike, beginnings, problems, subject_span
from errata.types import Request

Where = Literal["mlp_out", "block_out", "attn_and_mlp"]
Scale = Literal["stream", "site", "published"]
Stop = Literal["loss", "top"]

LIKE_ROWS = {"cpu": 8, "cuda": 256}
"""Rows of one length that make a bundle of their own, by kind of device."""


@dataclass(frozen=True)
class ValueConfig:
    """Settings of the search."""

    steps: int
    """Adam steps at most; the last evaluation takes none."""
    learning_rate: float
    """Adam's rate, in the unit of ``scale``."""
    clamp: float
    """Largest norm of the shift, in the unit of ``scale``."""
    decay: float
    """Weight of the shift's norm over the squared norm of that vector, as in the authors' code."""
    kl: float
    """Weight of the divergence at the subject, in "{subject} is a"."""
    stop_loss: float = 0.05
    """A problem stops once its loss is below this (per request it serves)."""
    scale: Scale = "stream"
    """Units. ``stream``: rate in root mean squares and clamp in norms of the residual stream above the
    layer; ``site``: the same of the shifted vector; ``published``: rate in plain numbers, clamp in norms of
    the shifted vector. States differ in scale by orders of magnitude between families, and a
    feed-forward's output may be small beside the stream it has to turn."""
    stop: Stop = "loss"
    """``top``: stop also once every target token was the first choice in every context (ENCORE)."""
    top_count: int = 1
    """``stop: top``: in how many evaluations that must have been so, in a row or not."""
    top_bare: bool = True
    """Whether the bare prompt is one of the contexts that must agree; where it stands alone it always is."""
    nll_loss_factor: float = 1.0
    """Weight of the targets' loss."""
    relax: bool = False
    """PMET's code: after an evaluation in which every target token was the first choice the targets' loss
    counts a tenth, until that is no longer so; the search ends there if the weighted divergence is at most
    0.01."""


@dataclass(frozen=True)
class Value:
    """What was found for one problem."""

    start: Tensor
    """The vector at the place in the bare prompt, ``[d]``."""
    shift: Tensor
    """What to add to it ``[d]``."""
    loss: float
    """Negative log-likelihood per target token at the end, mean over contexts, nats; a sum over requests."""
    steps: int
    """Steps taken."""
    stream: Tensor
    """The residual stream above the layer at the place in the bare prompt, unshifted, ``[d]``."""

    @property
    def target(self) -> Tensor:
        """The value to write ``[d]``."""
        return self.start + self.shift


def optimise(
    host: Host,
    requests: Sequence[Request],
    contexts: Sequence[Context],
    *,
    layer: int,
    where: Where,
    config: ValueConfig,
    span: Span = subject_span,
) -> list[Value]:
    """Find a value per request for a layer's feed-forward output or its block's output.

    Raises RequestError for a target without tokens and for texts longer than the window.
    """
    laid = problems(host, requests, contexts, span=span, merge=False)
    return solve(host, laid, layer=layer, where=where, config=config)


def solve(
    host: Host,
    laid: Sequence[Problem],
    *,
    layer: int,
    where: Where,
    config: ValueConfig,
    batch_size: int | None = None,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> list[Value]:
    """Find a value per problem, in the order given.

    ``batch_size``: problems run at once; None takes as many as keep a device busy. Batches shrink when
    memory runs out. ``tick`` is told how many problems are done.
    """
    order = sorted(range(len(laid)), key=lambda i: -_suffix(laid[i]))  # like lengths together
    size = batch_size or _auto(host, laid, layer)
    done = 0

    def run(batch: Sequence[int]) -> list[Value]:
        nonlocal done
        chosen = [laid[i] for i in batch]
        longest = max(len(line.ids) for problem in chosen for line in problem.lines)
        values = _Search(host, chosen, layer, where, config, can_reuse(host, longest)).run()
        done += len(batch)
        tick(done, len(laid))
        return values

    with hooks.frozen(host.model):
        found = in_batches(order, size, run)
    place = {problem: i for i, problem in enumerate(order)}
    return [found[place[i]] for i in range(len(laid))]


def _suffix(problem: Problem) -> int:
    return sum(len(line.ids) - line.place for line in problem.lines)


def _auto(host: Host, laid: Sequence[Problem], layer: int) -> int:
    """Return how many problems to run at once: what a backward pass keeps must fit the device's share."""
    blocks = max(1, len(host.layout.blocks) - layer - 1)
    inner = max((site.d_in for site in host.layout.mlp_out if site is not None), default=host.layout.width)
    size = torch.finfo(host.dtype).bits // 8
    token = blocks * (12 * host.layout.width + 4 * inner) * size  # bytes, of states and activations
    largest = max((_suffix(problem) for problem in laid), default=1)
    return max(1, share(host.device) // (token * max(1, largest)))


@dataclass
class _Bundle:
    """Rows that run together in every step, cut to the tokens the shift can reach."""

    tokens: Tokens
    past: Past
    state: Tensor | None
    """Output of the highest block the shift cannot reach ``[rows, length, d]``."""
    group: Tensor
    """Problem of each row."""
    place: Tensor
    """Column of the shift in each row."""
    at_row: Tensor
    at: Tensor
    """Row and column of each prediction that counts."""
    token: Tensor
    weight: Tensor
    decides: Tensor
    """Whether a prediction decides on the first choice, 1 or 0."""
    before: Tensor | None = None
    """Unshifted log-probabilities at the essence rows' places ``[rows, vocab]``."""

    def of(self, running: Tensor) -> _Bundle:
        """Keep the rows of problems that still run."""
        rows = running[self.group].nonzero()[:, 0]
        new = torch.full_like(self.group, -1)
        new[rows] = torch.arange(len(rows), device=rows.device)
        counted = new[self.at_row] >= 0
        return _Bundle(
            self.tokens.rows(rows),
            self.past.of(rows),
            None if self.state is None else self.state[rows],
            self.group[rows],
            self.place[rows],
            new[self.at_row[counted]],
            self.at[counted],
            self.token[counted],
            self.weight[counted],
            self.decides[counted],
            None if self.before is None else self.before[rows],
        )


class _Search:
    """One batch of problems; holds what never changes during the descent."""

    def __init__(
        self,
        host: Host,
        laid: Sequence[Problem],
        layer: int,
        where: Where,
        config: ValueConfig,
        reuse: bool,
    ) -> None:
        self.host, self.config, self.layer, self.reuse = host, config, layer, reuse
        self.partial = Partial(host)
        self.count = len(laid)
        self.members = torch.tensor([float(len(p.members)) for p in laid], device=host.device)
        self._choose_sites(where)
        lines = [(g, line) for g, problem in enumerate(laid) for line in problem.lines]
        essences = [(g, p.essence) for g, p in enumerate(laid) if p.essence is not None and config.kl]
        self.bundles = self._prepare([*lines, *essences], len(lines))

    def _choose_sites(self, where: Where) -> None:
        """Decide which outputs are shifted and which block is the first to run in every step."""
        host, layer = self.host, self.layer
        block = self.partial.blocks[layer]
        if where == "attn_and_mlp":
            sites = [host.layout.site(layer, "attn_out"), host.layout.site(layer, "mlp_out")]
            self.modules = [host.model.get_submodule(site.name) for site in sites]
        elif where == "mlp_out":
            self.modules = [host.model.get_submodule(host.layout.site(layer).name)]
        else:
            self.modules = [block]
        # where the feed-forward adds straight to the stream, shifting one is shifting the other
        self.on_stream = where == "block_out" or (where == "mlp_out" and host.layout.adds_directly)
        self.first = layer + 1 if self.on_stream else layer

    # --- once ------------------------------------------------------------------------------

    def _prepare(self, lines: list[tuple[int, Line]], with_target: int) -> list[_Bundle]:
        """Run everything once, unshifted; return the bundles of target rows and of essence rows."""
        rows = [line for _, line in lines]
        cut = beginnings(rows) if self.reuse else {line.context: 0 for line in rows}
        past = self._beginnings(rows, cut)
        tokens, column = align(
            self.host,
            [line.ids[cut[line.context] :] for line in rows],
            [line.place - cut[line.context] for line in rows],
            [cut[line.context] for line in rows],
            left=self.reuse,  # a query with nothing before it may compute NaN, which a gradient would meet
        )
        device = self.host.device
        columns = torch.tensor([column if self.reuse else line.place for line in rows], device=device)
        group = torch.tensor([g for g, _ in lines], device=device)
        essence = torch.arange(with_target, len(rows), device=device)
        at = (essence, columns[essence])
        keep = {self.layer, *([self.first - 1] if self.first else [])}
        above = range(self.first, len(self.partial.blocks))
        starts: list[Tensor] = []
        with contextlib.ExitStack() as stack, torch.no_grad():
            self._give(stack, rows, columns.tolist())
            for module in self.modules:
                stack.enter_context(hooks.on_output(module, _note(starts, columns)))
            ran = self.partial.run(tokens, past, at=at, keep=keep, remember=above if self.reuse else ())
        assert ran.logits is not None
        first = [next(i for i, (g, _) in enumerate(lines) if g == p) for p in range(self.count)]
        self.start = [start[first] for start in starts]
        above_layer = ran.states[self.layer]
        at_place = torch.arange(len(rows), device=above_layer.device), columns.to(above_layer.device)
        self.stream = wide(above_layer[at_place])[first].to(device)
        state = ran.states[self.first - 1] if self.first else None
        before = wide(ran.logits).log_softmax(-1)
        split: list[tuple[Tensor, Any, Tensor | None]] = []
        alone = all(line.context == 0 for line in rows[:with_target])
        least = LIKE_ROWS.get(device.type, LIKE_ROWS["cpu"])
        for like in alike([len(line.ids) - line.place for line in rows[:with_target]], least):
            mine = torch.tensor(like, device=device)
            counted = _targets(
                [rows[i] for i in like], columns[mine].tolist(), device, bare=self.config.top_bare or alone
            )
            split.append((mine, counted, None))
        if len(essence):
            split.append((essence, _places(columns[essence]), before))
        cutting = column if self.reuse else 0
        return [
            self._bundle(tokens, past, ran.past, state, group, chosen, found, old, columns, cutting)
            for chosen, found, old in split
        ]

    def _beginnings(self, rows: list[Line], cut: dict[int, int]) -> Past:
        """Run the tokens that rows of one context share; return what stands before each row."""
        shared = {line.context: line.ids[: cut[line.context]] for line in rows if cut[line.context]}
        if not shared:
            return nothing_before(self.host, len(rows))
        texts = list(shared.values())
        tokens, _ = align(self.host, texts, [len(text) for text in texts], [0] * len(texts))
        with torch.no_grad():
            blocks = self.partial.blocks
            ran = self.partial.run(
                tokens, nothing_before(self.host, len(texts)), remember=range(len(blocks)), stop=blocks[-1]
            )
        # one empty row more, for rows that share nothing
        states = {b: (longer(k), longer(v)) for b, (k, v) in ran.past.items()}
        place = {context: i for i, context in enumerate(shared)}
        row = torch.tensor([place.get(line.context, len(texts)) for line in rows], device=self.host.device)
        return Past(states, longer(tokens.mask), row)

    def _give(self, stack: contextlib.ExitStack, rows: list[Line], columns: list[int]) -> None:
        """Put shifts in place that stand already."""
        given = [
            (i, columns[i] + at - line.place, shift)
            for i, line in enumerate(rows)
            for at, shift in line.given
        ]
        if not given:
            return
        row, at = (torch.tensor([g[i] for g in given], device=self.host.device) for i in (0, 1))
        shifts = torch.stack([g[2] for g in given]).to(self.host.device)

        def push(hidden: Tensor) -> Tensor:
            where = (row.to(hidden.device), at.to(hidden.device))
            return hidden.index_put(where, shifts.to(hidden), accumulate=True)

        stack.enter_context(hooks.on_output(self.partial.blocks[self.layer], push))

    def _bundle(
        self, tokens: Tokens, past: Past, seen: dict[int, Any], state: Tensor | None, group: Tensor,
        rows: Tensor, found: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], before: Tensor | None,
        columns: Tensor, cutting: int,
    ) -> _Bundle:  # fmt: skip
        """Cut rows to what the shift reaches, with the rest of them in their past."""
        mine = tokens.rows(rows)
        length = int(mine.mask.sum(1).add(mine.start).max())
        kept = {b: (k[rows], v[rows]) for b, (k, v) in seen.items()}
        behind = past.of(rows).followed_by(kept, mine, cutting) if self.reuse else past.of(rows)
        cut = mine.columns(cutting)
        most = length - cutting
        cut = Tokens(cut.ids[:, :most], cut.mask[:, :most], cut.positions[:, :most], cut.start)
        return _Bundle(
            cut, behind, None if state is None else state[rows][:, cutting:length], group[rows],
            columns[rows] - cutting, found[0], found[1] - cutting, *found[2:], before,
        )  # fmt: skip

    # --- every step ------------------------------------------------------------------------

    def _forward(self, bundles: Sequence[_Bundle], shifts: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return negative log-likelihood, divergence and whether all targets come first, by problem."""
        zero = torch.zeros(self.count, device=self.host.device, dtype=shifts[0].dtype)
        nll, divergence, missed = zero, zero, zero
        for bundle in bundles:
            if not len(bundle.group):
                continue
            logits = self._logits(bundle, shifts)
            group = bundle.group[bundle.at_row]
            if bundle.before is None:
                lost = functional.cross_entropy(logits, bundle.token, reduction="none")
                nll = nll.index_add(0, group, lost * bundle.weight)
                wrong = (logits.detach().argmax(-1) != bundle.token).to(zero.dtype)
                missed = missed.index_add(0, group, wrong * bundle.decides)
            else:
                after = logits.log_softmax(-1)
                # KL(edited || original), read at the subject, as the authors' code has it
                gap = (after.exp() * (after - bundle.before)).sum(-1)
                divergence = divergence.index_add(0, group, gap)
        return nll, divergence, missed == 0

    def _logits(self, bundle: _Bundle, shifts: Sequence[Tensor]) -> Tensor:
        count = len(bundle.group)
        line = torch.arange(count, device=self.host.device)

        def push(shift: Tensor) -> Callable[[Tensor], Tensor]:
            def add(hidden: Tensor) -> Tensor:
                flat = hidden.reshape(count, -1, hidden.shape[-1])
                added = shift[bundle.group].to(flat)  # a layer may live on another device
                at = (line.to(flat.device), bundle.place.to(flat.device))
                return flat.index_put(at, added, accumulate=True).reshape(hidden.shape)

            return add

        state = bundle.state
        with contextlib.ExitStack() as stack:
            if self.on_stream:
                assert state is not None
                state = push(shifts[0])(state)
            else:
                for module, shift in zip(self.modules, shifts, strict=True):
                    stack.enter_context(hooks.on_output(module, push(shift)))
            ran = self.partial.run(
                bundle.tokens, bundle.past, first=self.first, given=state, at=(bundle.at_row, bundle.at)
            )
        assert ran.logits is not None
        return wide(ran.logits)

    # --- the descent -----------------------------------------------------------------------

    def _units(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return, per shifted site, the longest shift allowed and the rate, ``[g, 1]``."""
        limits, rates = [], []
        for start in self.start:
            reference = self.stream if self.config.scale == "stream" else start
            unit = reference.square().mean(1, keepdim=True).sqrt()
            plain = self.config.scale == "published"
            limits.append(self.config.clamp * reference.norm(dim=1, keepdim=True))
            rates.append(self.config.learning_rate * (torch.ones_like(unit) if plain else unit))
        return limits, rates

    def run(self) -> list[Value]:
        """Descend until every problem has stopped."""
        config, device = self.config, self.host.device
        limits, rates = self._units()
        shifts = [torch.zeros_like(s, requires_grad=True) for s in self.start]
        adam = [(torch.zeros_like(s), torch.zeros_like(s)) for s in self.start]
        running = torch.ones(self.count, dtype=torch.bool, device=device)
        taken = torch.zeros(self.count, dtype=torch.long)
        factor = torch.full((self.count,), config.nll_loss_factor, device=device)
        at_top = torch.zeros(self.count, dtype=torch.long, device=device)
        seen = torch.zeros(self.count, device=device)
        bundles = self.bundles
        for step in range(1, config.steps + 1):
            nll, divergence, top = self._forward(bundles, shifts)
            seen = torch.where(running, nll.detach(), seen)
            loss = factor * nll + config.kl * divergence + self._penalty(shifts)
            at_top += top
            stopped = self._stopped(loss.detach(), divergence.detach(), top, at_top)
            if config.relax:  # what is seen now counts from the next evaluation on
                factor = torch.where(top, 0.1 * config.nll_loss_factor, config.nll_loss_factor)
            still = running & ~stopped
            if step == config.steps or not still.any():
                break
            if not torch.equal(still, running):
                bundles = [bundle.of(still) for bundle in self.bundles]
            running = still
            gradients = torch.autograd.grad(loss[running].sum(), shifts)
            with torch.no_grad():
                moved = [
                    _adam(shift, gradient, state, step, rate, running)
                    for shift, gradient, state, rate in zip(shifts, gradients, adam, rates, strict=True)
                ]
                shifts = [
                    (m * (limit / m.norm(dim=1, keepdim=True).clamp_min(1e-12)).clamp_max(1.0))
                    for m, limit in zip(moved, limits, strict=True)
                ]
            shifts = [shift.requires_grad_(True) for shift in shifts]
            taken[running.cpu()] = step
        # of several sites the last is the one that is written
        start, shift = self.start[-1].cpu(), shifts[-1].detach().cpu()
        stream = self.stream.cpu()
        return [
            Value(start[g], shift[g], float(seen[g]), int(taken[g]), stream[g]) for g in range(self.count)
        ]

    def _penalty(self, shifts: Sequence[Tensor]) -> Tensor:
        parts = [
            shift.norm(dim=1) / start.norm(dim=1).square().clamp_min(1e-12)
            for shift, start in zip(shifts, self.start, strict=True)
        ]
        return self.config.decay * torch.stack(parts).sum(0)

    def _stopped(self, loss: Tensor, divergence: Tensor, top: Tensor, at_top: Tensor) -> Tensor:
        stopped = loss < self.config.stop_loss * self.members
        if self.config.stop == "top":
            stopped = stopped | (at_top >= self.config.top_count)
        if self.config.relax:
            stopped = stopped | (top & (self.config.kl * divergence <= 0.01))
        return stopped


def _adam(
    shift: Tensor, gradient: Tensor, state: tuple[Tensor, Tensor], step: int, rate: Tensor, live: Tensor
) -> Tensor:
    """Take one Adam step with its usual constants, for the problems that still run."""
    first, second = state
    first.copy_(torch.where(live[:, None], 0.9 * first + 0.1 * gradient, first))
    second.copy_(torch.where(live[:, None], 0.999 * second + 0.001 * gradient.square(), second))
    size = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
    return torch.where(live[:, None], shift - rate * size, shift)


def _note(into: list[Tensor], columns: Tensor) -> Callable[[Tensor], None]:
    """Keep what a module says in one column of each row ``[rows, d]``."""
    line = torch.arange(len(columns), device=columns.device)

    def keep(hidden: Tensor) -> None:
        flat = hidden.detach().reshape(len(columns), -1, hidden.shape[-1])
        here = flat[line.to(flat.device), columns.to(flat.device)]
        into.append(wide(here).to(columns.device))

    return keep


def _targets(
    rows: Sequence[Line], columns: Sequence[int], device: torch.device, *, bare: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Index every target token: its row, the column that predicts it, its id, its weight, whether it decides.

    Without ``bare``, tokens behind the bare prompt do not decide on the first choice.
    """
    row, at, token, weight, decides = [], [], [], [], []
    for i, (line, column) in enumerate(zip(rows, columns, strict=True)):
        first = column + len(line.ids) - len(line.targets) - line.place
        for j, target in enumerate(line.targets):
            row.append(i)
            at.append(first + j)
            token.append(target)
            weight.append(line.weight / len(line.targets))
            decides.append(float(bare or line.context != 0))
    return (
        torch.tensor(row, device=device),
        torch.tensor(at, device=device),
        torch.tensor(token, device=device),
        torch.tensor(weight, device=device),
        torch.tensor(decides, device=device),
    )


def _places(columns: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Index the one prediction of each essence row."""
    row = torch.arange(len(columns), device=columns.device)
    none = torch.zeros(len(row), device=columns.device)
    return row, columns, torch.zeros_like(row), none, none
