"""How text becomes rows of ids, rows a batch, and a batch a pass: what differs between kinds of model that read text.

A host owns one codec, see :func:`errata.host.open.codec_for`. A row is a prompt with as much of its answer as there
is so far. In the rows of every kind the scores of a token are read one place before it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache
from typing import Any, ClassVar

import torch
from torch import nn

from errata.errors import HostError, RequestError, shown
from errata.host import prompts, tokens
from errata.host.kinds import CAUSAL
from errata.host.passes import Pass
from errata.host.prompts import Framed
from errata.host.tokens import Ids
from errata.types import IMAGE, Picture
from errata.writing import Join

BREAK = -1
"""Marks in a row where the part that is read ends and the answer's begins; no id is negative."""
PICTURES = 2**40
"""Ids from this one on are pictures' places in a row (:mod:`errata.host.pictures`); no vocabulary is as large."""
IMAGE_IDS = ("image_token_id", "image_token_index")
"""Settings that name the token in whose place a model puts a picture's features."""
CACHED_TEXTS = 2**17
"""Tokenised texts that a codec remembers: the same probes are run before and after every edit."""


class Codec(ABC):
    """Text to rows of ids, rows to a batch, a batch to a pass; knows neither prompt formats nor windows."""

    kind: ClassVar[str]
    """Name of the kind of model, see :mod:`errata.host.kinds`."""
    continues: ClassVar[bool] = False
    """Whether a row may continue a cached one, where the model's cache allows it."""
    reads_by_encoder: ClassVar[bool] = False
    """Whether an encoder reads the prompt, so that the decoder's row holds the answer alone."""
    fills: ClassVar[bool] = False
    """Whether an answer takes places in what is read, rather than following it."""
    takes_positions: ClassVar[bool] = True
    """Whether passes number the tokens; where they do not, the model counts in its family's own way."""

    def __init__(self, model: nn.Module, tokenizer: Any, *, name: str) -> None:
        self.model: Any = model
        self.tokenizer = tokenizer
        self.name = name
        """The host's, for messages."""

    @cached_property
    def remember(self) -> Callable[..., Any]:
        """Call a function with the tokenizer and hashable arguments, or return what it returned for them before."""
        return lru_cache(CACHED_TEXTS)(lambda make, tokenizer, *arguments: make(tokenizer, *arguments))

    # --- facts -----------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """Number of tokens the model may answer with."""
        return int(text_config(self.model.config).vocab_size)

    def probe(self, device: torch.device) -> Pass:
        """Return a few tokens to find the layout with."""
        ids = torch.arange(5, device=device)[None] % self.vocab_size
        return Pass(ids, torch.ones_like(ids))

    # --- pictures --------------------------------------------------------------------------

    blind: str = "it has no image tower, or was opened without its processor of pictures"
    """Why prompts may have no pictures, for those that read none; see :mod:`errata.host.pictures`."""

    @property
    def pictures_key(self) -> str:
        """Tells apart ways in which pictures are prepared for the model; empty where it reads none."""
        return ""

    def see(self, picture: Picture) -> None:
        """Take a picture that prompts show. Raises HostError where the model reads none."""
        raise HostError(
            f"{self.name} reads no pictures ({self.blind}); {picture.name or picture.key} was given"
        )

    def check_unmarked(self, prompt: str) -> None:
        """Raise RequestError for a prompt without a picture that says where one is, if the model has such places."""
        config = getattr(self.model, "config", None)
        if IMAGE in prompt and any(isinstance(getattr(config, key, None), int) for key in IMAGE_IDS):
            raise RequestError(
                f"{shown(prompt)} says {IMAGE}, and no picture was given for it: give one, or leave {IMAGE} out"
            )

    @contextmanager
    def seeing(self, pictures: Sequence[Picture]) -> Iterator[None]:
        """Have taken some pictures inside the block; those that were not taken before it are forgotten after it."""
        for picture in pictures:
            self.see(picture)
        yield

    def resolve(self, request: Pass) -> Pass:
        """Return a pass as the model takes it."""
        return request

    def show_pictures(self, rows: Iterable[Sequence[int]]) -> bool:
        """Whether any of some rows shows a picture, inside of which it must not be cut."""
        return False

    def must_stay_whole(self, rows: Iterable[Sequence[int]]) -> bool:
        """Whether any of some rows must be run whole in every pass, whatever the model's cache allows."""
        return False

    # --- text to rows ----------------------------------------------------------------------

    def hide(self, prompt: str) -> str:
        """Replace what a prompt format must leave alone; :meth:`show` puts it back."""
        return prompt

    def show(self, text: str) -> str:
        """Put back what :meth:`hide` replaced."""
        return text

    @abstractmethod
    def encode(self, text: str, *, special: bool = True) -> tokens.Encoded:
        """Tokenise a text with character offsets; ``special`` as in :func:`errata.host.tokens.encode`."""

    @abstractmethod
    def prompt_row(self, framed: Framed, *, slots: int | None = None) -> Ids:
        """Return the row up to where the answer begins.

        ``slots``: how many tokens the answer has, for models that fill places; others do not need it.
        """

    def scored_row(self, framed: Framed, *, slots: int | None = None) -> Ids:
        """Return the row that answers are scored behind; ``slots`` as in :meth:`prompt_row`."""
        return self.prompt_row(framed, slots=slots)

    @abstractmethod
    def answer_row(self, framed: Framed, answer: str, *, join: Join) -> tokens.Answer:
        """Return the row with an answer. Raises RequestError when the answer yields no token."""

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Return answers as texts, thinking blocks left out."""
        ends = prompts.block_ends(self.tokenizer)
        answers = [prompts.behind_thoughts(list(row), ends) for row in ids]
        return list(self.tokenizer.batch_decode(answers, skip_special_tokens=True))

    def prompt_text(self, row: Sequence[int]) -> str:
        """Return the text of a row without special tokens, with the marks of its pictures."""
        return str(self.tokenizer.decode(list(row), skip_special_tokens=True))

    def text_of(self, row: Sequence[int]) -> str:
        """Return the text of a row, marks of its parts and pictures left out."""
        return str(self.tokenizer.decode([token for token in row if 0 <= token < PICTURES]))

    # --- rows to passes --------------------------------------------------------------------

    @abstractmethod
    def length(self, row: Sequence[int]) -> int:
        """Return how many tokens the window must hold for a row."""

    @abstractmethod
    def room(self, row: Sequence[int], window: int | None) -> int | None:
        """Return how many tokens may still be added to a row; None where nothing sets a bound."""

    def reading(self, row: Ids) -> tuple[Ids, int]:
        """Return the ids that the model reads to predict what follows a row, and the column of its logits."""
        return row, len(row) - 1

    @abstractmethod
    def batch(
        self, rows: Sequence[Sequence[int]], *, side: tokens.Side, fill: int, device: torch.device
    ) -> tokens.Batch:
        """Pad rows with the id ``fill``. Raises HostError for rows that the model cannot score."""

    def inputs(self, batch: tokens.Batch) -> dict[str, Any]:
        """Return the arguments of the model's forward and of its ``generate``."""
        return {"input_ids": batch.ids, "attention_mask": batch.mask}

    @abstractmethod
    def as_pass(self, batch: tokens.Batch, **options: Any) -> Pass:
        """Return a batch as a pass, with options of :class:`errata.host.passes.Pass`; places count in whole rows."""


