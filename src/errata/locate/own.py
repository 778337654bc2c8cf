"""What a host itself says about a request's subject and about others of its type, as data for an edit.

Built from the host's tables (:mod:`errata.stats.tables`), or from statements that the host is let write about
the subject. Nothing here takes a case or a probe: host, request and tables are all there is.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import regex
import torch
from torch import Tensor

from errata.errors import RequestError
from errata.host.generate import sample_rows
from errata.host.host import Host
from errata.host.layout import Site
from errata.locate.contexts import Context
from errata.locate.keys import capture_from
from errata.locate.problems import PromptRow, value_problems
from errata.stats.tables import (
    AnswerTable,
    Tables,
    TemplateMatch,
    answers,
    consequences,
    fill,
    inverses,
    plain,
)
from errata.stats.templates import SLOT
from errata.training.tune import Line, Losses
from errata.types import Request
from errata.writing import TERMINAL

TOKENS = 8
"""Tokens of an answer at most."""
SAMPLES, SAMPLE_TOKENS = 32, 16
"""Statements about the subject that are sampled where the tables know no type for it, and their length."""
OWN_WEIGHT = 0.5
"""Loss weight of a paraphrase, consequence or inverse, that of the request's own prompt being 1."""
KNOWN = 2
"""Names with the new answer, at least, whose answers settle what follows from it."""
TAILS = 8
"""Templates that tell to which type an unknown subject belongs."""


@dataclass(frozen=True)
class OwnText:
    """Statements of the host's own for one request; each a prompt, a subject and an answer."""

    paraphrases: tuple[Request, ...] = ()
    """Other templates for the request's relation, with its target."""
    consequences: tuple[Request, ...] = ()
    """Templates whose answer follows from the request's, with the answer that its target brings with it."""
    inverses: tuple[Request, ...] = ()
    """Statements about the request's target whose answer is its subject."""
    anchors: tuple[Request, ...] = ()
    """Other statements about the subject, with the host's own answers."""
    mates: tuple[Request, ...] = ()
    """The request's statement about other subjects of its type, and the inverses about others than the target, with
    the host's own answers."""
    type: int | None = None
    """Which of the tables' types the subject is of; None: none, the statements were sampled."""
    closed: frozenset[str] = frozenset()
    """Templates whose answer about the subject the request may change: none of them is an anchor."""

    @property
    def fitted(self) -> tuple[Request, ...]:
        """What is fitted beside the request: paraphrases, consequences and inverses."""
        return (*self.paraphrases, *self.consequences, *self.inverses)


@dataclass(frozen=True)
class OwnCounts:
    """How many statements of each sort to return at most; inverses together have as many mates as the request."""

    paraphrases: int = 0
    consequences: int = 0
    inverses: int = 0
    anchors: int = 0
    mates: int = 0


