"""Find the target value of a site at a token: gradient descent on a shift of one vector.

Problems are independent but share forward passes. Adam works elementwise, so a batch of problems with the sum of
their losses, and with a clamp and a stop of its own each, is equivalent to separate runs. What the shift cannot
influence is computed once: blocks below it, tokens before it (cached as attention keys and values; shared prefixes
only once), and the head only at the positions of predictions in the loss.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from errata.host import hooks
from errata.host.host import Host
from errata.host.kv_cache import FixedCache
from errata.host.memory import in_batches, share
from errata.host.prefix import Prefix, PrefixRunner, align, can_reuse, no_prefix
from errata.host.tokens import Batch
from errata.locate import inference
from errata.locate.contexts import Context
from errata.locate.inference import Inference, Taught
from errata.locate.predictions import essence_predictions, target_predictions
from errata.locate.problems import (
    PromptRow,
    Span,
    ValueProblem,
    group_by_length,
    shared_prefix_lengths,
    subject_span,
    value_problems,
    wide,
)
from errata.progress import OnCount, ignore
from errata.types import Request

Where = Literal["mlp_out", "block_out", "attn_and_mlp"]
Scale = Literal["stream", "site", "published"]
Stop = Literal["loss", "top"]

MIN_EQUAL_LENGTH_ROWS = {"cpu": 8, "cuda": 256}
"""Minimum number of rows of one length for a group of their own, by device type."""


@dataclass(frozen=True)
class ValueConfig:
    """Settings of the search."""

    steps: int
    """Maximum number of evaluations; there is no Adam step after the last one."""
    learning_rate: float
    """Adam's rate, in the unit of ``scale``."""
    clamp: float
    """Maximum norm of the shift, in the unit of ``scale``."""
    decay: float
    """Weight of the shift's norm over the squared norm of the vector, as in the authors' code."""
    kl: float
    """Weight of the KL divergence at the subject in "{subject} is a"."""
    stop_loss: float = 0.05
    """A problem stops when its loss is below this (per request)."""
    scale: Scale = "stream"
    """Units. ``stream``: rate in root mean squares and clamp in norms of the residual stream above the
    layer; ``site``: the same of the shifted vector; ``published``: rate in plain numbers, clamp in norms of
    the shifted vector. Hidden states differ in scale by orders of magnitude between families, and a
    feed-forward's output may be small compared to the residual stream that it has to change."""
    stop: Stop = "loss"
    """``top``: also stop when every target token is the argmax in every context (ENCORE)."""
    top_count: int = 1
    """``stop: top``: the number of evaluations in which that must be so, consecutive or not."""
    top_bare: bool = True
    """``stop: top``: whether the bare prompt is one of those contexts; always, where it is the only one."""
    nll_loss_factor: float = 1.0
    """Weight of the targets' loss."""
    balance: bool = False
    """Whether the targets' loss is squared: with rows of negative weight, which it subtracts, it is least where both
    kinds of row are equally likely (LSDM)."""
    relax: bool = False
    """PMET's code: after an evaluation in which every target token is the argmax, the targets' loss is weighted by a
    tenth, until that is no longer so; the search ends there if the weighted divergence is at most 0.01."""
    erase: float = 0.0
    """Weight of what is left of old answers, of the problems' erased rows: the hinge max(0, log p - ``erase_above``) of
    an old answer's log-probability, mean over contexts (KELE)."""
    erase_above: float = 0.0
    """Log-probability in nats above which an old answer costs something."""
    inference: Inference | None = None
    """Further terms that hold the model to what it infers with the fact in its context (LTI); the problems' rows are
    then those of :func:`errata.locate.inference.informed`."""


