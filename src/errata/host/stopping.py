"""When a free continuation has said its answer."""

from __future__ import annotations

import re
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import StoppingCriteria

Stop = Literal["sentence", "line", "thought", "passage", "end"]
"""Where a continuation stops besides its end token: shortly after its first ``sentence`` or at a line break;
at a ``line`` break; where a ``thought`` has come to its answer or a new question begins; where after a
``passage`` a new question begins; only at the ``end`` token."""

SENTENCE_END = re.compile(r"[.!?][\"')\]]*\s")
GRACE = 12
"""Characters let through after a sentence's end, for "St. Louis" and the like."""

CONCLUDED = re.compile(r"\banswer\b(?: is)?[ \t]*:?[ \t]*[^\s:][^\n]*\n", re.IGNORECASE)
NEW_QUESTION = re.compile(r"\n\s*(?:question|q)\s*:", re.IGNORECASE)


def done(text: str, stop: Stop) -> bool:
    """Whether a continuation has come to its natural stop."""
    body = text.lstrip()
    if stop == "end":
        return False
    if stop in ("thought", "passage"):
        concluded = stop == "thought" and CONCLUDED.search(body) is not None
        return concluded or NEW_QUESTION.search(body) is not None
    if "\n" in body:
        return True
    if stop == "line":
        return False
    end = SENTENCE_END.search(body)
    return end is not None and len(body) - end.end() > GRACE


def cut(text: str, stop: Stop) -> str:
    """Take off what the last token brought from beyond the stop; white space in front stays."""
    body = text.lstrip()
    lead = text[: len(text) - len(body)]
    if stop in ("thought", "passage"):
        found = NEW_QUESTION.search(body)
        return lead + (body[: found.start()] if found else body)
    marks: dict[Stop, str] = {"sentence": "\n\n", "line": "\n"}
    return lead + body.partition(marks[stop])[0] if stop in marks else text


class NaturalStop(StoppingCriteria):
    """Stops a row of transformers' own loop where :func:`done` says so."""

    def __init__(self, tokenizer: Any, prompt_length: int, stop: Stop) -> None:
        self._tokenizer = tokenizer
        self._start = prompt_length
        self._stop: Stop = stop

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Say for each row whether it is done."""
        texts = self._tokenizer.batch_decode(input_ids[:, self._start :], skip_special_tokens=True)
        return torch.tensor([done(text, self._stop) for text in texts], device=input_ids.device)
