"""A host's own tables: the names and templates in text sampled from it, and its answer to each template.

Templates, names and their types come from free text (:mod:`errata.stats.templates`); the host then completes every
template for the names of its type. Comparing the columns of answers shows which templates are paraphrases and which
are consequences of one another. The tables depend on the host alone and are cached with its statistics.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import regex
import torch
from torch import Tensor

from errata.config import positive
from errata.errors import ConfigError, HostError
from errata.host import locking
from errata.host.generate import generate_rows, sample_rows
from errata.host.host import Host
from errata.host.kinds import CAUSAL
from errata.host.memory import in_batches
from errata.host.tokens import encode_prompt
from errata.progress import OnCount, OnProgress, ignore
from errata.stats import cache
from errata.stats.collect import Corpus
from errata.stats.templates import SLOT, Kind, mine
from errata.writing import TERMINAL

VERSION = 1
"""Version of the algorithm; part of the cache key."""
ROWS = 64
"""Prompts per batch."""
UNFINISHED, SAVE_EVERY = "tables-unfinished", 8
"""Kind of file of tables that are being made, and the number of batches after which it is written."""
RELATED = 0.3
"""Minimum share of equal answers for two templates to count as related."""
AGREE = 0.6
"""Minimum share of equal answers for two templates to count as paraphrases."""
FOLLOWS, TIMES, PAIRS = 0.4, 4.0, 5
"""B is a consequence of A if pairs of names with equal answers to A have equal answers to B in at least this share of
cases, this many times as often as other pairs, and there are at least this many such pairs."""

MIN_NAMES, MIN_SHARE = 5, 0.05
"""A second template is compared if its table knows the answers of at least this many names, and this share of all."""
CHANCE = 2.0
"""Answers reached over a second template must equal those of a first this many times as often as by chance."""

_CLAUSE = regex.compile(rf"\n|[{TERMINAL},;:、，；：](?![\p{{N}}\p{{Ll}}])")


@dataclass(frozen=True)
class TableSettings:
    """Sizes and budget of the tables."""

    texts: int = 1280
    """Number of texts to sample, or to read from a corpus."""
    length: int = 26
    """Tokens per sampled text."""
    names: int = 64
    """Maximum number of names per type, the most frequent ones."""
    templates: int = 96
    """Maximum number of templates per type, the most frequent ones."""
    answer_tokens: int = 8
    """Maximum tokens of an answer."""
    budget: int = 150_000
    """Maximum number of generated tokens, text and answers together."""
    seed: int = 0
    """Seed of the sampled text."""

    def __post_init__(self) -> None:
        names = ("texts", "length", "names", "templates", "answer_tokens", "budget")
        complaints = positive(self, *names)
        if complaints:
            raise ConfigError("; ".join(complaints))


@dataclass(frozen=True)
class AnswerTable:
    """The host's answers to the templates of one type of names."""

    names: tuple[str, ...]
    templates: tuple[str, ...]
    """Each with ``{}`` for the name; the answer follows."""
    answers: tuple[tuple[str, ...], ...]
    """``answers[template][name]``; empty if the host generated nothing."""

    def column(self, template: str) -> tuple[str, ...] | None:
        """Return the answers to a template, one per name; None if the table does not have it."""
        return self.answers[self.templates.index(template)] if template in self.templates else None

    @cached_property
    def plain(self) -> list[list[str]]:
        """The answers in normalised form, for comparison."""
        return [[plain(answer) for answer in column] for column in self.answers]

    @cached_property
    def relations(self) -> list[list[str]]:
        """Groups of paraphrases, in the order of each group's first template."""
        groups: list[list[int]] = []
        for i, own in enumerate(self.plain):
            same = next((group for group in groups if _share(self.plain[group[0]], own) >= AGREE), None)
            if same is None:
                groups.append([i])
            else:
                same.append(i)
        return [[self.templates[i] for i in group] for group in groups]

    def paraphrases(self, column: Sequence[str]) -> list[str]:
        """Return the templates whose answers agree with a column, the closest first."""
        own = [plain(answer) for answer in column]
        scores = [(_share(own, other), t) for t, other in zip(self.templates, self.plain, strict=True)]
        return [template for score, template in sorted(scores, key=lambda one: -one[0]) if score >= AGREE]

    def related(self, column: Sequence[str]) -> set[str]:
        """Return the templates that may state the same relation as a column: some answers have equal last words."""
        own = [plain(answer) for answer in column]
        pairs = zip(self.templates, self.plain, strict=True)
        return {template for template, other in pairs if _share(own, other, endings=True) >= RELATED}

    def dependents(self, column: Sequence[str]) -> list[str]:
        """Return the templates whose answers are functionally dependent on those of a column, except related ones.

        For example a country on its city: names with the same city have the same country, other names seldom do.
        """
        cause, related = _numbers([plain(answer) for answer in column]), self.related(column)
        pairs = zip(self.templates, self.plain, strict=True)
        return [t for t, other in pairs if t not in related and _follows(cause, _numbers(other))]


