"""A fact as tokens: what is traced, where its subject stands, which token answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from errata.errors import RequestError
from errata.host.host import Host
from errata.locate.patching import require_plain
from errata.types import Request

FIRST, MIDDLE, LAST = "first subject token", "middle subject tokens", "last subject token"
NEXT, FURTHER, END = "first subsequent token", "further tokens", "last token"
SUBJECT = "all subject tokens"
ROLES = (FIRST, MIDDLE, LAST, NEXT, FURTHER, END)
"""Roles of tokens from the subject on, as in the paper; a subject of one token has its last one only."""


@dataclass(frozen=True)
class Fact:
    """A prompt about a subject, tokenised, and the token that is read at its end."""

    text: str
    subject: str
    template: tuple[str, str]
    """The text before and after the subject."""
    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    """The text of each token."""
    place: tuple[int, ...]
    """Indices of the subject's tokens."""
    answer: int
    """The answer's first token."""
    answer_text: str
    first: int
    """The host's own first choice."""

    @property
    def known(self) -> bool:
        """Whether the host answers with this token."""
        return self.first == self.answer

    @property
    def roles(self) -> dict[int, str]:
        """Return the role of each token from the subject's first one on."""
        begin, end, last = self.place[0], self.place[-1], len(self.ids) - 1
        roles: dict[int, str] = {}
        for at in range(begin, last + 1):
            if at == end:
                roles[at] = LAST
            elif at < end:
                roles[at] = FIRST if at == begin else MIDDLE
            else:
                roles[at] = END if at == last else NEXT if at == end + 1 else FURTHER
        return roles

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "prompt": self.text, "subject": self.subject, "tokens": list(self.tokens),
            "subject_tokens": list(self.place), "answer": self.answer_text, "answer_id": self.answer,
            "first_choice": self.first, "known": self.known,
        }  # fmt: skip


@torch.no_grad()
def facts(host: Host, requests: Sequence[Request], *, answers: Sequence[str | None]) -> list[Fact]:
    """Tokenise prompts with their answers; an answer of None is the host's own first choice.

    Only the first token of an answer is read. Raises HostError for a host that is no causal language model.
    """
    require_plain(host, "looking at a fact")
    rows = [host.encode_base(request.text) for request in requests]
    firsts: list[int] = []
    for begin in range(0, len(rows), 32):
        logits = host.forward(host.batch(rows[begin : begin + 32], side="left"), keep=1)[:, -1]
        firsts += logits.argmax(-1).tolist()
    return [
        _fact(host, request, row, first, answer)
        for request, row, first, answer in zip(requests, rows, firsts, answers, strict=True)
    ]


def _fact(host: Host, request: Request, ids: tuple[int, ...], first: int, answer: str | None) -> Fact:
    start, stop = request.span
    frame = host.frame(request.text, before=start)
    encoded = host.encode(frame.scored, special=frame.special)
    begin = encoded.first_of(start + frame.shift, stop + frame.shift)
    end = encoded.last_of(start + frame.shift, stop + frame.shift)
    if end >= len(ids) or encoded.ids[: end + 1] != ids[: end + 1]:
        raise RequestError(f"the subject {request.subject!r} has no tokens of its own in {request.text!r}")
    token = first if answer is None else host.encode_answer(request.text, answer).target[0]
    texts = [
        encoded.text[a:b] if b > a else str(host.tokenizer.decode([i]))
        for (a, b), i in zip(encoded.spans, encoded.ids, strict=True)
    ]
    texts += [str(host.tokenizer.decode([i])) for i in ids[len(texts) :]]
    shown = str(host.tokenizer.decode([token])).strip() if answer is None else answer
    return Fact(
        request.text, request.subject, request.template, ids, tuple(texts[: len(ids)]),
        tuple(range(begin, end + 1)), token, shown, first,
    )  # fmt: skip


def fact(host: Host, prompt: str, subject: str, answer: str | None = None) -> Fact:
    """Tokenise one prompt about a subject; ``answer`` None: the host's own first choice.

    Raises RequestError for a subject that does not occur in the prompt.
    """
    return facts(host, [Request(prompt, subject, answer or "?")], answers=[answer])[0]
