"""The one door to a model: a forward pass as a record, and the only code that runs it.

A caller states which rows a model reads, what they continue and where logits are needed;
hooks, caches and edits in place act on what is run here and nowhere else.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from threading import local
from typing import Any

import torch
from torch import Tensor, nn

from errata.host import hooks

SETS = "sets"
"""Name under which routes hold the numbers of the edit sets that each row belongs to: one ``[rows]`` or several
``[rows, k]``, 0 for none; see :mod:`errata.host.placed`."""
Places = tuple[Tensor, Tensor]
"""Row and column of tokens, int64 ``[n]`` each."""


@dataclass(frozen=True, eq=False)
class Pass:
    """Rows that a model reads in one forward pass: token ids, or images."""

    ids: Tensor | None = None
    """int64 ``[rows, length]``; of an encoder-decoder what its decoder is given."""
    mask: Tensor | None = None
    """int64 ``[rows, length of the prefix + length]``, 1 for tokens."""
    positions: Tensor | None = None
    """int64 ``[rows, length]``, each token's index in its whole text, or ``[axes, rows, length]`` where a model counts
    along several; None lets the model count."""
    source: Places | None = None
    """Ids and mask ``[rows, length]`` that an encoder reads."""
    pixels: Tensor | None = None
    """Images as the model takes them ``[rows, channels, height, width]``, in place of ids."""
    images: Mapping[str, Tensor] = field(default_factory=dict)
    """What goes with ids where their texts show pictures: the processor's inputs by name."""
    shown: Tensor | None = None
    """Where they do, the ids with each picture's own number in its places, by which routers know it."""
    prefix: Any = None
    """Attention keys and values of the tokens that rows continue, a transformers cache."""
    use_cache: bool = False
    """Whether keys and values of these rows are returned, to be continued later."""
    at: Places | None = None
    """Where logits are computed; None: everywhere."""
    last: int | None = None
    """Of how many last columns logits are returned; None: of all."""

    ends: Tensor | None = None
    """int64 ``[rows]``: column, counted with the prefix, of each row's last prompt token, at which routers decide;
    None: each row's last token."""
    routes: Mapping[str, Tensor] = field(default_factory=dict)
    """What routers have decided about these rows already, see :class:`Routing`."""

    def inputs(self, accepts: frozenset[str]) -> dict[str, Any]:
        """Return arguments of a model's forward; ``accepts`` names those it takes."""
        if self.pixels is not None:
            return {"pixel_values": self.pixels}
        inputs: dict[str, Any] = {"input_ids": self.ids, "attention_mask": self.mask}
        if self.source is not None:
            inputs = {
                "input_ids": self.source[0],
                "attention_mask": self.source[1],
                "decoder_input_ids": self.ids,
                "decoder_attention_mask": self.mask,
            }
        elif self.positions is not None and "position_ids" in accepts:
            inputs["position_ids"] = self.positions
        if self.prefix is not None and "past_key_values" in accepts:
            inputs["past_key_values"] = self.prefix
        if self.last is not None and "logits_to_keep" in accepts:
            inputs["logits_to_keep"] = self.last
        return {**inputs, **self.images, "use_cache": self.use_cache}


@dataclass(frozen=True, eq=False)
class Ran:
    """What a pass gave."""

    logits: Tensor
    """``[rows, length, vocab]``; ``[n, vocab]`` where places were named, ``[rows, classes]`` of images."""
    prefix: Any = None
    """Keys and values of all tokens so far, with ``use_cache``."""
    routes: Mapping[str, Tensor] = field(default_factory=dict)
    """What routers have decided about the rows, to be passed on with the prefix."""


