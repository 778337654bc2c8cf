"""A model that reads text, with its codec and its layout; :mod:`errata.host.open` opens one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from errata.errors import HostError, RequestError
from errata.host import hooks, locking, passes, placed, placement, prompts, tokens, trial
from errata.host.base import BRANCHES as BRANCHES
from errata.host.base import OVERLAYS as OVERLAYS
from errata.host.base import ModelHost
from errata.host.codec import Codec, text_config
from errata.host.generation_settings import is_plain
from errata.host.kinds import CAUSAL, kind
from errata.host.layout import Layout, discover
from errata.host.open import DTYPES as DTYPES
from errata.host.open import codec_for
from errata.host.open import load as load
from errata.host.open import quiet as quiet
from errata.host.passes import Pass

if TYPE_CHECKING:  # opens transformers, which most uses of this file do without
    from errata.host.stopping import Stop


class Host(ModelHost):
    """A model that reads text, with its tokenizer, its codec and its layout.

    Not changed by anything but an edit's ``apply_`` and ``on``.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, *, name: str, codec: Codec | None = None) -> None:
        """Take a live model; ``codec``: how it reads and answers, None for that of its kind, detected by structure."""
        super().__init__(model, name=name)
        self.codec = codec_for(model, tokenizer, name=name) if codec is None else codec
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

    @cached_property
    def window(self) -> int | None:
        """Longest input in tokens; None if neither the configuration nor a table of positions sets a bound."""
        return trial.window(self)

    @cached_property
    def beyond(self) -> Mapping[int, str]:
        """Tokens of the tokenizer that the model has no embedding for, by their ids."""
        return trial.beyond(self)

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

    @cached_property
    def continues(self) -> bool:
        """Whether texts may continue one that was run before, tried out once; see :mod:`errata.host.prefix`."""
        from errata.host.prefix import can_grow

        return self.codec.continues and can_grow(self)

    @cached_property
    def padding(self) -> trial.Padding:
        """How rows are generated from together so that none sees another's padding, tried out once."""
        if self.continues or self.reads_by_encoder:
            return "left"
        with passes.without_interventions():
            return trial.padding(self)

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
        self, batch: tokens.Batch, row: Tensor, at: Tensor, *, ends: Tensor | None = None
    ) -> Tensor:
        """Run a batch; logits ``[n, vocab]`` at the positions (row[i], at[i]) only.

        ``ends`` ``[rows]``: position of each row's last prompt token; None: its last token.
        """
        return self.run(self.as_pass(batch, at=(row, at), ends=ends)).logits

    # --- text ------------------------------------------------------------------------------

    def generate(
        self, prompt: str | Sequence[str], *, max_new_tokens: int = 32, natural_stop: bool = True,
        sets: Sequence[str | None] | None = None,
    ):  # fmt: skip
        """Continue one prompt, or each of several, greedily; return the new text only.

        Prompts are formatted by :attr:`prompt_format`. Stops at the end token, and unless ``natural_stop`` is
        off also at a line break or shortly after the first sentence; behind an answer cue at a line break, in
        a conversation at its end token only. A thinking block that was closed is left out. ``sets``: the edit
        set of each prompt, None for the edits of all rows alone. Raises ConfigError for a set that no edit was
        placed for.
        """
        one = isinstance(prompt, str)
        questions = [prompt] if one else list(prompt)
        member = None if sets is None else placed.numbers(self.model, sets)
        framed = [
            self.frame(text, number=None if member is None else int(member[i]))
            for i, text in enumerate(questions)
        ]
        stops: dict[bool, list[int]] = {}
        for i, form in enumerate(framed):
            stops.setdefault(form.special, []).append(i)
        texts = [""] * len(questions)
        for special, group in stops.items():
            line: Stop = "line" if self.prompt_format.template in ("question", "auto") else "sentence"
            stop: Stop = line if natural_stop and special else "end"
            rows = [self.encode_framed(framed[i]) for i in group]
            own = None if member is None else member[torch.tensor(group)]
            for i, text in zip(group, generate_rows(self, rows, max_new_tokens, stop, own), strict=True):
                texts[i] = prompts.answer_of(text, framed[i].open_block)
        return texts[0] if one else texts

    def with_prompt_format(self, settings: prompts.PromptFormat) -> Host:
        """Return this host with another prompt format; model, tokenizer and what is in place are shared."""
        if settings == self.prompt_format:
            return self
        view = copy.copy(self)
        view.prompt_format = settings
        return view

    def frame(
        self, prompt: str, *, prefix: str = "", before: int | None = None, number: int | None = None
    ) -> prompts.Framed:
        """Format a prompt by :attr:`prompt_format`, after edits have rewritten it.

        See :func:`errata.host.prompts.frame`; ``before`` counts in the prompt that is passed. ``number``: the
        edit set that the prompt belongs to.
        """
        text, before = self._hidden(prompt, before)
        rewritten = self.rewritten(text, number)
        if before is not None and rewritten != text:
            before += len(rewritten) - len(text)
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

    def rewritten(self, prompt: str, number: int | None = None) -> str:
        """Return a prompt as the edits in place make it, the oldest first; ``number``: its edit set."""
        for rewriter in placed.on(self.model).rewriters:
            if rewriter.number in (None, number):
                prompt = rewriter.rewrite(prompt)
        return prompt

    def prefixed(self, prompt: str, prefix: str, before: int | None = None) -> str:
        """Put running text before a prompt; see :func:`errata.host.prompts.prefixed`."""
        text, before = self._hidden(prompt, before)
        return self.codec.show(prompts.prefixed(self.tokenizer, text, prefix, before))

    def encode(self, text: str, *, special: bool = True) -> tokens.Encoded:
        """Tokenise a text with character offsets; ``special`` as in :func:`tokens.encode`."""
        encoded = self.codec.encode(text, special=special)
        self._check_embedded(encoded.ids)
        return encoded

    def encode_framed(self, framed: prompts.Framed, *, slots: int | None = None) -> tokens.Ids:
        """Tokenise what is continued of a framed prompt; ids.

        ``slots``: how many tokens the answer has, for models that fill places; others do not need it.
        """
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


