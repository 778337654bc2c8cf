"""Encoder-decoders as hosts: a prompt is read by the encoder, an answer said by the decoder.

A text of such a model is one row of ids, ``(*source, BREAK, start, *said)``: what the encoder reads, a mark,
and what the decoder is given, from its start token on. What stands before a token in such a row is what the
token depends on, so rows are handled as those of a causal model are: scores of a token are read one place
before it, and a row that another one begins with need not be run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from errata.errors import HostError, RequestError
from errata.host import tokens
from errata.host.kinds import ENCODER_DECODER
from errata.host.load import Host
from errata.host.passes import Pass
from errata.host.prompts import Framed, written
from errata.writing import strip

Ids = tuple[int, ...]

BREAK = -1
"""Marks in a row where the encoder's part ends; no id is negative."""


@dataclass(frozen=True)
class Pairs(tokens.Batch):
    """A batch whose own fields are the decoder's side."""

    source: tokens.Batch
    """What the encoder reads."""
    begin: Tensor
    """int64 ``[rows]``: place of the decoder's first token in each row, BREAK counted."""


class Seq2SeqHost(Host):
    """An encoder-decoder language model with its tokenizer and a layout of two stacks.

    Its :attr:`layout` is the decoder's, with the encoder's under ``encoder``.
    """

    kind = ENCODER_DECODER

    def __repr__(self) -> str:
        return f"Seq2SeqHost({self.name!r}, {self.family}, {self.dtype})"

    def _probe(self) -> Pass:
        """Return a few tokens for each stack; their numbers differ, so that states tell whose they are."""
        said, read = (torch.arange(n, device=self.device)[None] % self.vocab_size for n in (5, 7))
        return Pass(said, torch.ones_like(said), source=(read, torch.ones_like(read)))

    @property
    def reads_by_encoder(self) -> bool:
        """True: a row's first part is the encoder's."""
        return True

    @property
    def continues(self) -> bool:
        """False: rows share no cache; transformers' own loop generates."""
        return False

    @cached_property
    def start_token(self) -> int:
        """Id that the decoder is given first. Raises HostError where no setting names it."""
        for settings in (getattr(self.model, "generation_config", None), self.config):
            for key in ("decoder_start_token_id", "bos_token_id"):
                found = getattr(settings, key, None)
                if isinstance(found, int):
                    return found
        raise HostError(f"{self.name} names no decoder_start_token_id; set it in the model's configuration")

    @cached_property
    def _frame(self) -> tuple[Ids, int]:
        """Tokens that the tokenizer puts before any answer, and how many it puts after it."""
        made = self.tokenizer(text_target="a", return_special_tokens_mask=True)
        ids, special = list(made["input_ids"]), [bool(s) for s in made["special_tokens_mask"]]
        if all(special):
            raise HostError("the tokenizer gives no token for the text 'a'")
        return tuple(ids[: special.index(False)]), special[::-1].index(False)

    def encode(self, text: str, *, special: bool = True) -> tokens.Encoded:
        """Tokenise what the encoder reads, closing token and all."""
        made = self.tokenizer(text, return_offsets_mapping=True, add_special_tokens=special)
        return tokens.Encoded(text, tuple(made["input_ids"]), tuple(map(tuple, made["offset_mapping"])))

    def encode_framed(self, framed: Framed, *, slots: int | None = None) -> Ids:
        """Return the row up to where the answer begins."""
        lead, _ = self._frame
        return (*self.encode(framed.text, special=framed.special).ids, BREAK, self.start_token, *lead)

    def encode_base(self, prompt: str, *, slots: int | None = None) -> Ids:
        """Return the row that answers are scored behind: the decoder's side begins alike."""
        return self.encode_prompt(prompt)

    def encode_answer(
        self, prompt: str, answer: str, *, prefix: str = "", before: int | None = None, special: bool = True
    ) -> tokens.Answer:
        """Return the row with an answer, without the token that closes it.

        Raises RequestError when the answer yields no token.
        """
        lead, closing = self._frame
        body = strip(answer)
        ids = list(self.tokenizer(text_target=body)["input_ids"])
        target = ids[len(lead) : len(ids) - closing]
        if not target or not body:
            raise RequestError(f"target {answer!r} yields no token of its own")
        framed = self.frame(prompt, prefix=prefix, before=before) if special else written(prompt)
        row = self.encode_framed(framed)
        return tokens.Answer((*row, *target), len(row))

    def length(self, row: Ids) -> int:
        """Return the longer of the two sides, each of which the window holds by itself."""
        place = row.index(BREAK)
        return max(place, len(row) - place - 1)

    def batch(self, rows: Sequence[Sequence[int]], *, side: tokens.Side = "right") -> Pairs:
        """Pad rows; the encoder's side always on the right, since its places may count from the left.

        Raises HostError for rows without a decoder's part, RequestError for what is longer than the window.
        """
        if any(BREAK not in row for row in rows):
            raise HostError(
                f"{self.name} is an encoder-decoder: it scores answers to prompts, not running text"
            )
        places = [list(row).index(BREAK) for row in rows]
        source = [list(row)[:place] for row, place in zip(rows, places, strict=True)]
        said = [list(row)[place + 1 :] for row, place in zip(rows, places, strict=True)]
        read, given = super().batch(source), super().batch(said, side=side)
        begin = torch.tensor([place + 1 for place in places])
        return Pairs(given.ids, given.mask, given.positions, given.offset, read, begin)

    def inputs(self, batch: tokens.Batch) -> dict[str, Any]:
        """Return what the model takes."""
        if not isinstance(batch, Pairs):
            raise HostError("an encoder-decoder takes rows of its own batch()")
        return {
            "input_ids": batch.source.ids,
            "attention_mask": batch.source.mask,
            "decoder_input_ids": batch.ids,
            "decoder_attention_mask": batch.mask,
        }

    def as_pass(self, batch: tokens.Batch, **options: Any) -> Pass:
        """Return a batch as a pass: the encoder's side, and the decoder's, at whose places logits are wanted."""
        if not isinstance(batch, Pairs):
            raise HostError("an encoder-decoder takes rows of its own batch()")
        at = options.pop("at", None)
        if at is not None:
            row, place = at
            at = (row, place - batch.begin[row] + batch.offset.cpu()[row])
        options.pop("ends", None)  # a prompt ends in the encoder, before any of these
        return Pass(batch.ids, batch.mask, source=(batch.source.ids, batch.source.mask), at=at, **options)


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a live model reads with an encoder and speaks with a decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
