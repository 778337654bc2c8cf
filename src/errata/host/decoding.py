"""Continue rows of tokens: run what they begin with once, then score, generate or sample what follows.

Many texts may continue one prefix at the cost of their own tokens, see :mod:`errata.host.prefix`. Finished rows are
dropped from the batch, which is why this is not transformers' own loop; both give the same text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from errata.host import locking
from errata.host.generation_settings import end_tokens
from errata.host.passes import SETS
from errata.host.prefix import Prefix, PrefixRunner, align, can_join, join
from errata.host.stopping import Stop, is_complete
from errata.host.text import TextHost
from errata.host.tokens import Batch

Ids = tuple[int, ...]
Choose = Callable[[Tensor, Sequence[int]], list[int]]
"""Chooses the next token of some rows: logits ``[n, vocab]`` and the rows' indices, to ids."""


@dataclass(frozen=True, eq=False)
class Prefixes(Sequence[Ids]):
    """Rows of ids that were run once, with all that is needed to continue them; still read as rows."""

    rows: tuple[Ids, ...]
    logits: Tensor
    """After each row, ``[rows, vocab]``."""
    prefix: Prefix
    """The rows as what others continue, padded on the left. Without a cache for a host whose texts cannot be cut
    (:attr:`Host.continues`): what continues a row is run with it."""

    @overload
    def __getitem__(self, index: int) -> Ids: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Ids, ...]: ...
    def __getitem__(self, index: int | slice) -> Ids | tuple[Ids, ...]:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)


@torch.no_grad()
@locking.shared
def run_prefixes(host: TextHost, rows: Sequence[Ids], sets: Tensor | None = None) -> Prefixes:
    """Run rows together; ``sets``: number of each row's edit set, int64 ``[rows]``.

    Raises RequestError for a row longer than the model's window.
    """
    routes = {} if sets is None else {SETS: sets}
    line = torch.arange(len(rows))
    if not host.continues_rows(rows):
        last = torch.tensor([len(row) - 1 for row in rows])
        ran = host.run(host.as_pass(host.batch(rows), at=(line, last), routes=routes))
        return Prefixes(tuple(rows), ran.logits, Prefix(line.new_zeros(len(rows), 0), routes=ran.routes))
    batch = host.batch(rows, side="left")
    last = torch.full_like(line, batch.ids.shape[1] - 1)
    output = PrefixRunner(host).grow(batch, at=(line, last), routes=routes)
    assert output.logits is not None and output.prefix is not None
    return Prefixes(tuple(rows), output.logits, output.prefix)


@torch.no_grad()
@locking.shared
def logits_after(
    host: TextHost, prefixes: Prefixes, rows: Sequence[tuple[int, Ids]], at: tuple[Tensor, Tensor]
) -> Tensor:
    """Run rows that continue some prefixes: (which one, the tokens that follow).

    Returns logits ``[n, vocab]`` after the tokens (at[0][i], at[1][i]), counted in the given rows. Raises
    RequestError where the whole is longer than the model's window.
    """
    offsets = [len(prefixes.rows[i]) for i, _ in rows]
    batch, _ = align(host, [row for _, row in rows], [0] * len(rows), offsets, left=False)
    prefix = prefixes.prefix.select(torch.tensor([i for i, _ in rows]))
    ends = torch.full((len(rows),), prefix.length - 1)  # prefixes are padded on the left
    logits = PrefixRunner(host).grow(batch, prefix, at=at, ends=ends).logits
    assert logits is not None
    return logits


def greedy(host: TextHost, prefixes: Prefixes, limits: Sequence[int], stop: Stop) -> list[list[int]]:
    """Append the most probable token to each row until its answer ends; ids without the row's own.

    ``limits``: how many tokens each row may take.
    """
    return _generate(host, prefixes, limits, stop, lambda logits, rows: logits.argmax(-1).tolist())


