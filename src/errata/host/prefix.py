"""The prefix engine: run rows of which a part has been computed before.

That part may be their first tokens, kept as attention's keys and values (a prefix in time), their lowest blocks,
kept as hidden states (a prefix in depth), or both; :class:`Prefix` is the record of it and :class:`PrefixRunner`
runs the rest. The model's own forward does the work, so nothing here knows a family.

Work is shared in this way by generation and scoring (:mod:`errata.host.decoding`), by searches for values and by
attribution (the blocks above an edited layer, on the tokens from the edited one on), and by fine-tuning
(:class:`ComputedRows`: everything below the lowest change). When it may be:

* depth: for rows of one causal stack, always;
* time: where the model keeps nothing but attention's keys and values of the tokens it has read
  (:func:`keeps_attention_only`), and a trial of the engine gives the same numbers in one piece and in two
  (:func:`can_grow` for caches that rows are continued with, :func:`can_reuse` for those of searches);
* for rows that differ behind one prefix: while everything in place depends on the text alone
  (:attr:`errata.host.base.ModelHost.shareable`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from errata.errors import HostError
from errata.host import hooks, locking, passes, placed, tokens
from errata.host.kv_cache import FixedCache, FixedLayer, GrowingCache, KeyValues, append_zeros, as_cache
from errata.host.memory import in_batches
from errata.host.passes import Pass
from errata.host.text import TextHost
from errata.host.tokens import Batch, Side

SHAREABLE_LAYERS = frozenset({"full_attention", "sliding_attention"})
TRIAL_ERRORS = (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError)
"""What a model raises in a trial that keeps something else than keys and values, or takes no padding."""
ROWS = 64
"""Rows run at once by default; fewer when memory runs out."""


# --- the record -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Prefix:
    """What has been computed of some rows: their first tokens, their lowest blocks, or both."""

    mask: Tensor
    """Of the first tokens, int64 ``[entries, length]``, 1 for tokens; of length 0 where rows begin their texts."""
    cache: GrowingCache | FixedCache | None = None
    """Attention's keys and values of those tokens; None: nothing is kept of them."""
    row: Tensor | None = None
    """int64 ``[rows]``: which entry each row continues, so that several may share one; None: each its own."""
    depth: int = 0
    """How many of the lowest blocks are computed for the rows' own tokens."""
    states: Tensor | None = None
    """Output of the highest of those blocks ``[rows, columns, d]``; None for no blocks."""
    routes: Mapping[str, Tensor] = field(default_factory=dict)
    """What routers have decided about the rows, ``[rows, ...]`` by edit."""

    @property
    def length(self) -> int:
        """Columns of the first tokens, padding included."""
        return self.mask.shape[1]

    def masks(self) -> Tensor:
        """Return the mask of each row ``[rows, length]``."""
        return self.mask if self.row is None else self.mask[self.row]

    def select(self, rows: Tensor) -> Prefix:
        """Return what has been computed of some rows ``[n]``, which may repeat; a copy that may grow."""
        states = None if self.states is None else self.states[rows.to(self.states.device)]
        routes = select_routes(self.routes, rows)
        if self.row is not None:
            return replace(self, row=self.row[rows.to(self.row.device)], states=states, routes=routes)
        # copied once here rather than at every step
        cache = None if self.cache is None else self.cache.select(rows)
        mask = self.mask[rows.to(self.mask.device)]
        return Prefix(mask, cache, None, self.depth, states, routes)

    def copy(self) -> Prefix:
        """Return the same with a cache that may grow."""
        return replace(self, cache=self.cache.select(None)) if isinstance(self.cache, GrowingCache) else self

    def share(self, rows: Tensor) -> Prefix:
        """Return the first tokens as what other rows continue, ``rows`` ``[n]`` naming the entry of each."""
        return Prefix(self.mask, self.cache, rows)

    def with_empty(self, row: Tensor) -> Prefix:
        """Return the first tokens with an empty entry appended for rows that share nothing; ``row`` ``[rows]``."""
        assert isinstance(self.cache, FixedCache)
        return Prefix(append_zeros(self.mask), self.cache.with_empty(), row)

    def at_depth(self, depth: int, states: Tensor | None) -> Prefix:
        """Return the same first tokens with ``states`` ``[rows, length, d]`` of the lowest blocks for the others."""
        return replace(self, depth=depth, states=states if depth else None)

    def followed_by(self, key_values: Mapping[int, KeyValues], batch: Batch, columns: int) -> Prefix:
        """Return the first tokens of each row with the first ``columns`` columns of its own tokens behind them."""
        assert isinstance(self.cache, FixedCache)
        cache = self.cache.followed_by(key_values, columns, self.row, self.length)
        return Prefix(torch.cat([self.masks(), batch.mask[:, :columns]], 1), cache)


