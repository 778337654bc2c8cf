"""When a free continuation has said its answer."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

SENTENCE_END = re.compile(r"[.!?][\"')\]]*\s")
GRACE = 12
"""Characters let through after a sentence's end, for "St. Louis" and the like."""


class FirstSentence(StoppingCriteria):
    """Stops a row at a line break after some text, or a little after its first sentence."""

    def __init__(self, tokenizer: Any, prompt_length: int) -> None:
        self._tokenizer = tokenizer
        self._start = prompt_length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Say for each row whether it is done."""
        texts = self._tokenizer.batch_decode(input_ids[:, self._start :], skip_special_tokens=True)
        return torch.tensor([_done(text) for text in texts], device=input_ids.device)


def _done(text: str) -> bool:
    body = text.lstrip()
    if "\n" in body:
        return True
    end = SENTENCE_END.search(body)
    return end is not None and len(body) - end.end() > GRACE