def sample(
    host: TextHost, prefixes: Prefixes, limits: Sequence[int], *, top_k: int, seed: int
) -> list[list[int]]:
    """Draw each next token among the ``top_k`` most probable ones, up to the end token.

    Each row has a random state of its own, from the seed and its tokens, so neither its neighbours nor the
    global state matter.
    """
    states = [torch.Generator().manual_seed(_seed(seed, row)) for row in prefixes.rows]

    def choose(logits: Tensor, rows: Sequence[int]) -> list[int]:
        best, ids = logits.float().topk(min(top_k, logits.shape[-1]))
        bounds = best.double().softmax(-1).cumsum(-1).cpu()
        thrown = torch.stack([torch.rand((), generator=states[i], dtype=torch.float64) for i in rows])
        place = torch.searchsorted(bounds, thrown[:, None]).clamp_max(bounds.shape[-1] - 1)
        return ids.cpu().gather(1, place)[:, 0].tolist()

    return _generate(host, prefixes, limits, "end", choose)


def _seed(seed: int, row: Ids) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {row}".encode()).digest()[:6], "big")


@torch.no_grad()
@locking.shared
def _generate(
    host: TextHost, prefixes: Prefixes, limits: Sequence[int], stop: Stop, choose: Choose
) -> list[list[int]]:
    ends = end_tokens(host)
    new: list[list[int]] = [[] for _ in prefixes.rows]
    alive = [i for i, limit in enumerate(limits) if limit > 0]
    decoding = DecodingRows(host, prefixes, alive)
    logits = prefixes.logits[torch.tensor(alive, dtype=torch.long).to(prefixes.logits.device)]
    while alive:
        next_tokens = choose(logits, alive)
        for i, token in zip(alive, next_tokens, strict=True):
            new[i].append(token)
        texts = host.tokenizer.batch_decode([new[i] for i in alive], skip_special_tokens=True)
        going = [
            k
            for k, (i, text) in enumerate(zip(alive, texts, strict=True))
            if next_tokens[k] not in ends and len(new[i]) < limits[i] and not is_complete(text, stop)
        ]
        alive = [alive[k] for k in going]
        if alive:
            logits = decoding.step(going, [next_tokens[k] for k in going])
    return new


class DecodingRows:
    """Rows that are being continued, with what has been computed of them; others may join them between two tokens."""

    def __init__(self, host: TextHost, prefixes: Prefixes, rows: Sequence[int]) -> None:
        """Take some of the rows that were run, by their indices."""
        self.host, self.runner = host, PrefixRunner(host)
        self.texts = [prefixes.rows[i] for i in rows]
        self.length = prefixes.prefix.length
        """Columns of what was run at first; rows end in the last one."""
        self.ends = torch.tensor([len(text) - 1 for text in self.texts])
        self.prefix = prefixes.prefix
        if rows:
            fewer = len(rows) < len(prefixes)
            self.prefix = self.prefix.select(torch.tensor(rows)) if fewer else self.prefix.copy()

    def __len__(self) -> int:
        return len(self.texts)

    def can_join(self, other: DecodingRows) -> bool:
        """Whether another batch's rows can be continued together with these; :func:`errata.host.prefix.can_join`."""
        return can_join(self.prefix, other.prefix)

    def join(self, other: DecodingRows) -> None:
        """Continue another batch's rows together with these, behind them in order; the other is used up."""
        self.texts = [*self.texts, *other.texts]
        self.ends = torch.cat([self.ends, other.ends])
        self.prefix = join(self.prefix, other.prefix)
        self.length = self.prefix.length

    def step(self, going: Sequence[int], next_tokens: Sequence[int]) -> Tensor:
        """Append a token to each row that goes on; logits after it ``[rows going, vocab]``."""
        if len(going) < len(self.texts):
            rows = torch.tensor(going)
            self.prefix, self.ends = self.prefix.select(rows), self.ends[rows]
        self.texts = [(*self.texts[k], token) for k, token in zip(going, next_tokens, strict=True)]
        if self.prefix.cache is None:
            line, last = torch.arange(len(going)), torch.tensor([len(text) - 1 for text in self.texts])
            batch = self.host.batch(self.texts)
            own = {name: rows for name, rows in self.prefix.routes.items() if name == SETS}
            return self.host.run(self.host.as_pass(batch, at=(line, last), ends=self.ends, routes=own)).logits
        ids = torch.tensor(next_tokens, device=self.host.device)[:, None]
        position = self.prefix.mask.sum(1, keepdim=True)
        batch = Batch(ids, torch.ones_like(ids), position, torch.zeros_like(ids[:, 0]))
        ends = torch.full((len(going),), self.length - 1)
        output = self.runner.grow(batch, self.prefix, ends=ends)
        assert output.logits is not None and output.prefix is not None
        self.prefix = output.prefix
        return output.logits[:, -1]
