"""The ridge regression of MALMEN and RLEdit: from a network's values to changes, and back to its gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from errata.edits.artefact import Artefact
from errata.edits.weight import WeightEdit
from errata.host.host import Host
from errata.linalg.gram import solve_gram
from errata.methods import _hypernetwork as hypernetwork
from errata.methods._editor import trained_editor
from errata.methods._hypernetwork import Editor, EditorSettings, Prepared, weight_rms
from errata.methods._method import Workspace, check_requests
from errata.training.factors import Change, Factors, capture
from errata.training.hypernetwork import Damping
from errata.types import Request

STEP, RIDGE = LOGS = ("step", "ridge")
ROWS = 1024
"""Rows that the network is run on at once when it is differentiated (authors' code: 1,024)."""


def fit(
    method: str, host: Host, requests: Sequence[Request], config: Any, work: Workspace,
    train: Callable[[], Artefact], modules: tuple[str, ...],
) -> WeightEdit:  # fmt: skip
    """Return the regression on what an editor makes of all requests' gradients, as an edit.

    ``train``: makes the editor where the settings name none; ``modules``: what is edited where they name none.
    """
    check_requests(method, requests)
    artefact = trained_editor(method, host, config.editor, config, work, train)
    editor, config = hypernetwork.editor_of(
        artefact, host, config, lambda: _names(host, config, modules), hypernetwork.network_of
    )
    answers = [host.encode_answer(request.text, request.target) for request in requests]
    factors = hypernetwork.factors_of(host, answers, list(editor.numbers), config)
    changes = changes_of(editor, factors)
    return hypernetwork.edit_of(method, host, requests, factors, changes, artefact, config, work)


def start(
    method: str, host: Host, config: EditorSettings, work: Workspace, modules: tuple[str, ...], step: float,
    ridge: float, damped: int = 0, floor: float = 1.0,
) -> Prepared:  # fmt: skip
    """Return what an editor is trained with, each map's step and ridge at their start.

    ``damped``, ``floor``: see :class:`errata.training.hypernetwork.Damping`.
    """
    names = _names(host, config, modules)
    prepared = hypernetwork.prepare(
        method, host, config, work, names=names, form="outside", logs=LOGS, damped=damped
    )
    if damped:
        prepared = _damp(prepared, floor)
    start_(prepared, step, ridge)
    return prepared


def _damp(prepared: Prepared, floor: float) -> Prepared:
    """Damp the inputs by their second moments over all tokens of the examples that statistics are taken of."""
    config, editor, energy = prepared.config, prepared.editor, dict(prepared.energy)
    answers = [item.answer for item in prepared.items[: config.statistics]]
    found = capture(prepared.host, answers, list(editor.numbers), tokens="all", rows=config.rows)
    for name, number in editor.numbers.items():
        keys = found[name].keys.double()
        damping = editor.damping[number]
        assert isinstance(damping, Damping)
        energy[name] *= damping.set_moments_(keys.mT @ keys / len(keys), floor)
    return replace(prepared, energy=energy)


def _names(host: Host, config: EditorSettings, modules: tuple[str, ...]) -> list[str]:
    return hypernetwork.map_names(host, config, modules)


@torch.no_grad()
def start_(prepared: Prepared, step: float, ridge: float) -> None:
    """Set each map's step and ridge, in the unit of the settings' scale.

    A step of 1 relative to the weight changes the output at a key about as much as W answers to a random input of its
    norm; the ridge is in mean squared norms of the inputs.
    """
    editor, relative = prepared.editor, prepared.config.scale == "weight"
    for name, number in editor.numbers.items():
        width = editor.network.maps[name][1]
        unit = weight_rms(prepared.host, name) / width**0.5 if relative else 1.0
        editor.logs[STEP][number] = torch.tensor(step * unit).log()
        editor.logs[RIDGE][number] = torch.tensor(ridge * (prepared.energy[name] if relative else 1.0)).log()


def values_of(editor: Editor, name: str, factors: Factors) -> Tensor:
    """Return D ``[n, d_out]``, what a map's output shall change by at each key: -e <u, u~> g~."""
    inner, outer = editor.network.of(name, factors)
    return -editor.positive(STEP, name) * (factors.keys * inner).sum(1, keepdim=True) * outer


@dataclass(frozen=True)
class Solved:
    """A regression, its coefficients as variables of their own."""

    changes: Mapping[str, Change]
    coefficients: Sequence[Tensor]
    """C of each map ``[n, d_out]``, which the changes are made of; they require gradients."""


def solve(editor: Editor, factors: Mapping[str, Factors]) -> Solved:
    """Return the regression on what the editor makes of some factors; the network is not differentiated."""
    changes = {}
    with torch.no_grad():
        for name, one in factors.items():
            ridge = float(editor.positive(RIDGE, name).detach())
            rows = editor.damp(name, one.keys)
            coefficients = solve_gram(rows, values_of(editor, name, one), ridge).to(one.keys)
            changes[name] = Change(coefficients, editor.damp(name, rows), torch.zeros_like(one.owner))
    for change in changes.values():
        change.outer.requires_grad_()
    return Solved(changes, [change.outer for change in changes.values()])


def changes_of(editor: Editor, factors: Mapping[str, Factors]) -> dict[str, Change]:
    """Return each map's change by all texts together as products ``[n, ...]``."""
    return dict(solve(editor, factors).changes)


def differentiate(
    editor: Editor, factors: Mapping[str, Factors], solved: Solved, gradients: Sequence[Tensor]
) -> list[Tensor]:
    """Return the gradient of each of the editor's parameters ``[...]``, from those for the coefficients ``[n, d_out]``.

    With A = U P U^T + l I, P from the damping, and C = A^-1 D, that for D is A^-1 times that for C, and that for log l
    is -l times the inner product of the former with C. The network is run again in parts, on the inner product of its
    values with the former.
    """
    variables = {name: p for name, p in editor.named_parameters() if name != f"logs.{RIDGE}"}
    total = {name: torch.zeros_like(variable) for name, variable in variables.items()}
    of_ridge = torch.zeros_like(editor.logs[RIDGE])
    for (name, one), gradient in zip(factors.items(), gradients, strict=True):
        ridge = float(editor.positive(RIDGE, name).detach())
        of_values = solve_gram(editor.damp(name, one.keys), gradient, ridge)
        of_ridge[editor.numbers[name]] = -ridge * (of_values * solved.changes[name].outer.detach()).sum()
        of_values = of_values.to(gradient)
        for first in range(0, len(one.keys), ROWS):
            part = slice(first, first + ROWS)
            rows = Factors(one.keys[part], one.gradients[part], one.owner[part])
            surrogate = (of_values[part] * values_of(editor, name, rows)).sum()
            found = torch.autograd.grad(surrogate, list(variables.values()), allow_unused=True)
            for (parameter, sum_), own in zip(total.items(), found, strict=True):
                total[parameter] = sum_ if own is None else sum_ + own
    return [of_ridge if name == f"logs.{RIDGE}" else total[name] for name, _ in editor.named_parameters()]


# --- sequences ------------------------------------------------------------------------------


def norm_gradients(solved: Solved, weight: float) -> list[Tensor]:
    """Return the gradient of weight |S|^2 for the coefficients of each map, 2 weight U U^T C ``[n, d_out]``."""
    return [
        2 * weight * (change.inner @ (change.inner.mT @ change.outer.detach()))
        for change in solved.changes.values()
    ]
