"""PAINT's search: how strong an edit should be, between the unedited model and the edited one, or beyond.

Source: Ilharco et al., "Patching open-vocabulary models by interpolating weights", NeurIPS 2022, arXiv 2208.05592.
There the supported tasks are data sets, and an interpolation may cost them one point of accuracy; here they are what
the ledger's guard asks beside an edit's own requests: statements about their subjects, and canaries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from errata.edits.combining import interpolate
from errata.edits.edit import Edit
from errata.errors import ConfigError, EditError
from errata.host.host import Host
from errata.ledger.guard import Guard
from errata.ledger.settings import GuardSettings
from errata.progress import OnProgress, ignore
from errata.types import Request

ALPHAS = tuple(i / 10 for i in range(1, 11))
"""The paper's, without 0, which is the unedited model."""
MOST_LOST = 0.01
"""The paper's bound: one point."""


@dataclass(frozen=True)
class Point:
    """What an interpolation does; shares in [0, 1]."""

    alpha: float
    answered: float
    """Requests answered with their target."""
    kept: float
    """Statements about their subjects and canaries whose answer is the same, the lower of the two shares."""
    perplexity: float
    """Of neutral text, as a multiple of the unedited model's."""

    def to_dict(self) -> dict[str, Any]:
        """Return the point as plain data."""
        return asdict(self)


def scan(
    host: Host, edit: Edit, *, alphas: Sequence[float] = ALPHAS, settings: GuardSettings | None = None,
    on_progress: OnProgress = ignore,
) -> list[Point]:  # fmt: skip
    """Measure interpolations of an edit on its unedited host, in the order of alpha.

    Raises EditError for an edit without requests, of which nothing can be asked, ConfigError for an alpha that is not
    above 0.
    """
    requests = [request for request in edit.provenance.requests if isinstance(request, Request)]
    if not requests:
        raise EditError(f"edit {edit.digest} has no requests to choose alpha by; give it: --weights 0.5")
    wrong = [alpha for alpha in alphas if not 0 < alpha < float("inf")]
    if wrong or not alphas:
        raise ConfigError(f"alphas: expected numbers above 0, found {list(alphas)}")
    guard = Guard.of(host, settings or GuardSettings(), on_progress=on_progress)
    before = guard.before(requests, [])
    points: list[Point] = []
    for number, alpha in enumerate(sorted(set(alphas))):
        on_progress("interpolations", number, len(alphas))
        one = interpolate(edit, alpha)
        with one.on(host):
            measured = guard.measure(before, one, [])
        shares = [share for share in (measured.subject, measured.canaries) if share is not None]
        if measured.answered is None or measured.perplexity is None or not shares:
            raise EditError(
                f"there is nothing to measure an interpolation of edit {edit.digest} by on {host.name}"
            )
        points.append(Point(alpha, measured.answered, min(shares), measured.perplexity))
    return points


def choose(points: Sequence[Point], most_lost: float = MOST_LOST) -> Point | None:
    """Return the point that answers the most among those that keep all but ``most_lost``.

    Of points that answer as many the one that keeps more, then the smallest alpha. None where no such point answers any
    request.
    """
    allowed = [point for point in points if point.answered > 0 and point.kept >= 1 - most_lost - 1e-9]
    return max(allowed, key=lambda point: (point.answered, point.kept, -point.alpha), default=None)
