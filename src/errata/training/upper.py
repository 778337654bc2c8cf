"""Run requests again and again for changes of one module's output; what no change can influence is computed once.

That is everything below the module and, where attention's keys and values can be cached, the tokens before the first
one that changes. What is left are the blocks above, on few tokens, for many requests in one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from errata.host import hooks
from errata.host.host import Host
from errata.host.memory import share
from errata.host.prefix import (
    TRIAL_ERRORS,
    Prefix,
    PrefixRunner,
    agree,
    align,
    can_reuse,
    no_prefix,
    plain_prefix,
)
from errata.host.tokens import Batch
from errata.training.tune import Line

Change = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Maps a module's input ``[n, t, d_in]``, its output ``[n, t, d_out]`` and each token's distance from the prompt's last
one ``[n, t]``, negative inside the prompt, to the output in its place ``[n, t, d_out]``."""
Start = Literal["stream", "block", "model"]
"""Where a pass begins. ``stream``: above the module's block, whose output is computed once, the change added to it;
``block``: in that block; ``model``: at the tokens."""


@dataclass(frozen=True, eq=False)
class _Rows:
    """Rows as they are run in every pass."""

    tokens: Batch
    prefix: Prefix
    distance: Tensor
    """``[rows, t]``, see :data:`Change`."""
    inputs: Tensor | None = None
    """Of the module ``[rows, t, d_in]``, where the pass begins above it."""
    outputs: Tensor | None = None

    def select(self, rows: Tensor) -> _Rows:
        def own(part: Tensor | None) -> Tensor | None:
            return None if part is None else part[rows.to(part.device)]

        before, states = self.prefix, own(self.prefix.states)
        before = (
            plain_prefix().at_depth(before.depth, states) if before.cache is None else before.select(rows)
        )
        return _Rows(
            self.tokens.select(rows), before, self.distance[rows], own(self.inputs), own(self.outputs)
        )