@dataclass(frozen=True)
class Tables:
    """All tables of a host, and what they were computed from."""

    types: tuple[AnswerTable, ...]
    """Empty if no template repeats in the text."""
    source: str
    """Name of the text."""
    texts: int
    """Number of texts."""
    prompts: int
    """Number of prompts that the host completed."""
    generated: int
    """Upper bound of the generated tokens: those of sampled texts, and ``answer_tokens`` per prompt."""

    def report(self) -> list[dict[str, Any]]:
        """Return a readable summary, one record per type: its relations, with paraphrases, consequences, inverses."""
        return [
            {
                "names": len(table.names),
                "examples": list(table.names[:3]),
                "templates": len(table.templates),
                "relations": [_described(self, table, group) for group in table.relations],
            }
            for table in self.types
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the tables as plain data."""
        return asdict(self)

    @staticmethod
    def from_dict(record: Mapping[str, Any]) -> Tables:
        """Build tables from plain data. Raises KeyError or TypeError for other data."""
        types = tuple(
            AnswerTable(tuple(t["names"]), tuple(t["templates"]), tuple(tuple(row) for row in t["answers"]))
            for t in record["types"]
        )
        return Tables(types, record["source"], record["texts"], record["prompts"], record["generated"])


def _described(tables: Tables, table: AnswerTable, group: Sequence[str]) -> dict[str, Any]:
    """Describe a group of paraphrases."""
    column = table.column(group[0]) or ()
    name, answer = next(((n, a) for n, a in zip(table.names, column, strict=True) if a), ("", ""))
    return {
        "template": group[0],
        "paraphrases": len(group),
        "wordings": list(group),
        "example": f"{fill(group[0], name)} {answer}",
        "follows": consequences(column, table, tables)[0],
        "inverses": [match.template for match in inverses(column, table.names, tables)],
    }


# --- reading columns ------------------------------------------------------------------------


def plain(answer: str) -> str:
    """Return an answer in normalised form: without case, punctuation and extra white space."""
    return " ".join(regex.sub(r"[\p{P}\p{S}]+", " ", answer).casefold().split())


def agreement(first: Sequence[str], second: Sequence[str]) -> float:
    """Return the share of names to which two templates have the same answer, in 0 to 1."""
    return _share([plain(one) for one in first], [plain(one) for one in second])


def follows(cause: Sequence[str], effect: Sequence[str]) -> bool:
    """Whether the answers in ``effect`` are a function of those in ``cause``, judged by pairs of names."""
    return _follows(_numbers([plain(one) for one in cause]), _numbers([plain(one) for one in effect]))


def _share(first: Sequence[str], second: Sequence[str], *, endings: bool = False) -> float:
    """Return the share of equal answers; ``endings``: also those that are the last words of the other."""

    def equal(a: str, b: str) -> bool:
        return a == b or (endings and (a.endswith(f" {b}") or b.endswith(f" {a}")))

    return sum(equal(a, b) for a, b in zip(first, second, strict=True) if a and b) / max(1, len(first))


def _numbers(column: Sequence[str]) -> Tensor:
    """Return a number for each answer, equal for equal answers, unique for empty ones: int64 ``[names]``."""
    numbers = {answer: i for i, answer in enumerate(dict.fromkeys(column))}
    return torch.tensor([numbers[answer] if answer else len(numbers) + i for i, answer in enumerate(column)])


def _follows(cause: Tensor, effect: Tensor) -> bool:
    pairs = torch.ones(len(cause), len(cause), dtype=torch.bool).triu(1)
    equal, both = (cause[:, None] == cause)[pairs], (effect[:, None] == effect)[pairs]
    if int(equal.sum()) < PAIRS or bool(equal.all()):
        return False
    share, rest = float(both[equal].double().mean()), float(both[~equal].double().mean())
    return share >= FOLLOWS and share >= TIMES * rest


@dataclass(frozen=True)
class TemplateMatch:
    """A template about the answers to another one, as "{} is located in" is about those to "{} works for"."""

    template: str
    table: AnswerTable
    """The table that has it."""
    share: float
    """Share, 0 to 1, that agrees of the names whose answer that table knows."""


def _answers_about(
    column: Sequence[str], tables: Tables
) -> Iterator[tuple[TemplateMatch, list[int], list[str]]]:
    """Yield each template about answers of a column, the places of those it knows, and its own answers about them."""
    own = [plain(answer) for answer in column]
    for table in tables.types:
        row = {plain(name): i for i, name in enumerate(table.names)}
        places = [i for i, answer in enumerate(own) if answer in row]
        if len(places) >= max(MIN_NAMES, MIN_SHARE * len(own)):
            for template, replies in zip(table.templates, table.plain, strict=True):
                yield TemplateMatch(template, table, 0.0), places, [replies[row[own[i]]] for i in places]


def compositions(column: Sequence[str], table: AnswerTable, tables: Tables) -> dict[str, TemplateMatch]:
    """Return the templates of a table that compose a column with a second template, each with the one that fits best.

    "The employer of {} is located in" composes "{} works for" with "{} is located in" if its answer for most of the
    names whose employer is known is the second template's for that employer. ``column``: the first template's answers
    for the names of ``table``. Templates that may state the same relation as the column are left out.
    """
    matches: dict[str, TemplateMatch] = {}
    related = table.related(column)
    for match, places, reached in _answers_about(column, tables):
        for template, replies in zip(table.templates, table.plain, strict=True):
            if template in related:
                continue
            own = [replies[i] for i in places]
            share = _share(own, reached)
            known = matches.get(template)
            if (
                share >= AGREE
                and share >= CHANCE * _by_chance(own, reached)
                and not (known and known.share >= share)
            ):
                matches[template] = replace(match, share=share)
    return matches


def consequences(
    column: Sequence[str], table: AnswerTable, tables: Tables
) -> tuple[list[str], dict[str, TemplateMatch]]:
    """Return the templates of a table that follow from a column, and of those that compose it the second template."""
    composed = compositions(column, table, tables)
    return list(dict.fromkeys((*composed, *table.dependents(column)))), composed


def inverses(column: Sequence[str], names: Sequence[str], tables: Tables) -> list[TemplateMatch]:
    """Return the templates that lead from a column's answers back to the names, the surest first.

    ``column``: the answers for ``names``.
    """
    own = [plain(name) for name in names]
    matches = [
        replace(match, share=share)
        for match, places, reached in _answers_about(column, tables)
        if (share := _share([own[i] for i in places], reached)) >= AGREE
    ]
    return sorted(matches, key=lambda match: -match.share)


def _by_chance(first: Sequence[str], second: Sequence[str]) -> float:
    """Return the share of equal answers that is expected if two columns have nothing to do with one another."""
    one, two = Counter(first), Counter(second)
    return sum(one[answer] * two[answer] for answer in one if answer) / max(1, len(first)) ** 2


# --- prompting the host ---------------------------------------------------------------------


def fill(template: str, name: str) -> str:
    """Fill a name into a template."""
    before, _, after = template.partition(SLOT)
    return before + name + after


class Unfinished:
    """Texts and answers of tables that are being made, stored now and then; a killed computation goes on from them."""

    def __init__(self, folder: Path | None, facts: Mapping[str, Any]) -> None:
        """Read what an earlier computation left under these facts; without a folder nothing is read or stored."""
        self.folder, self.facts = folder, facts
        stored = None if folder is None else cache.read_document(folder, facts, UNFINISHED)
        self.texts: list[str] = list(stored["texts"]) if stored else []
        self.answers: dict[str, str] = dict(stored["answers"]) if stored else {}
        """By prompt."""
        self._batches = 0

    def add(self, texts: Sequence[str] = (), answers: Mapping[str, str] | None = None) -> None:
        """Keep one more batch; every ``SAVE_EVERY`` of them the file is written."""
        self.texts += texts
        self.answers |= answers or {}
        self._batches += 1
        if self.folder is not None and self._batches % SAVE_EVERY == 0:
            document = {"texts": self.texts, "answers": self.answers}
            cache.write_document(self.folder, self.facts, UNFINISHED, document)

    def drop(self) -> None:
        """Remove the file, if there is one."""
        if self.folder is not None:
            cache.path(self.folder, self.facts, UNFINISHED).unlink(missing_ok=True)


def answers(
    host: Host, prompts: Sequence[str], *, tokens: int, tick: OnCount = ignore,
    unfinished: Unfinished | None = None,
) -> list[str]:  # fmt: skip
    """Return the host's greedy answer to each prompt, up to the end of the clause.

    ``unfinished``: answers of an earlier computation, which are not generated again, and where new ones are kept.
    """
    rows = [host.encode_prompt(prompt) for prompt in prompts]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    known = unfinished.answers if unfinished else {}
    texts: dict[int, str] = {}
    for first in range(0, len(order), ROWS):
        tick(first, len(order))
        group = order[first : first + ROWS]
        if all(prompts[i] in known for i in group):
            texts |= {i: known[prompts[i]] for i in group}
            continue

        def generate(part: Sequence[int], group: Sequence[int] = group) -> list[str]:
            return generate_rows(host, [rows[group[i]] for i in part], tokens)

        generated = in_batches(range(len(group)), len(group), generate)
        texts |= {
            i: _CLAUSE.split(text.strip(), maxsplit=1)[0].strip()
            for i, text in zip(group, generated, strict=True)
        }
        if unfinished:
            unfinished.add(answers={prompts[i]: texts[i] for i in group})
    return [texts[i] for i in range(len(rows))]


@locking.exclusive
def own_tables(
    host: Host, settings: TableSettings, *, corpus: Corpus | None = None, folder: Path | None = None,
    on_progress: OnProgress = ignore,
) -> Tables:  # fmt: skip
    """Return a host's tables: read from ``folder``, or computed and stored there; None stores nothing.

    A computation that was interrupted goes on from what it had stored. ``corpus``: text to use instead of samples from
    the host. Raises ConfigError for a host that generates no text and for a budget that is too small for the text,
    HostError for a folder while an edit is in place, DataError where the folder cannot be written.
    """
    if host.kind != CAUSAL or host.tokenizer is None:
        raise ConfigError(f"tables need a model that generates text, and {host.name} generates none")
    if folder is not None and host.placed:
        raise HostError("tables of an edited host are not stored: revert its edits, or give no folder")
    key = facts(host, settings, corpus)
    stored = None if folder is None else cache.read_document(folder, key, "tables")
    if folder is not None and stored is not None:
        cache.path(folder, key, UNFINISHED).unlink(missing_ok=True)  # of another process, killed since
        return Tables.from_dict(stored)
    unfinished = Unfinished(folder, key)
    tables = _make(host, settings, corpus, unfinished, on_progress)
    if folder is not None:
        cache.write_document(folder, key, "tables", tables.to_dict())
        unfinished.drop()
    return tables


def facts(host: Host, settings: TableSettings, corpus: Corpus | None = None) -> dict[str, Any]:
    """Return everything that a host's tables depend on, the cache key of :mod:`errata.stats.cache`."""
    return {
        "tables": VERSION,
        "host": host.fingerprint,
        "dtype": str(host.dtype),
        "corpus": None if corpus is None else corpus.name,
        "prompts": host.prompt_format.to_dict(),
        **asdict(settings),
    }


def _make(
    host: Host,
    settings: TableSettings,
    corpus: Corpus | None,
    unfinished: Unfinished,
    on_progress: OnProgress,
) -> Tables:
    own = corpus is None
    text_tokens = settings.texts * settings.length if own else 0
    if text_tokens >= settings.budget:
        raise ConfigError(
            f"a budget of {settings.budget} tokens is too small for {settings.texts} texts of {settings.length} "
            "tokens and the answers; raise the budget, or lower the number of texts"
        )
    texts = list(_some(corpus, settings)) if corpus else free_text(host, settings, on_progress, unfinished)
    kinds = plan(mine(texts), settings, settings.budget - text_tokens)
    total = sum(len(kind.names) * len(kind.templates) for kind in kinds)
    types, finished = [], 0
    for kind in kinds:
        prompts = [fill(template, name) for template in kind.templates for name in kind.names]
        flat = answers(
            host, prompts, tokens=settings.answer_tokens,
            tick=lambda here, _, before=finished: on_progress("answers", before + here, total),
            unfinished=unfinished,
        )  # fmt: skip
        finished += len(prompts)
        width = len(kind.names)
        types.append(_table(kind, [flat[i : i + width] for i in range(0, len(flat), width)]))
    on_progress("answers", total, total)
    name = corpus.name if corpus else f"written by the host, seed {settings.seed}"
    informative = tuple(table for table in types if table.templates)
    return Tables(informative, name, len(texts), total, text_tokens + total * settings.answer_tokens)


def _table(kind: Kind, columns: Sequence[Sequence[str]]) -> AnswerTable:
    """Return the table without templates that have the same answer for all names."""
    informative = [
        (t, tuple(column))
        for t, column in zip(kind.templates, columns, strict=True)
        if len(set(map(plain, column))) > 1
    ]
    return AnswerTable(
        kind.names,
        tuple(t for t, _ in informative),
        tuple(column for _, column in informative),
    )


def _some(corpus: Corpus, settings: TableSettings) -> Iterable[str]:
    return itertools.islice(corpus.texts(), settings.texts)


def free_text(
    host: Host,
    settings: TableSettings,
    on_progress: OnProgress = ignore,
    unfinished: Unfinished | None = None,
) -> list[str]:
    """Return ancestral samples from the host's begin token; ``unfinished`` as for :func:`answers`."""
    plain_format = host.prompt_format.is_default
    start = host.encode_prompt("", special=True) if plain_format else encode_prompt(host.tokenizer, "").ids
    room = host.room(tuple(start))
    length = settings.length if room is None else min(settings.length, room)
    texts: list[str] = list(unfinished.texts) if unfinished else []
    for first in range(len(texts), settings.texts, ROWS):  # whole batches are stored
        on_progress("free text", first, settings.texts)
        rows = [start] * min(ROWS, settings.texts - first)
        part = sample_rows(host, rows, length, top_k=None, seed=settings.seed * 100_003 + first)
        texts += part
        if unfinished:
            unfinished.add(part)
    on_progress("free text", settings.texts, settings.texts)
    return texts


def plan(kinds: Sequence[Kind], settings: TableSettings, budget: int) -> list[Kind]:
    """Reduce types to the names and templates that fit a budget of generated tokens.

    Tokens that small types do not use go to larger ones; a type with fewer than two names or templates is omitted.
    """
    cut = [Kind(kind.names[: settings.names], kind.templates[: settings.templates]) for kind in kinds]
    order = sorted(range(len(cut)), key=lambda i: len(cut[i].names) * len(cut[i].templates))
    answers_left, plans = budget // settings.answer_tokens, {}
    for place, i in enumerate(order):
        share = answers_left // (len(order) - place)
        names = cut[i].names[: max(2, min(len(cut[i].names), int(share**0.5)))]
        templates = cut[i].templates[: share // len(names)]
        if len(templates) > 1:
            plans[i] = Kind(names, templates)
            answers_left -= len(names) * len(templates)
    return [plans[i] for i in sorted(plans)]
