"""Keys layer by layer, upwards, while the weights below change.

A key depends on the tokens up to its place only, so rows end there. Rows of one context share their
beginning, which is run once. After a layer has been edited only its own block is run again, from states
kept below it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from errata.host import hooks
from errata.host.layout import Site
from errata.host.load import Host
from errata.host.memory import in_batches
from errata.host.partial import Partial, Past, Tokens, align, can_reuse, nothing_before, wide
from errata.locate.problems import Line, Problem, alike, beginnings

WALK_TOKENS = {"cpu": 2048, "cuda": 32768}
"""Tokens run at once, by kind of device."""
LIKE_PROBLEMS = 4
"""Problems of one length that make a batch of their own."""


@dataclass
class _Batch:
    rows: list[Line]
    tokens: Tokens
    column: int
    row: Tensor
    """Which beginning each row stands behind; the last is the empty one."""
    start: Tokens | None
    """The shared beginnings; None where nothing is shared."""
    states: Tensor | None = None
    """Input of the next block ``[rows, length, d]``; None before the first block."""
    start_states: Tensor | None = None


class Walk:
    """The places of some problems, with the states that go into a block."""

    def __init__(self, host: Host, laid: Sequence[Problem], first: int) -> None:
        self.host, self.partial, self.layer = host, Partial(host), 0
        # rows of like length together, so that little is padded; put back in order in what is returned
        groups = alike([len(problem.places[0].ids) for problem in laid], LIKE_PROBLEMS)
        self.order = torch.tensor([i for group in groups for i in group])
        self.counts = [len(laid[i].places) for i in self.order.tolist()]

        def lay(chosen: Sequence[Problem]) -> list[_Batch | None]:
            batch = self._lay([line for problem in chosen for line in problem.places])
            for layer in range(first):
                self._through(batch, layer)
            return [batch, *[None] * (len(chosen) - 1)]

        self.batches: list[_Batch] = []
        for group in groups:
            chosen = [laid[i] for i in group]
            budget = WALK_TOKENS.get(host.device.type, WALK_TOKENS["cpu"])
            per = max(1, budget // max(sum(len(row.ids) for row in p.places) for p in chosen))
            with hooks.frozen(host.model), torch.no_grad():
                self.batches += [batch for batch in in_batches(chosen, per, lay) if batch is not None]
        self.layer = first

    def _lay(self, rows: list[Line]) -> _Batch:
        reuse = can_reuse(self.host, max(len(row.ids) for row in rows))
        cut = beginnings(rows) if reuse else {row.context: 0 for row in rows}
        tokens, column = align(
            self.host,
            [row.ids[cut[row.context] :] for row in rows],
            [row.place - cut[row.context] for row in rows],
            [cut[row.context] for row in rows],
        )
        shared = {row.context: row.ids[: cut[row.context]] for row in rows if cut[row.context]}
        number = {context: i for i, context in enumerate(shared)}
        row = torch.tensor([number.get(r.context, len(shared)) for r in rows], device=self.host.device)
        start = None
        if shared:
            texts = list(shared.values())
            start, _ = align(self.host, texts, [len(text) for text in texts], [0] * len(texts))
        return _Batch(rows, tokens, column, row, start)

    def keys(self, site: Site) -> Tensor:
        """Return each problem's key at the present layer, mean over contexts, float32 ``[n, d_in]``."""
        if site.layer != self.layer:
            raise ValueError(f"the walk stands at layer {self.layer}, not at {site.layer}")
        found = []
        with hooks.frozen(self.host.model), torch.no_grad():
            for batch in self.batches:
                seen: list[Tensor] = []
                module = self.host.model.get_submodule(site.name)
                past = self._before(batch, site.layer)
                with hooks.on_input(module, _column(seen, len(batch.rows), batch.column)):
                    self._run(batch, past, stop=module)
                weights = seen[0].new_tensor([row.share for row in batch.rows])
                found.append((seen[0] * weights[:, None]).cpu())
        rows = torch.cat(found)
        of = torch.repeat_interleave(torch.arange(len(self.counts)), torch.tensor(self.counts))
        return self._ordered(rows.new_zeros(len(self.counts), rows.shape[1]).index_add(0, of, rows))

    def values(self, top: int, module: torch.nn.Module) -> Tensor:
        """Return what a module in block ``top`` says at each bare prompt's place, float32 ``[n, d]``."""
        found = []
        with hooks.frozen(self.host.model), torch.no_grad():
            for batch in self.batches:
                bare = torch.tensor(
                    [i for i, row in enumerate(batch.rows) if row.context == 0], device=batch.row.device
                )
                part = _Batch(
                    [batch.rows[i] for i in bare.tolist()],
                    batch.tokens.rows(bare),
                    batch.column,
                    batch.row[bare],
                    batch.start,
                    None if batch.states is None else batch.states[bare],
                    batch.start_states,
                )
                seen: list[Tensor] = []
                past = self._before(part, top)
                with hooks.on_output(module, _column(seen, len(part.rows), part.column)):
                    self._run(part, past, stop=self.partial.blocks[top])
                found.append(seen[0].cpu())
        return self._ordered(torch.cat(found))

    def _ordered(self, found: Tensor) -> Tensor:
        """Return rows in the order of the problems, as they were given."""
        return torch.empty_like(found).index_copy(0, self.order, found)

    def hidden(self, top: int) -> Tensor:
        """Return the residual stream above block ``top`` at each bare prompt's place ``[n, d]``."""
        return self.values(top, self.partial.blocks[top])

    def advance(self) -> None:
        """Pass the present layer, with its weights as they are now."""
        with hooks.frozen(self.host.model), torch.no_grad():
            for batch in self.batches:
                self._through(batch, self.layer)
        self.layer += 1

    def _through(self, batch: _Batch, layer: int) -> None:
        """Move a batch's states from below a block to above it."""
        past = self._before(batch, layer, advance=True)
        block = self.partial.blocks[layer]
        ran = self.partial.run(batch.tokens, past, first=layer, given=batch.states, keep=[layer], stop=block)
        batch.states = ran.states[layer]

    def _before(self, batch: _Batch, top: int, *, advance: bool = False) -> Past:
        """Run the shared beginnings up to block ``top``; return what stands before the rows."""
        if batch.start is None:
            return nothing_before(self.host, len(batch.rows))
        begin = self.layer if not advance else top
        ran = self.partial.run(
            batch.start,
            nothing_before(self.host, len(batch.start.ids)),
            first=begin,
            given=batch.start_states,
            keep=[top] if advance else (),
            remember=range(begin, top + 1),
            stop=self.partial.blocks[top],
        )
        if advance:
            batch.start_states = ran.states[top]
        states = {b: (_longer(k), _longer(v)) for b, (k, v) in ran.past.items()}
        return Past(states, _longer(batch.start.mask), batch.row)

    def _run(self, batch: _Batch, past: Past, *, stop: torch.nn.Module) -> None:
        self.partial.run(batch.tokens, past, first=self.layer, given=batch.states, stop=stop)


def _column(into: list[Tensor], rows: int, column: int) -> Callable[[Tensor], None]:
    def keep(tensor: Tensor) -> None:
        into.append(wide(tensor.detach().reshape(rows, -1, tensor.shape[-1])[:, column]))

    return keep


def _longer(tensor: Tensor) -> Tensor:
    """Append one row of zeros."""
    return torch.cat([tensor, torch.zeros_like(tensor[:1])])
