"""How a model reads text: rows of token ids, prompts and answers, passes over them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from errata import files
from errata.errors import HostError, RequestError, shown
from errata.host import hooks, passes, placed, placement, prompts, tokens
from errata.host.base import ModelHost
from errata.host.codec import Codec, text_config
from errata.host.kinds import CAUSAL, kind
from errata.host.layout import Layout, discover
from errata.host.passes import Pass, Ran
from errata.types import Picture

Padding = Literal["left", "equal", "uncached"]
"""How rows are generated from together: padded on the left, in groups of equal length, or those without a cache."""


def check_characters(text: str) -> None:
    """Raise RequestError for half a surrogate pair, as broken text of a terminal or of JSON has; none can be read."""
    half = files.HALF_PAIR.search(text)
    if half is not None:
        raise RequestError(
            f"{shown(text)} holds half a surrogate pair, \\u{ord(half[0]):04x}, which is no character"
        )


class TextHost(ModelHost):
    """A model that reads text, with its codec and its layout; :class:`errata.host.host.Host` also generates."""

    def __init__(self, model: nn.Module, codec: Codec, *, name: str) -> None:
        """Take a live model; ``codec``: how it reads and answers."""
        super().__init__(model, name=name)
        self.codec = codec
        self.kind = self.codec.kind
        self.prompt_format = prompts.PromptFormat()
        self.position_tables: tuple[int, ...] = ()
        """How many tokens its tables of positions have room for, as measured when it was opened."""

    def __repr__(self) -> str:
        title = "" if self.kind == CAUSAL else f"{kind(self.kind).title}, "
        return f"Host({self.name!r}, {title}{self.family}, {len(self.layout.blocks)} layers, {self.dtype})"

    # --- facts -----------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        """What turns text into ids."""
        return self.codec.tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self.codec.tokenizer = tokenizer

    @property
    def text_config(self) -> Any:
        """The configuration of the language model, where the model's own holds others beside it."""
        return text_config(self.config)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, or labels, the model may answer with."""
        return self.codec.vocab_size

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the embeddings."""
        return placement.runs_on(self.model.get_input_embeddings())

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the embeddings."""
        return self.model.get_input_embeddings().weight.dtype

    @property
    def layout(self) -> Layout:
        """Sites found by structure, anew where layers were replaced since, as by an adapter.

        Raises HostError where there are none to find.
        """
        cached = self.__dict__.get("_layout")
        modules = placement.identities(self.model)
        if cached is None or cached[0] != modules:
            with hooks.plain_torch(), passes.without_interventions():
                layout = discover(self.model, self.codec.probe(self.device))
            cached = vars(self)["_layout"] = modules, layout
        return cached[1]

    def _vocabulary(self) -> bytes:
        if self.tokenizer is None:
            return b""
        vocabulary = sorted(self.tokenizer.get_vocab().items(), key=lambda item: item[1])
        return repr(vocabulary).encode()

    @property
    def reads_by_encoder(self) -> bool:
        """Whether an encoder reads the prompt, so that the decoder's row holds the answer alone."""
        return self.codec.reads_by_encoder

    @property
    def fills(self) -> bool:
        """Whether an answer takes places in what is read, rather than following it."""
        return self.codec.fills

    @cached_property
    def accepts(self) -> frozenset[str]:
        """Arguments of the model's forward that passes may give it."""
        names = passes.arguments(self.model)
        return names if self.codec.takes_positions else names - {"position_ids"}

    # --- found by running it, see :mod:`errata.host.trial` ---------------------------------

    @property
    @abstractmethod
    def window(self) -> int | None:
        """Longest input in tokens; None if neither the configuration nor a table of positions sets a bound."""

    @property
    @abstractmethod
    def beyond(self) -> Mapping[int, str]:
        """Tokens of the tokenizer that the model has no embedding for, by their ids."""

    @property
    @abstractmethod
    def continues(self) -> bool:
        """Whether texts may continue one that was run before; see :mod:`errata.host.prefix`."""

    @property
    @abstractmethod
    def padding(self) -> Padding:
        """How rows are generated from together so that none sees another's padding."""

    # --- rows and passes -------------------------------------------------------------------

    def length(self, row: tokens.Ids) -> int:
        """Return how many tokens the window must hold for a row."""
        return self.codec.length(row)

    def room(self, row: tokens.Ids) -> int | None:
        """Return how many tokens may still be added to a row; None where nothing sets a bound."""
        return self.codec.room(row, self.window)

    def reading(self, row: tokens.Ids) -> tuple[tokens.Ids, int]:
        """Return the ids that the model reads to predict what follows a row, and the column of its logits."""
        return self.codec.reading(row)

    @property
    def pad_id(self) -> int:
        """Id used to fill rows; masked out everywhere."""
        for key in ("pad_token_id", "eos_token_id", "bos_token_id"):
            value = getattr(self.tokenizer, key, None)
            if value is not None and int(value) not in self.beyond:
                return int(value)
        return 0

    def batch(self, rows: Sequence[Sequence[int]], *, side: tokens.Side = "right") -> tokens.Batch:
        """Pad rows of token ids. Raises RequestError for a row longer than the model's window.

        Raises HostError for running text where the model scores answers to prompts only.
        """
        self.check_window(max(self.codec.length(row) for row in rows))
        return self.codec.batch(rows, side=side, fill=self.pad_id, device=self.device)

    def check_window(self, length: int) -> None:
        """Raise RequestError for a text of more tokens than the model's window holds."""
        if self.window is not None and length > self.window:
            raise RequestError(
                f"a text of {length} tokens is longer than the model's window of {self.window}"
            )

    def inputs(self, batch: tokens.Batch) -> dict[str, Any]:
        """Return what the model takes of a batch wherever it is run or generates."""
        return self.codec.inputs(batch)

    def as_pass(self, batch: tokens.Batch, **options: Any) -> Pass:
        """Return a batch as a pass, with options of :class:`errata.host.passes.Pass`; places count in whole rows."""
        return self.codec.as_pass(batch, **options)

    def forward(self, batch: tokens.Batch, *, keep: int | None = None) -> Tensor:
        """Run a batch; logits ``[rows, length, vocab]``, or of the last ``keep`` positions only.

        Raises HostError for more than the last where a model fills places.
        """
        if self.fills and keep != 1:
            raise HostError(f"{self.name} scores answers to prompts, not running text")
        logits = self.run(self.as_pass(batch, last=keep)).logits
        return logits[:, None] if self.fills else logits

    def forward_at(
        self, batch: tokens.Batch, row: Tensor, at: Tensor, *, ends: Tensor | None = None,
        routes: Mapping[str, Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """Run a batch; logits ``[n, vocab]`` at the positions (row[i], at[i]) only.

        ``ends`` ``[rows]``: position of each row's last prompt token; None: its last token. ``routes``: what was
        decided about the rows, ``[rows, ...]``.
        """
        return self.run(self.as_pass(batch, at=(row, at), ends=ends, routes=routes or {})).logits

    def generate_batch(
        self, batch: tokens.Batch, routes: Mapping[str, Tensor] | None = None, **options: Any
    ) -> Any:
        """Let transformers continue a batch; ``routes``: decisions ``[rows]``; returns what its loop does."""
        options["pad_token_id"] = self.pad_id
        with torch.no_grad():
            shown = batch.ids if self.codec.show_pictures(batch.ids.tolist()) else None
            return passes.generate(self.model, self.inputs(batch), routes, shown=shown, **options)

    # --- pictures --------------------------------------------------------------------------

    def see(self, items: Iterable[Any]) -> None:
        """Take the pictures of requests and probes, so that their prompts can be read.

        Whoever passes a prompt with a picture on as text gives the picture here first. Raises HostError where the
        model reads no pictures, RequestError for a picture that cannot be read, or a prompt that marks the place of one
        and has none.
        """
        for item in items:
            pictures = (item,) if isinstance(item, Picture) else getattr(item, "pictures", ())
            for picture in pictures:
                self.codec.see(picture)
            if not pictures:
                self.codec.check_unmarked(getattr(item, "text", None) or getattr(item, "prompt", ""))

    def run(self, request: Pass) -> Ran:
        """Run one forward pass; see :meth:`errata.host.base.ModelHost.run`."""
        return super().run(self.codec.resolve(request))

    def continues_rows(self, rows: Iterable[tokens.Ids]) -> bool:
        """Whether rows may be continued from what was run of them before: :attr:`continues`, and none is kept whole."""
        return self.continues and not self.codec.must_stay_whole(rows)

    # --- text ------------------------------------------------------------------------------

    def frame(
        self, prompt: str, *, prefix: str = "", before: int | None = None,
        number: int | Collection[int] | None = None,
    ) -> prompts.Framed:  # fmt: skip
        """Format a prompt by :attr:`prompt_format`, after edits have rewritten it.

        See :func:`errata.host.prompts.frame`; ``before`` counts in the prompt that is passed. ``number``: the
        edit sets that the prompt belongs to.
        """
        text, before = self._hidden(prompt, before)
        rewritten = self.rewritten(text, number)
        if before is not None and rewritten != text:
            before += max(rewritten.rfind(text), 0)  # what edits put before it
        template = getattr(self.tokenizer, "chat_template", None)
        key = repr(template) if template else ""  # it may be changed on a live tokenizer
        framed = self.codec.remember(
            _frame, self.tokenizer, self.prompt_format, rewritten, prefix, before, key
        )
        whole = self.codec.show(framed.text)
        if whole is framed.text:  # nothing was hidden
            return framed
        return replace(framed, text=whole, scored=self.codec.show(framed.scored))

    def _hidden(self, prompt: str, before: int | None) -> tuple[str, int | None]:
        """Return a prompt without what its format must leave alone, and where ``before`` is in it."""
        text = self.codec.hide(prompt)
        if before is not None and text != prompt:
            before += len(self.codec.hide(prompt[:before])) - len(prompt[:before])
        return text, before

    def rewritten(self, prompt: str, number: int | Collection[int] | None = None) -> str:
        """Return a prompt as the edits in place make it, the oldest first; ``number``: its edit sets.

        Passes that interventions leave alone read prompts as they are.
        """
        if passes.is_plain():
            return prompt
        for rewriter in placed.on(self.model).rewriters:
            if rewriter.takes(number):
                prompt = rewriter.rewrite(prompt)
        return prompt

    def prefixed(self, prompt: str, prefix: str, before: int | None = None) -> str:
        """Put running text before a prompt; see :func:`errata.host.prompts.prefixed`."""
        text, before = self._hidden(prompt, before)
        return self.codec.show(prompts.prefixed(self.tokenizer, text, prefix, before))

    def encode(self, text: str, *, special: bool = True) -> tokens.Encoded:
        """Tokenise a text with character offsets; ``special`` as in :func:`tokens.encode`."""
        check_characters(text)
        encoded = self.codec.encode(text, special=special)
        self._check_embedded(encoded.ids)
        return encoded

    def encode_framed(self, framed: prompts.Framed, *, slots: int | None = None) -> tokens.Ids:
        """Tokenise what is continued of a framed prompt; ids.

        ``slots``: how many tokens the answer has, for models that fill places; others do not need it.
        """
        check_characters(framed.text)
        return self._check_embedded(self.codec.prompt_row(framed, slots=slots))

    def encode_prompt(self, prompt: str, *, special: bool = True) -> tokens.Ids:
        """Tokenise a prompt to be continued; ids. ``special`` off: it is a conversation with its own tokens."""
        return self.encode_framed(self.frame(prompt) if special else prompts.conversation(prompt))

    def encode_base(self, prompt: str, *, slots: int | None = None) -> tokens.Ids:
        """Tokenise what answers to a prompt are scored behind: :meth:`encode_prompt`, thinking closed; ids.

        ``slots`` as in :meth:`encode_framed`.
        """
        return self._check_embedded(self.codec.scored_row(self.frame(prompt), slots=slots))

    def encode_answer(
        self, prompt: str, answer: str, *, prefix: str = "", before: int | None = None, special: bool = True
    ) -> tokens.Answer:
        """Tokenise prompt and answer together; ``prefix`` and ``before`` as in :meth:`frame`."""
        framed = self.frame(prompt, prefix=prefix, before=before) if special else prompts.conversation(prompt)
        row = self.codec.answer_row(framed, answer, join=self.prompt_format.join)
        self._check_embedded(row.ids)
        return row

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Return answers as texts, thinking blocks left out."""
        return self.codec.decode(ids)

    def _check_embedded(self, ids: tokens.Ids) -> tokens.Ids:
        """Return ids. Raises RequestError for a token without an embedding."""
        if self.beyond:
            wrong = [self.beyond[token] for token in ids if token in self.beyond]
            if wrong:
                raise RequestError(
                    f"the model has no embedding for the token {wrong[0]!r:.80}: the tokenizer has more tokens "
                    "than the model; resize the model (model.resize_token_embeddings(len(tokenizer))), or use "
                    "the tokenizer it was trained with"
                )
        return ids


def _frame(
    tokenizer: Any, settings: prompts.PromptFormat, prompt: str, prefix: str, before: int | None, key: str
) -> prompts.Framed:
    return prompts.frame(tokenizer, settings, prompt, prefix, before)
