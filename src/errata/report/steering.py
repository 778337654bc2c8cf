"""Pictures of what strength buys and costs; from documents alone. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.report import picture
from errata.report.figures import LIGHT
from errata.report.style import MARKERS, style_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SCORES = ("concept", "instruction", "fluency", "overall")


def write_calibration(path: Path, sweep: Mapping[str, Any], title: str) -> Path:
    """Draw a sweep over strengths, as ``errata steer --json`` prints it: scores on the left, perplexity on the right.

    Raises ConfigError without matplotlib or for another ending than .png and .svg.
    """
    points = sweep["points"]
    strengths = [one["strength"] for one in points]
    figure, (left, right) = picture.panels(path, title, columns=2, height=3.6)
    scored = points[0]["overall"] is not None
    for name in SCORES if scored else ("margin",):
        style = style_of(name)
        left.plot(strengths, [one[name] for one in points], color=LIGHT.series[style.colour], linewidth=1.6,
                  marker=MARKERS[style.marker], markersize=4, label=name)  # fmt: skip
    _titled(
        left, "scores of written texts, 0 to 2" if scored else "margin of the positive answers, nats a token"
    )
    right.plot(strengths, [one["perplexity"] for one in points], color=LIGHT.accent, linewidth=1.6, marker="o",
               markersize=4)  # fmt: skip
    right.axhline(sweep["limit"] * points[0]["perplexity"], color=LIGHT.ink, linewidth=1, linestyle="--")
    right.set_yscale("log")
    _plain(right.yaxis)
    _titled(right, "perplexity of neutral text, and its limit")
    for axes in (left, right):
        axes.axvline(sweep["chosen"], color=LIGHT.ink, linewidth=1, linestyle=":")
        axes.set_xlabel("strength (dotted: the one chosen)", fontsize=8.5)
    left.legend(fontsize=7.5, frameon=False)
    return picture.write_picture(path, figure)


def write_sweeps(path: Path, document: Mapping[str, Any]) -> Path:
    """Draw the sweeps of all methods from the file of benchmarks/steering.py: overall score against perplexity.

    The strength grows along each line; a ring marks the one that was chosen.
    """
    sweeps = [row for row in document["rows"] if "points" in row]
    figure, (left, right) = picture.panels(path, f"Steering to {document['task']}", columns=2, height=4.2)
    for name, axes in (("overall", left), ("concept", right)):
        for number, row in enumerate(sweeps):  # few methods: by their place they differ in colour and marker
            _trade(axes, number, row["method"], name, row["points"], row["chosen"])
        base = sweeps[0]["points"][0]["perplexity"]
        axes.axvline(document["limit"] * base, color=LIGHT.ink, linewidth=1, linestyle="--")
        axes.set_xscale("log")
        _plain(axes.xaxis)
        axes.set_xlabel("perplexity of neutral text (dashed: the limit)", fontsize=8.5)
        _titled(axes, f"{name} score, 0 to 2")
    right.legend(fontsize=6.5, frameon=False)
    return picture.write_picture(path, figure)


def _trade(
    axes: Axes, number: int, method: str, name: str, points: Sequence[Mapping[str, Any]], chosen: float
) -> None:
    colour, marker = LIGHT.series[number % len(LIGHT.series)], MARKERS[number % len(MARKERS)]
    where = [(one["perplexity"], one[name]) for one in points]
    axes.plot(*zip(*where, strict=True), color=colour, linewidth=1.3, alpha=0.85, marker=marker,
              markersize=3.5, label=method)  # fmt: skip
    here = next(at for one, at in zip(points, where, strict=True) if one["strength"] == chosen)
    axes.plot(*here, marker="o", markersize=10, markerfacecolor="none", markeredgecolor=colour)


def _plain(axis: Any) -> None:
    """Write the numbers of a logarithmic axis as they are, also those between two powers of ten."""
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("{x:g}")


def _titled(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=9.5, color=LIGHT.ink, loc="left")