def can_join(first: Prefix, second: Prefix) -> bool:
    """Whether :func:`join` takes two prefixes: both without a cache, or with a column of it for every token."""
    caches = first.cache, second.cache
    if caches == (None, None):
        return True
    return all(isinstance(one, GrowingCache) and one.joinable for one in caches)


def join(first: Prefix, second: Prefix) -> Prefix:
    """Return the rows of both as rows of one length, padded on the left: those of the second join those of the first.

    Columns that are padding in every row are left out. Decisions that were taken about one part alone are none for
    the other.
    """
    length = max(first.length, second.length)
    mask = torch.cat([functional.pad(one.mask, (length - one.length, 0)) for one in (first, second)])
    counts = len(first.mask), len(second.mask)
    routes = {
        name: _joined(name, (first.routes.get(name), second.routes.get(name)), counts, length)
        for name in {**first.routes, **second.routes}
        if first.cache is not None or name == passes.SETS  # rows that are run whole are decided about anew
    }
    if first.cache is None:
        return Prefix(mask, routes=routes)
    assert isinstance(first.cache, GrowingCache) and isinstance(second.cache, GrowingCache)
    cache, empty = first.cache.join(second.cache), int(mask.any(0).int().argmax())
    if empty:
        cache, mask = cache.without_first(empty), mask[:, empty:]
        routes = {name: rows[:, empty:] if _by_column(name) else rows for name, rows in routes.items()}
    return Prefix(mask, cache, routes=routes)


def _by_column(name: str) -> bool:
    """Whether a route holds something of every earlier token, see :attr:`errata.host.passes.Routing.decided`."""
    return " " in name


def _joined(name: str, parts: Sequence[Tensor | None], counts: Sequence[int], length: int) -> Tensor:
    """Return a decision about the rows of several parts, ``[rows, ...]``; of a part that has none, that of no entry.

    ``length``: of the rows, to which what is kept of their tokens is padded on the left.
    """
    known = [part for part in parts if part is not None]
    like = known[0]
    nothing = 0 if name == passes.SETS or not like.dtype.is_signed or like.is_floating_point() else -1
    if like.ndim == 1 and all(part.ndim == 1 for part in known):
        empty = [like.new_full((count,), nothing) for count in counts]
    else:
        known = [part[:, None] if part.ndim == 1 else part for part in known]
        width = length if _by_column(name) else max(part.shape[1] for part in known)
        empty = [like.new_full((count, width, *known[0].shape[2:]), nothing) for count in counts]
    for into, part in zip(empty, parts, strict=True):
        if part is not None:
            part = part[:, None] if part.ndim < into.ndim else part
            if into.ndim == 1:
                into.copy_(part)
            elif _by_column(name):
                into[:, into.shape[1] - part.shape[1] :] = part
            else:
                into[:, : part.shape[1]] = part
    return torch.cat(empty)


def select_routes(routes: Mapping[str, Tensor], rows: Tensor) -> Mapping[str, Tensor]:
    """Return what was decided about some rows ``[n]``."""
    return {digest: entry[rows.to(entry.device)] for digest, entry in routes.items()}


