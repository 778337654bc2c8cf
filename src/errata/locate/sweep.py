"""Compute keys layer by layer, upwards, while the weights below change.

A key depends only on the tokens up to the edited one, so rows end there. Rows of one context share a prefix, which is
run once. After a layer has been edited, only its own block is run again, from the states below it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from errata.host import hooks
from errata.host.host import Host
from errata.host.kv_cache import FixedCache
from errata.host.layout import Site
from errata.host.prefix import Output, Prefix, PrefixRunner, align, can_reuse, no_prefix
from errata.host.tokens import Batch
from errata.locate.problems import PromptRow, ValueProblem, group_by_length, shared_prefix_lengths, wide

SWEEP_TOKENS = {"cpu": 2048, "cuda": 32768}
"""Maximum tokens per batch, by device type."""
MIN_EQUAL_LENGTH_PROBLEMS = {"cpu": 2, "cuda": 64}
"""Minimum number of problems of one length for a batch of their own, by device type."""


@dataclass
class _Batch:
    rows: list[PromptRow]
    tokens: Batch
    columns: Tensor
    """Column of each row's edited token."""
    prefix: Tensor
    """Index of the shared prefix that each row continues; the last one is empty."""
    states: Tensor | None = None
    """Input of the next block ``[rows, length, d]``; None before the first block."""