class UpperRows:
    """Requests on a host, for changes of a module's output in one block."""

    def __init__(self, host: Host, lines: Sequence[Line], module: str, layer: int, *, whole: bool) -> None:
        """Compute what stays; requires a frozen model.

        ``module``: path of a feed-forward or of its projection, in block ``layer``. ``whole``: whether a change may
        act on tokens of the prompt before its last one. Whether the model can be run in parts is tried out with a
        change on the first request: where it cannot, all of the model is run in every pass, with the same results.
        """
        self.host, self.lines, self.layer = host, lines, layer
        self.module = host.model.get_submodule(module)
        self.runner = PrefixRunner(host)
        top = layer == len(self.runner.blocks) - 1
        self.firsts = [0 if whole and not top else line.at[0] for line in lines]
        """Index of each row's first token whose output matters."""
        # what acts at run time may decide below the module about what it does above
        rows = [line.ids for line in lines]
        self.reuse = host.shareable and can_reuse(host, max(map(len, rows)), rows)
        self.start: Start = self._choose()
        self._all = self._prepare(range(len(lines)), self.start)
        self._selected: tuple[tuple[int, ...], _Rows, tuple[Tensor, Tensor], Tensor] | None = None

    # --- once ------------------------------------------------------------------------------

    @torch.no_grad()
    def _choose(self) -> Start:
        """Return the latest start from which the first request ends as it does in the whole model."""
        starts: tuple[Start, ...] = ("stream", "block") if self.host.layout.adds_directly else ("block",)

        first = self.firsts[0] - self.lines[0].at[0]

        def turn(_: Tensor, output: Tensor, distance: Tensor) -> Tensor:
            return torch.where((distance >= first).to(output.device)[..., None], output.flip(-1), output)

        at = self._places([0])
        whole = self._run(self._prepare([0], "model"), turn, at, "model")
        for start in starts if self.host.shareable else ():
            try:
                part = self._run(self._prepare([0], start), turn, at, start)
            except TRIAL_ERRORS:
                continue
            if agree(whole, part, self.host.dtype):
                return start
        return "model"

    @torch.no_grad()
    def _prepare(self, index: Sequence[int], start: Start) -> _Rows:
        """Run rows without a change and keep what each pass begins with."""
        lines, firsts = [self.lines[i] for i in index], [self.firsts[i] for i in index]
        ends = torch.tensor([line.at[0] for line in lines], device=self.host.device)
        rows = [line.ids for line in lines]
        if start == "model":
            batch = self.host.batch(rows)
            column = torch.arange(batch.ids.shape[1], device=ends.device)
            return _Rows(batch, plain_prefix(), column - ends[:, None])
        # a query without any earlier key may give NaN, so padding goes to the left only where a cache masks it
        batch, column = align(self.host, rows, firsts, [0] * len(rows), left=self.reuse)
        first = column if self.reuse else 0
        depth = self.layer + (start == "stream")
        blocks = self.runner.blocks
        above = range(depth, len(blocks)) if self.reuse and first else ()
        seen = list[Tensor]()  # copies: some families go on adding to them in place

        def keep(tensor: Tensor) -> None:
            seen.append(tensor.clone())

        with hooks.on_input(self.module, keep), hooks.on_output(self.module, keep):
            ran = self.runner.run(
                batch, no_prefix(self.host, len(rows)), keep=[depth - 1] if depth else [], remember=above,
                stop=blocks[-1] if above else blocks[self.layer],
            )  # fmt: skip
        length = int(batch.mask.sum(1).add(batch.offset).max())
        prefix = plain_prefix()
        if above:
            prefix = no_prefix(self.host, len(rows)).followed_by(ran.key_values, batch, first)
        states = ran.states[depth - 1][:, first:length] if depth else None
        line = torch.arange(length - first, device=ends.device)
        shift = torch.tensor(firsts, device=ends.device) if self.reuse else torch.zeros_like(ends)
        kept = _Rows(
            batch.columns(first, length), prefix.at_depth(depth, states), line + (shift - ends)[:, None]
        )
        if start == "block":
            return kept
        cut = [part.reshape(len(rows), -1, part.shape[-1])[:, first:length] for part in seen]
        return replace(kept, inputs=cut[0], outputs=cut[1])

    # --- every pass ------------------------------------------------------------------------

    def logits(self, index: Sequence[int], change: Change) -> Tensor:
        """Return logits where each target token of some requests is predicted, in float32 or wider ``[t, vocab]``.

        ``change`` is given the rows of these requests in their order.
        """
        rows, at, _ = self._select(index)
        return self._run(rows, change, at, self.start)

    def losses(self, index: Sequence[int], logits: Tensor) -> Tensor:
        """Return the mean negative log-likelihood per target token, nats ``[n]``, from ``logits`` ``[t, vocab]``."""
        _, at, token = self._select(index)
        losses = functional.cross_entropy(logits, token.to(logits.device), reduction="none")
        counts = [len(self.lines[i].targets) for i in index]
        share = losses.new_tensor([1 / count for count in counts])
        row = at[0].to(losses.device)
        return losses.new_zeros(len(index)).index_add(0, row, losses * share[row])

    def correct(self, index: Sequence[int], logits: Tensor) -> Tensor:
        """Return whether each target's tokens are the most probable, bool ``[n]``, from ``logits`` ``[t, vocab]``."""
        _, at, token = self._select(index)
        wrong = (logits.detach().argmax(-1).cpu() != token.cpu()).long()
        return torch.zeros(len(index), dtype=torch.long).index_add(0, at[0].cpu(), wrong) == 0

    def _select(self, index: Sequence[int]) -> tuple[_Rows, tuple[Tensor, Tensor], Tensor]:
        """Return rows, places of predictions and target tokens, kept while the same requests are asked for."""
        key = tuple(index)
        if self._selected is None or self._selected[0] != key:
            rows = self._all
            if key != tuple(range(len(self.lines))):
                rows = rows.select(torch.tensor(key, device=rows.distance.device))
            token = torch.tensor([t for i in key for t in self.lines[i].targets], device=self.host.device)
            self._selected = key, rows, self._places(key), token
        return self._selected[1:]

    def _places(self, index: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return row of each prediction and its token's index in the whole row, as it is behind the first one."""
        lines = [self.lines[i] for i in index]
        row = torch.tensor([i for i, line in enumerate(lines) for _ in line.at], device=self.host.device)
        at = torch.tensor([at - line.at[0] for line in lines for at in line.at], device=self.host.device)
        return row, at

    def _run(self, rows: _Rows, change: Change, at: tuple[Tensor, Tensor], start: Start) -> Tensor:
        row, behind = at
        zero = (rows.distance == 0).long().argmax(1)  # column of each prompt's last token
        prefix = rows.prefix
        ends = zero + (prefix.length if prefix.cache is not None else 0)
        with ExitStack() as stack:
            if start == "stream":
                assert prefix.states is not None and rows.inputs is not None and rows.outputs is not None
                old, wide = rows.outputs, torch.promote_types(rows.outputs.dtype, torch.float32)
                new = change(rows.inputs, old, rows.distance).to(old.dtype)
                states = prefix.states.to(wide) + (new.to(wide) - old.to(wide)).to(prefix.states.device)
                prefix = prefix.at_depth(self.layer + 1, states.to(prefix.states.dtype))
            else:
                inputs = list[Tensor]()

                def replaced(output: Tensor) -> Tensor:
                    shape = (*rows.tokens.ids.shape, -1)
                    new = change(inputs.pop().reshape(shape), output.reshape(shape), rows.distance)
                    return new.to(output.dtype).reshape(output.shape)

                stack.enter_context(hooks.on_input(self.module, inputs.append))
                stack.enter_context(hooks.on_output(self.module, replaced))
            logits = self.runner.run(rows.tokens, prefix, at=(row, zero[row] + behind), ends=ends).logits
        assert logits is not None
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def rows_at_once(host: Host, layer: int, tokens: int) -> int:
    """Return how many rows of ``tokens`` tokens fit a backward pass through the blocks above a layer, at least one."""
    blocks = max(1, len(host.layout.blocks) - layer)
    inner = max((site.d_in for site in host.layout.mlp_out if site is not None), default=host.layout.width)
    size = torch.finfo(host.dtype).bits // 8
    token = blocks * (12 * host.layout.width + 4 * inner) * size + 12 * host.vocab_size
    return max(1, share(host.device) // (token * max(1, tokens)))
