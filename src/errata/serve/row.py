"""One text that is being continued: what was asked, the tokens so far, and what is sent of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from errata.errors import ConfigError, RequestError
from errata.host import passes, prompts
from errata.host.host import Host
from errata.serve.sampling import Sampling

Reason = Literal["stop", "length"]
UNFINISHED = "\ufffd"
"""What decoding gives for a character of which not all bytes are there yet."""


@dataclass(frozen=True)
class Question:
    """What is asked of the model for one row."""

    edits: tuple[str, ...]
    """Digests of the edits that act on it."""
    limit: int
    """Most tokens of the answer."""
    prompt: str = ""
    """A text to be continued; empty with ``turns``."""
    turns: tuple[Mapping[str, str], ...] = ()
    """A conversation: role and content of each turn, the user's last."""
    stops: tuple[str, ...] = ()
    """Texts at which the answer ends; they are no part of it."""
    sampling: Sampling = field(default_factory=Sampling)

    def frame(self, host: Host, numbers: Sequence[int]) -> prompts.Framed:
        """Return the prompt as the model reads it; ``numbers``: of the edit sets that the row belongs to.

        Raises RequestError for a conversation that the model's tokenizer cannot write.
        """
        with passes.belonging(numbers):
            if not self.turns:
                return host.frame(self.prompt, number=numbers)
            last = self.turns[-1]["content"]
            if not prompts.has_chat(host.tokenizer):
                if len(self.turns) > 1:
                    raise RequestError(
                        "the model's tokenizer has no chat template: send one message, the user's, or use "
                        "/v1/completions"
                    )
                question = host.with_prompt_format(prompts.PromptFormat(template="question"))
                return question.frame(last, number=numbers)
            rewritten = {**self.turns[-1], "content": host.rewritten(last, numbers)}
        try:
            return prompts.continued(host.tokenizer, [*self.turns[:-1], rewritten])
        except ConfigError as error:
            raise RequestError(str(error)) from error


@dataclass(frozen=True)
class Started:
    """The prompt was read."""

    prompt_tokens: int


@dataclass(frozen=True)
class Text:
    """More of the answer."""

    text: str


@dataclass(frozen=True)
class Ended:
    """The answer is whole."""

    reason: Reason
    tokens: int


@dataclass(frozen=True)
class Failed:
    """There is no answer, or no more of it."""

    error: Exception


Event = Started | Text | Ended | Failed


class Row:
    """A question while it is answered. Its events are emitted in the engine's thread."""

    def __init__(self, question: Question, emit: Callable[[Event], None]) -> None:
        self.question, self.emit = question, emit
        self.cancelled = False
        """Set by whoever asked, to have no more of it."""
        self.left = False
        """Whether the engine has no more to do with it."""
        self.numbers: tuple[int, ...] = ()
        """Numbers of its edit sets on the host, once its edits are in place."""
        self.prompt: tuple[int, ...] = ()
        self.new: list[int] = []
        self.generator: torch.Generator | None = None
        self._sent = ""
        self._open_block = ""
        self._limit = question.limit

    def read(self, host: Host) -> None:
        """Turn the prompt into ids. Raises RequestError for one that the model cannot read."""
        framed = self.question.frame(host, self.numbers)
        self.prompt, self._open_block = host.encode_framed(framed), framed.open_block
        host.check_window(len(self.prompt))
        room = host.room(self.prompt)
        self._limit = self.question.limit if room is None else min(self.question.limit, room)
        if self.question.sampling.temperature > 0:
            self.generator = self.question.sampling.generator(self.prompt)
        self.emit(Started(len(self.prompt)))

    def accept(self, host: Host, token: int, ends: frozenset[int]) -> bool:
        """Take the next token; return whether more are to come. Emits what is certain of the text."""
        self.new.append(token)
        text = prompts.answer_of(host.decode([self.new])[0], self._open_block)
        stopped = min((at for stop in self.question.stops if (at := text.find(stop)) >= 0), default=None)
        if stopped is not None:
            return self._end(text[:stopped], "stop")
        if token in ends:
            return self._end(text, "stop")
        if len(self.new) >= self._limit:
            return self._end(text, "length")
        if not self._open_block:  # else thoughts are taken out once they are closed
            self._send(text[: self._certain(text)])
        return True

    def fail(self, error: Exception) -> None:
        """Give up with an error."""
        self.emit(Failed(error))

    def _end(self, text: str, reason: Reason) -> bool:
        self._send(text)
        self.emit(Ended(reason, len(self.new)))
        return False

    def _send(self, text: str) -> None:
        if len(text) > len(self._sent) and text.startswith(self._sent):
            self.emit(Text(text[len(self._sent) :]))
            self._sent = text

    def _certain(self, text: str) -> int:
        """Return how many characters of the text later tokens cannot take back."""
        certain = len(text.rstrip(UNFINISHED))
        for stop in self.question.stops:  # its beginning may be the text's end
            for length in range(min(len(stop) - 1, certain), 0, -1):
                if text.endswith(stop[:length], 0, certain):
                    certain -= length
                    break
        return certain
