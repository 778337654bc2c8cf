"""How sure an average is: bootstrap over cases, for one method and for the difference of two.

Rows of one case hang together, so whole cases are drawn, never single rows. An average is that of all
drawn rows, hence a case with more rows counts more, as in the average itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
LEVEL = 0.95

_FEW = 64
"""Up to so many different cases are drawn by how often each comes up."""
_DRAWS = 2**21
"""Draws held at once otherwise."""

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """How much larger the second method's average is than the first one's, over the same cases."""

    mean: float
    low: float
    high: float
    cases: int
    """Cases that both have."""

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


def bootstrap(
    cases: Sequence[Sequence[float]], *, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> tuple[float, float] | None:
    """Return the percentile interval of the mean of all values, drawing whole cases with replacement.

    None where there is no value or one is not finite. The order of the cases does not matter.
    """
    table = _sums(case for case in cases if case)
    if table is None:
        return None
    totals = _resampled(table, resamples, seed)
    return _percentiles(totals[:, 0] / totals[:, 1], level)


def paired(
    first: Mapping[str, Sequence[float]],
    second: Mapping[str, Sequence[float]],
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Difference | None:
    """Compare two methods by their values per case: mean of the second minus mean of the first.

    The same cases are drawn for both, so what makes a case hard for both cancels. None where they share no
    case with values, or where a value is not finite.
    """
    shared = sorted(name for name in first.keys() & second.keys() if first[name] and second[name])
    a, b = _sums(first[name] for name in shared), _sums(second[name] for name in shared)
    if a is None or b is None:
        return None
    totals = _resampled(np.hstack([a, b]), resamples, seed)
    spread = totals[:, 2] / totals[:, 3] - totals[:, 0] / totals[:, 1]
    low, high = _percentiles(spread, level)
    mean = b[:, 0].sum() / b[:, 1].sum() - a[:, 0].sum() / a[:, 1].sum()
    return Difference(float(mean), low, high, len(shared))


def mean(values: Sequence[float]) -> float | None:
    """Return the mean, None of nothing."""
    return sum(values) / len(values) if values else None


def macro(cases: Sequence[Sequence[float]]) -> float | None:
    """Return the mean over cases of the mean inside each, None of nothing: how papers average paraphrases."""
    return mean([sum(case) / len(case) for case in cases if case])


def quantile(values: Sequence[float], q: float) -> float | None:
    """Return the q-quantile, between neighbours linearly; None of nothing, NaN if any is NaN."""
    if not values:
        return None
    if any(map(math.isnan, values)):
        return math.nan
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    return low if low == high else low + (place - math.floor(place)) * (high - low)


def _sums(cases: Iterable[Sequence[float]]) -> Values | None:
    """Return sum and number of each case's values ``[cases, 2]``; None if there are none or any is not finite."""
    pairs = [(math.fsum(case), float(len(case))) for case in cases]
    table = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    return table if len(table) and np.isfinite(table).all() else None


def _resampled(table: Values, resamples: int, seed: int) -> Values:
    """Return the column sums of as many rows as the table has, drawn with replacement ``[resamples, columns]``.

    Shares of a few probes take few different values. Then it is drawn how often each value comes up,
    which is the same distribution and does not grow with the number of cases.
    """
    rng = np.random.default_rng(seed)
    kinds, counts = np.unique(table, axis=0, return_counts=True)
    n = len(table)
    if len(kinds) <= _FEW:
        return rng.multinomial(n, counts / n, size=resamples) @ kinds
    ordered = np.repeat(kinds, counts, axis=0)
    step = max(1, _DRAWS // n)
    parts = [
        ordered[rng.integers(n, size=(min(step, resamples - start), n))].sum(axis=1)
        for start in range(0, resamples, step)
    ]
    return np.concatenate(parts)


def _percentiles(values: Values, level: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