@locking.shared
def generate_rows(
    host: Host, rows: Sequence[tuple[int, ...]], max_new_tokens: int, stop: Stop = "sentence",
    sets: Tensor | None = None,
) -> list[str]:  # fmt: skip
    """Continue rows of token ids greedily; the new text only, cut at its natural stop.

    Rows that were run already (``decoding.Prefixes``) are continued. No row takes more tokens than the model's
    window holds. ``sets``: number of each row's edit set, int64 ``[rows]``.
    """
    from errata.host import decoding, stopping

    if host.fills:
        stop = "end"
    if (host.continues and is_plain(host)) or host.fills or not hasattr(host.model, "generate"):
        prefixes = rows if isinstance(rows, decoding.Prefixes) else decoding.run_prefixes(host, rows, sets)
        ids: Any = decoding.greedy(host, prefixes, _limits(host, rows, max_new_tokens), stop)
    else:
        from transformers import StoppingCriteriaList

        def stops(length: int) -> Any:
            return StoppingCriteriaList([stopping.NaturalStop(host.tokenizer, length, stop)])

        limit = min(_limits(host, rows, max_new_tokens))
        ids = _generate(host, rows, limit, stops, sets, do_sample=False)
    return [stopping.cut(text, stop) for text in host.decode(ids)]


def _limits(host: Host, rows: Sequence[tuple[int, ...]], most: int) -> list[int]:
    """Return how many tokens each row may take: one at least, as all fit before it."""
    rooms = [host.room(tuple(row)) for row in rows]
    return [most if room is None else min(max(1, most) if room else 0, room) for room in rooms]


@locking.shared
def draw_rows(
    host: Host, rows: Sequence[tuple[int, ...]], total: int, *, top_k: int = 5, seed: int = 0
) -> list[str]:
    """Continue rows by drawing among the ``top_k`` most probable tokens, up to ``total`` with the row's own.

    A row's text depends on seed and row, not on its neighbours or the global random state. Rows that were run
    already are continued.
    """
    from errata.host import decoding

    limits = [min(total - len(row), one) for row, one in zip(rows, _limits(host, rows, total), strict=True)]
    prefixes = rows if isinstance(rows, decoding.Prefixes) else decoding.run_prefixes(host, rows)
    ids = decoding.sample(host, prefixes, limits, top_k=top_k, seed=seed)
    return list(host.tokenizer.batch_decode(ids, skip_special_tokens=True))


@locking.exclusive
def sample_rows(
    host: Host, rows: Sequence[Sequence[int]], new_tokens: int, *, top_k: int | None, seed: int
) -> list[str]:
    """Continue rows of token ids by sampling exactly ``new_tokens`` tokens each.

    ``top_k`` keeps the k most probable tokens at each step, None all. The global random state is left
    as it was.
    """
    devices = [host.device] if host.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        ids = _generate(
            host, rows, new_tokens, None, do_sample=True, top_k=top_k or 0, top_p=1.0, temperature=1.0,
            min_new_tokens=new_tokens,
        )  # fmt: skip
    return list(host.tokenizer.batch_decode(ids, skip_special_tokens=True))


def _generate(
    host: Host, rows: Sequence[Sequence[int]], new_tokens: int, stops: Callable[[int], Any] | None,
    sets: Tensor | None = None, **options: Any,
) -> list[list[int]]:  # fmt: skip
    """Let transformers continue rows, those together that do not disturb one another; the new ids of each.

    ``stops``: makes stopping criteria from the length of what is continued.
    """
    settings = {"temperature": None, "top_p": None, "top_k": None, "num_beams": 1, **options}
    manner = host.padding
    if manner == "uncached":
        settings["use_cache"] = False
    new: list[list[int]] = [[] for _ in rows]
    for group in trial.groups(rows, manner):
        batch = host.batch([rows[i] for i in group], side="left")
        length = batch.ids.shape[1]
        if stops is not None:
            settings["stopping_criteria"] = stops(length)
        own = {} if sets is None else {passes.SETS: sets[torch.tensor(group)]}
        out = generate_batch(host, batch, own, max_new_tokens=new_tokens, **settings)
        for i, ids in zip(group, out[:, length:].tolist(), strict=True):
            new[i] = ids
    return new


def generate_batch(
    host: Host, batch: tokens.Batch, routes: Mapping[str, Tensor] | None = None, **options: Any
) -> Any:
    """Let transformers continue a batch; ``routes``: decisions ``[rows]``; what its loop returns for the options."""
    with torch.no_grad():
        return passes.generate(host.model, host.inputs(batch), routes, pad_token_id=host.pad_id, **options)