class Routing:
    """What routers decide about the rows of one text: once, at each row's last prompt token.

    Later tokens of a row, also in later passes, keep the decision of its prompt.
    """

    def __init__(
        self, ends: Tensor | None = None, mask: Tensor | None = None, *, prefix: int | None = 0,
        ids: Tensor | None = None, decided: Mapping[str, Tensor] | None = None, past: bool = False,
        rows: int | None = None, shown: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Take each row's end, or the mask ``[rows, prefix + length]`` that it is computed from when needed.

        ``past``: all prompts ended before this pass. ``prefix``: columns before it; None where that varies. ``rows``:
        their number, where neither ids nor mask are given. ``shown``: a prompt's ids with its pictures' numbers.
        """
        self._rows = rows
        self._ends, self._mask, self._prefix, self._past = ends, mask, prefix, past
        self._ids, self._shown = ids, shown
        self.by_host = False
        """Whether a host runs the pass, and puts other models' logits in place itself."""
        self.passing: dict[str, Tensor] = {}
        """What modules of this pass have shown to those above them, by name."""
        self.names: dict[tuple[str, tuple[int, ...]], int | None] = {}
        """Where prompts name phrases, by phrase and ids: the index of the token with which they first do."""
        self.decided: dict[str, Tensor] = dict(decided or {})

        """By edit digest, the entry that acts on each row, int64 ``[rows]``, or several ``[rows, k]``; -1: none. Also
        what edits keep of earlier tokens, ``[rows, columns, ...]``, and what goes with their entries, under names that
        begin with the digest."""

    def ends(self, rows: int, length: int) -> Tensor:
        """Return each row's column of its last prompt token in this pass, int64 ``[rows]``; -1 where it lies before."""
        if self._past:
            return torch.full((rows,), -1)
        if self._ends is None:
            whole = length - 1 + (self._prefix or 0)
            self._ends = torch.full((rows,), whole) if self._mask is None else last_tokens(self._mask)
        if self._prefix is None:  # a loop that reads either whole rows or one token more
            return torch.where(self._ends < length, self._ends, -1)
        return (self._ends - self._prefix).clamp_min(-1)

    def by_rows(self, states: Tensor) -> Tensor | None:
        """Return states ``[rows, length, d]``, also of a module whose rows are joined, ``[rows * length, d]``.

        None where they cannot be told apart: another shape, or a number of tokens that is not that of this pass.
        """
        if states.ndim == 3:
            return states
        known = self._ids if self._ids is not None else self._mask
        rows = self._rows if known is None else len(known)
        if states.ndim != 2 or not rows or len(states) % rows:
            return None
        length = len(states) // rows
        if self._ids is not None and self._prefix is not None and length != self._ids.shape[1]:
            return None  # some of the tokens only
        return states.unflatten(0, (rows, length))

    def prompt(self, row: int, end: int) -> list[int]:
        """Return the ids that a pass holds of a row up to a column, padding left out; none where they are not known."""
        if self._ids is None:
            return []
        ids = self._ids[row, : end + 1]
        if self._mask is None:
            return ids.tolist()
        own = self._mask[row, -self._ids.shape[1] :][: end + 1]
        return ids[own.bool()].tolist()

    def numbered(self, ids: Tensor) -> Tensor:
        """Return ids ``[rows, length]`` of a pass with pictures' numbers, where it reads the prompt that has them."""
        own = self._shown
        if own is None or len(own) != len(ids) or not 1 < own.shape[1] <= ids.shape[1]:
            return ids
        return torch.cat([own.to(ids.device), ids[:, own.shape[1] :]], 1)

    def before(self, length: int) -> int | None:
        """Return how many columns of the rows came before this pass; None where that is not known: those so far.

        A loop reads rows whole, or one token more: a single one may be either where the prompts have no more.
        """
        if self._prefix is not None:
            return self._prefix
        return 0 if length > 1 and (self._mask is None or length >= self._mask.shape[1]) else None

    def tokens(self, rows: int, length: int) -> Tensor:
        """Return which columns of this pass are tokens, not padding, bool ``[rows, length]``."""
        whole = torch.ones(rows, length, dtype=torch.bool)
        if self._mask is None or self._past:
            return whole
        mask = self._mask.bool().to(whole.device)
        if self._prefix is not None:
            return mask[:, -length:]
        if self.before(length) == 0:  # a loop that reads rows whole: what it has written is behind the mask
            whole[:, : mask.shape[1]] = mask
        return whole

    def indices(self, rows: int, length: int) -> Tensor:
        """Return each column's index among the tokens of its row, int64 ``[rows, length]``.

        Counted from the row's first token, also of earlier passes; -1 for padding before it.
        """
        if self._mask is None:
            return (torch.arange(length) + (self._prefix or 0)).expand(rows, -1)
        mask = self._mask.long().cpu()
        if mask.shape[1] < length:  # what a loop has written is behind the mask
            mask = torch.cat([mask, mask.new_ones(rows, length - mask.shape[1])], 1)
        return (mask.cumsum(1) - 1)[:, -length:]

    def members(self, number: int | None, rows: int) -> Tensor | None:
        """Return which rows belong to an edit set, bool ``[rows]``; None where an edit is for all rows."""
        if number is None:
            return None
        sets = self.decided.get(SETS)
        if sets is None:
            return torch.zeros(rows, dtype=torch.bool)
        return (sets == number).reshape(rows, -1).any(1)

    def decision(self, digest: str, decide: Callable[[], Tensor]) -> Tensor:
        """Return what was decided for an edit, ``[rows, ...]``, or decide now."""
        if digest not in self.decided:
            self.decided[digest] = decide()
        return self.decided[digest]


Substituting = Callable[[Pass, Tensor, Routing], Tensor]
"""Gives other logits of the same shape for a pass, given the model's own."""


class _Running(local):
    """The routing of the pass that each thread is in, whether it came to the model past its host, whether interventions
    are to leave it alone, and the edit sets of rows that name none."""

    routing: Routing | None = None
    direct: bool = False
    plain: bool = False
    sets: tuple[int, ...] = ()


_RUNNING = _Running()


def routing() -> Routing | None:
    """Return the routing of the pass that this thread runs; None outside of one."""
    return _RUNNING.routing


@contextmanager
def routed(current: Routing | None) -> Iterator[None]:
    """Have passes in the block decide by this routing."""
    before, _RUNNING.routing = _RUNNING.routing, current
    try:
        yield
    finally:
        _RUNNING.routing = before


def is_plain() -> bool:
    """Whether interventions leave the passes of this thread alone."""
    return _RUNNING.plain


@contextmanager
def without_interventions() -> Iterator[None]:
    """Have interventions leave passes in the block alone: models are examined without them."""
    before, _RUNNING.plain = _RUNNING.plain, True
    try:
        yield
    finally:
        _RUNNING.plain = before


@contextmanager
def belonging(sets: Sequence[int]) -> Iterator[None]:
    """Have rows of passes in the block that name no edit set belong to these, by number.

    For what is asked of a model on behalf of such a row: what a router reads, what is written before a prompt.
    """
    before, _RUNNING.sets = _RUNNING.sets, tuple(sets)
    try:
        yield
    finally:
        _RUNNING.sets = before


def membership() -> tuple[int, ...]:
    """Return the numbers of the edit sets that rows belong to which name none."""
    return _RUNNING.sets


def _with_sets(routes: Mapping[str, Tensor] | None, rows: int) -> Mapping[str, Tensor]:
    """Return decisions about rows with the sets that they belong to."""
    routes = routes or {}
    if SETS in routes or not _RUNNING.sets:
        return routes
    return {**routes, SETS: torch.tensor(_RUNNING.sets).expand(rows, -1)}


def enter(current: Routing) -> None:
    """Begin a pass that came to the model past its host."""
    _RUNNING.routing, _RUNNING.direct = current, True


def leave() -> Routing | None:
    """End such a pass and return its routing; None where there is none."""
    if not _RUNNING.direct:
        return None
    current, _RUNNING.routing, _RUNNING.direct = _RUNNING.routing, None, False
    return current


def last_tokens(mask: Tensor) -> Tensor:
    """Return the column of each row's last token, int64 ``[rows]``; ``mask`` ``[rows, length]`` is 1 for tokens."""
    return (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(1)


def _routing(request: Pass) -> Routing | None:
    if request.ids is None or request.mask is None or request.source is not None:
        return None
    prefix = request.mask.shape[1] - request.ids.shape[1]
    decided = _with_sets(request.routes, len(request.ids))
    return Routing(request.ends, request.mask, prefix=prefix, ids=request.ids, decided=decided)


def arguments(model: nn.Module) -> frozenset[str]:
    """Return the names of the arguments that a model's forward takes."""
    return frozenset(inspect.signature(model.forward).parameters)


def run(
    model: nn.Module,
    request: Pass,
    accepts: frozenset[str] | None = None,
    substitute: Substituting | None = None,
) -> Ran:
    """Run a pass in evaluation mode; ``accepts`` as :func:`arguments` gives it.

    ``substitute`` replaces the logits that the pass asks for, unless interventions are to leave it alone.

    With a large vocabulary the output head costs as much as many blocks, so where places are named it computes
    those alone.
    """
    inputs = request.inputs(arguments(model) if accepts is None else accepts)
    head = output_head(model) if request.at is not None and request.source is None else None
    reduce = nullcontext() if head is None or request.at is None else hooks.gathering(head, *request.at)
    current = _routing(request)
    if current is not None:
        current.by_host = True
    with hooks.evaluating(model), reduce, routed(current):
        out = model(**inputs)
    if isinstance(out, Tensor):  # a bare module, that returns nothing else
        return Ran(out)
    logits = _logits(out.logits, request, gathered=head is not None)
    if current is not None and substitute is not None and not is_plain():
        logits = substitute(request, logits, current)
    prefix = out.past_key_values if request.use_cache else None
    return Ran(logits, prefix, current.decided if current is not None else {})


def _logits(logits: Tensor, request: Pass, *, gathered: bool) -> Tensor:
    """Return those that a pass asks for; ``gathered``: the head has computed them at its places alone."""
    if request.at is None:
        return logits if request.last is None else logits[:, -request.last :]
    if gathered:
        return logits[0]
    row, column = (index.to(logits.device) for index in request.at)
    return logits[row, column]


def output_head(model: nn.Module) -> nn.Module | None:
    """Return the map from hidden states to the vocabulary; None for a model that names none."""
    getter = getattr(model, "get_output_embeddings", None)
    return None if getter is None else getter()


def generate(
    model: Any, inputs: dict[str, Any], routes: Mapping[str, Tensor] | None = None, *, shown: Tensor | None = None,
    **options: Any,
) -> Any:  # fmt: skip
    """Let transformers' own loop continue rows, padded on the left; what it returns for the options.

    ``inputs``: ids and mask ``[rows, length]``; ``routes``: by edit, decisions ``[rows]`` taken already. ``shown``: the
    ids with pictures' numbers ``[rows, length]``; None: they are those of the inputs.
    """
    length, beams = inputs["input_ids"].shape[1], options.get("num_beams", 1)
    # what routers read of a prompt; the loop repeats each row for its beams
    ids, mask = (inputs[name].repeat_interleave(beams, 0) for name in ("input_ids", "attention_mask"))
    shown = None if shown is None else shown.repeat_interleave(beams, 0)
    ends = torch.full((len(ids),), length - 1)
    decided = _with_sets(routes, len(ids))
    with (
        hooks.evaluating(model),
        routed(Routing(ends, mask, prefix=None, ids=ids, decided=decided, shown=shown)),
    ):
        return model.generate(**inputs, **options)