def no_prefix(host: TextHost, rows: int) -> Prefix:
    """Return the prefix of rows that begin their texts; they share one empty entry."""
    row = torch.zeros(rows, dtype=torch.long, device=host.device)
    return Prefix(torch.zeros(1, 0, dtype=torch.long, device=host.device), FixedCache({}), row)


# --- running the rest -----------------------------------------------------------------------


@dataclass(eq=False)
class Output:
    """What a run gave."""

    logits: Tensor | None = None
    """At the places ``at`` ``[n, vocab]``, else ``[rows, length, vocab]``; None when it was stopped before them."""
    states: dict[int, Tensor] = field(default_factory=dict)
    """Outputs of the blocks ``keep`` ``[rows, length, d]``, detached."""
    key_values: dict[int, KeyValues] = field(default_factory=dict)
    """Attention's keys and values of the blocks ``remember``, zero at padding on the left, detached."""
    prefix: Prefix | None = None
    """The rows with the tokens that were run, to be continued, where a cache was to grow."""
    routes: dict[str, Tensor] = field(default_factory=dict)
    """What routers had decided about the rows by the blocks ``keep``, ``[rows, ...]`` by edit."""


class PrefixRunner:
    """Runs what is left to compute of rows on a host."""

    def __init__(self, host: TextHost) -> None:
        self.host = host
        self._blocks: list[Any] | None = None
        self._form: Any = None
        """What a block returns, be it a tensor or a tuple led by one, with no rows; read off a run with ``keep``."""

    @property
    def blocks(self) -> list[Any]:
        """The host's blocks; cached, since a layout is checked anew at each access."""
        if self._blocks is None:
            self._blocks = [self.host.model.get_submodule(name) for name in self.host.layout.blocks]
        return self._blocks

    def run(
        self, batch: Batch, prefix: Prefix, *, at: tuple[Tensor, Tensor] | None = None,
        ends: Tensor | None = None, keep: Iterable[int] = (), remember: Iterable[int] = (), stop: Any = None,
    ) -> Output:  # fmt: skip
        """Run rows behind a prefix with a fixed cache; blocks below its depth return its states.

        ``at``: rows and columns ``[n]`` to return logits ``[n, vocab]`` of. ``ends`` ``[rows]``: column of each row's
        last prompt token, counted with the prefix. ``keep``: blocks whose outputs to return; ``remember``: blocks
        whose attention's keys and values to return. ``stop``: module after which to end the pass.
        """
        output = Output()
        remember = set(remember)
        # a model that keeps more than attention's keys and values takes no cache of ours, nor needs one here
        padded = bool(prefix.length or remember) or bool(batch.offset.max() > 0)
        layers = self._layers(batch, prefix) if padded and prefix.cache is not None else None
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._lowest(prefix))
            for block in keep:
                stack.enter_context(hooks.on_answer(self.blocks[block], self._keeper(output, block)))
            if stop is not None:
                stack.enter_context(hooks.stop_after(stop))
            with contextlib.suppress(hooks.Stopped):
                output.logits = self.host.run(self._pass(batch, prefix, layers, at, ends)).logits
        for block in remember:
            new = None if layers is None else layers[block].new
            if new is not None:
                output.key_values[block] = (new[0].detach(), new[1].detach())
        return output

    def _layers(self, batch: Batch, prefix: Prefix) -> list[Any]:
        assert isinstance(prefix.cache, FixedCache)
        padding = batch.mask[:, None, :, None] == 0 if bool(batch.offset.max() > 0) else None
        entries = prefix.cache.blocks
        return [
            FixedLayer(entries.get(i), prefix.row, prefix.length, padding) for i in range(len(self.blocks))
        ]

    def _pass(
        self, batch: Batch, prefix: Prefix, layers: list[Any] | None, at: tuple[Tensor, Tensor] | None,
        ends: Tensor | None,
    ) -> Pass:  # fmt: skip
        if type(batch) is not Batch:  # rows that only the host knows how to run: two stacks, places to fill
            return self.host.as_pass(batch, at=at, ends=ends, routes=prefix.routes)
        mask = torch.cat([prefix.masks(), batch.mask], 1) if prefix.length else batch.mask
        cache = None if layers is None else as_cache(layers)
        return Pass(batch.ids, mask, batch.positions, prefix=cache, at=at, ends=ends, routes=prefix.routes)

    def grow(
        self, batch: Batch, prefix: Prefix | None = None, *, at: tuple[Tensor, Tensor] | None = None,
        ends: Tensor | None = None, routes: Mapping[str, Tensor] | None = None,
    ) -> Output:  # fmt: skip
        """Run rows behind a prefix with the model's own cache, None for rows that begin their texts.

        The prefix is used up, for its cache grows: hand in a selection or a copy. The output has one that holds these
        tokens too. ``at`` ``[n]`` and ``ends`` ``[rows]`` as for :meth:`run`; ``routes``: decisions about rows without
        a prefix.
        """
        mask, cache = batch.mask, None
        if prefix is not None:
            assert isinstance(prefix.cache, GrowingCache)
            mask, routes = torch.cat([prefix.masks(), batch.mask], 1), prefix.routes
            cache = prefix.cache.cache
        ran = self.host.run(
            Pass(
                batch.ids, mask, batch.positions, prefix=cache, use_cache=True, at=at, ends=ends,
                routes=routes or {},
            )
        )  # fmt: skip
        return Output(ran.logits, prefix=Prefix(mask, GrowingCache(ran.prefix), routes=ran.routes))

    def head(self, states: Tensor) -> Tensor:
        """Return the logits of states ``[n, d]`` of the last block, float32 at least ``[n, vocab]``; gradients pass.

        The model's own forward does it. Needs an earlier run that kept states.
        """
        rows = len(states)
        batch = tokens.lay_out([[0]] * rows, [0] * rows, fill=self.host.pad_id, device=self.host.device)
        logits = self.run(batch, plain_prefix().at_depth(len(self.blocks), states[:, None])).logits
        assert logits is not None
        return logits[:, 0].to(torch.promote_types(logits.dtype, torch.float32))

    @contextlib.contextmanager
    def _lowest(self, prefix: Prefix) -> Iterator[None]:
        """Have the blocks below the prefix's depth return its states inside the block."""
        fixed: dict[Any, Any] = {}
        if prefix.depth:
            if prefix.states is None or self._form is None:
                raise ValueError("states of the lowest blocks come from an earlier run that kept them")
            if placed.on(self.host.model).reads_blocks:
                raise HostError(
                    "an edit is in place that reads the states of lower blocks, and these are not run again here: take "
                    "it off first"
                )
            fixed = dict.fromkeys(self.blocks[: prefix.depth], hooks.with_first(self._form, prefix.states))
        with hooks.answer_with(fixed):
            yield

    def _keeper(self, into: Output, block: int) -> Callable[[Any], None]:
        def keep(output: Any) -> None:
            hidden = hooks.first_tensor(output).detach()
            into.states[block] = hidden.clone()  # some families go on adding to it in place
            current = passes.routing()
            into.routes |= {} if current is None else current.decided
            if self._form is None:
                self._form = hooks.with_first(output, hidden[:0])

        return keep


