"""Whether an edit survives the rounding of the weights it wrote, before somebody quantises the edited model.

A change smaller than half a step of the target grid is rounded away. Asked is every request of the edit, with the
written weights as they are and rounded; the other weights stay as they are, so that the edit's own loss shows alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from errata.edits import Edit, WeightEdit
from errata.edits.deltas import dense
from errata.edits.weight import as_stored
from errata.errors import ConfigError, EditError
from errata.evaluation.check import EditCheck, answer_requests, compare_answers
from errata.host import placement
from errata.host.host import Host
from errata.linalg.rounding import GRIDS, kept_share
from errata.progress import OnProgress, ignore
from errata.registry import unknown
from errata.training.tune import with_weights
from errata.types import DEFAULT_ASK, AskOptions, Request


@dataclass(frozen=True)
class Survival:
    """An edit before and after its weights were rounded to a grid."""

    grid: str
    """One of :data:`errata.linalg.rounding.GRIDS`."""
    kept: Mapping[str, float]
    """By weight, the share of its change that rounding leaves, see :func:`errata.linalg.rounding.kept_share`."""
    noise: Mapping[str, float]
    """By weight, the norm of the rounding error over that of the change."""
    merged: EditCheck
    """Answers without the edit, and with it merged."""
    rounded: EditCheck
    """Answers without the edit, and with it merged and the written weights rounded."""

    @property
    def lost(self) -> tuple[str, ...]:
        """Names of the requests that are answered with their target before rounding and not after it."""
        pairs = zip(self.merged.requests, self.rounded.requests, strict=True)
        return tuple(one.name for one, other in pairs if one.answered and not other.answered)

    @property
    def survives(self) -> bool:
        """Whether no request is lost."""
        return not self.lost


def survives(
    host: Host, edit: Edit, grid: str = "int8", *, foreign: bool = False, options: AskOptions = DEFAULT_ASK,
    on_progress: OnProgress = ignore,
) -> Survival:  # fmt: skip
    """Measure whether an edit's requests still hold once the weights it writes are rounded; the host is left as it was.

    ``grid``: ``int8`` (a scale for each output), ``int4`` (for 128 inputs) or ``nf4`` (for 64), to the nearest level.
    ``options``: how prompts are formatted.

    Raises ConfigError for an unknown grid, EditError for an edit that writes no weight, for weights that are quantised
    already, and as :meth:`Edit.apply_` does.
    """
    if grid not in GRIDS:
        raise ConfigError(unknown(grid, list(GRIDS), "grid"))
    if not isinstance(edit, WeightEdit):
        raise EditError(
            f"{edit.kind} edits write no weight, so there is nothing that rounding could take: fit the edit on the "
            "quantised model, or place it there"
        )
    requests = [request for request in edit.provenance.requests if isinstance(request, Request)]
    if len(requests) != len(edit.provenance.requests):
        raise ConfigError("requests of images are not kept in an edit, so they cannot be asked")

    def answers(phase: str) -> list[str]:
        return answer_requests(
            host, requests, options=options, on_progress=lambda now, total: on_progress(phase, now, total)
        )

    before = answers("asking before")
    unedited = {name: host.model.get_parameter(name).detach().clone() for name in edit.deltas}
    with edit.on(host, foreign=foreign, merge=_merge(host, edit)):
        merged = answers("asking after")
        weights, kept, noise = _rounded_weights(host, edit, unedited, grid)
        rounded = with_weights(host, weights, lambda: answers("asking rounded"))
    checks = (compare_answers(requests, before, after) for after in (merged, rounded))
    return Survival(grid, kept, noise, *checks)


def _merge(host: Host, edit: WeightEdit) -> bool:
    """Return True. Raises EditError for weights that are quantised already."""
    for name in edit.deltas:
        reason = placement.obstacle(host.model, name)
        if reason is not None:
            raise EditError(f"weight {name!r} cannot be rounded: {reason}")
    return True


def _rounded_weights(
    host: Host, edit: WeightEdit, unedited: Mapping[str, Tensor], grid: str
) -> tuple[dict[str, Tensor], dict[str, float], dict[str, float]]:
    """Return each written weight on a grid, in its own shape, what that leaves of its change, and the noise."""
    weights, kept, noise = dict[str, Tensor](), dict[str, float](), dict[str, float]()
    for name in edit.deltas:
        turned = name in edit.transposed
        stored = host.model.get_parameter(name).detach()
        after = stored.to(torch.promote_types(stored.dtype, torch.float32))
        change = dense(as_stored(edit.deltas[name], turned), after)
        rows, base, delta = (_by_output(one, turned) for one in (after, unedited[name].to(after), change))
        kept[name], noise[name] = kept_share(base, rows, grid, delta)
        back = GRIDS[grid](rows)
        shape = after.mT.shape if turned else after.shape
        whole = back.reshape(shape)
        weights[name] = (whole.mT if turned else whole).to(stored.dtype)
    return weights, kept, noise


def _by_output(weight: Tensor, turned: bool) -> Tensor:
    """Return a stored weight as a matrix with a row for each output, of each expert where it stacks some."""
    matrix = weight.mT if turned else weight
    return matrix.flatten(0, -2) if matrix.ndim == 3 else matrix.flatten(1)
