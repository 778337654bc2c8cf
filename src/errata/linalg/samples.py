"""Whether two samples could be from one distribution."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence

EXACT = 1_000_000
"""Product of two samples' sizes up to which the exact distribution is computed."""


def ks_distance(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the largest difference of two samples' empirical distribution functions.

    Raises ValueError for an empty sample.
    """
    if not a or not b:
        raise ValueError("expected two samples of at least one number each")
    one, other = sorted(a), sorted(b)
    i = j = 0
    largest = 0.0
    while i < len(one) and j < len(other):
        at = min(one[i], other[j])
        while i < len(one) and one[i] == at:
            i += 1
        while j < len(other) and other[j] == at:
            j += 1
        largest = max(largest, abs(i / len(one) - j / len(other)))
    return largest


def ks_p_value(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the p-value of the two-sided Kolmogorov-Smirnov test of two samples.

    The probability of a distance at least as large if both are from one continuous distribution: exact by counting
    lattice paths up to :data:`EXACT`, else Kolmogorov's limit. It falls with the samples' sizes.
    """
    distance, n, m = ks_distance(a, b), len(a), len(b)
    if n * m > EXACT:
        root = math.sqrt(n * m / (n + m)) * distance
        terms = (2 * (-1) ** (k - 1) * math.exp(-2 * (k * root) ** 2) for k in range(1, 101))
        return min(1.0, max(0.0, sum(terms))) if root > 0 else 1.0
    # share of orders of both samples whose distance stays below, built up one observation after another
    bound = distance - 1e-12
    below = [0.0] * (m + 1)
    for i in range(n + 1):
        for j in range(m + 1):
            if abs(i / n - j / m) >= bound and i + j > 0:
                below[j] = 0.0
            elif i + j > 0:
                left = below[j - 1] * j / (i + j) if j else 0.0
                below[j] = left + (below[j] * i / (i + j) if i else 0.0)
            else:
                below[0] = 1.0 if bound > 0 else 0.0
    return 1.0 - below[m]


def auc(high: Sequence[float], low: Sequence[float]) -> float:
    """Return the probability that one of ``high`` exceeds one of ``low``, ties counted half.

    Raises ValueError for an empty sample.
    """
    if not high or not low:
        raise ValueError("expected two samples of at least one number each")
    ordered = sorted(low)
    wins = sum(bisect.bisect_left(ordered, x) + bisect.bisect_right(ordered, x) for x in high)
    return wins / (2 * len(high) * len(low))
