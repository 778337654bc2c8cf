"""A linear gate: ridge regression of 1 for one set of vectors and -1 for another."""

from __future__ import annotations

import torch
from torch import Tensor

from errata.linalg import routines


def two_sided_ridge(inside: Tensor, outside: Tensor, *, ridge: float) -> tuple[Tensor, float]:
    """Return w ``[d]`` and b of the w x + b nearest to 1 for ``inside`` and to -1 for ``outside``, each ``[n, d]``.

    Minimises the mean squared error, each set with half the weight, plus lambda |w|^2; ``ridge``: lambda in the
    vectors' mean variance per entry. Solved among the vectors, so the cost grows with their number, not with d.
    """
    vectors = torch.cat([inside, outside])
    targets = torch.cat([vectors.new_ones(len(inside)), -vectors.new_ones(len(outside))])
    weights = torch.cat(
        [vectors.new_full((len(part),), 0.5 / max(1, len(part))) for part in (inside, outside)]
    )
    center, offset, roots = weights @ vectors, weights @ targets, weights.sqrt()
    rows = (vectors - center) * roots[:, None]
    gram = rows @ rows.mT
    shrinkage = ridge * gram.diagonal().sum() / vectors.shape[1]
    shrinkage = shrinkage.clamp_min(torch.finfo(gram.dtype).tiny)
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    weight = rows.mT @ routines.solve(gram + shrinkage * eye, (targets - offset) * roots)
    return weight, float(offset - center @ weight)