def own_text(host: Host, request: Request, tables: Tables, counts: OwnCounts, *, seed: int = 0) -> OwnText:
    """Return the host's own statements for a request; answers are those it gives at present."""
    number = type_of(host, request, tables)
    draw = random.Random(f"errata-own-{seed}-{request.text}")
    if number is None:
        return _sampled(host, request, counts, seed)
    table, template = tables.types[number], SLOT.join(request.template)
    column = table.column(template) or answers(
        host, [fill(template, name) for name in table.names], tokens=TOKENS
    )
    same = [one for one in table.paraphrases(column) if one != template]
    paraphrases = _usable(same, request.subject)[: counts.paraphrases]
    effects, composed = (
        consequences(column, table, tables) if counts.consequences or counts.anchors else ([], {})
    )
    matches = inverses(column, table.names, tables) if counts.inverses else []
    matches = [one for one in matches if _usable([one.template], request.target)][: counts.inverses]
    closed = frozenset((template, *same, *effects, *table.related(column)))
    others = _one_of_each(table, set(table.templates) - closed)
    mates = _mates(request, table, {template: tuple(column)}, same, counts.mates, draw)
    for one in matches:
        mates += _inverse_mates(request, one, counts.mates // len(matches), draw)
    return OwnText(
        tuple(_ask(request, one, request.target) for one in paraphrases),
        tuple(_consequences(host, request, table, column, effects, composed, counts.consequences)),
        tuple(Request(one.template, request.target, request.subject) for one in matches),
        tuple(_anchors(host, request, _usable(others, request.subject), counts.anchors)),
        tuple(mates),
        number,
        closed,
    )


def type_of(host: Host, request: Request, tables: Tables) -> int | None:
    """Return the number of the subject's type: the one that knows it, or its template, or fits it best; None: none.

    Where several do, the type whose templates the host finds most likely behind the subject.
    """
    template = SLOT.join(request.template)
    everything = list(range(len(tables.types)))
    with_subject = [i for i in everything if request.subject in tables.types[i].names]
    fitting = [i for i in everything if template in tables.types[i].templates]
    candidates = with_subject or fitting or everything
    if len(candidates) < 2:
        return candidates[0] if candidates else None
    scores = {i: _likely(host, request.subject, tables.types[i].templates) for i in candidates}
    return min(candidates, key=lambda i: scores[i])


def _likely(host: Host, subject: str, templates: Sequence[str]) -> float:
    """Return the mean loss in nats per token of templates that begin with a name, behind a subject."""
    tails = [one.removeprefix(f"{SLOT} ") for one in templates if one.startswith(f"{SLOT} ")][:TAILS]
    if not tails:
        return float("inf")
    rows = [host.encode_answer(subject, tail) for tail in tails]
    lines = [Line(r.ids[:-1], tuple(range(r.start - 1, len(r.ids) - 1)), r.target) for r in rows]
    with torch.no_grad():
        return float(Losses(host, lines)(range(len(lines))).mean())


# --- statements from the tables -------------------------------------------------------------


def _ask(request: Request, template: str, answer: str, subject: str | None = None) -> Request:
    return Request(template, subject or request.subject, answer)


def _usable(templates: Sequence[str], name: str) -> list[str]:
    """Leave out what a name cannot be put into, as where it stands in the template already."""
    return [one for one in templates if one.count(SLOT) == 1 and name not in one]


def _one_of_each(table: AnswerTable, wanted: Collection[str]) -> list[str]:
    """Order some of a table's templates so that each relation comes once before any comes again."""
    groups = [[one for one in group if one in wanted] for group in table.relations]
    deepest = max(map(len, groups), default=0)
    return [group[i] for i in range(deepest) for group in groups if i < len(group)]


def _anchors(host: Host, request: Request, templates: Sequence[str], count: int) -> list[Request]:
    templates = templates[:count]
    texts = answers(host, [fill(one, request.subject) for one in templates], tokens=TOKENS)
    return [_ask(request, one, answer) for one, answer in zip(templates, texts, strict=True) if plain(answer)]


def _consequences(
    host: Host, request: Request, table: AnswerTable, column: Sequence[str], templates: Sequence[str],
    composed: Mapping[str, TemplateMatch], count: int,
) -> list[Request]:  # fmt: skip
    """Return what follows from the request, at most ``count`` statements, one of each relation before a second of any.

    The new answer is what the host says about the target in the second template of a composition; of templates that
    compose nothing, what most names have that have the target already.
    """
    if not count:
        return []
    ordered = _usable(_one_of_each(table, templates), request.subject)
    composable = [
        one for one in ordered if one in composed and _usable([composed[one].template], request.target)
    ]
    prompts = [fill(composed[one].template, request.target) for one in composable[:count]]
    texts = dict(zip(composable, answers(host, prompts, tokens=TOKENS), strict=False))
    for template in ordered:
        if not plain(texts.get(template, "")):
            texts[template] = _most_common(request, column, table.column(template) or ())
    return [_ask(request, one, texts[one]) for one in ordered if plain(texts[one])][:count]


def _most_common(request: Request, column: Sequence[str], effect: Sequence[str]) -> str:
    """Return the answer of most names that have the request's target already; empty where too few agree."""
    having = [i for i, answer in enumerate(column) if plain(answer) == plain(request.target)]
    votes = Counter(plain(effect[i]) for i in having)
    (answer, count), *_ = votes.most_common(1) or [("", 0)]
    if not answer or count < KNOWN or 2 * count <= len(having):
        return ""
    return next(effect[i] for i in having if plain(effect[i]) == answer)


def _mates(
    request: Request, table: AnswerTable, own: dict[str, tuple[str, ...]], same: Sequence[str], count: int,
    draw: random.Random,
) -> list[Request]:  # fmt: skip
    """Return the request's own template with other names first, then its paraphrases with them."""
    excluded = {request.subject, request.target, request.target_old}
    names = [i for i, name in enumerate(table.names) if name not in excluded]
    draw.shuffle(names)
    columns = {**own, **{one: table.column(one) or () for one in same}}
    templates = list(columns)
    statements = []
    for k in range(count):
        i = names[k % len(names)] if names else None
        if i is None or k // len(names) >= len(templates):
            break
        # one name after another, each in the next template, so that few rows see many of both
        template = templates[(k + k // len(names)) % len(templates)]
        if template.count(SLOT) == 1 and table.names[i] not in template and plain(columns[template][i]):
            statements.append(_ask(request, template, columns[template][i], table.names[i]))
    return statements


def _inverse_mates(
    request: Request, inverse: TemplateMatch, count: int, draw: random.Random
) -> list[Request]:
    """Return an inverse's template with other names than the target, with the answers of its table.

    The names whose answer is the subject are left out, as is the old target: that is what the request changes.
    """
    column = inverse.table.column(inverse.template) or ()
    excluded = {request.subject, request.target, request.target_old}
    pairs = [
        (name, answer)
        for name, answer in zip(inverse.table.names, column, strict=True)
        if name not in excluded
        and name not in inverse.template
        and plain(answer) not in ("", plain(request.subject))
    ]
    draw.shuffle(pairs)
    return [Request(inverse.template, name, answer) for name, answer in pairs[:count]]


# --- statements that the host writes about a subject ----------------------------------------


def _sampled(host: Host, request: Request, counts: OwnCounts, seed: int) -> OwnText:
    """Return statements from sampled continuations of the subject: with the old answer paraphrases, else anchors."""
    if not counts.paraphrases and not counts.anchors:
        return OwnText()
    old = request.target_old or answers(host, [request.text], tokens=TOKENS)[0]
    start = host.encode_prompt(request.subject)
    digest = hashlib.sha256(f"{seed} {request.subject}".encode()).digest()
    texts = sample_rows(
        host, [start] * SAMPLES, SAMPLE_TOKENS, top_k=50, seed=int.from_bytes(digest[:4], "big")
    )
    paraphrases: dict[str, Request] = {}
    anchors: dict[str, Request] = {}
    for text in texts:
        tail = regex.split(rf"[\n{TERMINAL}]", text, maxsplit=1)[0].rstrip()
        before, old_answer, _ = tail.partition(old) if old else (tail, "", "")
        if not old_answer:
            before, _, answer = tail.rpartition(" ")
        template = f"{SLOT}{before.rstrip()}"
        if not before.strip() or request.subject in before or SLOT in before:
            continue
        if template == SLOT.join(request.template):
            continue
        if old_answer:
            paraphrases.setdefault(template, _ask(request, template, request.target))
        elif plain(answer) and plain(request.target) not in plain(tail):
            anchors.setdefault(template, _ask(request, template, answer))
    return OwnText(
        tuple(paraphrases.values())[: counts.paraphrases], anchors=tuple(anchors.values())[: counts.anchors]
    )


# --- statements as rows and keys ------------------------------------------------------------


def statement_rows(host: Host, statements: Sequence[Request], *, end: bool = False) -> list[PromptRow]:
    """Return each statement's text and the place of its subject; what shares a token with its answer is left out.

    ``end``: with the token that ends a text behind the answer.
    """
    rows: list[PromptRow] = []
    for statement in statements:
        with contextlib.suppress(RequestError):
            (problem,) = value_problems(host, [statement], [Context("", 1.0)], merge=False, end=end)
            rows += problem.rows
    return rows


def training_rows(
    host: Host, rows: Sequence[PromptRow], text: OwnText, *, end: bool = False
) -> tuple[PromptRow, ...]:
    """Return a request's rows with its own paraphrases, consequences and inverses behind, at half the weight of a row.

    Loss weights of the result sum to one. ``end`` as for :func:`statement_rows`.
    """
    added = statement_rows(host, text.fitted, end=end)
    if not added:
        return tuple(rows)
    one = 1 / (len(rows) + OWN_WEIGHT * len(added))
    weighted = [(row, one) for row in rows] + [(row, OWN_WEIGHT * one) for row in added]
    return tuple(replace(row, loss_weight=weight) for row, weight in weighted)


def line_of(row: PromptRow) -> Line:
    """Return a row for the loss: every target token is predicted by the one before it."""
    count = len(row.targets)
    return Line(row.ids, tuple(range(len(row.ids) - count, len(row.ids))), row.targets)


@dataclass(frozen=True)
class WeightedRow:
    """A statement's row whose keys are terms of a cost matrix."""

    row: PromptRow
    scale: float
    """Square root of the weight of each key's outer product."""
    request: int
    """Index of the request that it belongs to."""


def weighted_rows(host: Host, texts: Sequence[OwnText], *, anchors: float, mates: float) -> list[WeightedRow]:
    """Return each request's statements with the scale of their keys: a weight over the number of keys of a sort."""
    rows: list[WeightedRow] = []
    for i, text in enumerate(texts):
        for weight, statements in ((anchors, text.anchors), (mates, text.mates)):
            own = statement_rows(host, statements) if weight > 0 else []
            count = sum(len(row.ids) - row.position for row in own)
            rows += [WeightedRow(row, (weight / max(1, count)) ** 0.5, i) for row in own]
    return rows


def owners_of(rows: Sequence[WeightedRow]) -> list[int]:
    """Return the request of each key of some rows."""
    return [one.request for one in rows for _ in one.row.ids[one.row.position :]]


def scaled_keys(host: Host, rows: Sequence[WeightedRow], sites: Sequence[Site]) -> dict[Site, list[Tensor]]:
    """Return the scaled keys of each row by site, ``[tokens, d_in]``, with the weights that are in place.

    At all positions from the subject's last token to the one that predicts the answer's last.
    """
    keys_by_site = capture_from(
        host, [one.row.ids for one in rows], [one.row.position for one in rows], sites
    )
    return {
        site: [k * one.scale for k, one in zip(keys, rows, strict=True)]
        for site, keys in keys_by_site.items()
    }


def kept_keys(
    host: Host, texts: Sequence[OwnText], sites: Sequence[Site], *, anchors: float, mates: float
) -> tuple[dict[Site, Tensor], list[int]]:
    """Return P ``[d_in, p]`` per site with P P^T = anchors E_anchors[k k^T] + mates E_mates[k k^T], and p owners.

    Keys as of :func:`scaled_keys`; means over each request's own statements, summed over requests; an owner is the
    request of a key. Empty where there is none.
    """
    rows = weighted_rows(host, texts, anchors=anchors, mates=mates)
    if not rows:
        return {}, []
    owners = owners_of(rows)
    return {site: torch.cat(keys).mT for site, keys in scaled_keys(host, rows, sites).items()}, owners
