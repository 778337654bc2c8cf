"""Find the value a site should give: gradient descent on a shift of one vector at one token.

Every request is its own problem; they share forward passes. Adam works entry by entry, so a batch of
requests with one sum of losses, one clamp and one stop each is exactly as many separate runs. Blocks
below the shift never change and are computed once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from errata.errors import RequestError
from errata.host import hooks
from errata.host.load import Host
from errata.host.tokens import Batch
from errata.locate.contexts import Context
from errata.types import Request

Where = Literal["mlp_out", "block_out"]
Scale = Literal["stream", "site", "published"]


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
    """A request stops once its loss is below this."""
    scale: Scale = "stream"
    """Units. ``stream``: rate in root mean squares and clamp in norms of the residual stream above the
    layer; ``site``: the same of the shifted vector; ``published``: rate in plain numbers, clamp in norms of
    the shifted vector. States differ in scale by orders of magnitude between families, and a
    feed-forward's output may be small beside the stream it has to turn."""
    rows: int = 192
    """Rows run at once, contexts included."""


@dataclass(frozen=True)
class Value:
    """What was found for one request."""

    start: Tensor
    """The vector at the subject in the bare prompt, ``[d]``."""
    shift: Tensor
    """What to add to it ``[d]``."""
    loss: float
    """Negative log-likelihood per target token at the end, mean over contexts, nats."""
    steps: int
    """Steps taken."""

    @property
    def target(self) -> Tensor:
        """The value to write ``[d]``."""
        return self.start + self.shift


@dataclass(frozen=True)
class _Line:
    """One row: a prompt in one context with its target, or the divergence row."""

    ids: tuple[int, ...]
    place: int
    """Index of the subject's last token."""
    targets: tuple[int, ...]
    """Target ids; empty for the divergence row."""
    weight: float