class LayerSweep:
    """The edited tokens of some problems, with the input states of the current layer's block."""

    def __init__(self, host: Host, problems: Sequence[ValueProblem], first: int) -> None:
        """Start at layer ``first``, with the current weights below."""
        self.host, self.problems, self.runner, self.layer = host, tuple(problems), PrefixRunner(host), 0
        kind = host.device.type if host.device.type in SWEEP_TOKENS else "cpu"
        # rows of similar length together, to avoid padding; results are returned in the given order
        groups = group_by_length([len(p.key_rows[0].ids) for p in problems], MIN_EQUAL_LENGTH_PROBLEMS[kind])
        self.order = torch.tensor([i for group in groups for i in group])
        self.counts = [len(problems[i].key_rows) for i in self.order.tolist()]
        rows = [row for problem in problems for row in problem.key_rows]
        self.reuse = reuse = can_reuse(host, max(len(row.ids) for row in rows), (row.ids for row in rows))
        self.cut = shared_prefix_lengths(rows) if reuse else {row.context: 0 for row in rows}
        self.shared = {row.context: row.ids[: self.cut[row.context]] for row in rows if self.cut[row.context]}
        self._keys: tuple[Site, Tensor, Tensor] | None = None
        self.start: Batch | None = None
        """The shared prefixes; None where nothing is shared."""
        self.start_states: Tensor | None = None
        if self.shared:
            texts = list(self.shared.values())
            self.start, _ = align(host, texts, [len(text) for text in texts], [0] * len(texts))
        self.batches: list[_Batch] = []
        for group in groups:
            members = [problems[i] for i in group]
            per = max(1, SWEEP_TOKENS[kind] // max(sum(len(row.ids) for row in p.key_rows) for p in members))
            for begin in range(0, len(members), per):
                part = members[begin : begin + per]
                self.batches.append(self._batch([row for problem in part for row in problem.key_rows]))
        while self.layer < first:
            self.advance()

    def _batch(self, rows: list[PromptRow]) -> _Batch:
        prefix_length, number = self.cut, {context: i for i, context in enumerate(self.shared)}
        tokens, column = align(
            self.host,
            [row.ids[prefix_length[row.context] :] for row in rows],
            [row.position - prefix_length[row.context] for row in rows],
            [prefix_length[row.context] for row in rows],
            left=self.reuse,  # a model that may ignore the mask is padded on the right only
        )
        columns = [column if self.reuse else row.position for row in rows]
        prefix = [number.get(row.context, len(number)) for row in rows]
        device = self.host.device
        return _Batch(rows, tokens, torch.tensor(columns, device=device), torch.tensor(prefix, device=device))

    def keys(self, site: Site) -> Tensor:
        """Return each problem's key at the current layer, mean over contexts, ``[n, d_in]``.

        A layer's keys do not depend on its own weight, so they are computed once per layer.
        """
        if site.layer != self.layer:
            raise ValueError(f"the sweep is at layer {self.layer}, not at {site.layer}")
        return self._read(site)[0]

    def outputs(self, site: Site) -> Tensor:
        """Return the site's output at each problem's edited token, mean over contexts, ``[n, d_out]``.

        With the weight as it was when the layer's keys were read.
        """
        return self._read(site)[1]

    def _read(self, site: Site) -> tuple[Tensor, Tensor]:
        """Return keys and outputs, from one pass that stops after the site."""
        if self._keys is not None and self._keys[0] == site:
            return self._keys[1:]
        keys, outputs = [], []
        module = self.host.model.get_submodule(site.name)
        with hooks.frozen(self.host.model), torch.no_grad():
            start = self._before(site.layer)
            for batch in self.batches:
                captured: list[Tensor] = []
                with (
                    hooks.on_input(module, _column(captured, batch.columns)),
                    hooks.on_output(module, _column(captured, batch.columns)),
                ):
                    self._run(batch, start, stop=module)
                weights = captured[0].new_tensor([row.key_weight for row in batch.rows])
                keys.append((captured[0] * weights[:, None]).cpu())
                outputs.append((captured[1] * weights[:, None]).cpu())
        self._keys = (site, self._mean(torch.cat(keys)), self._mean(torch.cat(outputs)))
        return self._keys[1:]

    def _mean(self, rows: Tensor) -> Tensor:
        """Sum weighted rows by problem, in the given order."""
        of = torch.repeat_interleave(torch.arange(len(self.counts)), torch.tensor(self.counts))
        return self._in_given_order(rows.new_zeros(len(self.counts), rows.shape[1]).index_add(0, of, rows))

    def values(self, top: int, module: torch.nn.Module) -> Tensor:
        """Return the output of a module in block ``top`` at each bare prompt's edited token ``[n, d]``."""
        outputs = []
        with hooks.frozen(self.host.model), torch.no_grad():
            start = self._before(top, only=0) if 0 in self.shared else None
            for batch in self.batches:
                bare = [i for i, row in enumerate(batch.rows) if row.context == 0]
                part = _part(batch, bare)
                captured: list[Tensor] = []
                with hooks.on_output(module, _column(captured, part.columns)):
                    self._run(part, start, stop=self.runner.blocks[top])
                outputs.append(captured[0].cpu())
        return self._in_given_order(torch.cat(outputs))

    def _in_given_order(self, rows: Tensor) -> Tensor:
        """Return rows in the given order of the problems."""
        return torch.empty_like(rows).index_copy(0, self.order, rows)

    def block_outputs(self, top: int) -> Tensor:
        """Return the residual stream above block ``top`` at each bare prompt's edited token ``[n, d]``."""
        return self.values(top, self.runner.blocks[top])

    def advance(self) -> None:
        """Run the current layer with its current weights and move to the next one."""
        layer = self.layer
        block = self.runner.blocks[layer]
        with hooks.frozen(self.host.model), torch.no_grad():
            start = self._before(layer, advance=True)
            for batch in self.batches:
                batch.states = self._run(batch, start, stop=block, keep=layer).states[layer]
        self.layer += 1

    def _before(self, top: int, *, advance: bool = False, only: int | None = None) -> Prefix | None:
        """Run the shared prefixes up to block ``top``; return them, an empty one appended.

        ``only``: the only context whose prefix is needed; the others then have no prefix.
        """
        if self.start is None:
            return None
        tokens, states = self.start, self.start_states
        number = {context: i for i, context in enumerate(self.shared)}
        rows = torch.arange(len(number) + 1, device=tokens.ids.device)
        if only is not None:
            row = rows[number[only]][None]
            begin = int(tokens.offset[row].min())
            tokens = tokens.select(row).columns(begin)
            states = None if states is None else states[row][:, begin:]
            rows = torch.where(rows == number[only], 0, 1)
        ran = self.runner.run(
            tokens,
            no_prefix(self.host, len(tokens.ids)).at_depth(self.layer, states),
            keep=[top] if advance else (),
            remember=range(self.layer, top + 1),
            stop=self.runner.blocks[top],
        )
        if advance:
            self.start_states = ran.states[top]
        return Prefix(tokens.mask, FixedCache(ran.key_values)).with_empty(rows)

    def _run(
        self, batch: _Batch, start: Prefix | None, *, stop: torch.nn.Module, keep: int | None = None
    ) -> Output:
        """Run rows from the current layer on, after their prefixes."""
        prefix = no_prefix(self.host, len(batch.rows)) if start is None else start.select(batch.prefix)
        layers = () if keep is None else (keep,)
        return self.runner.run(
            batch.tokens, prefix.at_depth(self.layer, batch.states), keep=layers, stop=stop
        )


def _part(batch: _Batch, rows: Sequence[int]) -> _Batch:
    """Return some rows of a batch."""
    index = torch.tensor(rows, device=batch.prefix.device)
    states = None if batch.states is None else batch.states[index]
    some = [batch.rows[i] for i in rows]
    return _Batch(some, batch.tokens.select(index), batch.columns[index], batch.prefix[index], states)


def _column(into: list[Tensor], columns: Tensor) -> Callable[[Tensor], None]:
    line = torch.arange(len(columns), device=columns.device)

    def keep(tensor: Tensor) -> None:
        flat = tensor.detach().reshape(len(columns), -1, tensor.shape[-1])
        into.append(wide(flat[line.to(flat.device), columns.to(flat.device)]))

    return keep
