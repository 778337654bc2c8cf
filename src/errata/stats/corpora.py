"""Text files as corpora."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from errata.errors import DataError
from errata.files import parse_json
from errata.stats.collect import corpus_name
from errata.types import Corpus


def as_corpus(corpus: str | os.PathLike[str] | Corpus) -> Corpus:
    """Return a corpus, opening a text file if a path is given. Raises DataError for a file without text."""
    return corpus if isinstance(corpus, Corpus) else file_corpus(Path(corpus))


def file_corpus(path: Path) -> Corpus:
    """Stream a text file by paragraphs, or the ``text`` field of a .jsonl file; its name contains a content hash."""

    def texts() -> Iterator[str]:
        if path.exists() and not path.is_file():
            raise DataError(f"cannot read corpus {path}: it is no regular file")
        try:
            with path.open(encoding="utf-8-sig") as file:
                yield from _records(path, file) if path.suffix.lower() == ".jsonl" else _paragraphs(file)
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read corpus {path}: {error}") from error

    if next(texts(), None) is None:
        raise DataError(f"corpus {path} contains no text")
    return Corpus(corpus_name(path.name, texts()), texts)


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """Yield paragraphs: the lines between empty lines, joined."""
    for empty, group in itertools.groupby(lines, lambda line: not line.strip()):
        if not empty:
            yield "".join(group).strip()


def _records(path: Path, lines: Iterable[str]) -> Iterator[str]:
    """Yield the texts of JSON lines. Raises DataError for a line without one."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"corpus {path}, line {number}"
        record = parse_json(line, lambda reason, place=place: DataError(f"{place}: {reason}"))
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise DataError(f'corpus {path}, line {number}: expected {{"text": "..."}}, found no text there')
        if text.strip():
            yield text
