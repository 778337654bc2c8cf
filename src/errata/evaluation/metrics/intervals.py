"""Bootstrap confidence intervals over cases, for one method and for the difference of two.

Rows of a case are not independent, so whole cases are resampled, never single rows. The statistic is the mean of all
resampled rows, so a case with more rows weighs more, as in the average itself.
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
"""Up to this many distinct cases, the multinomial counts are sampled instead of indices."""
_DRAWS = 2**21
"""Otherwise, maximum number of indices in memory."""

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """The second method's average minus the first one's, over the same cases."""

    mean: float
    low: float
    high: float
    cases: int
    """Number of common cases."""

    @property
    def clear(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


def bootstrap(
    cases: Sequence[Sequence[float]], *, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> tuple[float, float] | None:
    """Return the percentile interval of the mean of all values, resampling whole cases with replacement.

    None where there is no value or one is not finite. The order of the cases does not matter.
    """
    table = _sums(case for case in cases if case)
    if table is None:
        return None
    totals = _resample(table, resamples, seed)
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

    The same resampled cases are used for both, so the difficulty of a case cancels. None where they have no common
    case with values, or where a value is not finite.
    """
    shared = sorted(name for name in first.keys() & second.keys() if first[name] and second[name])
    a, b = _sums(first[name] for name in shared), _sums(second[name] for name in shared)
    if a is None or b is None:
        return None
    totals = _resample(np.hstack([a, b]), resamples, seed)
    spread = totals[:, 2] / totals[:, 3] - totals[:, 0] / totals[:, 1]
    low, high = _percentiles(spread, level)
    mean = b[:, 0].sum() / b[:, 1].sum() - a[:, 0].sum() / a[:, 1].sum()
    return Difference(float(mean), low, high, len(shared))


def mean(values: Sequence[float]) -> float | None:
    """Return the mean, None for an empty sequence."""
    return sum(values) / len(values) if values else None


def macro(cases: Sequence[Sequence[float]]) -> float | None:
    """Return the mean over cases of each case's mean, as papers average paraphrases; None for no values."""
    return mean([sum(case) / len(case) for case in cases if case])


def quantile(values: Sequence[float], q: float) -> float | None:
    """Return the q-quantile with linear interpolation; None for an empty sequence, NaN if any value is NaN."""
    if not values:
        return None
    if any(map(math.isnan, values)):
        return math.nan
    in_order = sorted(values)
    place = q * (len(in_order) - 1)
    low, high = in_order[math.floor(place)], in_order[math.ceil(place)]
    return low if low == high else low + (place - math.floor(place)) * (high - low)


def _sums(cases: Iterable[Sequence[float]]) -> Values | None:
    """Return sum and count of each case's values ``[cases, 2]``; None without values or if any is not finite."""
    pairs = [(math.fsum(case), float(len(case))) for case in cases]
    table = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    return table if len(table) and np.isfinite(table).all() else None


def _resample(table: Values, resamples: int, seed: int) -> Values:
    """Return column sums of rows resampled with replacement ``[resamples, columns]``.

    Shares over a few probes have few distinct values. Then the multinomial counts of the values are sampled, which
    is the same distribution at a cost independent of the number of cases.
    """
    rng = np.random.default_rng(seed)
    kinds, counts = np.unique(table, axis=0, return_counts=True)
    n = len(table)
    if len(kinds) <= _FEW:
        return rng.multinomial(n, counts / n, size=resamples) @ kinds
    values = np.repeat(kinds, counts, axis=0)
    step = max(1, _DRAWS // n)
    parts = [
        values[rng.integers(n, size=(min(step, resamples - start), n))].sum(axis=1)
        for start in range(0, resamples, step)
    ]
    return np.concatenate(parts)


def _percentiles(values: Values, level: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
