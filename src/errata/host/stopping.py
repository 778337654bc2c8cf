"""When a free continuation has given its answer."""

from __future__ import annotations

import re
from typing import Any, Literal

import regex
import torch
from torch import Tensor
from transformers import StoppingCriteria

from errata.writing import TERMINAL, after_thoughts

Stop = Literal["sentence", "line", "thought", "passage", "end"]
"""Where a continuation stops besides its end token: shortly after its first ``sentence`` or at a line break;
at a ``line`` break; where a ``thought`` has come to its answer or a new question begins; where after a
``passage`` a new question begins; only at the ``end`` token."""

SENTENCE_END = regex.compile(
    rf"(?V1)[.!?][\"'\p{{Pe}}\p{{Pf}}\p{{Pi}}]*\s|(?P<other>[{TERMINAL}--[.!?．]])[\"'\p{{Pe}}\p{{Pf}}\p{{Pi}}]*(?=[^\"'\p{{Pe}}\p{{Pf}}\p{{Pi}}])"
)
"""The end of a sentence. Marks of other scripts (。！？।؟) need no space, only something, behind them."""
GRACE = 12
"""Characters let through after a sentence's end: what a matcher reads as its first sentence may be longer."""
_SHORTENED = re.compile(
    r"(?:[A-Z]|(?:[^\W\d_]\.)+[^\W\d_]"
    r"|Capt|Col|Dr|Ft|Gen|Gov|Hon|Jr|Lt|Mme|Mr|Mrs|Ms|Mt|Prof|Rev|Sen|Sgt|Sr|St|Ste|vs)"
)
"""Initials, abbreviations and words that are written with a period; matchers settle what one ends, here it
only has to be waited for: "Dr. Martin Luther King", "a U.S. citizen"."""

CONCLUDED = re.compile(
    r"\banswer\b(?: (?:to|of|for) [^.:?\n]{1,80}?)?[^\w\n]{0,4}(?:\bis\b|[:：])[\s:：*]*[^\s:：*][^\n]*\n",
    re.IGNORECASE,
)
"""A line that gives an answer: "answer is" or "answer:" with words behind it, not "to answer this"."""
NEW_QUESTION = re.compile(r"\n\s*(?:question|q)\s*[:：]", re.IGNORECASE)


def is_complete(text: str, stop: Stop) -> bool:
    """Whether a continuation has come to its natural stop."""
    if stop == "end":
        return False
    body = after_thoughts(text).lstrip()
    if stop in ("thought", "passage"):
        concluded = stop == "thought" and CONCLUDED.search(body) is not None
        return concluded or NEW_QUESTION.search(body) is not None
    if "\n" in body:
        return True
    if stop == "line":
        return False
    return any(
        end["other"] or (len(body) - end.end() > GRACE and not _shortened(body[: end.end()]))
        for end in SENTENCE_END.finditer(body)
    )


def _shortened(text: str) -> bool:
    """Whether a text that ends in a mark and white space ends in a word that is written with a period."""
    word = text.split()[-1].lstrip("\"'([")
    return word.endswith(".") and _SHORTENED.fullmatch(word[:-1]) is not None


def cut(text: str, stop: Stop) -> str:
    """Take off what the last token brought from beyond the stop; white space in front stays."""
    body = after_thoughts(text).lstrip()
    lead = text[: len(text) - len(body)]
    if stop in ("thought", "passage"):
        match = NEW_QUESTION.search(body)
        return lead + (body[: match.start()] if match else body)
    marks: dict[Stop, str] = {"sentence": "\n\n", "line": "\n"}
    return lead + body.partition(marks[stop])[0] if stop in marks else text


class NaturalStop(StoppingCriteria):
    """Stops a row of transformers' own loop where :func:`is_complete` is true."""

    def __init__(self, tokenizer: Any, prompt_length: int, stop: Stop) -> None:
        self._tokenizer = tokenizer
        self._start = prompt_length
        self._stop: Stop = stop

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Return for each row whether it is complete."""
        texts = self._tokenizer.batch_decode(input_ids[:, self._start :], skip_special_tokens=True)
        return torch.tensor([is_complete(text, self._stop) for text in texts], device=input_ids.device)
