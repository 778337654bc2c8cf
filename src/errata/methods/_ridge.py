"""The ridge regression of MALMEN and RLEdit: from a network's values to changes, and back to its gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from errata.linalg.gram import solve_gram
from errata.methods._hypernetwork import Editor, Prepared, weight_rms
from errata.training.factors import Change, Factors

STEP, RIDGE = LOGS = ("step", "ridge")
ROWS = 1024
"""Rows that the network is run on at once when it is differentiated (authors' code: 1,024)."""


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
            coefficients = solve_gram(one.keys, values_of(editor, name, one), ridge).to(one.keys)
            changes[name] = Change(coefficients, one.keys, torch.zeros_like(one.owner))
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

    With A = U U^T + l I and C = A^-1 D, that for D is A^-1 times that for C, and that for log l is -l times the inner
    product of the former with C. The network is run again in parts, on the inner product of its values with the former.
    """
    variables = {name: p for name, p in editor.named_parameters() if name != f"logs.{RIDGE}"}
    total = {name: torch.zeros_like(variable) for name, variable in variables.items()}
    of_ridge = torch.zeros_like(editor.logs[RIDGE])
    for (name, one), gradient in zip(factors.items(), gradients, strict=True):
        ridge = float(editor.positive(RIDGE, name).detach())
        of_values = solve_gram(one.keys, gradient, ridge)
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