class CausalCodec(Codec):
    """Rows of a causal language model: prompt and answer, one after the other."""

    kind = CAUSAL
    continues = True

    def encode(self, text: str, *, special: bool = True) -> tokens.Encoded:
        """Tokenise a text with character offsets."""
        return tokens.encode(self.tokenizer, text, special=special)

    def prompt_row(self, framed: Framed, *, slots: int | None = None) -> Ids:
        """Return the prompt's ids; of an empty prompt the begin token."""
        return self._stripped(framed.text, framed.special) or (tokens.begin_id(self.tokenizer),)

    def scored_row(self, framed: Framed, *, slots: int | None = None) -> Ids:
        """Return the prompt's ids with thinking closed."""
        return self._stripped(framed.scored, framed.special) or (tokens.begin_id(self.tokenizer),)

    def answer_row(self, framed: Framed, answer: str, *, join: Join) -> tokens.Answer:
        """Return the row with an answer. Raises RequestError when the answer yields no token."""
        before = self._stripped(framed.scored, framed.special)
        arguments = (framed.scored, answer, framed.special, join, framed.lead, before)
        return self.remember(_answer_ids, self.tokenizer, *arguments)

    def _stripped(self, text: str, special: bool) -> Ids:
        return self.remember(_stripped_ids, self.tokenizer, text, special)

    def length(self, row: Sequence[int]) -> int:
        """Return the number of tokens of a row."""
        return len(row)

    def room(self, row: Sequence[int], window: int | None) -> int | None:
        """Return what the window holds besides the row, one at least."""
        return None if window is None else max(1, window - len(row))

    def batch(
        self, rows: Sequence[Sequence[int]], *, side: tokens.Side, fill: int, device: torch.device
    ) -> tokens.Batch:
        """Pad rows."""
        return tokens.pad(rows, side=side, fill=fill, device=device)

    def as_pass(self, batch: tokens.Batch, **options: Any) -> Pass:
        """Return a batch as a pass."""
        return Pass(batch.ids, batch.mask, batch.positions, **options)


def text_config(config: Any) -> Any:
    """Return the configuration of the language model, where the model's own holds others beside it."""
    inner = getattr(config, "get_text_config", None)
    return inner(decoder=True) if inner is not None else config


def split(row: Sequence[int], name: str) -> tuple[Ids, Ids]:
    """Return the two parts of a row with a break. Raises HostError, naming the host, for a row without."""
    ids = tuple(row)
    if BREAK not in ids:
        raise HostError(f"{name} scores answers to prompts, not running text")
    place = ids.index(BREAK)
    return ids[:place], ids[place + 1 :]


def _stripped_ids(tokenizer: Any, prompt: str, special: bool) -> Ids:
    return tokens.encode_stripped(tokenizer, prompt, special=special).ids


def _answer_ids(
    tokenizer: Any, prompt: str, answer: str, special: bool, join: Join, lead: str | None, before: Ids
) -> tokens.Answer:
    return tokens.encode_answer(
        tokenizer, prompt, answer, special=special, join=join, lead=lead, prompt_ids=before
    )