def optimise(
    host: Host,
    requests: Sequence[Request],
    contexts: Sequence[Context],
    *,
    layer: int,
    where: Where,
    config: ValueConfig,
) -> list[Value]:
    """Find a value per request for a layer's feed-forward output or its block's output.

    Raises RequestError for a target without tokens and for texts longer than the window.
    """
    lines = [_lines(host, request, contexts) for request in requests]
    values: list[Value] = []
    per = max(1, config.rows // (len(contexts) + 1))
    with hooks.frozen(host.model):
        for first in range(0, len(lines), per):
            values += _Search(host, lines[first : first + per], layer, where, config).run()
    return values


def _lines(host: Host, request: Request, contexts: Sequence[Context]) -> list[_Line]:
    """Lay out a request's rows; weights of the contexts sum to one."""
    total = sum(c.weight for c in contexts)
    lines = []
    for c in contexts:
        answer = host.encode_answer(c.prefix + request.text, request.target)
        start, stop = (bound + len(c.prefix) for bound in request.span)
        place = host.encode(c.prefix + request.text).last_of(start, stop)
        if place >= answer.start:
            raise RequestError(f"the subject {request.subject!r} and the target share a token")
        lines.append(_Line(answer.ids[:-1], place, answer.target, c.weight / total))
    essence = Request("{} is a", request.subject, request.target)
    encoded = host.encode(essence.text)
    lines.append(_Line(encoded.ids, encoded.last_of(*essence.span), (), 1.0))
    return lines


class _Search:
    """One batch of problems; holds the frozen states below the shift."""

    def __init__(
        self, host: Host, groups: list[list[_Line]], layer: int, where: Where, config: ValueConfig
    ) -> None:
        self.host, self.where, self.config = host, where, config
        self.blocks = [host.model.get_submodule(name) for name in host.layout.blocks]
        self.layer = layer
        self.depth = layer + 1 if where == "block_out" else layer  # blocks the shift cannot reach
        site = host.layout.site(layer)
        self.module = host.model.get_submodule(site.name) if where == "mlp_out" else self.blocks[layer]
        self.width = site.d_out if where == "mlp_out" else host.layout.width
        self.lines = [line for group in groups for line in group]
        self.group = torch.tensor([g for g, group in enumerate(groups) for _ in group], device=host.device)
        self.count = len(groups)
        self.batch = host.batch([line.ids for line in self.lines])
        self.place = torch.tensor([line.place for line in self.lines], device=host.device)
        self._layout_targets()

    def _layout_targets(self) -> None:
        """Index every target token: its row, the position that predicts it, its weight."""
        row, at, token, weight = [], [], [], []
        for i, line in enumerate(self.lines):
            first = len(line.ids) - len(line.targets)
            for j, target in enumerate(line.targets):
                row.append(i)
                at.append(first + j)
                token.append(target)
                weight.append(line.weight / len(line.targets))
        device = self.host.device
        self.t_row = torch.tensor(row, device=device)
        self.t_at = torch.tensor(at, device=device)
        self.t_id = torch.tensor(token, device=device)
        self.t_weight = torch.tensor(weight, device=device)

    def run(self) -> list[Value]:
        """Descend until every request has stopped."""
        below = self._freeze()
        start = self.start  # [g, d], set by the first pass
        reference = self.stream if self.config.scale == "stream" else start
        limit = self.config.clamp * reference.norm(dim=1)
        plain = self.config.scale == "published"
        unit = 1.0 if plain else reference.square().mean(1, keepdim=True).sqrt()  # [g, 1]
        rate = self.config.learning_rate * unit
        shift = torch.zeros_like(start, requires_grad=True)
        first, second = torch.zeros_like(start), torch.zeros_like(start)
        running = torch.ones(self.count, dtype=torch.bool, device=start.device)
        taken = torch.zeros(self.count, dtype=torch.long)
        nll = torch.zeros(self.count, device=start.device)
        for step in range(1, self.config.steps + 1):
            rows = running[self.group].nonzero()[:, 0]
            part, divergence = self._forward(below, rows, shift)
            penalty = self.config.decay * shift.norm(dim=1) / start.norm(dim=1).square()
            loss = part + self.config.kl * divergence + penalty
            nll = torch.where(running, part.detach(), nll)
            running = running & (loss.detach() >= self.config.stop_loss)
            if step == self.config.steps or not running.any():
                break
            (gradient,) = torch.autograd.grad(loss[running].sum(), shift)
            with torch.no_grad():  # Adam with its usual constants, entry by entry
                live = running[:, None]
                first = torch.where(live, 0.9 * first + 0.1 * gradient, first)
                second = torch.where(live, 0.999 * second + 0.001 * gradient.square(), second)
                size = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
                moved = torch.where(live, shift - rate * size, shift)
                norm = moved.norm(dim=1).clamp_min(1e-12)
                moved = moved * (limit / norm).clamp_max(1.0)[:, None]
            shift = moved.detach().requires_grad_(True)
            taken[running.cpu()] = step
        return [
            Value(start[g].cpu(), shift[g].detach().cpu(), float(nll[g]), int(taken[g]))
            for g in range(self.count)
        ]

    def _freeze(self) -> Any:
        """Run once unshifted; return the output of the highest block that the shift cannot reach."""
        depth = self.depth
        outputs: list[Any] = []
        seen: list[Tensor] = []
        above: list[Tensor] = []

        def keep(_: Any, __: Any, output: Any) -> None:
            outputs.append(_detached(output))

        with contextlib.ExitStack() as stack:
            if depth:
                handle = self.blocks[depth - 1].register_forward_hook(keep)
                stack.callback(handle.remove)
            stack.enter_context(hooks.on_output(self.module, lambda out: seen.append(out.detach().clone())))
            top = self.blocks[self.layer]
            stack.enter_context(hooks.on_output(top, lambda out: above.append(out.detach().clone())))
            with torch.no_grad():
                self.kl_rows = torch.tensor([i for i, line in enumerate(self.lines) if not line.targets])
                kl = self.kl_rows.to(self.place.device)
                logits = self.host.forward_at(self.batch, kl, self.place[kl])  # [g, vocab]
        lines = torch.arange(len(self.lines), device=self.place.device)
        bare = [int((self.group == g).nonzero()[0, 0]) for g in range(self.count)]
        self.start = seen[0].reshape(len(self.lines), -1, self.width)[lines, self.place].float()[bare]
        self.stream = above[0][lines, self.place].float()[bare]
        self.before = logits.float().log_softmax(-1)
        return outputs[0] if outputs else None

    def _forward(self, below: Any, rows: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """Return negative log-likelihood and divergence per group ``[g]``; stopped groups give 0."""
        batch = Batch(
            *(t[rows] for t in (self.batch.ids, self.batch.mask, self.batch.positions, self.batch.offset))
        )
        line = torch.arange(len(rows), device=rows.device)
        add = shift[self.group[rows]]  # [rows, d]

        def push(hidden: Tensor) -> Tensor:
            flat = hidden.reshape(len(rows), -1, self.width)
            full = torch.zeros_like(flat).index_put((line, self.place[rows]), add.to(flat.dtype))
            return (flat + full).reshape(hidden.shape)

        fixed: dict[Any, Any] = {}
        if below is not None:  # the blocks under it need not run for it
            fixed = dict.fromkeys(self.blocks[: self.depth], _rows(below, rows))
        if self.where == "block_out":
            # the shifted block is frozen too: hand over its output with the shift added
            top = self.blocks[self.layer]
            fixed[top] = hooks.with_first(fixed[top], push(hooks.first_tensor(fixed[top])))
        position = torch.full((len(self.lines),), -1, device=rows.device)
        position[rows] = line
        chosen = position[self.t_row] >= 0  # target tokens of rows that still run
        kl_rows = self.kl_rows.to(rows.device)
        live = position[kl_rows] >= 0
        at_row = torch.cat([position[self.t_row[chosen]], position[kl_rows[live]]])
        at = torch.cat([self.t_at[chosen], self.place[kl_rows[live]]])
        with contextlib.ExitStack() as stack:
            if self.where == "mlp_out":
                stack.enter_context(hooks.on_output(self.module, push))
            stack.enter_context(hooks.answer_with(fixed))
            logits = self.host.forward_at(batch, at_row, at).float()
        count = int(chosen.sum())
        lost = functional.cross_entropy(logits[:count], self.t_id[chosen], reduction="none")
        after = logits[count:].log_softmax(-1)
        # KL(edited || original), read at the subject, as the authors' code has it
        gap = (after.exp() * (after - self.before[live])).sum(-1)
        zero = torch.zeros(self.count, device=rows.device)
        nll = zero.index_add(0, self.group[self.t_row[chosen]], lost * self.t_weight[chosen])
        return nll, zero.index_add(0, self.group[kl_rows[live]], gap)


def _detached(output: Any) -> Any:
    """Copy a module's output, since some families go on adding to it in place."""
    if isinstance(output, Tensor):
        return output.detach().clone()
    return type(output)(o.detach().clone() if isinstance(o, Tensor) else o for o in output)


def _rows(output: Any, rows: Tensor) -> Any:
    if isinstance(output, Tensor):
        return output[rows]
    return type(output)(o[rows] if isinstance(o, Tensor) else o for o in output)
