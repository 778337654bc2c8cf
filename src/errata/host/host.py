"""A model that reads and generates text; :mod:`errata.host.open` opens one."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from errata.host import passes, placed, prompts, trial
from errata.host.codec import Codec
from errata.host.codecs import codec_for
from errata.host.generate import generate_rows
from errata.host.text import Padding, TextHost

if TYPE_CHECKING:  # opens transformers, which most uses of this file do without
    from errata.host.stopping import Stop


class Host(TextHost):
    """A model that reads and generates text, with its tokenizer, its codec and its layout.

    Not changed by anything but an edit's ``apply_`` and ``on``.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, *, name: str, codec: Codec | None = None) -> None:
        """Take a live model; ``codec``: how it reads and answers, None for that of its kind, detected by structure."""
        super().__init__(model, codec_for(model, tokenizer, name=name) if codec is None else codec, name=name)

    # --- found by running it ---------------------------------------------------------------

    @cached_property
    def window(self) -> int | None:
        """Longest input in tokens; None if neither the configuration nor a table of positions sets a bound."""
        return trial.window(self)

    @cached_property
    def beyond(self) -> Mapping[int, str]:
        """Tokens of the tokenizer that the model has no embedding for, by their ids."""
        return trial.beyond(self)

    @cached_property
    def continues(self) -> bool:
        """Whether texts may continue one that was run before, tried out once; see :mod:`errata.host.prefix`."""
        from errata.host.prefix import can_grow

        return self.codec.continues and can_grow(self)

    @cached_property
    def padding(self) -> Padding:
        """How rows are generated from together so that none sees another's padding, tried out once."""
        if self.continues or self.reads_by_encoder:
            return "left"
        with passes.without_interventions():
            return trial.padding(self)

    # --- text ------------------------------------------------------------------------------

    def generate(
        self, prompt: str | Sequence[str], *, max_new_tokens: int = 32, natural_stop: bool = True,
        sets: Sequence[str | Sequence[str] | None] | None = None,
    ):  # fmt: skip
        """Continue one prompt, or each of several, greedily; return the new text only.

        Prompts are formatted by :attr:`prompt_format`. Stops at the end token, and unless ``natural_stop`` is
        off also at a line break or shortly after the first sentence; behind an answer cue at a line break, in
        a conversation at its end token only. A thinking block that was closed is left out. ``sets``: the edit
        set of each prompt, or several, None for the edits of all rows alone. Raises ConfigError for a set that no
        edit was placed for.
        """
        one = isinstance(prompt, str)
        questions = [prompt] if one else list(prompt)
        member = None if sets is None else placed.numbers(self.model, sets)
        framed: list[prompts.Framed] = []
        for i, text in enumerate(questions):
            own = () if member is None else [number for number in member[i].tolist() if number]
            with passes.belonging(own):
                framed.append(self.frame(text, number=own))
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
