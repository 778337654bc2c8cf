"""The codecs of models that answer in places of what they read: masked language models and text classifiers.

A text of such a model is one row of ids, ``(*prompt, BREAK, *answer)``: what the model reads, a mark, and the tokens
of the answer so far. Scores of an answer's token are read one place before it, as in a causal model's row; what
the model is given for that place is made from the row by :meth:`SlotCodec.reading`, once for every place.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import regex
import torch
from torch import Tensor, nn

from errata.errors import HostError, RequestError
from errata.host import tokens
from errata.host.codec import BREAK, Codec, split
from errata.host.kinds import CLASSIFIER, MASKED
from errata.host.passes import Pass
from errata.host.prompts import Framed
from errata.host.text import TextHost
from errata.host.tokens import Ids
from errata.writing import Join, strip

BATCH_TOKENS = 8192
"""Padded tokens that are classified at once."""

_BLANK = "\ue002blank\ue003"
"""Takes the place of a mask while a prompt is put into its format, where a special token would end it."""


@dataclass(frozen=True)
class Slots(tokens.Batch):
    """A batch with the rows it was made of, from which each place's own input is made."""

    rows: tuple[Ids, ...]
    fill: int
    """Id that pads rows."""


class SlotCodec(Codec):
    """Rows of a model that answers in places of what it reads."""

    fills = True
    takes_positions = False

    def length(self, row: Sequence[int]) -> int:
        """Return how many tokens are read: the answer fills places among them."""
        return len(split(row, self.name)[0])

    @abstractmethod
    def reading(self, row: Ids) -> tuple[Ids, int]:
        """Return what the model reads to answer after a row, and the column that holds the answer's logits."""

    def encode(self, text: str, *, special: bool = True) -> tokens.Encoded:
        """Tokenise a whole text, closing token and all. Raises HostError for a tokenizer without offsets."""
        if not getattr(self.tokenizer, "is_fast", False):
            raise HostError("the tokenizer gives no character offsets; load it as a fast tokenizer")
        output = self.tokenizer(text, return_offsets_mapping=True, add_special_tokens=special)
        spans = tuple((int(start), int(stop)) for start, stop in output["offset_mapping"])
        return tokens.Encoded(text, tuple(output["input_ids"]), spans)

    def batch(
        self, rows: Sequence[Sequence[int]], *, side: tokens.Side, fill: int, device: torch.device
    ) -> Slots:
        """Pad what is read of rows, always on the right. Raises HostError for rows without a place for an answer."""
        prompts = [split(row, self.name)[0] for row in rows]
        padded = tokens.pad(prompts, side="right", fill=fill, device=device)
        whole = tuple(map(tuple, rows))
        return Slots(padded.ids, padded.mask, padded.positions, padded.offset, whole, fill)

    def as_pass(self, batch: tokens.Batch, **options: Any) -> Pass:
        """Return a batch as a pass with one row for every place where logits are needed, in their order.

        Without places: of each row's last token.
        """
        if not isinstance(batch, Slots):
            raise HostError(f"{self.name} takes rows of its own batch()")
        at = options.get("at")
        if at is None:
            line = torch.arange(len(batch.rows))
            at = line, torch.tensor([len(row) - 1 for row in batch.rows])
        inputs = [
            self.reading(batch.rows[row][: place + 1])
            for row, place in zip(at[0].tolist(), at[1].tolist(), strict=True)
        ]
        rows, columns = [ids for ids, _ in inputs], torch.tensor([column for _, column in inputs])
        padded = tokens.pad(rows, side="right", fill=batch.fill, device=batch.ids.device)
        routes = {name: own[at[0].to(own.device)] for name, own in (options.get("routes") or {}).items()}
        return self._pass(Pass(padded.ids, padded.mask, routes=routes), columns)

    def _pass(self, request: Pass, columns: Tensor) -> Pass:
        return replace(request, at=(torch.arange(len(columns)), columns))


