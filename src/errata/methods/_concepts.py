"""What the editors of cross-attention share: tokens of texts as keys, one ridge regression for all maps.

With c the token of a text that a map reads, W the map and c* what it is to be read as, the change of W is

    delta = R (K^T M^-1 K + I)^-1 K^T M^-1

K the columns sqrt(e) c, R the columns sqrt(e) W (c* - c), M = lambda I + p sum of c c^T over what is preserved. A fit
that goes on from an earlier one solves for the requests of both, relative to the pipeline without either.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from errata.edits.deltas import Delta
from errata.edits.records import Record
from errata.edits.weight import WeightEdit
from errata.errors import ConfigError, DataError, RequestError
from errata.host.cross_attention import CrossSite
from errata.host.text_to_image import Reading, TextToImageHost
from errata.linalg.lowrank import LowRank
from errata.linalg.solve import CostMatrix, from_solved
from errata.methods._method import Workspace, notes, provenance
from errata.types import Request


@dataclass
class Columns:
    """Keys c and what they are to be read as c*, by the source of maps; a column a token."""

    keys: dict[str, list[Tensor]] = field(default_factory=dict[str, list[Tensor]])
    goals: dict[str, list[Tensor]] = field(default_factory=dict[str, list[Tensor]])
    requests: list[tuple[int, ...]] = field(default_factory=list[tuple[int, ...]])

    def add(self, keys: Mapping[str, Tensor], goals: Mapping[str, Tensor], request: int) -> None:
        """Add columns ``[n, d_in]`` of one request."""
        for source, rows in keys.items():
            self.keys.setdefault(source, []).append(rows)
            self.goals.setdefault(source, []).append(goals[source])
        self.requests += [(request,)] * len(next(iter(keys.values())))


@dataclass(frozen=True)
class Pair:
    """Two texts, and the span of the phrase in each that takes the other's place."""

    source: str
    source_span: tuple[int, int]
    target: str
    target_span: tuple[int, int]


def pipeline_of(method: str, host: Any) -> TextToImageHost:
    """Return a host as a text-to-image pipeline with maps to edit. Raises ConfigError or HostError otherwise."""
    if not isinstance(host, TextToImageHost):
        raise ConfigError(f"{method} edits text-to-image pipelines, {host.name} is none")
    host.layout.cross_sites()
    return host


def pair_of(request: Request, frame: str = "{}", *, empty: bool = False) -> Pair:
    """Return a request's texts with its subject, and with its target in its place; ``frame``: around both.

    ``empty``: the target text is empty, whatever the request's target is.
    """
    before, after = frame.split("{}")
    head, tail = request.template
    source = f"{before}{head}{request.subject}{tail}{after}"
    at = len(before) + len(head)
    span = (at, at + len(request.subject))
    if empty:
        return Pair(source, span, "", (0, 0))
    return Pair(source, span, f"{before}{head}{request.target}{tail}{after}", (at, at + len(request.target)))


def last_tokens(
    host: TextToImageHost, texts: Sequence[str], spans: Sequence[tuple[int, int]]
) -> dict[str, Tensor]:
    """Return what maps are given at the last token of a span in each text, ``[n, d_in]`` by source."""
    at = [read_span(host.read(text), span, text) for text, span in zip(texts, spans, strict=True)]
    rows = torch.arange(len(texts))
    return {source: states[rows, at] for source, states in host.inputs(texts).items()}


def read_span(reading: Reading, span: tuple[int, int], text: str) -> int:
    """Return the last token of a span. Raises RequestError where no token stands for any of its characters."""
    start, end = span
    inside = any(a < end and b > start and a < b for a, b in reading.spans)
    if end > start and not inside:
        raise RequestError(f"{text[start:end]!r:.80} in {text!r:.80} is no token of the text encoder")
    return reading.last(start, end)


