"""Models that answer in places of what they read: masked language models and text classifiers.

A text of such a model is one row of ids, ``(*reads, BREAK, *answer)``: what the model reads, a mark, and the tokens
of the answer so far. Scores of an answer's token are read one place before it, as in a causal model's row; what
the model really reads for that place is made from the row by :meth:`SlotHost.reading`, once for every place.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import regex
import torch
from torch import Tensor, nn

from errata.errors import HostError, RequestError
from errata.host import passes, tokens
from errata.host.kinds import CLASSIFIER, MASKED
from errata.host.load import Host
from errata.host.passes import Pass
from errata.host.prompts import Framed, written
from errata.host.seq2seq import BREAK
from errata.writing import strip

Ids = tuple[int, ...]

BATCH_TOKENS = 8192
"""Padded tokens that are classified at once."""

_BLANK = "\ue002blank\ue003"
"""Takes the place of a mask while a prompt is put into its format, where a special token would end it."""


@dataclass(frozen=True)
class Slots(tokens.Batch):
    """A batch with the rows it was made of, from which each place's own input is made."""

    rows: tuple[Ids, ...]


class SlotHost(Host, ABC):
    """A model that answers in places of what it reads, with its tokenizer and its layout."""

    @property
    def fills(self) -> bool:
        """True: an answer fills places, and is as long as there are places."""
        return True

    @property
    def continues(self) -> bool:
        """False: what is read changes with every token of an answer."""
        return False

    @cached_property
    def accepts(self) -> frozenset[str]:
        """Arguments of the model's forward, without positions: families count them each in its own way."""
        return passes.arguments(self.model) - {"position_ids"}

    def length(self, row: Ids) -> int:
        """Return how many tokens are read: the answer fills places among them."""
        return row.index(BREAK)

    @abstractmethod
    def room(self, row: Ids) -> int:
        """Return how many tokens may still be added to a row."""

    @abstractmethod
    def reading(self, row: Ids) -> tuple[Ids, int]:
        """Return what the model reads to answer after a row, and the column that holds the answer's logits."""

    def encode(self, text: str, *, special: bool = True) -> tokens.Encoded:
        """Tokenise a whole text, closing token and all. Raises HostError for a tokenizer without offsets."""
        if not getattr(self.tokenizer, "is_fast", False):
            raise HostError("the tokenizer gives no character offsets; load it as a fast tokenizer")
        output = self.tokenizer(text, return_offsets_mapping=True, add_special_tokens=special)
        spans = tuple((int(start), int(stop)) for start, stop in output["offset_mapping"])
        return self._embedded(tokens.Encoded(text, tuple(output["input_ids"]), spans))

    def batch(self, rows: Sequence[Sequence[int]], *, side: tokens.Side = "right") -> Slots:
        """Pad what is read of rows, always on the right. Raises RequestError for what the window does not hold.

        Raises HostError for rows without a place for an answer.
        """
        if any(BREAK not in row for row in rows):
            raise HostError(f"{self.name} scores answers to prompts, not running text")
        logical = tuple(map(tuple, rows))
        padded = super().batch([row[: row.index(BREAK)] for row in logical])
        return Slots(padded.ids, padded.mask, padded.positions, padded.offset, logical)

    def as_pass(self, batch: tokens.Batch, **options: Any) -> Pass:
        """Return a batch as a pass with one row for every place where logits are wanted, in their order."""
        if not isinstance(batch, Slots):
            raise HostError(f"{type(self).__name__} takes rows of its own batch()")
        at = options.get("at")
        if at is None:
            line = torch.arange(len(batch.rows))
            at = line, torch.tensor([len(row) - 1 for row in batch.rows])
        inputs = [
            self.reading(batch.rows[row][: place + 1])
            for row, place in zip(at[0].tolist(), at[1].tolist(), strict=True)
        ]
        padded = tokens.pad([ids for ids, _ in inputs], side="right", fill=self.pad_id, device=self.device)
        columns = torch.tensor([column for _, column in inputs])
        routes = {name: own[at[0].to(own.device)] for name, own in (options.get("routes") or {}).items()}
        return self._pass(Pass(padded.ids, padded.mask, routes=routes), columns)

    def _pass(self, request: Pass, columns: Tensor) -> Pass:
        return replace(request, at=(torch.arange(len(columns)), columns))

    def forward(self, batch: tokens.Batch, *, keep: int | None = None) -> Tensor:
        """Run a batch; logits after each row ``[rows, 1, vocab]``. Raises HostError for more than those."""
        if keep != 1:
            raise HostError(f"{self.name} scores answers to prompts, not running text")
        return self.run(self.as_pass(batch)).logits[:, None]


