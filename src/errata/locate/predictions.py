"""Where the predictions are that a value search's loss reads, as tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from errata.locate.problems import PromptRow


def target_predictions(
    rows: Sequence[PromptRow], columns: Sequence[int], device: torch.device, *, bare: bool,
    erased: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Index every target token: its row, the column that predicts it, its id, its weight, whether it decides.

    Five tensors ``[n]``, for n target tokens. Without ``bare``, tokens after the bare prompt do not count for
    ``stop: top``. Those of rows to be erased weigh and decide nothing.
    """
    row, at, token, weight, decides = [], [], [], [], []
    for i, (prompt, column) in enumerate(zip(rows, columns, strict=True)):
        first = column + len(prompt.ids) - len(prompt.targets) - prompt.position
        for j, target in enumerate(prompt.targets):
            row.append(i)
            at.append(first + j)
            token.append(target)
            weight.append(0.0 if erased[i] else prompt.loss_weight / len(prompt.targets))
            decides.append(float((bare or prompt.context != 0) and not erased[i]))
    return (
        torch.tensor(row, device=device),
        torch.tensor(at, device=device),
        torch.tensor(token, device=device),
        torch.tensor(weight, device=device),
        torch.tensor(decides, device=device),
    )


def essence_predictions(columns: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Index the one prediction of each essence row, in the same way; ``columns`` ``[rows]``."""
    row = torch.arange(len(columns), device=columns.device)
    none = torch.zeros(len(row), device=columns.device)
    return row, columns, torch.zeros_like(row), none, none
