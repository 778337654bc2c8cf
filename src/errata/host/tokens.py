"""From text to token ids and back to places in them.

Texts are tokenised once, whole, with character offsets; places (a subject's last token, the tokens of
a target) are read off the offsets. So begin tokens, prefix spaces and merges cannot shift them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from errata.errors import HostError, RequestError
from errata.host.prompts import chat, has_chat, question
from errata.writing import Join, joint

Side = Literal["left", "right"]
Ids = tuple[int, ...]

__all__ = [
    "Answer", "Batch", "Encoded", "Ids", "Side", "by_length", "chat", "encode", "encode_answer", "encode_prompt",
    "has_chat", "joint", "pad", "question",
]  # fmt: skip


@dataclass(frozen=True)
class Encoded:
    """A tokenised text; ``spans`` holds each token's character interval."""

    text: str
    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]

    def last_of(self, start: int, stop: int) -> int:
        """Index of the last token that overlaps a character interval."""
        inside = [i for i, (a, b) in enumerate(self.spans) if a < stop and b > start]
        if not inside:
            raise RequestError(f"no token of {self.text!r} covers {self.text[start:stop]!r}")
        return inside[-1]

    def first_of(self, start: int, stop: int) -> int:
        """Index of the first token that overlaps a character interval."""
        inside = [i for i, (a, b) in enumerate(self.spans) if a < stop and b > start]
        if not inside:
            raise RequestError(f"no token of {self.text!r} covers {self.text[start:stop]!r}")
        return inside[0]


@dataclass(frozen=True)
class Answer:
    """A prompt with an answer: ``ids[start:]`` are the answer's tokens."""

    ids: tuple[int, ...]
    start: int

    @property
    def target(self) -> tuple[int, ...]:
        """Ids of the answer."""
        return self.ids[self.start :]


def encode(tokenizer: Any, text: str, *, special: bool = True) -> Encoded:
    """Tokenise a text with the tokenizer's own special tokens, less a closing one.

    ``special`` off: the text brings its special tokens itself, as a chat template's does, and none are added.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise HostError(
            "the tokenizer gives no character offsets; load it as a fast tokenizer "
            "(a tokenizer.json beside the model)"
        )
    begin = getattr(tokenizer, "bos_token", None)
    doubled = bool(begin) and text.startswith(begin)  # a begin token in the text itself
    output = tokenizer(text, return_offsets_mapping=True, add_special_tokens=special and not doubled)
    ids, spans = list(output["input_ids"]), [tuple(s) for s in output["offset_mapping"]]
    # tokenizers that close every text (T5 style) would end it before its continuation
    while ids and spans[-1][0] == spans[-1][1] and ids[-1] == getattr(tokenizer, "eos_token_id", None):
        ids.pop()
        spans.pop()
    return Encoded(text, tuple(ids), tuple(spans))  # type: ignore[arg-type]


def encode_answer(
    tokenizer: Any,
    prompt: str,
    answer: str,
    *,
    special: bool = True,
    join: Join = "auto",
    lead: str | None = None,
    prompt_ids: Ids | None = None,
) -> Answer:
    """Tokenise an answer as a continuation of its prompt; ``special`` as in :func:`encode`, ``join`` and ``lead``
    as in :func:`errata.writing.joint`. ``prompt_ids``: the prompt's tokens where they are known, see
    :func:`encode_stripped`.

    The prompt's tokens are those it has alone, which is what a model continues: a token that prompt and answer
    would share in running text is not made. Raises RequestError when the answer yields no token of its own.
    """
    text, at = joint(prompt, answer, join, lead=lead)
    whole = encode(tokenizer, text, special=special)
    inside = [
        i for i, (a, b) in enumerate(whole.spans) if b > at and b > a and not text[max(a, at) : b].isspace()
    ]
    if not inside:
        raise RequestError(f"target {answer!r} yields no token after {prompt!r}")
    before = encode_stripped(tokenizer, prompt, special=special).ids if prompt_ids is None else prompt_ids
    if whole.ids[: len(before)] == before and len(before) <= inside[0]:
        return Answer(whole.ids, len(before))
    border = len(prompt.rstrip(" \t") if special else prompt)
    behind = _behind(tokenizer, text[border:])
    return Answer((*before, *behind), len(before)) if behind and before else Answer(whole.ids, inside[0])


def _behind(tokenizer: Any, text: str) -> Ids:
    """Tokenise a text as it is inside a line, not at its beginning; nothing where no border can be had."""
    for border in ("\n", "\n\n", "|", "\N{IDEOGRAPHIC FULL STOP}"):
        encoded = encode(tokenizer, border + text, special=False)
        at = len(border)
        if encoded.ids and all(b <= at or a >= at for a, b in encoded.spans):
            return tuple(i for i, (_, b) in zip(encoded.ids, encoded.spans, strict=True) if b > at)
    return ()


def encode_stripped(tokenizer: Any, prompt: str, *, special: bool = True) -> Encoded:
    """Tokenise a prompt without a trailing space, since answers bring their own.

    With ``special`` off it stays: a chat template knows what its model continues.
    """
    return encode(tokenizer, prompt.rstrip(" \t") if special else prompt, special=special)


def encode_prompt(tokenizer: Any, prompt: str, *, special: bool = True) -> Encoded:
    """Tokenise a prompt to be continued, as :func:`encode_stripped` does; an empty one as a begin token."""
    encoded = encode_stripped(tokenizer, prompt, special=special)
    return encoded if encoded.ids else Encoded(prompt, (begin_id(tokenizer),), ((0, 0),))


def begin_id(tokenizer: Any) -> int:
    """Return the id of an empty prompt. Raises RequestError where the tokenizer names none."""
    begin = getattr(tokenizer, "bos_token_id", None)
    if begin is None:
        begin = getattr(tokenizer, "eos_token_id", None)
    if begin is None:
        raise RequestError("an empty prompt needs a tokenizer with a begin token")
    return int(begin)


@dataclass(frozen=True)
class Batch:
    """Rows of ids padded to one length, with the mask and positions every family understands."""

    ids: Tensor
    """int64 ``[rows, length]``."""
    mask: Tensor
    """int64 ``[rows, length]``, 1 for tokens."""
    positions: Tensor
    """int64 ``[rows, length]``, counted from each row's first token."""
    offset: Tensor
    """int64 ``[rows]``, index of each row's first token: 0 with right padding."""

    def select(self, rows: Tensor) -> Batch:
        """Return some rows by their indices ``[n]``, which may repeat."""
        return Batch(self.ids[rows], self.mask[rows], self.positions[rows], self.offset[rows])

    def columns(self, first: int, stop: int | None = None) -> Batch:
        """Return the columns from one on, up to another."""
        columns = slice(first, stop)
        offset = (self.offset - first).clamp_min(0)
        return Batch(self.ids[:, columns], self.mask[:, columns], self.positions[:, columns], offset)


