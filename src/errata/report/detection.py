"""Pictures of what ``errata detect`` found, and of how often it tells; from documents alone. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.report import picture
from errata.report.figures import LIGHT
from errata.report.style import MARKERS, style_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_BARS = 12
"""Weights in a picture."""
FEWEST_PLACES = 6
"""Bars that a panel has room for at least, so that a single one is not as high as the panel."""
Point = tuple[float, float]


def write_detection(path: Path, document: Mapping[str, Any]) -> Path:
    """Draw a detection, as ``errata detect --json`` prints it: weights on the left, names on the right.

    Raises ConfigError without matplotlib or for another ending than .png and .svg.
    """
    against = document["against"]
    title = f"{document['model']}: {document['verdict']}" + (f", against {against}" if against else "")
    figure, (left, right) = picture.panels(path, title, columns=2, height=4.2)
    if against:
        bars = [(one["weight"], one["directions"]) for one in document["changes"]]
        left.set_title("directions in which a weight changed", fontsize=9.5, color=LIGHT.ink, loc="left")
    else:
        bars = [
            (one["weight"], max(one["shape"], one["fall"], one["carried"] or 0)) for one in document["traces"]
        ]
        left.axvline(document["threshold"], color=LIGHT.accent, linewidth=1)
        left.set_title(
            "score of a weight by itself, and its bound", fontsize=9.5, color=LIGHT.ink, loc="left"
        )
    _bars(left, bars)
    names = [(one["name"], one["ratio"]) for one in document["subjects"]]
    right.set_title("key of a name moved, beside the median", fontsize=9.5, color=LIGHT.ink, loc="left")
    _bars(right, names)
    return picture.write_picture(path, figure)


def _bars(axes: Axes, bars: Sequence[tuple[str, float]]) -> None:
    shown = list(bars[:MOST_BARS])[::-1]
    axes.barh(range(len(shown)), [value for _, value in shown], height=0.62, color=LIGHT.accent)
    axes.set_yticks(range(len(shown)), [name for name, _ in shown], color=LIGHT.ink)
    axes.set_ylim(len(shown) - 0.4 - max(FEWEST_PLACES, len(shown)), len(shown) - 0.4)
    axes.grid(axis="y", visible=False)


# --- how often it tells ---------------------------------------------------------------------


def roc(edited: Sequence[float], controls: Sequence[float]) -> tuple[list[Point], float]:
    """Return the points (false alarms, detections) of all thresholds on scores, high meaning edited, and the area.

    The area is the probability that an edited model scores above a control, ties counted half. Raises ValueError where
    one of them is empty.
    """
    if not edited or not controls:
        raise ValueError("a ROC curve needs edited models and controls")
    bounds = sorted({*edited, *controls}, reverse=True)
    points = [(0.0, 0.0)] + [
        (sum(c >= bound for c in controls) / len(controls), sum(e >= bound for e in edited) / len(edited))
        for bound in bounds
    ]
    wins = sum((e > c) + 0.5 * (e == c) for e in edited for c in controls)
    return points, wins / len(edited) / len(controls)


def write_roc(path: Path, document: Mapping[str, Any]) -> Path:
    """Draw the curves by method from the file of benchmarks/detection.py: of all seeds, as they depend on no bound."""
    return picture.write_picture(path, roc_figure(path, document)[0])


def roc_figure(path: Path, document: Mapping[str, Any]) -> tuple[Figure, list[Axes]]:
    """Return the picture with its panels: a row for each number of edits, with the base and without, legend outside."""
    rows = [one for one in document["rows"] if "failed" not in one]
    controls = [one for one in rows if one["kind"].startswith("control")]
    counts = sorted({one["count"] for one in rows if one["count"]})
    title = "Edited or not: detections against false alarms"
    figure, axes = picture.panels(path, title, 2, 0.6 + 3.4 * len(counts), rows=len(counts), beside=2.2)
    for count, pair in zip(counts, zip(axes[::2], axes[1::2], strict=True), strict=True):
        for panel, where in zip(pair, ("with the base", "without the base"), strict=True):
            noun = "edit" if count == 1 else "edits"
            panel.set_title(f"{count} {noun}, {where}", fontsize=9.5, color=LIGHT.ink, loc="left")
            panel.set_xlim(-0.02, 1.02)
            panel.set_ylim(-0.02, 1.02)
        for method in sorted({one["kind"] for one in rows if one["count"] == count}):
            own = [one for one in rows if (one["kind"], one["count"]) == (method, count)]
            curves = [
                roc([evidence(one, alone) for one in own], [evidence(one, alone) for one in controls])
                for alone in (False, True)
            ]
            label = f"{method}  " + " / ".join(f"{area:.2f}" for _, area in curves)
            style = style_of(method)
            for panel, (points, _) in zip(pair, curves, strict=True):
                panel.plot(*zip(*points, strict=True), color=LIGHT.series[style.colour], linewidth=1.4, alpha=0.8,
                           marker=MARKERS[style.marker], markersize=3, label=label)  # fmt: skip
        legend = pair[1].legend(
            fontsize=7.5,
            frameon=False,
            loc="center left",
            bbox_to_anchor=(1.02, 0.5),
            title="area with / without",
        )
        legend.get_title().set_fontsize(7.5)
    return figure, axes


def evidence(one: Mapping[str, Any], alone: bool) -> float:
    """Return a row's score, high meaning edited: with the base minus that of a detection, no change at all lowest."""
    if alone:
        return float(one["alone"])
    return -float(one["share"]) / max(1.0, one["ratio"]) ** 2 if one["changed"] else float("-inf")