class MaskedCodec(SlotCodec):
    """Rows of a masked language model: an answer fills the mask in a prompt, or masks behind it.

    A prompt holds the tokenizer's mask token, once or several times in a row, or none: masks then follow it. An
    answer of n tokens fills n masks, and is scored from left to right,

        log p(answer) = sum over k of log p(t_k | prompt with t_1 .. t_(k-1) and n - k + 1 masks in their places).

    Free answers are as long as there are masks in the prompt; of a prompt without, as the target of the probe,
    else one token.
    """

    kind = MASKED

    def __init__(self, model: nn.Module, tokenizer: Any, *, name: str) -> None:
        if getattr(tokenizer, "mask_token_id", None) is None:
            raise HostError(f"{name} is a masked language model, and its tokenizer has no mask token")
        super().__init__(model, tokenizer, name=name)

    @property
    def mask_id(self) -> int:
        """Id of the mask token."""
        return int(self.tokenizer.mask_token_id)

    def room(self, row: Sequence[int], window: int | None) -> int:
        """Return how many masks of a row are not filled yet."""
        prompt, answer = split(row, self.name)
        return prompt.count(self.mask_id) - len(answer)

    def reading(self, row: Ids) -> tuple[Ids, int]:
        """Return the row's text with its answer so far in the masks' places, and the first mask that remains."""
        prompt, answer = split(row, self.name)
        ids = list(prompt)
        slots = [i for i, token in enumerate(ids) if token == self.mask_id]
        if len(answer) >= len(slots):
            raise RequestError(
                f"an answer of more than {len(slots)} tokens does not fit the masks of its prompt"
            )
        for slot, token in zip(slots, answer, strict=False):
            ids[slot] = token
        return tuple(ids), slots[len(answer)]

    def hide(self, prompt: str) -> str:
        """Replace masks, which would count as the special tokens of a conversation."""
        return prompt.replace(str(self.tokenizer.mask_token), _BLANK)

    def show(self, text: str) -> str:
        """Put masks back."""
        return text.replace(_BLANK, str(self.tokenizer.mask_token))

    def _blank(self, text: str) -> tuple[str, str, int]:
        """Return the text before and behind the place of an answer, and how many masks hold it."""
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
        before, behind, own = self._blank(text)
        ids = self.encode(f"{before}{self.tokenizer.mask_token}{behind}", special=special).ids
        at = ids.index(self.mask_id)
        return (*ids[:at], *[self.mask_id] * (count or own or 1), *ids[at + 1 :], BREAK)

    def prompt_row(self, framed: Framed, *, slots: int | None = None) -> Ids:
        """Return the row up to where the answer begins; ``slots``: masks of a prompt that has none."""
        own = self._blank(framed.text)[2]
        return self._slotted(framed.text, framed.special, own or slots)

    def scored_row(self, framed: Framed, *, slots: int | None = None) -> Ids:
        """Return the row that an answer of so many tokens is scored behind."""
        return self._slotted(framed.scored, framed.special, slots)

    def answer_row(self, framed: Framed, answer: str, *, join: Join) -> tokens.Answer:
        """Return the row with an answer, whose tokens are those it has in its place in the text.

        Raises RequestError when the answer yields no token.
        """
        before, behind, _ = self._blank(framed.scored)
        body, start = strip(answer), len(before)
        whole = self.encode(f"{before}{body}{behind}", special=framed.special)
        target = tuple(
            token for token, (a, b) in zip(whole.ids, whole.spans, strict=True)
            if a < b and a < start + len(body) and b > start
        )  # fmt: skip
        if not body or not target:
            raise RequestError(f"target {answer!r} yields no token of its own")
        row = self._slotted(framed.scored, framed.special, len(target))
        return tokens.Answer((*row, *target), len(row))


class ClassifierCodec(SlotCodec):
    """Rows of a text classifier: text in, label out; an answer is the name of one of its labels."""

    kind = CLASSIFIER

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the labels, in the order of the logits."""
        names = {int(index): str(name) for index, name in (self.model.config.id2label or {}).items()}
        return tuple(names.get(index, str(index)) for index in range(self.vocab_size))

    @property
    def vocab_size(self) -> int:
        """Number of labels."""
        return int(self.model.config.num_labels)

    def room(self, row: Sequence[int], window: int | None) -> int:
        """Return 1 before the label, 0 behind it."""
        return 1 - len(split(row, self.name)[1])

    def reading(self, row: Ids) -> tuple[Ids, int]:
        """Return the text; a classifier has one answer."""
        return split(row, self.name)[0], 0

    def _pass(self, request: Pass, columns: Tensor) -> Pass:
        return request

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Name labels."""
        return [", ".join(self.names[i] for i in row) for row in ids]

    def prompt_row(self, framed: Framed, *, slots: int | None = None) -> Ids:
        """Return the row of a text, which labels are scored behind."""
        return (*self.encode(framed.text, special=framed.special).ids, BREAK)

    def answer_row(self, framed: Framed, answer: str, *, join: Join) -> tokens.Answer:
        """Return the row with a label. Raises RequestError for a label that the model does not have."""
        row, name = self.prompt_row(framed), strip(answer)
        if name not in self.names:
            raise RequestError(f"{answer!r} is no label of {self.name}; its labels: {', '.join(self.names)}")
        return tokens.Answer((*row, self.names.index(name)), len(row))


@torch.no_grad()
def class_logits(host: TextHost, texts: Sequence[str]) -> Tensor:
    """Classify texts with the host of a text classifier; logits ``[n, labels]``."""
    rows = [host.encode_prompt(text) for text in texts]
    groups = tokens.by_length(rows, BATCH_TOKENS)
    parts = [host.forward(host.batch([rows[i] for i in group]), keep=1)[:, 0] for group in groups]
    order = torch.tensor([i for group in groups for i in group], device=host.device)
    return torch.cat(parts)[order.argsort()]


def slot_codec(model: nn.Module) -> type[SlotCodec] | None:
    """Return the codec class of a masked language model or a text classifier; None for another model.

    transformers names the task in the class, and in the configuration's ``architectures`` of a folder.
    """
    endings: dict[str, type[SlotCodec]] = {
        "ForMaskedLM": MaskedCodec, "ForSequenceClassification": ClassifierCodec
    }  # fmt: skip
    for ending, codec in endings.items():
        if any(cls.__name__.endswith(ending) for cls in type(model).__mro__):
            return codec
    return None