@dataclass(frozen=True)
class Value:
    """The result for one problem."""

    start: Tensor
    """The vector at the edited token in the bare prompt, ``[d]``."""
    shift: Tensor
    """The shift of that vector ``[d]``."""
    loss: float
    """Negative log-likelihood per target token at the end, mean over contexts, nats; a sum over requests."""
    steps: int
    """Number of Adam steps."""
    stream: Tensor
    """The residual stream above the layer at the edited token in the bare prompt, unshifted, ``[d]``."""

    @property
    def target(self) -> Tensor:
        """The target value ``[d]``."""
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
    problems = value_problems(host, requests, contexts, span=span, merge=False)
    return find_values(host, problems, layer=layer, where=where, config=config)


def find_values(
    host: Host,
    problems: Sequence[ValueProblem],
    *,
    layer: int,
    where: Where,
    config: ValueConfig,
    batch_size: int | None = None,
    tick: OnCount = ignore,
) -> list[Value]:
    """Find a value per problem, in the order given.

    ``batch_size``: problems per batch; None: as many as fit. Batches shrink when memory runs out. ``tick`` is called
    with the number of finished problems and their total.
    """
    order = sorted(range(len(problems)), key=lambda i: -_suffix(problems[i]))  # similar lengths together
    size = batch_size or _auto(host, problems, layer)
    finished = 0

    def run(batch: Sequence[int]) -> list[Value]:
        nonlocal finished
        members = [problems[i] for i in batch]
        rows = [row.ids for problem in members for row in (*problem.rows, *problem.erased)]
        reuse = can_reuse(host, max(map(len, rows)), rows)
        values = _Search(host, members, layer, where, config, reuse).run()
        finished += len(batch)
        tick(finished, len(problems))
        return values

    with hooks.frozen(host.model):
        values = dict(zip(order, in_batches(order, size, run), strict=True))
    return [values[i] for i in range(len(problems))]


def _suffix(problem: ValueProblem) -> int:
    return sum(len(row.ids) - row.position for row in (*problem.rows, *problem.erased))


