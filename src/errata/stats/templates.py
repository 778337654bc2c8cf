"""Find templates and names in raw text, from the text alone, without a model or a word list.

A name is a run of capitalised words. A template is a sentence with a slot in place of a name and without its last
words, which are the answer; it counts if it occurs with several names and several answers. Names that fill the same
templates are of one type.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import regex

from errata.writing import TERMINAL

SLOT = "{}"
ANSWER_WORDS = 3
"""Maximum number of words of an answer."""
LEAST_NAMES = 4
"""Minimum number of names of a type; columns of fewer answers cannot be compared."""
REPEATS = 3.0
"""If the words after a template recur more often than this on average, they belong to longer templates."""
SHARED = 2
"""Minimum number of names that two templates of one type have in common."""
SHARED_PART = 0.1
"""Minimum share of the smaller group's names that two groups of templates of one type have in common."""

_WORD = r"\p{Lu}[\p{L}\p{M}\p{N}]*(?:-[\p{L}\p{M}\p{N}]+)*"
_NAME = regex.compile(rf"(?<![\p{{L}}\p{{M}}\p{{N}}]){_WORD}(?: {_WORD})*")
_SENTENCE = regex.compile(rf"[^\n{TERMINAL}]+[{TERMINAL}]?")
_ASKS = regex.compile(r"[?？؟⸮՞፧;⁇⁈]\s*\Z")
_LOWER = regex.compile(r"(?<![\p{L}\p{M}\p{N}])\p{Ll}[\p{L}\p{M}\p{N}]*")


@dataclass(frozen=True)
class Kind:
    """Names of one type and the templates they occur in, the most frequent first."""

    names: tuple[str, ...]
    templates: tuple[str, ...]
    """Each with ``{}`` for the name; the answer follows."""


@dataclass(frozen=True)
class _Reading:
    """One analysis of a sentence: a name, the text around it, and the answer at its end."""

    template: str
    name: str
    answer: str


def sentences(texts: Iterable[str]) -> list[str]:
    """Split texts into statements; questions and incomplete last sentences are omitted."""
    statements = []
    for text in texts:
        for match in _SENTENCE.finditer(text):
            sentence = " ".join(match.group().split())
            whole = match.end() < len(text) or regex.search(rf"[{TERMINAL}]\Z", sentence)
            if sentence and whole and not _ASKS.search(sentence):
                statements.append(regex.sub(rf"[\s{TERMINAL}]+\Z", "", sentence))
    return [sentence for sentence in statements if sentence]


def mine(texts: Iterable[str]) -> list[Kind]:
    """Return the types of names in some texts, those with the most occurrences first.

    Empty if nothing repeats, or if the script has no capital letters.
    """
    readings = list(_readings(sentences(texts)))
    valid = _templates(readings)
    longest = [next((one for one in options if one.template in valid), None) for options in readings]
    fills = _settled([reading for reading in longest if reading is not None])
    return _kinds({template: names for template, names in fills.items() if len(names) > 1})


def _readings(statements: Sequence[str]) -> Iterator[list[_Reading]]:
    """Yield, for each name in each sentence, its analyses with answers of one word and more."""
    lower = {word for sentence in statements for word in _LOWER.findall(sentence)}
    inside = {match.group() for sentence in statements for match in _NAME.finditer(sentence) if match.start()}
    for sentence in statements:
        for match in _NAME.finditer(sentence):
            name, start = match.group(), match.start()
            if start == 0 and name not in inside:  # the first word of a sentence is capitalised in any case
                first, _, rest = name.partition(" ")
                if first.lower() in lower:
                    name, start = rest, len(first) + 1
            if name:
                yield list(_cuts(sentence, name, start))


def _cuts(sentence: str, name: str, start: int) -> Iterator[_Reading]:
    """Yield the analyses of a sentence for a given name, the shortest answer first."""
    before, words = sentence[:start], sentence[start + len(name) :].split(" ")
    for count in range(1, min(ANSWER_WORDS, len(words) - 1) + 1):
        after = " ".join(words[:-count])
        if regex.search(r"\p{L}", after):
            yield _Reading(f"{before}{SLOT}{after}", name, " ".join(words[-count:]))