def captions(host: TextToImageHost, work: Workspace, count: int) -> list[str]:
    """Return the first texts of the corpus that the text encoder takes, at most ``count``; none without a corpus.

    Raises DataError where a corpus has none.
    """
    found: list[str] = []
    for text in () if work.corpus is None else work.corpus.texts():
        if len(found) == count:
            break
        try:
            host.read(text)
        except RequestError:
            continue  # longer than the encoder's window
        found.append(text)
    if count and not found and work.corpus is not None:
        raise DataError(
            f"{work.corpus.name}: no text fits the text encoder's window; give shorter texts, as captions"
        )
    return found


def costs(
    host: TextToImageHost, phrases: Sequence[str], texts: Sequence[str], *, ridge: float, scale: float
) -> dict[str, CostMatrix]:
    """Return M = ridge I + scale (sum of c c^T) by source: over the last tokens of phrases, and all tokens of texts."""
    sources = {site.source: site.d_in for site in host.layout.cross_sites()}
    if (not phrases and not texts) or not scale:
        return {source: CostMatrix.identity(ridge) for source in sources}
    label = hashlib.sha256(repr((tuple(phrases), tuple(texts), scale, ridge)).encode()).hexdigest()[:12]
    moments = {
        source: torch.zeros(d, d, dtype=torch.float64, device=host.device) for source, d in sources.items()
    }
    if phrases:
        for source, rows in last_tokens(host, phrases, [(0, len(text)) for text in phrases]).items():
            moments[source] += rows.double().mT @ rows.double()
    for text in texts:
        length = len(host.read(text).ids)
        for source, rows in host.inputs([text]).items():
            own = rows[0, :length].double()
            moments[source] += own.mT @ own
    made: dict[str, CostMatrix] = {}
    for source, second in moments.items():
        whole = scale * second + ridge * torch.eye(len(second), dtype=torch.float64, device=host.device)
        made[source] = CostMatrix.of(whole, ridge=0.0, name=f"preserved {label}")
    return made


def solve(
    method: str, host: TextToImageHost, requests: Sequence[Request], config: Any, work: Workspace, *,
    columns: Columns, cost: Mapping[str, CostMatrix], scale: float, sites: Sequence[CrossSite], **facts: Any,
) -> WeightEdit:  # fmt: skip
    """Solve every map for its columns, together with those of the edit that the fit goes on from.

    The edit that is continued must be off the host. ``scale``: e, the weight of the requests.
    """
    # maps that only the continued edit changes stay as it has them
    deltas: dict[str, Delta] = {} if work.after is None else dict(work.after.deltas)
    records: dict[str, Record] = {}
    keys = {source: scale**0.5 * torch.cat(rows).mT.contiguous() for source, rows in columns.keys.items()}
    moves = {source: scale**0.5 * torch.cat(rows).mT - keys[source] for source, rows in columns.goals.items()}
    solved = {source: cost[source].solve(own) for source, own in keys.items()}
    for number, site in enumerate(sites):
        weight = host.weight(site)
        own = keys[site.source].to(weight)
        change = (weight.double() @ moves[site.source].double()).to(weight)
        record = Record(
            own, change, solved[site.source].to(weight), 1.0, cost[site.source].label, tuple(columns.requests)
        )
        earlier = None if work.after is None else work.after.records.get(site.parameter)
        if work.after is None or earlier is None:
            delta = from_solved(own, solved[site.source], change, gamma=1.0)
        else:
            delta = earlier.join(record.shift_requests(len(work.after.provenance.requests))).delta()
        records[site.parameter] = record
        deltas[site.parameter] = _compact(delta)
        work.on_progress("maps", number + 1, len(sites))
    return WeightEdit(
        deltas, frozenset(), provenance(method, host, requests, config, work, **notes(facts)), records  # type: ignore[arg-type]
    )  # fmt: skip


def _compact(delta: LowRank) -> Delta:
    """Return a delta as factors, or as a matrix where that is no larger."""
    out, into = delta.shape
    return delta if delta.rank * (out + into) < out * into else delta.dense()


def check_phrases(name: str, phrases: Sequence[str]) -> list[str]:
    """List what is wrong with a setting of phrases."""
    wrong = [phrase for phrase in phrases if not phrase.strip()]
    return [f"{name}: expected phrases that are not empty, found {wrong[0]!r}"] if wrong else []
