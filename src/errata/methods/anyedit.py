"""AnyEdit: edit long answers chunk by chunk, each at the token before it.

Paper      Jiang et al., "AnyEdit: Edit Any Knowledge Encoded in Language Models", ICML 2025,
           arXiv 2502.05628
Implements The answer is cut into chunks of w tokens (Sec. 4); for each, a shift of the block output at the
           token before it is optimised with the text so far and all earlier shifts in place; one update of
           MEMIT or AlphaEdit fits them all and preserves the outputs at the other tokens of the same texts
Departs    Residuals and projections are indexed per layer (in the plain baselines of the authors' code an
           inner loop reuses the index). Preserved keys exclude padding. No contexts and no
           divergence, as in the authors' code.
Needs      Second moment of keys at each layer, with eigenvectors for ``base: alphaedit``
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from errata.config import positive
from errata.edits.weight import WeightEdit
from errata.host.host import Host
from errata.locate.keys import all_keys
from errata.locate.problems import PromptRow, ValueProblem
from errata.locate.values import Value
from errata.methods import _closed_form as closed_form
from errata.methods._closed_form import MEMIT_SETTINGS, Task
from errata.methods._method import Method, Workspace
from errata.methods._settings import CovarianceConfig, NullSpaceConfig
from errata.training.tune import end_token
from errata.types import Request


@dataclass(frozen=True)
class Config(CovarianceConfig, NullSpaceConfig):
    """Settings of AnyEdit."""

    base: Literal["memit", "alphaedit"] = "memit"
    """Method whose update fits the values."""
    chunk: int = 40
    """Tokens per chunk (authors' code: 40 for Llama 3, 50 for Qwen 2.5)."""
    overlap: int = 0
    """Tokens that a chunk shares with the previous one (authors' code: 0)."""
    decay: float = 1e-3
    """Value search: weight of the shift's norm (authors' code: 1e-3)."""
    kl: float = 0.0
    """Value search: no divergence row (authors' code: none)."""
    stop_loss: float = 1e-2
    """Value search: stop below this loss (authors' code: 1e-2)."""
    contexts: int = 0
    """No context prefixes (authors' code: none)."""

    def problems(self) -> list[str]:
        """Check ranges."""
        complaints = [*super().problems(), *positive(self, "chunk")]
        if not 0 <= self.overlap < self.chunk:
            complaints.append(f"overlap: expected 0 to chunk - 1, found {self.overlap}")
        if self.contexts or self.kl:
            complaints.append(
                "contexts and kl: expected 0, a chunk is edited at the token before it in its own text"
            )
        if self.context_form != "plain":
            complaints.append(
                f"context_form: expected plain, as there are no contexts, found {self.context_form}"
            )
        return complaints


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> WeightEdit:
    """Return the edit that makes the host generate every target, of any length."""
    config = closed_form.resolve_covariance_config(host, config, METHOD.published_for(host))
    alphaedit = config.base == "alphaedit"
    task = closed_form.start_task("anyedit", host, requests, config, work)
    problems, rounds = chunk_problems(host, requests, config.chunk, config.overlap, end=config.end)
    edited = {(problem.requests[0], problem.rows[0].position) for problem in problems}
    costs = closed_form.null_space_costs(task) if alphaedit else closed_form.covariance_costs(task)
    sweep = closed_form.start_sweep(task, problems, costs)
    values = _find_by_round(task, problems, rounds)
    edit = closed_form.start_edit(task, values, chunks=len(problems))
    for layer in closed_form.sweep_layers(task, sweep, values, edit):
        with edit.in_place():
            preserved_keys = all_keys(host, requests, layer.site, skip=lambda i, at: (i, at) in edited).mT
        layer = layer.with_preserved(preserved_keys)
        edit.add(closed_form.solve_layer(task, layer, costs[layer.site], layer.even_share, history=alphaedit))
    return edit.build()


def chunk_problems(
    host: Host, requests: Sequence[Request], chunk: int, overlap: int, *, end: bool = False
) -> tuple[list[ValueProblem], list[list[int]]]:
    """Return one problem per chunk and, per round, the indices of those that are optimised together.

    ``end``: whether the token that ends a text is the last of each target.
    """
    problems: list[ValueProblem] = []
    rounds: list[list[int]] = []
    last = (end_token(host),) if end else ()
    for i, request in enumerate(requests):
        answer = host.encode_answer(request.text, request.target)
        ids = (*answer.ids, *last)
        for j, start in enumerate(range(answer.start, len(ids), chunk - overlap)):
            stop = min(start + chunk, len(ids))
            if j and stop - start <= overlap:
                break  # all its tokens are in the previous chunk
            row = PromptRow(ids[: stop - 1], start - 1, ids[start:stop], 1.0, 0)
            if j == len(rounds):
                rounds.append([])
            rounds[j].append(len(problems))
            problems.append(ValueProblem((i,), (row,), None))
    return problems, rounds


def _find_by_round(
    task: Task[Config], problems: Sequence[ValueProblem], rounds: Sequence[Sequence[int]]
) -> list[Value]:
    """Return the values: of first chunks, then of second chunks with the first in place, and so on."""
    values: dict[int, Value] = {}
    shifts: dict[int, tuple[tuple[int, Tensor], ...]] = {}
    for number, group in enumerate(rounds):
        rows = [(problems[k].requests[0], problems[k].rows[0]) for k in group]
        round_problems = [
            ValueProblem((i,), (replace(row, earlier_shifts=shifts.get(i, ())),), None) for i, row in rows
        ]
        for k, (i, row), value in zip(
            group, rows, closed_form.find_target_values(task, round_problems), strict=True
        ):
            values[k] = value
            shifts[i] = (*shifts.get(i, ()), (row.position, value.shift))
        task.work.on_progress("chunks", number + 1, len(rounds))
    return [values[k] for k in range(len(problems))]


METHOD = Method(
    name="anyedit",
    title="AnyEdit",
    paper="AnyEdit: Edit Any Knowledge Encoded in Language Models, ICML 2025, arXiv 2502.05628",
    config=Config,
    fit=fit,
    gives=WeightEdit,
    batch=True,
    sequential=True,
    needs=("second_moment", "eigenvectors"),
    published=MEMIT_SETTINGS,
)
