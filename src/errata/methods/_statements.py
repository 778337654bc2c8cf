"""Statements of the model's own beside the requests: as terms of a closed form's cost, or as rows to train on.

Anchors are other statements about a request's subject, mates the request's statement about other subjects. At the
subject's last token an anchor's key is the request's own, so a closed form can preserve anchors at later
positions only; all positions of a statement enter M.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from errata.errors import RequestError
from errata.host.host import Host
from errata.host.layout import Site
from errata.linalg.solve import independent_columns
from errata.locate.own import TOKENS, OwnCounts, OwnText, WeightedRow, owners_of, scaled_keys, weighted_rows
from errata.methods._closed_form import CostTerms, EditDraft, Task
from errata.methods._method import Workspace
from errata.methods._settings import StatementTerms
from errata.stats.tables import answers, plain
from errata.stats.templates import SLOT
from errata.training.tune import Companions, Line, lay_out
from errata.types import Request

Claim = tuple[str, str]
"""What a statement is about: its prompt, with a place for the subject, and its subject."""


def own_statements(
    host: Host, requests: Sequence[Request], config: StatementTerms, work: Workspace
) -> list[OwnText]:
    """Return the host's own statements for each request, anchors and mates with its present answers.

    None of a sort whose weight or number is 0, and none that :func:`consistent` leaves out.
    """
    counts = config.own_counts
    if counts == OwnCounts():
        return [OwnText() for _ in requests]
    earlier = work.after.provenance.requests if work.after else ()
    texts = consistent(requests, work.own_texts(host, requests, counts), earlier)
    if work.after is None:  # the tables' answers are those of the host without the edit that goes on
        return texts
    return [replace(text, mates=_present(host, text.mates)) for text in texts]


def consistent(
    requests: Sequence[Request], texts: Sequence[OwnText], earlier: Sequence[Request] = ()
) -> list[OwnText]:
    """Return each request's statements less those that contradict another request or its statements.

    Of what would be fitted: statements that a request, also an ``earlier`` one, makes itself, and those that two
    requests would give different answers. Of what would be preserved: what another request changes.
    """
    explicit = {_claim(request) for request in (*requests, *earlier)}
    replies: dict[Claim, set[str]] = {}
    for text in texts:
        for one in text.fitted:
            replies.setdefault(_claim(one), set()).add(plain(one.target))
    contested = explicit | {claim for claim, answers_to in replies.items() if len(answers_to) > 1}
    changes = [_changes(request, text) for request, text in zip(requests, texts, strict=True)]
    subjects = {request.subject for request in requests}
    result = []
    for i, text in enumerate(texts):
        changed = set[Claim]().union(*(claims for j, claims in enumerate(changes) if j != i))
        mates = [one for one in text.mates if one.subject not in subjects]
        result.append(
            replace(
                text,
                paraphrases=_outside(contested, text.paraphrases),
                consequences=_outside(contested, text.consequences),
                inverses=_outside(contested, text.inverses),
                anchors=_outside(changed, text.anchors),
                mates=_outside(changed, mates),
            )
        )
    return result


def _claim(statement: Request) -> Claim:
    return SLOT.join(statement.template), statement.subject


def _changes(request: Request, text: OwnText) -> set[Claim]:
    """Return what a request changes: its own statement, those fitted with it, and what may follow from it."""
    follows = {(template, request.subject) for template in text.closed}
    return {_claim(request), *map(_claim, text.fitted), *follows}


def _outside(claims: set[Claim], statements: Sequence[Request]) -> tuple[Request, ...]:
    return tuple(one for one in statements if _claim(one) not in claims)


def _present(host: Host, statements: Sequence[Request]) -> tuple[Request, ...]:
    """Return statements with the host's present answers; those without one are left out."""
    texts = answers(host, [one.text for one in statements], tokens=TOKENS)
    return tuple(
        replace(one, target=text) for one, text in zip(statements, texts, strict=True) if plain(text)
    )


# --- terms of the cost ----------------------------------------------------------------------


@dataclass(frozen=True)
class Terms:
    """Statements whose keys join the cost, in the host's state before the fit."""

    host: Host
    rows: Sequence[WeightedRow]

    def at(self, site: Site, draft: EditDraft | None = None) -> CostTerms | None:
        """Return the terms of a site's M, the lower layers' solutions in place; None without statements."""
        if not self.rows:
            return None
        if draft is None:
            return self._read(site)
        with draft.in_place():
            return self._read(site)

    def _read(self, site: Site) -> CostTerms:
        keys = scaled_keys(self.host, self.rows, [site])[site]
        return cost_terms(torch.cat(keys).mT, owners_of(self.rows))


def cost_terms(keys: Tensor, owners: Sequence[int]) -> CostTerms:
    """Return terms with the same sum of outer products as keys ``[d_in, p]``, each of one request.

    Fewer than p, since statements about one subject begin with the same keys.
    """
    parts, requests, owner = [], list[tuple[int, ...]](), torch.tensor(owners)
    for request in sorted(set(owners)):
        own = keys[:, owner == request]
        part = independent_columns(own, own)[0].to(own.dtype)
        parts.append(part)
        requests += [(request,)] * part.shape[1]
    return CostTerms(torch.cat(parts, 1), tuple(requests))


def statement_terms(task: Task[Any], *, unit: float = 1.0) -> Terms:
    """Return the terms of M by the settings ``anchors`` and ``mates``, in multiples of ``unit``."""
    config: StatementTerms = task.config
    texts = own_statements(task.host, task.requests, config, task.work)
    rows = weighted_rows(task.host, texts, anchors=unit * config.anchors, mates=unit * config.mates)
    return Terms(task.host, rows)


# --- rows of a loss -------------------------------------------------------------------------


def statement_companions(
    host: Host, requests: Sequence[Request], config: StatementTerms, work: Workspace
) -> Companions:
    """Return anchors and mates as lines to train on beside the requests, with the host's present answers."""
    lines: list[Line] = []
    owners: list[int] = []
    sorts: list[int] = []
    for i, text in enumerate(own_statements(host, requests, config, work)):
        for sort, statements in enumerate((text.anchors, text.mates)):
            own = [line for line in (_line(host, one) for one in statements) if line is not None]
            lines += own
            owners += [i] * len(own)
            sorts += [sort] * len(own)
    return Companions(tuple(lines), tuple(owners), tuple(sorts), (config.anchors, config.mates))


def _line(host: Host, statement: Request) -> Line | None:
    """Return a statement as a line; None where prompt and answer share their only token."""
    try:
        return lay_out(host, statement, "target")
    except RequestError:
        return None
