"""AnyEdit: teach long answers chunk by chunk, each at the token before it.

Paper      Jiang et al., "AnyEdit: Edit Any Knowledge Encoded in Language Models", ICML 2025,
           arXiv 2502.05628
Implements The answer is cut into chunks of w tokens (Sec. 4); for each, a shift of the block output at the
           token before it is sought with the text so far and all earlier shifts in place; all are written
           together by MEMIT's or AlphaEdit's update, with the keys at the other tokens of the same texts to
           keep their values
Departs    Residuals and projections are indexed per layer (in the plain baselines of the authors' code an
           inner loop reuses the index). No padding enters the keys to keep. No contexts and no
           divergence, as in the authors' code.
Needs      Second moment of keys at each layer, with eigenvectors for ``base: alphaedit``
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from errata.config import positive
from errata.edits.weight import WeightEdit
from errata.host.layout import Site
from errata.host.load import Host
from errata.locate.keys import all_keys
from errata.locate.problems import Line, Problem
from errata.locate.values import Value, ValueConfig, solve
from errata.methods._method import Method, Workspace
from errata.methods._spread import Covariance, Plan, SpreadConfig, covariance, null_space, settle, spread
from errata.types import Request


@dataclass(frozen=True)
class Config(Covariance, SpreadConfig):
    """Settings of AnyEdit."""

    base: Literal["memit", "alphaedit"] = "memit"
    """Whose update writes the values."""
    chunk: int = 40
    """Tokens a chunk (authors' code: 40 for Llama 3, 50 for Qwen 2.5)."""
    overlap: int = 0
    """Tokens that a chunk shares with the one before (authors' code: 0)."""
    decay: float = 1e-3
    """Value search: weight of the shift's norm (authors' code: 1e-3)."""
    kl: float = 0.0
    """Value search: no divergence row (authors' code: none)."""
    stop_loss: float = 1e-2
    """Value search: stop below this loss (authors' code: 1e-2)."""
    contexts: int = 0
    """No context prefixes (authors' code: none)."""
    energy: float = 0.99
    """For ``base: alphaedit``, see there."""
    threshold: float | None = None
    """For ``base: alphaedit``, see there."""
    ridge_relative: float = 0.003
    """For ``base: alphaedit``, see there."""
    ridge: float | None = None
    """For ``base: alphaedit``, see there."""
    projection: str | None = None
    """For ``base: alphaedit``, see there."""

    def problems(self) -> list[str]:
        """Check ranges."""
        found = [*super().problems(), *positive(self, "chunk", "threshold", "ridge", "ridge_relative")]
        if not 0 <= self.overlap < self.chunk:
            found.append(f"overlap: expected 0 to chunk - 1, found {self.overlap}")
        if self.contexts or self.kl:
            found.append(
                "contexts and kl: expected 0, a chunk's place is the token before it in its own text"
            )
        return found


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> WeightEdit:
    """Return the edit that makes the host say every target, however long."""
    config = settle(host, config, requests, work)
    layer = max(config.layers or ())
    laid, rounds = chunked(host, requests, config.chunk, config.overlap)
    places = {(p.members[0], p.lines[0].place) for p in laid}

    def sought(_: list[Problem], settings: ValueConfig) -> list[Value]:
        return _in_turn(host, laid, rounds, layer, settings, work)

    def kept(site: Site) -> Tensor:
        return all_keys(host, requests, site, but=lambda i, at: (i, at) in places).mT

    alpha = config.base == "alphaedit"
    metric = (null_space if alpha else covariance)(host, config, work)
    plan = Plan(
        "anyedit", metric, history=alpha, sought=sought, laid=lambda _: laid, kept=kept,
        extra={"chunks": len(laid)},
    )  # fmt: skip
    return spread(host, requests, config, plan, work)


def chunked(
    host: Host, requests: Sequence[Request], chunk: int, overlap: int
) -> tuple[list[Problem], list[list[int]]]:
    """Lay out one problem a chunk; return them and, per round, the indices of those that come together."""
    laid: list[Problem] = []
    rounds: list[list[int]] = []
    for i, request in enumerate(requests):
        answer = host.encode_answer(request.text, request.target)
        for j, start in enumerate(range(answer.start, len(answer.ids), chunk - overlap)):
            stop = min(start + chunk, len(answer.ids))
            if j and stop - start <= overlap:
                break  # nothing new in it
            line = Line(answer.ids[: stop - 1], start - 1, answer.ids[start:stop], 1.0, 0)
            if j == len(rounds):
                rounds.append([])
            rounds[j].append(len(laid))
            laid.append(Problem((i,), (line,), None))
    return laid, rounds


def _in_turn(
    host: Host,
    laid: list[Problem],
    rounds: list[list[int]],
    layer: int,
    settings: ValueConfig,
    work: Workspace,
) -> list[Value]:
    """Seek the values of first chunks, then of second ones with the first in place, and so on."""
    found: dict[int, Value] = {}
    given: dict[int, tuple[tuple[int, Tensor], ...]] = {}
    where = "block_out" if host.layout.adds_directly else "mlp_out"
    for number, group in enumerate(rounds):
        posed = []
        for k in group:
            line, member = laid[k].lines[0], laid[k].members[0]
            posed.append(Problem((member,), (_with(line, given.get(member, ())),), None))
        values = solve(host, posed, layer=layer, where=where, config=settings, batch_size=work.batch_size)
        for k, value in zip(group, values, strict=True):
            found[k] = value
            member = laid[k].members[0]
            given[member] = (*given.get(member, ()), (laid[k].lines[0].place, value.shift))
        work.on_progress("chunks", number + 1, len(rounds))
    return [found[k] for k in range(len(laid))]


def _with(line: Line, given: tuple[tuple[int, Tensor], ...]) -> Line:
    return Line(line.ids, line.place, line.targets, line.weight, line.context, given)


METHOD = Method(
    name="anyedit",
    title="AnyEdit",
    paper="AnyEdit: Edit Any Knowledge Encoded in Language Models, ICML 2025, arXiv 2502.05628",
    config=Config,
    fit=fit,
    gives=WeightEdit,
    batch=True,
    sequential=True,
    needs=("second_moment", "contexts"),
)