class MaskedHost(SlotHost):
    """A masked language model: an answer fills the mask in a prompt, or masks behind it.

    A prompt holds the tokenizer's mask token, once or several times in a row, or none: masks then follow it. An
    answer of n tokens fills n masks, and is scored from left to right,

        log p(answer) = sum over k of log p(t_k | prompt with t_1 .. t_(k-1) and n - k + 1 masks in their places).

    Free answers are as long as there are masks in the prompt; of a prompt without, as the target that is asked
    about, else one token.
    """

    kind = MASKED

    def __init__(self, model: nn.Module, tokenizer: Any, *, name: str) -> None:
        if getattr(tokenizer, "mask_token_id", None) is None:
            raise HostError(f"{name} is a masked language model, and its tokenizer has no mask token")
        super().__init__(model, tokenizer, name=name)

    def __repr__(self) -> str:
        return f"MaskedHost({self.name!r}, {self.family}, {len(self.layout.blocks)} layers, {self.dtype})"

    @property
    def mask_id(self) -> int:
        """Id of the mask token."""
        return int(self.tokenizer.mask_token_id)

    def room(self, row: Ids) -> int:
        """Return how many masks of a row are not filled yet."""
        place = row.index(BREAK)
        return row[:place].count(self.mask_id) - (len(row) - place - 1)

    def reading(self, row: Ids) -> tuple[Ids, int]:
        """Return the row's text with its answer so far in the masks' places, and the first mask that is left."""
        place = row.index(BREAK)
        ids, answer = list(row[:place]), row[place + 1 :]
        slots = [i for i, token in enumerate(ids) if token == self.mask_id]
        if len(answer) >= len(slots):
            raise RequestError(
                f"an answer of more than {len(slots)} tokens does not fit the masks of its prompt"
            )
        for slot, token in zip(slots, answer, strict=False):
            ids[slot] = token
        return tuple(ids), slots[len(answer)]

    def frame(
        self, prompt: str, *, prefix: str = "", before: int | None = None, number: int | None = None
    ) -> Framed:
        """Put a prompt as :attr:`prompt_format` says, its masks left as they are."""
        mask = str(self.tokenizer.mask_token)
        if before is not None:
            before += prompt[:before].count(mask) * (len(_BLANK) - len(mask))
        framed = super().frame(prompt.replace(mask, _BLANK), prefix=prefix, before=before, number=number)
        return replace(
            framed, text=framed.text.replace(_BLANK, mask), scored=framed.scored.replace(_BLANK, mask)
        )

    def prefixed(self, prompt: str, prefix: str, before: int | None = None) -> str:
        """Put running text before a prompt, whose masks do not count as the special tokens of a conversation."""
        return self.frame(prompt, prefix=prefix, before=before).text if prefix else prompt

    def _blank(self, text: str) -> tuple[str, str, int]:
        """Return what stands before and behind the place of an answer, and how many masks hold it."""
        mask = str(self.tokenizer.mask_token)
        runs = list(regex.finditer(rf"{regex.escape(mask)}(?:\s*{regex.escape(mask)})*", text))
        if len(runs) > 1:
            raise RequestError(
                f"{text!r:.80} has masks in {len(runs)} places; an answer takes one, masks side by side"
            )
        if not runs:
            return f"{text.rstrip()} ", "", 0
        return text[: runs[0].start()], text[runs[0].end() :], runs[0].group().count(mask)

    def _slotted(self, text: str, special: bool, count: int | None) -> Ids:
        """Tokenise a text with so many masks in the place of the answer; None: as many as it has, one at least."""
        left, right, own = self._blank(text)
        ids = self.encode(f"{left}{self.tokenizer.mask_token}{right}", special=special).ids
        at = ids.index(self.mask_id)
        return (*ids[:at], *[self.mask_id] * (count or own or 1), *ids[at + 1 :], BREAK)

    def encode_framed(self, framed: Framed, *, slots: int | None = None) -> Ids:
        """Return the row up to where the answer begins; ``slots``: masks of a prompt that has none."""
        own = self._blank(framed.text)[2]
        return self._slotted(framed.text, framed.special, own or slots)

    def encode_base(self, prompt: str, *, slots: int | None = None) -> Ids:
        """Return the row that an answer of so many tokens is scored behind."""
        framed = self.frame(prompt)
        return self._slotted(framed.scored, framed.special, slots)

    def encode_answer(
        self, prompt: str, answer: str, *, prefix: str = "", before: int | None = None, special: bool = True
    ) -> tokens.Answer:
        """Return the row with an answer, whose tokens are those it has in its place in the text.

        Raises RequestError when the answer yields no token.
        """
        framed = self.frame(prompt, prefix=prefix, before=before) if special else written(prompt)
        left, right, _ = self._blank(framed.scored)
        body, start = strip(answer), len(left)
        whole = self.encode(f"{left}{body}{right}", special=framed.special)
        target = tuple(
            token for token, (a, b) in zip(whole.ids, whole.spans, strict=True)
            if a < b and a < start + len(body) and b > start
        )  # fmt: skip
        if not body or not target:
            raise RequestError(f"target {answer!r} yields no token of its own")
        row = self._slotted(framed.scored, framed.special, len(target))
        return tokens.Answer((*row, *target), len(row))