def plain_prefix() -> Prefix:
    """Return the prefix of rows that are run as in any plain pass: nothing before them, and no cache."""
    return Prefix(torch.zeros(0, 0, dtype=torch.long))


class ComputedRows:
    """Rows of tokens whose lowest blocks are run once and for all."""

    def __init__(
        self, host: TextHost, rows: Sequence[Sequence[int]], depth: int, *, side: Side = "right",
        ends: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        """Run the lowest ``depth`` blocks on all rows; wants a frozen model.

        ``ends``: each row's last prompt token, at which routers decide; None: its last token.
        """
        # an edit that reads the states of lower blocks needs them in every pass
        depth = 0 if placed.on(host.model).reads_blocks else depth
        self.host, self.rows, self.depth, self.ends = host, rows, depth, ends
        self.side: Side = side
        self.runner = PrefixRunner(host)
        self.states: list[Tensor] = []
        """Output of the highest of those blocks, per row ``[tokens, d]``."""
        self.routes: dict[str, Tensor] = {}
        """What routers decided in those blocks, ``[rows, ...]`` by edit."""
        if depth:
            self.states = in_batches(range(len(rows)), ROWS, self._run)

    def _batch(self, index: Sequence[int]) -> Batch:
        return self.host.batch([self.rows[i] for i in index], side=self.side)

    def _run(self, index: Sequence[int]) -> list[Tensor]:
        batch, top = self._batch(index), self.depth - 1
        ends = None if self.ends is None else torch.tensor([self.ends[i] for i in index]) + batch.offset.cpu()
        with torch.no_grad():
            output = self.runner.run(
                batch, plain_prefix(), ends=ends, keep=[top], stop=self.runner.blocks[top]
            )
        for digest, entry in output.routes.items():
            empty = torch.empty(len(self.rows), *entry.shape[1:], dtype=entry.dtype)
            whole = self.routes.setdefault(digest, empty)
            whole[torch.tensor(index)] = entry.cpu()
        return split_rows(output.states[top], [len(self.rows[i]) for i in index], batch)

    def select(self, index: Sequence[int]) -> tuple[Batch, Prefix]:
        """Return some rows as a batch, and what has been computed of them."""
        batch = self._batch(index)
        if not self.depth:
            return batch, plain_prefix()
        first = self.states[index[0]]
        # built anew for each pass: some families go on adding to it in place
        whole = first.new_zeros(*batch.ids.shape, first.shape[-1])
        for i, (row, start) in enumerate(zip(index, batch.offset.tolist(), strict=True)):
            whole[i, start : start + len(self.rows[row])] = self.states[row]
        prefix = plain_prefix().at_depth(self.depth, whole)
        return batch, replace(prefix, routes=select_routes(self.routes, torch.tensor(index)))


def split_rows(states: Tensor, lengths: Sequence[int], batch: Batch) -> list[Tensor]:
    """Cut a batch's states ``[rows, length, d]`` into those of each row's own tokens ``[tokens, d]``."""
    starts = batch.offset.tolist()
    return [
        states[i, start : start + length].clone()
        for i, (start, length) in enumerate(zip(starts, lengths, strict=True))
    ]


def align(
    host: TextHost, rows: Sequence[Sequence[int]], columns: Sequence[int], offsets: Sequence[int], *,
    left: bool = True,
) -> tuple[Batch, int]:  # fmt: skip
    """Lay rows out as a batch with one column of each in the same place; return the batch and that place.

    ``offsets``: how many tokens each row continues. With ``left`` off no padding goes before a row's first token, so
    columns keep their own places, and the furthest is returned. Raises RequestError for a row that is longer than
    the model's window with what it continues.
    """
    host.check_window(max((len(row) + n for row, n in zip(rows, offsets, strict=True)), default=0))
    column = max(columns, default=0)
    starts = [column - own if left else 0 for own in columns]
    return tokens.lay_out(rows, starts, offsets=offsets, fill=host.pad_id, device=host.device), column


# --- when work may be shared ----------------------------------------------------------------


def keeps_attention_only(host: TextHost) -> bool:
    """Whether a model takes a cache and by its configuration keeps attention's keys and values alone."""
    kinds = set(getattr(host.text_config, "layer_types", None) or ())
    stateful = bool(getattr(host.model, "_is_stateful", False))
    return "past_key_values" in host.accepts and not stateful and kinds <= SHAREABLE_LAYERS


def agree(whole: Tensor, cut: Tensor, dtype: torch.dtype) -> bool:
    """Whether a text in one piece and in two ended alike, up to the rounding of a model's ``dtype``.

    The bound is relative to the largest entry of ``whole``; both are ``[...]`` of one shape.
    """
    bound = 5e-2 if dtype in (torch.float16, torch.bfloat16) else 1e-3
    return bool((whole - cut).abs().max() <= bound * whole.abs().max())


def can_grow(host: TextHost) -> bool:
    """Whether rows may be continued with the model's own cache; tried out anew, see :attr:`Host.continues`."""
    return _passes_trial(host, _try_growing)


def can_reuse(host: TextHost, longest: int, rows: Iterable[Sequence[int]] = ()) -> bool:
    """Whether ``rows`` of at most ``longest`` tokens may be continued with a fixed cache; tried out once per host.

    Not where a window of attention is shorter than they are, nor where they show pictures.
    """
    if host.codec.show_pictures(rows):
        return False
    window = getattr(host.text_config, "sliding_window", None)
    if isinstance(window, int) and 0 < window <= longest:
        return False
    trials = vars(host).setdefault("_prefix_trials", {})
    if "fixed" not in trials:
        trials["fixed"] = _passes_trial(host, _try_fixed)
    return trials["fixed"]


@torch.no_grad()
def _passes_trial(host: TextHost, trial: Callable[[TextHost], bool]) -> bool:
    """Run a trial, whatever is in place on the model; False where the model takes no such cache."""
    if not keeps_attention_only(host):
        return False
    with locking.of(host.model).shared, passes.without_interventions():
        try:
            return trial(host)
        except TRIAL_ERRORS:
            return False


def _trial_rows(host: TextHost, *lengths: int) -> list[tuple[int, ...]]:
    return [tuple((7 * i + 3 + k) % host.vocab_size for i in range(n)) for k, n in enumerate(lengths)]


def _try_growing(host: TextHost) -> bool:
    """Whether two rows end in the same logits in one piece and in two, padded on the left in the first."""
    rows = _trial_rows(host, 5, 7)
    line, column = torch.tensor([0, 0, 1, 1]), torch.tensor([3, 4, 5, 6])
    whole = host.forward_at(host.batch(rows), line, column)
    runner = PrefixRunner(host)
    prefix = runner.grow(host.batch([row[:-2] for row in rows], side="left")).prefix
    assert prefix is not None and isinstance(prefix.cache, GrowingCache)
    if not prefix.cache.selectable:
        return False
    batch, _ = align(host, [row[-2:] for row in rows], [0, 0], [len(row) - 2 for row in rows], left=False)
    cut = runner.grow(batch, prefix.copy(), at=(line, torch.tensor([0, 1, 0, 1]))).logits
    return cut is not None and agree(whole, cut, host.dtype)


def _try_fixed(host: TextHost) -> bool:
    """Whether two rows end in the same states in one piece and in two, and one of them also without any cache."""
    runner, rows = PrefixRunner(host), _trial_rows(host, 4, 5)
    top = len(runner.blocks) - 1
    last = runner.blocks[top]
    with hooks.frozen(host.model):
        batch, column = align(host, rows, [2, 3], [0, 0])
        whole = runner.run(batch, no_prefix(host, 2), keep=[top], remember=range(top + 1), stop=last)
        prefix = no_prefix(host, 2).followed_by(whole.key_values, batch, column)
        cut = runner.run(batch.columns(column), prefix, keep=[top], stop=last)
        plain = runner.run(host.batch(rows[:1]), plain_prefix(), keep=[top], stop=last)
    row = whole.states[top][0, column - 2 : column + 2]
    pairs = [(plain.states[top][0], row), (plain.states[top][0, 2:], cut.states[top][0, :2])]
    pairs.append((whole.states[top][1, column:], cut.states[top][1]))
    return all(agree(one, other, host.dtype) for one, other in pairs)
