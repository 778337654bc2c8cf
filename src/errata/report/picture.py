"""Pictures in the style of the report's figures, one file each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from errata.errors import ConfigError
from errata.report.figures import LIGHT, WIDTH, fixed, render, require_matplotlib, styled
from errata.report.files import write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMS = (".png", ".svg")


def panels(
    path: Path, title: str, columns: int, height: float, *, heights: Sequence[float] = (1.0,)
) -> tuple[Figure, list[Axes]]:
    """Return a figure of panels, row by row, for a file of this name; ``height`` of all in inches.

    ``heights``: of the rows, in proportion to one another.

    Raises ConfigError without matplotlib or for another ending than .png and .svg.
    """
    require_matplotlib()
    if path.suffix.lower() not in FORMS:
        raise ConfigError(f"pictures are .png or .svg files, found {path}")
    from matplotlib.figure import Figure

    figure = Figure(
        figsize=(WIDTH * max(1.0, columns / 2), height), facecolor=LIGHT.ground, layout="constrained"
    )
    figure.suptitle(title, color=LIGHT.ink, fontsize=12, fontweight="bold", x=0.012, ha="left")
    axes = figure.subplots(len(heights), columns, squeeze=False, height_ratios=heights)
    return figure, [styled(one, LIGHT) for row in axes for one in row]


def write_picture(path: Path, figure: Figure) -> Path:
    """Write a figure and return its path. Raises DataError where that fails."""
    return write(path, render(fixed(figure), path.suffix.lower().removeprefix(".")))
