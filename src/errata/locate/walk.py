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
from errata.host.partial import Partial, Past, Ran, Tokens, align, can_reuse, longer, nothing_before, wide
from errata.locate.problems import Line, Problem, alike, beginnings

WALK_TOKENS = {"cpu": 2048, "cuda": 32768}
"""Tokens run at once, by kind of device."""
LIKE_PROBLEMS = {"cpu": 2, "cuda": 64}
"""Problems of one length that make a batch of their own, by kind of device."""


@dataclass
class _Batch:
    rows: list[Line]
    tokens: Tokens
    columns: Tensor
    """Column of each row's place."""
    row: Tensor
    """Which beginning each row stands behind; the last is the empty one."""
    states: Tensor | None = None
    """Input of the next block ``[rows, length, d]``; None before the first block."""


class Walk:
    """The places of some problems, with the states that go into a block."""

    def __init__(self, host: Host, laid: Sequence[Problem], first: int) -> None:
        self.host, self.partial, self.layer = host, Partial(host), 0
        kind = host.device.type if host.device.type in WALK_TOKENS else "cpu"
        # rows of like length together, so that little is padded; put back in order in what is returned
        groups = alike([len(problem.places[0].ids) for problem in laid], LIKE_PROBLEMS[kind])
        self.order = torch.tensor([i for group in groups for i in group])
        self.counts = [len(laid[i].places) for i in self.order.tolist()]
        rows = [line for problem in laid for line in problem.places]
        self.reuse = reuse = can_reuse(host, max(len(row.ids) for row in rows))
        self.cut = beginnings(rows) if reuse else {row.context: 0 for row in rows}
        self.shared = {row.context: row.ids[: self.cut[row.context]] for row in rows if self.cut[row.context]}
        self._keys: tuple[Site, Tensor, Tensor] | None = None
        self.start: Tokens | None = None
        """The shared beginnings; None where nothing is shared."""
        self.start_states: Tensor | None = None
        if self.shared:
            texts = list(self.shared.values())
            self.start, _ = align(host, texts, [len(text) for text in texts], [0] * len(texts))
        self.batches: list[_Batch] = []
        for group in groups:
            chosen = [laid[i] for i in group]
            per = max(1, WALK_TOKENS[kind] // max(sum(len(row.ids) for row in p.places) for p in chosen))
            for begin in range(0, len(chosen), per):
                part = chosen[begin : begin + per]
                self.batches.append(self._lay([line for problem in part for line in problem.places]))
        while self.layer < first:
            self.advance()

    def _lay(self, rows: list[Line]) -> _Batch:
        cut, number = self.cut, {context: i for i, context in enumerate(self.shared)}
        tokens, column = align(
            self.host,
            [row.ids[cut[row.context] :] for row in rows],
            [row.place - cut[row.context] for row in rows],
            [cut[row.context] for row in rows],
            left=self.reuse,  # a model that may ignore the mask is padded behind the places only
        )
        places = [column if self.reuse else row.place for row in rows]
        columns = torch.tensor(places, device=self.host.device)
        row = torch.tensor([number.get(r.context, len(number)) for r in rows], device=self.host.device)
        return _Batch(rows, tokens, columns, row)

    def keys(self, site: Site) -> Tensor:
        """Return each problem's key at the present layer, mean over contexts, ``[n, d_in]``.

        A layer's keys do not depend on its own weight, so they are read once while the walk stands there.
        """
        if site.layer != self.layer:
            raise ValueError(f"the walk stands at layer {self.layer}, not at {site.layer}")
        return self._read(site)[0]

    def outputs(self, site: Site) -> Tensor:
        """Return what the site says at each problem's place, mean over contexts, ``[n, d_out]``.

        With the weight as it was when the layer's keys were read.
        """
        return self._read(site)[1]

    def _read(self, site: Site) -> tuple[Tensor, Tensor]:
        """Return keys and outputs, read in one pass that ends after the site."""
        if self._keys is not None and self._keys[0] == site:
            return self._keys[1:]
        found, said = [], []
        module = self.host.model.get_submodule(site.name)
        with hooks.frozen(self.host.model), torch.no_grad():
            start = self._before(site.layer)
            for batch in self.batches:
                seen: list[Tensor] = []
                with (
                    hooks.on_input(module, _column(seen, batch.columns)),
                    hooks.on_output(module, _column(seen, batch.columns)),
                ):
                    self._run(batch, start, stop=module)
                weights = seen[0].new_tensor([row.share for row in batch.rows])
                found.append((seen[0] * weights[:, None]).cpu())
                said.append((seen[1] * weights[:, None]).cpu())
        self._keys = (site, self._mean(torch.cat(found)), self._mean(torch.cat(said)))
        return self._keys[1:]

    def _mean(self, rows: Tensor) -> Tensor:
        """Sum weighted rows by problem, in the order given."""
        of = torch.repeat_interleave(torch.arange(len(self.counts)), torch.tensor(self.counts))
        return self._ordered(rows.new_zeros(len(self.counts), rows.shape[1]).index_add(0, of, rows))

    def values(self, top: int, module: torch.nn.Module) -> Tensor:
        """Return what a module in block ``top`` says at each bare prompt's place ``[n, d]``."""
        found = []
        with hooks.frozen(self.host.model), torch.no_grad():
            start = self._before(top, only=0) if 0 in self.shared else None
            for batch in self.batches:
                bare = [i for i, row in enumerate(batch.rows) if row.context == 0]
                part = _part(batch, bare)
                seen: list[Tensor] = []
                with hooks.on_output(module, _column(seen, part.columns)):
                    self._run(part, start, stop=self.partial.blocks[top])
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
        layer = self.layer
        block = self.partial.blocks[layer]
        with hooks.frozen(self.host.model), torch.no_grad():
            start = self._before(layer, advance=True)
            for batch in self.batches:
                batch.states = self._run(batch, start, stop=block, keep=layer).states[layer]
        self.layer += 1

    def _before(self, top: int, *, advance: bool = False, only: int | None = None) -> Past | None:
        """Run the shared beginnings up to block ``top``; return their past, an empty one appended.

        ``only``: the one context whose rows will stand behind it; the others then have no past.
        """
        if self.start is None:
            return None
        tokens, states = self.start, self.start_states
        place = {context: i for i, context in enumerate(self.shared)}
        rows = torch.arange(len(place) + 1, device=tokens.ids.device)
        if only is not None:
            chosen = rows[place[only]][None]
            cut = int(tokens.start[chosen].min())
            tokens = tokens.rows(chosen).columns(cut)
            states = None if states is None else states[chosen][:, cut:]
            rows = torch.where(rows == place[only], 0, 1)
        ran = self.partial.run(
            tokens,
            nothing_before(self.host, len(tokens.ids)),
            first=self.layer,
            given=states,
            keep=[top] if advance else (),
            remember=range(self.layer, top + 1),
            stop=self.partial.blocks[top],
        )
        if advance:
            self.start_states = ran.states[top]
        past = {b: (longer(k), longer(v)) for b, (k, v) in ran.past.items()}
        return Past(past, longer(tokens.mask), rows)

    def _run(
        self, batch: _Batch, start: Past | None, *, stop: torch.nn.Module, keep: int | None = None
    ) -> Ran:
        """Run rows from the present layer on, behind their beginnings."""
        past = nothing_before(self.host, len(batch.rows)) if start is None else start.of(batch.row)
        kept = () if keep is None else (keep,)
        return self.partial.run(
            batch.tokens, past, first=self.layer, given=batch.states, keep=kept, stop=stop
        )


def _part(batch: _Batch, rows: Sequence[int]) -> _Batch:
    """Return some rows of a batch."""
    chosen = torch.tensor(rows, device=batch.row.device)
    states = None if batch.states is None else batch.states[chosen]
    lines = [batch.rows[i] for i in rows]
    return _Batch(lines, batch.tokens.rows(chosen), batch.columns[chosen], batch.row[chosen], states)


def _column(into: list[Tensor], columns: Tensor) -> Callable[[Tensor], None]:
    line = torch.arange(len(columns), device=columns.device)

    def keep(tensor: Tensor) -> None:
        flat = tensor.detach().reshape(len(columns), -1, tensor.shape[-1])
        into.append(wide(flat[line.to(flat.device), columns.to(flat.device)]))

    return keep
