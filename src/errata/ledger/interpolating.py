"""PAINT's search: how strong an edit should be, between the unedited model and the edited one, or beyond.

Source: Ilharco et al., "Patching open-vocabulary models by interpolating weights", NeurIPS 2022, arXiv 2208.05592.
There the supported tasks are data sets of images, and an interpolation may cost them one point of accuracy: so it is
here for image hosts. For models of text they are what the ledger's guard asks beside an edit's own requests:
statements about their subjects, and canaries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from errata.edits.combining import interpolate
from errata.edits.edit import Edit
from errata.errors import ConfigError, EditError
from errata.host.host import Host
from errata.host.images import ImageHost
from errata.ledger.guard import Guard
from errata.ledger.settings import GuardSettings
from errata.progress import OnProgress, ignore
from errata.types import Request

if TYPE_CHECKING:
    from torch import Tensor

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
    _check_alphas(alphas)
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


def _check_alphas(alphas: Sequence[float]) -> None:
    wrong = [alpha for alpha in alphas if not 0 < alpha < float("inf")]
    if wrong or not alphas:
        raise ConfigError(f"alphas: expected numbers above 0, found {list(alphas)}")


# --- images -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ImageTask:
    """Labelled images, with the head that tells their classes apart; it is never edited."""

    name: str
    images: Tensor
    """``[n, c, h, w]``, in the host's unit."""
    labels: Tensor
    """Right classes, int64 ``[n]``: rows of the head, or the model's own where there is none."""
    head: Tensor | None = None
    """``[classes, d]`` for a two-tower model, see :func:`errata.host.two_towers.text_head`."""


@dataclass(frozen=True)
class ImagePoint:
    """What an interpolation does; shares in [0, 1]."""

    alpha: float
    patched: float
    """Accuracy on the task that the edit is for."""
    supported: float
    """Accuracy on the other tasks, the mean over them."""

    def to_dict(self) -> dict[str, Any]:
        """Return the point as plain data."""
        return asdict(self)


def accuracy(host: ImageHost, task: ImageTask) -> float:
    """Return the share of a task's images whose most probable class is right."""
    scores = host.logits(task.images)
    if task.head is not None:
        scores = scores.float() @ task.head.to(scores.device, scores.float().dtype).mT
    return float((scores.argmax(-1).cpu() == task.labels).double().mean())


def scan_images(
    host: ImageHost, edit: Edit, patch: ImageTask, supported: Sequence[ImageTask], *,
    alphas: Sequence[float] = ALPHAS, on_progress: OnProgress = ignore,
) -> list[ImagePoint]:  # fmt: skip
    """Measure interpolations of an edit on its unedited host, in the order of alpha; the first is alpha 0.

    Raises ConfigError for an alpha that is not above 0, and without a supported task.
    """
    _check_alphas(alphas)
    if not supported:
        raise ConfigError("name at least one task that is to stay supported")
    points: list[ImagePoint] = []
    for number, alpha in enumerate((0.0, *sorted(set(alphas)))):
        on_progress("interpolations", number, len(alphas) + 1)
        with interpolate(edit, alpha).on(host):
            others = [accuracy(host, task) for task in supported]
            points.append(ImagePoint(alpha, accuracy(host, patch), sum(others) / len(others)))
    return points


def choose_images(points: Sequence[ImagePoint], most_lost: float = MOST_LOST) -> ImagePoint | None:
    """Return the point with the best accuracy on the patched task that costs the supported ones at most ``most_lost``.

    Of points as good the one that supports more, then the smallest alpha. None where none is better than alpha 0.
    """
    before = points[0]
    allowed = [
        point for point in points[1:]
        if point.patched > before.patched and point.supported >= before.supported - most_lost - 1e-9
    ]  # fmt: skip
    return max(allowed, key=lambda point: (point.patched, point.supported, -point.alpha), default=None)
