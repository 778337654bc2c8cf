"""Run parts of a model: only some blocks, only some tokens, behind tokens that have been run before.

What a search for values repeats is small: the blocks above an edited layer, on the tokens from the
subject's last one on. Blocks below answer with states kept from an earlier pass; tokens before stand
as attention keys and values in a cache. The model's own forward does the work, so nothing here knows a
family.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from errata.errors import RequestError
from errata.host import hooks, passes
from errata.host.load import Host
from errata.host.passes import Pass
from errata.host.prefixes import TRIAL_ERRORS, agree, keeps_attention_only

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Tokens:
    """Rows of ids whose chosen places stand in one column; padding on both sides of a row."""

    ids: Tensor
    """int64 ``[rows, length]``."""
    mask: Tensor
    """int64 ``[rows, length]``, 1 for tokens."""
    positions: Tensor
    """int64 ``[rows, length]``, each token's index in its whole text."""
    start: Tensor
    """int64 ``[rows]``: column of each row's first token."""

    def rows(self, chosen: Tensor) -> Tokens:
        """Return some rows."""
        return Tokens(self.ids[chosen], self.mask[chosen], self.positions[chosen], self.start[chosen])

    def columns(self, first: int) -> Tokens:
        """Return the columns from one on."""
        cut = (self.ids[:, first:], self.mask[:, first:], self.positions[:, first:])
        return Tokens(*cut, (self.start - first).clamp_min(0))


def align(
    host: Host,
    rows: Sequence[Sequence[int]],
    places: Sequence[int],
    offsets: Sequence[int],
    *,
    left: bool = True,
) -> tuple[Tokens, int]:
    """Lay rows out with their places in one column; return them and that column.

    ``offsets`` says how many tokens stand before each row elsewhere. With ``left`` off nothing stands
    before a row's first token, places keep their own columns and the column returned is the furthest.
    Raises RequestError for a row that is longer than the model's window.
    """
    longest = max((len(row) + offset for row, offset in zip(rows, offsets, strict=True)), default=0)
    if host.window is not None and longest > host.window:
        raise RequestError(f"a text of {longest} tokens is longer than the model's window of {host.window}")
    column = max(places, default=0)
    length = column + max((len(row) - at for row, at in zip(rows, places, strict=True)), default=0)
    ids = torch.full((len(rows), length), host.pad_id, dtype=torch.long)
    mask, positions = torch.zeros_like(ids), torch.zeros_like(ids)
    start = torch.tensor([column - at if left else 0 for at in places], dtype=torch.long)
    for i, (row, offset) in enumerate(zip(rows, offsets, strict=True)):
        first = int(start[i])
        here = slice(first, first + len(row))
        ids[i, here] = torch.tensor(list(row), dtype=torch.long)
        mask[i, here] = 1
        positions[i, here] = torch.arange(offset, offset + len(row))
        positions[i, first + len(row) :] = offset + len(row) - 1  # padding stays inside the window
    device = host.device
    return Tokens(ids.to(device), mask.to(device), positions.to(device), start.to(device)), column


@dataclass(frozen=True)
class Past:
    """Attention keys and values of tokens before a batch; several rows may stand behind one."""

    states: Mapping[int, Pair]
    """Per block, keys and values ``[u, heads, length, head]``."""
    mask: Tensor
    """int64 ``[u, length]``."""
    row: Tensor | None
    """int64 ``[rows]``: which of the u each row of the batch stands behind; None: each behind its own."""

    @property
    def length(self) -> int:
        """Columns, padding included."""
        return self.mask.shape[1]

    def of(self, row: Tensor) -> Past:
        """Return the same past for other rows."""
        if self.row is not None:
            return replace(self, row=self.row[row])
        # copied once here rather than at every step
        states = {b: (k[row.to(k.device)], v[row.to(v.device)]) for b, (k, v) in self.states.items()}
        return Past(states, self.mask[row], None)

    def masks(self) -> Tensor:
        """Return the mask of each row of the batch ``[rows, length]``."""
        return self.mask if self.row is None else self.mask[self.row]

    def followed_by(self, states: Mapping[int, Pair], tokens: Tokens, columns: int) -> Past:
        """Return the past of each row with the first ``columns`` columns of its own tokens behind it."""
        joined: dict[int, Pair] = {}
        for block, (keys, values) in states.items():
            old = self.states.get(block) if self.length else None
            new = keys[:, :, :columns], values[:, :, :columns]
            if old is not None:
                mine = [part if self.row is None else part[self.row.to(part.device)] for part in old]
                new = torch.cat([mine[0], new[0]], 2), torch.cat([mine[1], new[1]], 2)
            joined[block] = new
        mask = torch.cat([self.masks(), tokens.mask[:, :columns]], 1)
        return Past(joined, mask, None)


