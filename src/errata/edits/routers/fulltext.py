"""The entry whose text shares the rarest words with the prompt: BM25, by SQLite's full-text search."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import regex
import torch
from torch import Tensor

from errata.edits.routers._router import Question, Reading, Router
from errata.writing import folded

_WORD = regex.compile(r"\w+")


@dataclass(frozen=True, eq=False)
class FullText(Router):
    """Accepts rows whose prompt shares a word with an entry's text; the highest BM25 acts."""

    name: ClassVar[str] = "fulltext"
    reads: ClassVar[frozenset[Reading]] = frozenset({"text"})
    per_entry: ClassVar[tuple[str, ...] | None] = ("passages",)
    passages: tuple[str, ...]
    """By entry, the text that prompts are compared with."""
    threshold: float = 0.0
    """BM25 that must be exceeded."""

    @cached_property
    def table(self) -> sqlite3.Connection:
        """The passages in a full-text table in memory."""
        table = sqlite3.connect(":memory:", check_same_thread=False)
        table.execute("create virtual table passages using fts5(text)")
        rows = ((number + 1, folded(text)) for number, text in enumerate(self.passages))
        table.executemany("insert into passages(rowid, text) values (?, ?)", rows)
        return table

    def scores(self, question: Question) -> Tensor:
        """Return BM25 less the threshold for entries that share a word, else 0, ``[rows, entries]``."""
        texts = question.texts()
        scores = torch.zeros(len(texts), len(self.passages), device=question.inputs.device)
        for row, text in enumerate(texts):
            words = " OR ".join(f'"{word}"' for word in dict.fromkeys(_WORD.findall(folded(text))))
            if words and self.passages:
                sql = "select rowid, bm25(passages) from passages where passages match ?"
                for number, rank in self.table.execute(sql, (words,)):
                    scores[row, number - 1] = -rank - self.threshold
        return scores


ROUTER = FullText