def _templates(readings: Iterable[Sequence[_Reading]]) -> set[str]:
    """Return the templates that occur with at least two names and two answers."""
    names: dict[str, set[str]] = {}
    answers: dict[str, set[str]] = {}
    for options in readings:
        for reading in options:
            names.setdefault(reading.template, set()).add(reading.name)
            answers.setdefault(reading.template, set()).add(reading.answer)
    return {template for template, fills in names.items() if len(fills) > 1 and len(answers[template]) > 1}


def _settled(readings: Iterable[_Reading]) -> dict[str, Counter[str]]:
    """Decide where templates end, the longest first; return for each how often it occurs with each name.

    "{} was" mostly continues as one of a few longer templates, such as "{} was born in", so it is no template itself.
    If the words after a template are nearly always different, as in "{} lives in New", the longer one is no template,
    and its occurrences count for the shorter one.
    """
    names: dict[str, Counter[str]] = {}
    first: dict[str, Counter[str]] = {}  # the words that answers begin with
    for reading in readings:
        names.setdefault(reading.template, Counter())[reading.name] += 1
        first.setdefault(reading.template, Counter())[reading.answer.split(" ", 1)[0]] += 1
    for template in sorted(names, key=lambda one: (-len(one), one)):
        longer = [one for one in names if one.startswith(template + " ")]
        inside = sum(names[one].total() for one in longer)
        words = first[template].copy()
        for one in longer:
            words[one[len(template) + 1 :].split(" ", 1)[0]] += names[one].total()
        if inside > names[template].total() and words.total() > REPEATS * len(words):
            del names[template]
        elif longer:
            first[template] = words
            for one in longer:
                names[template] += names.pop(one)
    return names


def _kinds(fills: dict[str, Counter[str]]) -> list[Kind]:
    """Group templates that share names; a name belongs to the group in which it occurs most."""
    groups = _components(fills)
    total: list[Counter[str]] = [sum((fills[t] for t in group), Counter()) for group in groups]
    owner = {
        name: max(range(len(groups)), key=lambda g: total[g][name]) for counts in total for name in counts
    }
    kinds = []
    for number, group in enumerate(groups):
        distinct = Counter(name for template in group for name in fills[template])
        names = [
            name
            for name, _ in sorted(total[number].items(), key=lambda item: (-item[1], item[0]))
            if owner[name] == number and distinct[name] > 1
        ]
        by_size = sorted(group, key=lambda template: (-fills[template].total(), template))
        if len(names) >= LEAST_NAMES and len(by_size) > 1:
            kinds.append((total[number].total(), Kind(tuple(names), tuple(by_size))))
    return [kind for _, kind in sorted(kinds, key=lambda item: (-item[0], item[1].names))]


def _components(fills: dict[str, Counter[str]]) -> list[list[str]]:
    """Group templates with two names in common, then groups with a share of their names in common.

    One name in common is not enough: a single error in the text would join two types.
    """
    groups: list[tuple[list[str], set[str]]] = []
    for template in sorted(fills, key=lambda one: (-len(fills[one]), one)):
        groups.append(([template], set(fills[template])))
    for single in (True, False):
        at = 0
        while at < len(groups):
            templates, names = groups[at]
            near = [
                other for other in groups[at + 1 :]
                if _alike(templates, other[0], fills, single) or (not single and _overlap(names, other[1]))
            ]  # fmt: skip
            for other in near:
                groups.remove(other)
                templates += other[0]
                names |= other[1]
            at = 0 if near and at else at + (not near)
    return [templates for templates, _ in groups]


def _alike(first: Iterable[str], second: Iterable[str], fills: dict[str, Counter[str]], single: bool) -> bool:
    """Whether any two templates of two groups have enough names in common."""
    return single and any(len(fills[a].keys() & fills[b].keys()) >= SHARED for a in first for b in second)


def _overlap(first: set[str], second: set[str]) -> bool:
    shared = len(first & second)
    return shared >= SHARED and shared >= SHARED_PART * min(len(first), len(second))