def _auto(host: Host, problems: Sequence[ValueProblem], layer: int) -> int:
    """Return the number of problems per batch: a backward pass's activations must fit the device's share."""
    blocks = max(1, len(host.layout.blocks) - layer - 1)
    inner = max((site.d_in for site in host.layout.mlp_out if site is not None), default=host.layout.width)
    size = torch.finfo(host.dtype).bits // 8
    token = blocks * (12 * host.layout.width + 4 * inner) * size  # bytes, of states and activations
    largest = max((_suffix(problem) for problem in problems), default=1)
    return max(1, share(host.device) // (token * max(1, largest)))


@dataclass
class _RowGroup:
    """Rows that run together in every step, reduced to the tokens that the shift can influence."""

    tokens: Batch
    prefix: Prefix
    """Their tokens before those, and the blocks that the shift cannot influence."""
    problem: Tensor
    """Index of each row's problem."""
    column: Tensor
    """Column of the shift in each row."""
    prediction_row: Tensor
    prediction_column: Tensor
    """Row and column of each prediction in the loss."""
    token: Tensor
    weight: Tensor
    decides: Tensor
    """Whether a prediction counts for ``stop: top``, 1 or 0."""
    erased: Tensor
    """Weight of each row's old answer among what is to be erased, 0 for rows with targets and essences."""
    essence_logprobs: Tensor | None = None
    """Unshifted log-probabilities at the essence rows' edited tokens ``[rows, vocab]``."""
    taught: Taught | None = None
    """What the unedited model gives with the facts in its context, for constraints on inference."""

    def select(self, running: Tensor) -> _RowGroup:
        """Return the rows of problems that are still running."""
        rows = running[self.problem].nonzero()[:, 0]
        new = torch.full_like(self.problem, -1)
        new[rows] = torch.arange(len(rows), device=rows.device)
        active = new[self.prediction_row] >= 0
        return _RowGroup(
            self.tokens.select(rows),
            self.prefix.select(rows),
            self.problem[rows],
            self.column[rows],
            new[self.prediction_row[active]],
            self.prediction_column[active],
            self.token[active],
            self.weight[active],
            self.decides[active],
            self.erased[rows],
            None if self.essence_logprobs is None else self.essence_logprobs[rows],
            None if self.taught is None else self.taught.select(rows, active),
        )


class _Search:
    """One batch of problems, with everything that is constant during the descent."""

    def __init__(
        self,
        host: Host,
        problems: Sequence[ValueProblem],
        layer: int,
        where: Where,
        config: ValueConfig,
        reuse: bool,
    ) -> None:
        self.host, self.config, self.layer, self.reuse = host, config, layer, reuse
        self.runner = PrefixRunner(host)
        self.count = len(problems)
        self.members = torch.tensor([float(len(p.requests)) for p in problems], device=host.device)
        self._choose_sites(where)
        rows = [(g, row) for g, problem in enumerate(problems) for row in problem.rows]
        erased = [(g, row) for g, p in enumerate(problems) for row in p.erased] if config.erase else []
        essences = [(g, p.essence) for g, p in enumerate(problems) if p.essence is not None and config.kl]
        weights = [0.0] * len(rows) + [row.loss_weight for _, row in erased] + [0.0] * len(essences)
        self.erased = torch.tensor(weights, device=host.device)
        self.groups = self._prepare([*rows, *erased, *essences], len(rows) + len(erased))

    def _choose_sites(self, where: Where) -> None:
        """Choose the outputs to shift and the first block to run in every step."""
        host, layer = self.host, self.layer
        block = self.runner.blocks[layer]
        if where == "attn_and_mlp":
            sites = [host.layout.site(layer, "attn_out"), host.layout.site(layer, "mlp_out")]
            self.modules = [host.model.get_submodule(site.name) for site in sites]
        elif where == "mlp_out":
            self.modules = [host.model.get_submodule(host.layout.site(layer).name)]
        else:
            self.modules = [block]
        # where the feed-forward's output is added directly to the residual stream, both shifts are equivalent
        self.on_stream = where == "block_out" or (where == "mlp_out" and host.layout.adds_directly)
        self.first = layer + 1 if self.on_stream else layer

    # --- once ------------------------------------------------------------------------------

    def _prepare(self, numbered: list[tuple[int, PromptRow]], with_target: int) -> list[_RowGroup]:
        """Run everything once without shifts; return the groups of target rows and of essence rows.

        ``numbered``: rows with the index of their problem, those with targets first.
        """
        rows = [row for _, row in numbered]
        prefix_length = shared_prefix_lengths(rows) if self.reuse else {row.context: 0 for row in rows}
        prefix = self._run_prefixes(rows, prefix_length)
        tokens, column = align(
            self.host,
            [row.ids[prefix_length[row.context] :] for row in rows],
            [row.position - prefix_length[row.context] for row in rows],
            [prefix_length[row.context] for row in rows],
            left=self.reuse,  # a query without any earlier key may give NaN, also in gradients
        )
        device = self.host.device
        columns = torch.tensor([column if self.reuse else row.position for row in rows], device=device)
        problem = torch.tensor([g for g, _ in numbered], device=device)
        essence = torch.arange(with_target, len(rows), device=device)
        at = (essence, columns[essence])
        keep = {self.layer, *([self.first - 1] if self.first else [])}
        above = range(self.first, len(self.runner.blocks))
        starts: list[Tensor] = []
        with contextlib.ExitStack() as stack, torch.no_grad():
            self._add_earlier_shifts(stack, rows, columns.tolist())
            for module in self.modules:
                stack.enter_context(hooks.on_output(module, _capture_column(starts, columns)))
            ran = self.runner.run(tokens, prefix, at=at, keep=keep, remember=above if self.reuse else ())
        assert ran.logits is not None
        first = [next(i for i, (g, _) in enumerate(numbered) if g == p) for p in range(self.count)]
        self.start = [start[first] for start in starts]
        above_layer = ran.states[self.layer]
        edited = torch.arange(len(rows), device=above_layer.device), columns.to(above_layer.device)
        self.stream = wide(above_layer[edited])[first].to(device)
        state = ran.states[self.first - 1] if self.first else None
        logprobs = wide(ran.logits).log_softmax(-1)
        split: list[tuple[Tensor, Any, Tensor | None]] = []
        alone = all(row.context == 0 for row in rows[:with_target])
        least = MIN_EQUAL_LENGTH_ROWS.get(device.type, MIN_EQUAL_LENGTH_ROWS["cpu"])
        lengths = [len(row.ids) - row.position for row in rows[:with_target]]
        for equal in group_by_length(lengths, least):
            mine = torch.tensor(equal, device=device)
            indexed = target_predictions(
                [rows[i] for i in equal], columns[mine].tolist(), device, bare=self.config.top_bare or alone,
                erased=self.erased[mine].tolist(),
            )  # fmt: skip
            split.append((mine, indexed, None))
        if len(essence):
            split.append((essence, essence_predictions(columns[essence]), logprobs))
        first_column = column if self.reuse else 0
        shared = (tokens, prefix, ran.key_values, state, problem)
        return [
            self._taught(
                self._row_group(*shared, members, predictions, old, columns, first_column), rows, members
            )
            for members, predictions, old in split
        ]

    def _taught(self, group: _RowGroup, rows: Sequence[PromptRow], members: Tensor) -> _RowGroup:
        """Return a group with what constraints on inference compare its target rows with."""
        if self.config.inference is None or group.essence_logprobs is not None:
            return group
        return replace(
            group,
            taught=inference.teach(self.runner, [rows[i] for i in members.tolist()], self.config.inference),
        )

    def _run_prefixes(self, rows: list[PromptRow], prefix_length: dict[int, int]) -> Prefix:
        """Run the prefixes shared by the rows of a context; return what each row continues."""
        shared = {
            row.context: row.ids[: prefix_length[row.context]] for row in rows if prefix_length[row.context]
        }
        if not shared:
            return no_prefix(self.host, len(rows))
        texts = list(shared.values())
        tokens, _ = align(self.host, texts, [len(text) for text in texts], [0] * len(texts))
        with torch.no_grad():
            blocks = self.runner.blocks
            ran = self.runner.run(
                tokens, no_prefix(self.host, len(texts)), remember=range(len(blocks)), stop=blocks[-1]
            )
        number = {context: i for i, context in enumerate(shared)}
        prefix = torch.tensor([number.get(row.context, len(texts)) for row in rows], device=self.host.device)
        return Prefix(tokens.mask, FixedCache(ran.key_values)).with_empty(prefix)

    def _add_earlier_shifts(
        self, stack: contextlib.ExitStack, rows: list[PromptRow], columns: list[int]
    ) -> None:
        """Add the shifts found before for earlier tokens of the rows."""
        earlier = [
            (i, columns[i] + at - row.position, shift)
            for i, row in enumerate(rows)
            for at, shift in row.earlier_shifts
        ]
        if not earlier:
            return
        row, at = (torch.tensor([e[i] for e in earlier], device=self.host.device) for i in (0, 1))
        shifts = torch.stack([e[2] for e in earlier]).to(self.host.device)

        def push(hidden: Tensor) -> Tensor:
            where = (row.to(hidden.device), at.to(hidden.device))
            return hidden.index_put(where, shifts.to(hidden), accumulate=True)

        stack.enter_context(hooks.on_output(self.runner.blocks[self.layer], push))

    def _row_group(
        self, tokens: Batch, prefix: Prefix, key_values: dict[int, Any], state: Tensor | None, problem: Tensor,
        rows: Tensor, predictions: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
        essence_logprobs: Tensor | None, columns: Tensor, first_column: int,
    ) -> _RowGroup:  # fmt: skip
        """Reduce rows to the tokens that the shift can influence, with the tokens before them in their prefix."""
        group_tokens = tokens.select(rows)
        length = int(group_tokens.mask.sum(1).add(group_tokens.offset).max())
        prefix = prefix.select(rows)
        if self.reuse:
            own = FixedCache(key_values).select(rows).blocks
            prefix = prefix.followed_by(own, group_tokens, first_column)
        states = None if state is None else state[rows.to(state.device)][:, first_column:length]
        return _RowGroup(
            group_tokens.columns(first_column, length), prefix.at_depth(self.first, states), problem[rows],
            columns[rows] - first_column, predictions[0], predictions[1] - first_column, *predictions[2:],
            self.erased[rows], essence_logprobs,
        )  # fmt: skip

    # --- every step ------------------------------------------------------------------------

    def _forward(
        self, groups: Sequence[_RowGroup], shifts: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return negative log-likelihood, divergence, further terms and whether all targets are the argmax.

        Each by problem. The further terms are those of inference and of what is left of old answers; as long as
        anything is left of one, the targets do not count as the argmax.
        """
        zero = torch.zeros(self.count, device=self.host.device, dtype=shifts[0].dtype)
        nll, divergence, further, misses = zero, zero, zero, zero
        for group in groups:
            if not len(group.problem):
                continue
            logits, states = self._logits(group, shifts)
            problem = group.problem[group.prediction_row]
            if group.essence_logprobs is None:
                loss = functional.cross_entropy(logits, group.token, reduction="none")
                nll = nll.index_add(0, problem, loss * group.weight)
                wrong = (logits.detach().argmax(-1) != group.token).to(zero.dtype)
                misses = misses.index_add(0, problem, wrong * group.decides)
                if bool(group.erased.any()):
                    left = self._left(group, loss)
                    further = further.index_add(0, group.problem, self.config.erase * left)
                    misses = misses.index_add(0, group.problem, left.detach())
                if group.taught is not None and self.config.inference is not None:
                    terms = group.taught.terms(
                        self.runner, self.config.inference, logits, states, group.prediction_row, group.weight
                    )
                    further = further.index_add(0, group.problem, terms)
            else:
                after = logits.log_softmax(-1)
                # KL(edited || original) at the subject, as in the authors' code
                gap = (after.exp() * (after - group.essence_logprobs)).sum(-1)
                divergence = divergence.index_add(0, problem, gap)
        return nll, divergence, further, misses == 0

    def _left(self, group: _RowGroup, loss: Tensor) -> Tensor:
        """Return how far each row's old answer is above its bound, weighed ``[rows]``, from the tokens' losses."""
        answer = torch.zeros_like(group.erased, dtype=loss.dtype).index_add(0, group.prediction_row, -loss)
        return functional.relu(answer - self.config.erase_above) * group.erased

    def _logits(self, group: _RowGroup, shifts: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Return logits of the predictions ``[n, vocab]``, and the states that a constraint is on ``[rows, d]``."""
        count = len(group.problem)
        line = torch.arange(count, device=self.host.device)

        def push(shift: Tensor) -> Callable[[Tensor], Tensor]:
            def add(hidden: Tensor) -> Tensor:
                flat = hidden.reshape(count, -1, hidden.shape[-1])
                addend = shift[group.problem].to(flat)  # a layer may live on another device
                at = (line.to(flat.device), group.column.to(flat.device))
                return flat.index_put(at, addend, accumulate=True).reshape(hidden.shape)

            return add

        prefix, states = group.prefix, list[Tensor]()
        with contextlib.ExitStack() as stack:
            if group.taught is not None and group.taught.subject is not None:
                assert self.config.inference is not None
                block = self.runner.blocks[self.config.inference.layer]
                stack.enter_context(hooks.on_output(block, _column(states, line, group.column)))
            if self.on_stream:
                assert prefix.states is not None
                prefix = prefix.at_depth(self.first, push(shifts[0])(prefix.states))
            else:
                for module, shift in zip(self.modules, shifts, strict=True):
                    stack.enter_context(hooks.on_output(module, push(shift)))
            ran = self.runner.run(
                group.tokens,
                prefix,
                at=(group.prediction_row, group.prediction_column),
            )
        assert ran.logits is not None
        return wide(ran.logits), states[0] if states else None

    # --- the descent -----------------------------------------------------------------------

    def _units(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return, per shifted site, the maximum norm of the shift and the rate, ``[g, 1]``."""
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
        steps_of = torch.zeros(self.count, dtype=torch.long)
        factor = torch.full((self.count,), config.nll_loss_factor, device=device)
        at_top = torch.zeros(self.count, dtype=torch.long, device=device)
        nll_of = torch.zeros(self.count, device=device)
        groups = self.groups
        for step in range(1, config.steps + 1):
            nll, divergence, further, top = self._forward(groups, shifts)
            nll = nll.square() if config.balance else nll
            nll_of = torch.where(running, nll.detach(), nll_of)
            loss = factor * nll + config.kl * divergence + further + self._penalty(shifts)
            at_top += top
            finished = self._is_finished(loss.detach(), divergence.detach(), top, at_top)
            if config.relax:  # takes effect from the next evaluation on
                factor = torch.where(top, 0.1 * config.nll_loss_factor, config.nll_loss_factor)
            still = running & ~finished
            if step == config.steps or not still.any():
                break
            if not torch.equal(still, running):
                groups = [group.select(still) for group in self.groups]
            running = still
            gradients = torch.autograd.grad(loss[running].sum(), shifts)
            with torch.no_grad():
                proposals = [
                    _adam(shift, gradient, state, step, rate, running)
                    for shift, gradient, state, rate in zip(shifts, gradients, adam, rates, strict=True)
                ]
                shifts = [
                    (m * (limit / m.norm(dim=1, keepdim=True).clamp_min(1e-12)).clamp_max(1.0))
                    for m, limit in zip(proposals, limits, strict=True)
                ]
            shifts = [shift.requires_grad_(True) for shift in shifts]
            steps_of[running.cpu()] = step
        # of several sites, the edit changes the last one
        start, shift = self.start[-1].cpu(), shifts[-1].detach().cpu()
        stream = self.stream.cpu()
        return [
            Value(start[g], shift[g], float(nll_of[g]), int(steps_of[g]), stream[g])
            for g in range(self.count)
        ]

    def _penalty(self, shifts: Sequence[Tensor]) -> Tensor:
        parts = [
            shift.norm(dim=1) / start.norm(dim=1).square().clamp_min(1e-12)
            for shift, start in zip(shifts, self.start, strict=True)
        ]
        return self.config.decay * torch.stack(parts).sum(0)

    def _is_finished(self, loss: Tensor, divergence: Tensor, top: Tensor, at_top: Tensor) -> Tensor:
        finished = loss < self.config.stop_loss * self.members
        if self.config.stop == "top":
            finished = finished | (at_top >= self.config.top_count)
        if self.config.relax:
            finished = finished | (top & (self.config.kl * divergence <= 0.01))
        return finished


def _adam(
    shift: Tensor, gradient: Tensor, state: tuple[Tensor, Tensor], step: int, rate: Tensor, live: Tensor
) -> Tensor:
    """Do one Adam step with the default constants, for the problems that are still running."""
    first, second = state
    first.copy_(torch.where(live[:, None], 0.9 * first + 0.1 * gradient, first))
    second.copy_(torch.where(live[:, None], 0.999 * second + 0.001 * gradient.square(), second))
    size = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
    return torch.where(live[:, None], shift - rate * size, shift)


def _column(into: list[Tensor], line: Tensor, column: Tensor) -> Callable[[Tensor], None]:
    """Return a hook that records a module's output in one column of each row ``[rows, d]``; gradients pass."""

    def keep(hidden: Tensor) -> None:
        into.append(hidden[line.to(hidden.device), column.to(hidden.device)])

    return keep


def _capture_column(into: list[Tensor], columns: Tensor) -> Callable[[Tensor], None]:
    """Return a hook that records a module's output in one column of each row ``[rows, d]``."""
    line = torch.arange(len(columns), device=columns.device)

    def keep(hidden: Tensor) -> None:
        flat = hidden.detach().reshape(len(columns), -1, hidden.shape[-1])
        here = flat[line.to(flat.device), columns.to(flat.device)]
        into.append(wide(here).to(columns.device))

    return keep