def lay_out(
    rows: Sequence[Sequence[int]], starts: Sequence[int], *, fill: int, device: torch.device | str,
    offsets: Sequence[int] | None = None,
) -> Batch:  # fmt: skip
    """Put rows of token ids into a batch, each from its own column on.

    ``offsets``: how many tokens each row continues, from which its positions are counted; None: none.
    """
    stops = [start + len(row) for row, start in zip(rows, starts, strict=True)]
    length = max(stops, default=0)
    padded = [
        [*[fill] * start, *row, *[fill] * (length - stop)]
        for row, start, stop in zip(rows, starts, stops, strict=True)
    ]
    ids = torch.tensor(padded, dtype=torch.long).reshape(len(rows), length)
    column, start = torch.arange(length), torch.tensor(starts, dtype=torch.long)[:, None]
    stop = torch.tensor(stops, dtype=torch.long)[:, None]
    mask = ((column >= start) & (column < stop)).long()
    positions = torch.minimum(column, stop - 1) - start  # padding behind a row stays inside the window
    if offsets is not None:
        positions = positions + torch.tensor(offsets, dtype=torch.long)[:, None]
    positions = torch.where(column < start, 0, positions).clamp_min(0)
    return Batch(ids.to(device), mask.to(device), positions.to(device), start[:, 0].to(device))


def pad(rows: Sequence[Sequence[int]], *, side: Side, fill: int, device: torch.device | str) -> Batch:
    """Pad rows of token ids on one side."""
    longest = max(len(row) for row in rows)
    starts = [longest - len(row) if side == "left" else 0 for row in rows]
    return lay_out(rows, starts, fill=fill, device=device)


def by_length(rows: Sequence[Sequence[int]], budget: int) -> list[list[int]]:
    """Group row indices, longest first, into batches of at most ``budget`` padded tokens."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    groups: list[list[int]] = []
    for i in order:
        if groups and (len(groups[-1]) + 1) * len(rows[groups[-1][0]]) <= budget:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups
