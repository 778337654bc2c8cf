"""Prompts with pictures: how a vision-language model's own processor writes them, and what it makes of the pictures.

A picture stands in a prompt as its mark (:class:`errata.types.Picture`). The processor says how a picture is written
out: a marker between delimiters, expanded to one placeholder for each of its features. Rows of ids hold these in their
true places, the placeholders under a number of the picture's own; so two prompts are the same row only if they show the
same picture, and all that acts on rows (subjects' places, shared prefixes, batches) needs to know nothing of pictures.
Numbers become the model's placeholder where a pass reaches the model, and the processor's pixels go with it.
"""

from __future__ import annotations

import hashlib
import io
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from errata import rasters
from errata.errors import HostError, RequestError
from errata.host import passes, tokens
from errata.host.codec import IMAGE_IDS, PICTURES, CausalCodec, _answer_ids
from errata.host.files import first_line
from errata.host.passes import Pass
from errata.host.prompts import Framed
from errata.host.tokens import Ids
from errata.types import Picture, marks
from errata.writing import Join

FIRST = PICTURES
"""Number of the first picture's placeholders."""
BATCHES = 16
"""Batches of pictures whose pixels are remembered: a search runs the same ones in every step."""
TOKEN_INPUTS = ("input_ids", "attention_mask")
TYPE_INPUTS = ("mm_token_type_ids", "token_type_ids")
"""What a processor says of each token: whether it belongs to a picture."""
KNOWN = (*TOKEN_INPUTS, *TYPE_INPUTS, "pixel_values", "pixel_attention_mask")
"""Inputs of known meaning; another that has an entry for each token belongs to the tokens of one text."""
_MARK = "What does the picture show?"
"""Stands for a text while a chat template is looked at."""


@dataclass(frozen=True)
class _Seen:
    """A picture that was given to a host."""

    number: int
    data: bytes
    """The image file; decoded when a batch needs it, for thousands of decoded pictures do not fit in memory."""
    text: str
    """How the processor writes it out, delimiters and placeholders."""
    count: int
    """Number of its placeholders."""
    ids: Ids
    """What stands for it in a row: the text's ids, the number in place of placeholders."""

    @property
    def image(self) -> Any:
        """Pillow's image, RGB."""
        return _opened(self.data, f"picture {self.number}")


@dataclass(frozen=True)
class _Piece:
    """A picture in a text: where its mark is, and where what is written for it."""

    mark: tuple[int, int]
    written: tuple[int, int]
    seen: _Seen


def is_processor(tokenizer: Any) -> bool:
    """Whether what was given for a tokenizer is a processor of text and pictures."""
    return all(getattr(tokenizer, name, None) is not None for name in ("tokenizer", "image_processor"))


class PictureCodec(CausalCodec):
    """Rows of a causal model whose prompts may have pictures."""

    def __init__(self, model: Any, processor: Any, *, name: str) -> None:
        """Take a model and its processor of text and pictures."""
        super().__init__(model, processor.tokenizer, name=name)
        self.processor = processor
        self._seen: dict[str, _Seen] = {}
        self._together: set[tuple[int, ...]] = set()
        """Pictures, by their numbers, that were found to be written together as each by itself."""
        self._numbers = itertools.count(
            FIRST
        )  # none is given twice, so what is remembered by numbers stays true

    # --- pictures --------------------------------------------------------------------------

    def beside(self, model: Any, name: str) -> PictureCodec:
        """Return the codec of a copy of the model, which knows the same pictures by the same numbers."""
        other = PictureCodec(model, self.processor, name=name)
        other._seen, other._numbers = self._seen, self._numbers
        return other

    def see(self, picture: Picture) -> None:
        """Take a picture, so that prompts may have its mark.

        Raises RequestError for one that cannot be read, HostError where the processor does not say how one is written.
        """
        if picture.key in self._seen:
            return
        name = picture.name or f"the picture {picture.key}"
        if picture.data is None:
            raise RequestError(
                f"the bytes of {name} are not at hand (an edit keeps the hash alone, {picture.key}): give the request "
                "with its image file"
            )
        image = _opened(picture.data, name)
        text, ids = self._written(image)
        number = next(self._numbers)
        own = tuple(number if token == self.placeholder else token for token in ids)
        # of two threads that were given the picture at once, both go on with the first one's number
        self._seen.setdefault(picture.key, _Seen(number, picture.data, text, own.count(number), own))

    @contextmanager
    def seeing(self, pictures: Sequence[Picture]) -> Iterator[None]:
        """Have taken some pictures inside the block; those that were not taken before it are forgotten after it."""
        new = [picture.key for picture in pictures if picture.key not in self._seen]
        try:
            for picture in pictures:
                self.see(picture)
            yield
        finally:
            for key in new:
                self._seen.pop(key, None)

    @cached_property
    def pictures_key(self) -> str:
        """Hash of how the processor writes pictures and prepares their pixels, 12 hex digits."""
        facts = {name: repr(value) for name, value in self.processor.image_processor.to_dict().items()}
        text = repr((self.form, sorted(facts.items())))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @cached_property
    def placeholder(self) -> int:
        """Id that the model puts a picture's features in place of. Raises HostError where its settings name none."""
        for key in IMAGE_IDS:
            value = getattr(self.model.config, key, None)
            if isinstance(value, int):
                return value
        raise HostError(
            f"the configuration of {self.name} names no image token, so it is not known where pictures go in a text"
        )

    @cached_property
    def form(self) -> str:
        """How one picture is written before it is expanded: as the chat template does it, else the marker alone."""
        marker = str(
            getattr(self.processor, "boi_token", None) or getattr(self.processor, "image_token", "") or ""
        )
        if getattr(self.processor, "chat_template", None):
            text = {"type": "text", "text": _MARK}
            try:
                heads = [
                    self.processor.apply_chat_template(
                        [{"role": "user", "content": content}], tokenize=False
                    ).partition(_MARK)[0]
                    for content in ([text], [{"type": "image"}, text])
                ]
            except Exception:  # whatever a template raises: then the marker says it
                return marker
            if heads[1].startswith(heads[0]) and marker and marker in heads[1][len(heads[0]) :]:
                return heads[1][len(heads[0]) :]
        return marker

    @cached_property
    def typed(self) -> frozenset[int]:
        """Ids that the processor counts as a picture's, where the model is told so of each token."""
        seen = next(iter(self._seen.values()))
        output = self._process([seen.image], [self.form])
        for name in TYPE_INPUTS:
            if name in output:
                ids, types = _row(output["input_ids"]), _row(output[name])
                return frozenset(i for i, kind in zip(ids, types, strict=True) if kind)
        return frozenset({self.placeholder})

    def _process(self, images: Sequence[Any], texts: Sequence[str], **options: Any) -> Mapping[str, Any]:
        try:
            return self.processor(images=list(images), text=list(texts), add_special_tokens=False, **options)
        except Exception as error:  # of a library that raises anything
            raise HostError(
                f"the processor of {self.name} ({type(self.processor).__name__}) does not take a picture: "
                f"{first_line(error)}"
            ) from error

    def _written(self, image: Any) -> tuple[str, Ids]:
        """Return what the processor writes for a picture, as text and as ids."""
        if not self.form:
            raise HostError(f"the processor of {self.name} names no marker for a picture in a text")
        output = self._process([image], [self.form])
        ids = _row(output["input_ids"])
        own = [
            name for name, value in output.items() if name not in KNOWN and _shape(value)[:2] == (1, len(ids))
        ]
        if own:
            raise HostError(
                f"{self.name} reads pictures through inputs that belong to the tokens of one text ({own[0]}), which "
                "are not batched here: edit it by text requests"
            )
        text = _spelled(self.tokenizer, ids)
        if self.placeholder not in ids:
            raise HostError(
                f"the processor of {self.name} writes no image token {self.placeholder} for a picture"
            )
        if self.tokenizer(text, add_special_tokens=False)["input_ids"] != ids:
            raise HostError(
                f"what the processor of {self.name} writes for a picture cannot be put into a text"
            )
        return text, tuple(ids)

    # --- text to rows ----------------------------------------------------------------------

    def _expanded(self, text: str) -> tuple[str, list[_Piece]]:
        """Write the pictures of a text out. Raises RequestError for one that the host was not given."""
        whole, at = "", 0
        pieces: list[_Piece] = []
        for start, stop, key in marks(text):
            if key not in self._seen:
                raise RequestError(
                    f"the prompt shows a picture {key} that {self.name} was not given: give the request or probe "
                    "with its image"
                )
            seen = self._seen[key]
            whole += text[at:start]
            pieces.append(_Piece((start, stop), (len(whole), len(whole) + len(seen.text)), seen))
            whole, at = whole + seen.text, stop
        if len(pieces) > 1:
            self._check_several([piece.seen for piece in pieces])
        return whole + text[at:], pieces

    def _check_several(self, seen: Sequence[_Seen]) -> None:
        """Raise HostError where the processor writes several pictures of a text otherwise than each by itself."""
        numbers = tuple(one.number for one in seen)
        if numbers in self._together:
            return
        output = self._process([one.image for one in seen], [self.form * len(seen)])
        expected = self.tokenizer("".join(one.text for one in seen), add_special_tokens=False)["input_ids"]
        if _row(output["input_ids"]) != expected:
            raise HostError(
                f"the processor of {self.name} writes {len(seen)} pictures of one text otherwise than each by itself: "
                "give one picture a prompt"
            )
        self._together.add(numbers)

    def _numbered(self, ids: Sequence[int], pieces: Sequence[_Piece]) -> Ids:
        """Put each picture's number in place of its placeholders."""
        numbers = [piece.seen.number for piece in pieces for _ in range(piece.seen.count)]
        if ids.count(self.placeholder) != len(numbers):
            raise RequestError(
                f"a prompt holds {ids.count(self.placeholder)} image tokens, and its pictures have {len(numbers)}: "
                "write <image> only where the picture stands"
            )
        rest = iter(numbers)
        return tuple(next(rest) if token == self.placeholder else token for token in ids)

    def encode(self, text: str, *, special: bool = True) -> tokens.Encoded:
        """Tokenise a text with character offsets; all that is written for a picture has the place of its mark."""
        whole, pieces = self._expanded(text)
        encoded = tokens.encode(self.tokenizer, whole, special=special)
        if not pieces:
            return encoded
        spans = tuple(
            (_before(start, pieces, last=False), _before(stop, pieces, last=True))
            for start, stop in encoded.spans
        )
        return tokens.Encoded(text, self._numbered(encoded.ids, pieces), spans)

    def answer_row(self, framed: Framed, answer: str, *, join: Join) -> tokens.Answer:
        """Return the row with an answer. Raises RequestError when the answer yields no token."""
        whole, pieces = self._expanded(framed.scored)
        if not pieces:
            return super().answer_row(framed, answer, join=join)
        before = super()._stripped(whole, framed.special)
        arguments = (whole, answer, framed.special, join, framed.lead, before)
        row = self.remember(_answer_ids, self.tokenizer, *arguments)
        return tokens.Answer(self._numbered(row.ids, pieces), row.start)

    def _stripped(self, text: str, special: bool) -> Ids:
        whole, pieces = self._expanded(text)
        ids = super()._stripped(whole, special)
        return self._numbered(ids, pieces) if pieces else ids

    def prompt_text(self, row: Sequence[int]) -> str:
        """Return the text of a row without special tokens, with the marks of its pictures."""
        numbers = set(row)
        own = [(key, seen) for key, seen in self._seen.items() if seen.number in numbers]
        if not own:
            return super().prompt_text(row)
        text, plain, at = "", list[int](), 0
        while at < len(row):
            key, ids = next(
                ((k, seen.ids) for k, seen in own if tuple(row[at : at + len(seen.ids)]) == seen.ids),
                ("", ()),
            )
            if ids:
                text += super().prompt_text(plain) + Picture.mark_of(key)
                plain = []
            elif row[at] < FIRST:  # else the rest of a picture that a row was cut in
                plain.append(row[at])
            at += max(1, len(ids))
        return text + super().prompt_text(plain)

    def text_of(self, row: Sequence[int]) -> str:
        """Return the text of a row; of one that shows pictures as :meth:`prompt_text`."""
        return self.prompt_text(row) if self.show_pictures([row]) else super().text_of(row)

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Return answers as texts, thinking blocks and pictures left out."""
        return super().decode([[token for token in row if token < FIRST] for row in ids])

    # --- rows to passes --------------------------------------------------------------------

    @cached_property
    def counts_axes(self) -> bool:
        """Whether tokens of a picture have places on several axes, which the model computes of a whole row alone."""
        return self._axes() is not None

    def _axes(self) -> Any:
        inner = getattr(self.model, "model", None)
        return next(
            (
                found
                for one in (self.model, inner)
                if (found := getattr(one, "get_rope_index", None)) is not None
            ),
            None,
        )

    def show_pictures(self, rows: Iterable[Sequence[int]]) -> bool:
        """Whether any of some rows shows a picture, inside of which it must not be cut."""
        return bool(self._seen) and any(token >= FIRST for row in rows for token in row)

    def must_stay_whole(self, rows: Iterable[Sequence[int]]) -> bool:
        """Whether any of some rows must be run whole in every pass: its picture's places are on several axes."""
        return self.show_pictures(rows) and self.counts_axes

    def inputs(self, batch: tokens.Batch) -> dict[str, Any]:
        """Return the arguments of the model's forward and of its ``generate``."""
        ready = self.resolve(Pass(batch.ids, batch.mask))
        return {"input_ids": ready.ids, "attention_mask": batch.mask, **ready.images}

    def resolve(self, request: Pass) -> Pass:
        """Return a pass as the model takes it: placeholders for the pictures' numbers, and the pixels."""
        if request.ids is None or not self._seen:
            return request
        shown = request.ids >= FIRST
        if not bool(shown.any()):
            return request
        by_number = {seen.number: seen for seen in self._seen.values()}
        order: list[int] = []
        for row in request.ids.tolist():
            order += _shown_in([token for token in row if token >= FIRST], by_number, self.name)
        ids = request.ids.masked_fill(shown, self.placeholder)
        accepts = passes.arguments(self.model)
        device, dtype = (
            request.ids.device,
            next(p.dtype for p in self.model.parameters() if p.is_floating_point()),
        )
        images = {
            name: value.to(device, dtype) if value.is_floating_point() else value.to(device)
            for name, value in self._pixels(tuple(order)).items() if name in accepts
        }  # fmt: skip
        if accepts & set(TYPE_INPUTS):
            types = torch.isin(ids, torch.tensor(sorted(self.typed), device=device))
            images |= {name: types.long() for name in TYPE_INPUTS if name in accepts}
        positions = request.positions
        if self.counts_axes:
            positions = self._positions(ids, request, images)
        return replace(request, ids=ids, images=images, positions=positions, shown=request.ids)

    def _positions(self, ids: Tensor, request: Pass, images: Mapping[str, Tensor]) -> Tensor | None:
        """Return each token's place on the model's axes ``[axes, rows, length]``, as the model counts them."""
        mask = request.mask
        if mask is not None and mask.shape[1] != ids.shape[1]:
            raise HostError(f"{self.name} counts a picture's places over whole rows, and one was continued")
        names = ("image_grid_thw", "mm_token_type_ids")
        known = {name: images[name] for name in names if name in images}
        return self._axes()(ids, attention_mask=mask, **known)[0]

    @cached_property
    def _pixels(self) -> Any:
        """Prepare pictures, by their numbers in order, remembering the last batches: inputs by name."""

        @lru_cache(BATCHES)
        def prepare(numbers: tuple[int, ...]) -> Mapping[str, Tensor]:
            wanted = set(numbers)
            images = {seen.number: seen.image for seen in self._seen.values() if seen.number in wanted}
            output = self._process(
                [images[number] for number in numbers], [self.form * len(numbers)], return_tensors="pt"
            )
            return {
                name: value for name, value in output.items()
                if name not in (*TOKEN_INPUTS, *TYPE_INPUTS) and isinstance(value, Tensor)
            }  # fmt: skip

        return prepare


def _shown_in(numbers: list[int], by_number: Mapping[int, _Seen], name: str) -> list[int]:
    """Return the pictures that a row's placeholders are of, in order. Raises HostError for a part of one."""
    order: list[int] = []
    at = 0
    while at < len(numbers):
        count = by_number[numbers[at]].count
        if numbers[at : at + count] != [numbers[at]] * count:
            raise HostError(f"{name} was given a part of a picture: a row was cut inside it")
        order.append(numbers[at])
        at += count
    return order


def _before(at: int, pieces: Sequence[_Piece], *, last: bool) -> int:
    """Return the place in a text of a place in what was written out of it; inside a picture, an end of its mark."""
    shift = 0
    for piece in pieces:
        start, stop = piece.written
        if at < start or (last and at == start):
            break
        if at < stop or (last and at == stop):
            return piece.mark[1] if last else piece.mark[0]
        shift = piece.mark[1] - stop
    return at + shift


def _spelled(tokenizer: Any, ids: Sequence[int]) -> str:
    """Return the text of ids, each added token as it is written."""
    added = tokenizer.added_tokens_decoder
    text, plain = "", list[int]()
    for token in (*ids, None):
        if token is not None and token not in added:
            plain.append(token)
            continue
        text += tokenizer.decode(plain) if plain else ""
        plain = []
        text += "" if token is None else str(added[token])
    return text


def _opened(data: bytes, name: str) -> Any:
    """Open an image file's bytes as an RGB image of Pillow. Raises RequestError, HostError without Pillow."""
    try:
        return rasters.opened(io.BytesIO(data), "RGB")
    except ImportError as error:
        raise HostError("reading pictures needs Pillow: pip install 'errata[images]'") from error
    except ValueError as error:
        raise RequestError(f"{name} cannot be read as an image: {error}") from error


def _row(value: Any) -> list[Any]:
    """Return the first row of a processor's output, or nothing where it is none."""
    first = value[0] if len(_shape(value)) > 1 else value
    return first.tolist() if hasattr(first, "tolist") else list(first)


def _shape(value: Any) -> tuple[int, ...]:
    shape = getattr(value, "shape", None)
    if shape is not None:
        return tuple(shape)
    if isinstance(value, (list, tuple)):
        return (len(value), *(_shape(value[0]) if value else ()))
    return ()