class ClassifierHost(SlotHost):
    """A text classifier: text in, label out; an answer is the name of one of its labels."""

    kind = CLASSIFIER

    def __repr__(self) -> str:
        return f"ClassifierHost({self.name!r}, {self.family}, {self.vocab_size} labels, {self.dtype})"

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the labels, in the order of the logits."""
        named = {int(index): str(name) for index, name in (self.config.id2label or {}).items()}
        return tuple(named.get(index, str(index)) for index in range(self.vocab_size))

    @property
    def vocab_size(self) -> int:
        """Number of labels."""
        return int(self.config.num_labels)

    @torch.no_grad()
    def logits(self, texts: Sequence[str]) -> Tensor:
        """Classify texts; logits ``[n, labels]``."""
        rows = [self.encode_prompt(text) for text in texts]
        groups = tokens.by_length(rows, BATCH_TOKENS)
        parts = [self.run(self.as_pass(self.batch([rows[i] for i in group]))).logits for group in groups]
        order = torch.tensor([i for group in groups for i in group], device=self.device)
        return torch.cat(parts)[order.argsort()]

    def labels(self, texts: Sequence[str]) -> list[str]:
        """Name the most probable label of each text."""
        names = self.names
        return [names[i] for i in self.logits(texts).argmax(-1).tolist()]

    def room(self, row: Ids) -> int:
        """Return 1 before the label, 0 behind it."""
        return 1 - (len(row) - row.index(BREAK) - 1)

    def reading(self, row: Ids) -> tuple[Ids, int]:
        """Return the text; a classifier has one answer."""
        return row[: row.index(BREAK)], 0

    def _pass(self, request: Pass, columns: Tensor) -> Pass:
        return request

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Name labels."""
        return [", ".join(self.names[i] for i in row) for row in ids]

    def encode_framed(self, framed: Framed, *, slots: int | None = None) -> Ids:
        """Return the row of a text."""
        return (*self.encode(framed.text, special=framed.special).ids, BREAK)

    def encode_base(self, prompt: str, *, slots: int | None = None) -> Ids:
        """Return the row that labels are scored behind."""
        return self.encode_framed(self.frame(prompt))

    def encode_answer(
        self, prompt: str, answer: str, *, prefix: str = "", before: int | None = None, special: bool = True
    ) -> tokens.Answer:
        """Return the row with a label. Raises RequestError for a label that the model does not have."""
        framed = self.frame(prompt, prefix=prefix, before=before) if special else written(prompt)
        row = self.encode_framed(framed)
        name = strip(answer)
        if name not in self.names:
            raise RequestError(f"{answer!r} is no label of {self.name}; its labels: {', '.join(self.names)}")
        return tokens.Answer((*row, self.names.index(name)), len(row))


def slot_host(model: nn.Module, tokenizer: Any, name: str) -> SlotHost | None:
    """Make the host of a masked language model or a text classifier; None for another model.

    transformers names the task in the class, and in the configuration's ``architectures`` of a folder.
    """
    for ending, make in (("ForMaskedLM", MaskedHost), ("ForSequenceClassification", ClassifierHost)):
        if any(kind.__name__.endswith(ending) for kind in type(model).__mro__):
            return make(model, tokenizer, name=name)
    return None