def nothing_before(host: Host, rows: int) -> Past:
    """Return the past of rows that begin their texts."""
    row = torch.zeros(rows, dtype=torch.long, device=host.device)
    return Past({}, torch.zeros(1, 0, dtype=torch.long, device=host.device), row)


class _Layer(DynamicLayer):
    """One block's cache: puts the past before what comes in and remembers the latter."""

    def __init__(self, past: Pair | None, row: Tensor | None, length: int, pad: Tensor | None) -> None:
        super().__init__()
        self.past, self.row, self.length, self.pad = past, row, length, pad
        self.seen: Pair | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Pair:
        if self.pad is not None:
            # a query with nothing to look at may compute anything, NaN too; nobody must see it
            pad = self.pad.to(key_states.device)
            key_states, value_states = key_states.masked_fill(pad, 0), value_states.masked_fill(pad, 0)
        self.seen = (key_states, value_states)
        if not self.length:
            return key_states, value_states
        if self.past is None:
            raise RuntimeError("a block was run whose past was not kept")
        keys, values = self.past
        if self.row is not None:
            keys, values = (part[self.row.to(part.device)] for part in self.past)
        return torch.cat([keys, key_states], -2), torch.cat([values, value_states], -2)

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0


@dataclass
class Ran:
    """What a partial pass gave."""

    logits: Tensor | None = None
    """At the positions asked for ``[n, vocab]``; None when the pass was stopped below the head."""
    states: dict[int, Tensor] = field(default_factory=dict)
    """Outputs of the blocks asked for ``[rows, length, d]``, detached."""
    past: dict[int, Pair] = field(default_factory=dict)
    """Attention keys and values of the blocks asked for, zero at padding on the left, detached."""


class Partial:
    """A host whose blocks can be run one by one."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.blocks = [host.model.get_submodule(name) for name in host.layout.blocks]
        self._shape: Any = None

    def run(
        self,
        tokens: Tokens,
        past: Past,
        *,
        first: int = 0,
        given: Tensor | None = None,
        at: tuple[Tensor, Tensor] | None = None,
        keep: Iterable[int] = (),
        remember: Iterable[int] = (),
        stop: Any = None,
    ) -> Ran:
        """Run the blocks from ``first`` on; those below answer with ``given`` ``[rows, length, d]``.

        ``at``: (row, column) where logits are wanted. ``keep``: blocks whose outputs to return;
        ``remember``: blocks whose attention keys and values to return. ``stop``: module after which
        to end the pass.
        """
        ran = Ran()
        remember = set(remember)
        left = bool(tokens.start.max() > 0)
        pad = tokens.mask[:, None, :, None] == 0 if left else None
        layers = [_Layer(past.states.get(i), past.row, past.length, pad) for i in range(len(self.blocks))]
        with contextlib.ExitStack() as stack:
            if first:
                assert given is not None
                fixed = hooks.with_first(self._answer(), given)
                stack.enter_context(hooks.answer_with(dict.fromkeys(self.blocks[:first], fixed)))
            for block in keep:
                stack.enter_context(hooks.on_output(self.blocks[block], _keeper(ran.states, block)))
            if stop is not None:
                stack.enter_context(hooks.stop_after(stop))
            # a model that keeps more than attention's keys and values takes no cache of ours, nor needs one here
            needed = bool(past.length or remember or left)
            with contextlib.suppress(hooks.Stopped):
                ran.logits = self._forward(tokens, past, layers if needed else None, at)
        for block in remember:
            seen = layers[block].seen
            if seen is not None:
                ran.past[block] = (seen[0].detach(), seen[1].detach())
        return ran

    def _forward(
        self, tokens: Tokens, past: Past, layers: list[_Layer] | None, at: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        mask = torch.cat([past.masks(), tokens.mask], 1)
        prefix = None if layers is None else Cache(layers=list(layers))
        return self.host.run(Pass(tokens.ids, mask, tokens.positions, prefix=prefix, at=at)).logits

    def _answer(self) -> Any:
        """Return what a block's answer looks like: a tensor, or a tuple led by one."""
        if self._shape is None:
            found: list[Any] = []
            ids = torch.arange(3, device=self.host.device)[None] % self.host.vocab_size
            with (
                torch.no_grad(),
                hooks.on_answer(self.blocks[0], found.append),
                hooks.stop_after(self.blocks[0]),
                contextlib.suppress(hooks.Stopped),
            ):
                self.host.run(Pass(ids, torch.ones_like(ids)))
            self._shape = found[0]
        return self._shape


def _keeper(into: dict[int, Tensor], block: int) -> Any:
    def keep(hidden: Tensor) -> None:
        into[block] = hidden.detach().clone()  # some families go on adding to it in place

    return keep


def longer(tensor: Tensor) -> Tensor:
    """Append one row of zeros: the past of rows that share nothing."""
    return torch.cat([tensor, torch.zeros_like(tensor[:1])])


def wide(tensor: Tensor) -> Tensor:
    """Return numbers in float32 at least: what is solved for is never held in 16 bits."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def can_reuse(host: Host, longest: int) -> bool:
    """Whether tokens may stand in a cache: attention only, no window shorter than the text, and it works.

    The last is tried out once per host: a row cut in two must end in the same states as in one piece.
    """
    window = getattr(host.text_config, "sliding_window", None)
    short = isinstance(window, int) and 0 < window <= longest
    if short or not keeps_attention_only(host):
        return False
    known = host.__dict__.setdefault("_reuse", {})
    if "works" not in known:
        try:
            with passes.without_interventions():
                known["works"] = _works(host)
        except TRIAL_ERRORS:
            known["works"] = False
    return known["works"]


@torch.no_grad()
def _works(host: Host) -> bool:
    """Try the cache on two rows of different lengths."""
    partial = Partial(host)
    top = len(partial.blocks) - 1
    count = host.vocab_size
    rows = [[(7 * i + 3 + k) % count for i in range(4 + k)] for k in range(2)]
    with hooks.frozen(host.model):
        tokens, column = align(host, rows, [2, 3], [0, 0])
        whole = partial.run(
            tokens, nothing_before(host, 2), keep=[top], remember=range(top + 1), stop=partial.blocks[top]
        )
        behind = nothing_before(host, 2).followed_by(whole.past, tokens, column)
        part = partial.run(tokens.columns(column), behind, keep=[top], stop=partial.blocks[top])
        seen: list[Tensor] = []  # and the plain forward, without any cache, says the same of one row
        with hooks.on_output(partial.blocks[top], lambda out: seen.append(out.detach().clone())):
            host.forward(host.batch(rows[:1]))
    whole_row, cut_row = whole.states[top][0, column - 2 : column + 2], part.states[top][0, :2]
    pairs = [(seen[0][0], whole_row), (seen[0][0, 2:], cut_row)]
    pairs.append((whole.states[top][1, column:], part.states[top][1]))
    return all(agree(a, b, host.dtype) for a, b in pairs)
