"""Pictures of what ``errata detect`` found, and of how often it tells; from documents alone. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.report import picture
from errata.report.figures import LIGHT
from errata.report.style import MARKERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_BARS = 12
"""Weights in a picture."""
FEWEST_PLACES = 6
"""Bars that a panel has room for at least, so that a single one is not as high as the panel."""
CURVES, ROW = 3.0, 0.21
"""Inches: height of the ROC curves, and of a method's row of scores."""
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


def areas(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], tuple[float, float]]:
    """Return the area under the ROC curve of each method and number of edits, with the base and without.

    ``rows``: of the file of benchmarks/detection.py; each method's models are compared with the controls of all seeds.
    Raises ValueError without a control.
    """
    rows = [one for one in rows if "failed" not in one]
    controls = [one for one in rows if not one["count"]]
    found = {}
    for key in sorted({(one["kind"], one["count"]) for one in rows if one["count"]}):
        own = [one for one in rows if (one["kind"], one["count"]) == key]
        with_base, alone = (
            roc([evidence(one, side) for one in own], [evidence(one, side) for one in controls])[1]
            for side in (False, True)
        )
        found[key] = with_base, alone
    return found


def write_scores(path: Path, document: Mapping[str, Any]) -> Path:
    """Draw how often models are told from controls, and every model's score, from the file of benchmarks/detection.py.

    Raises ConfigError without matplotlib or for another ending than .png and .svg, ValueError without an edited model
    or without a control.
    """
    return picture.write_picture(path, scores_figure(path, document)[0])


def scores_figure(path: Path, document: Mapping[str, Any]) -> tuple[Figure, list[Axes]]:
    """Return the picture with its panels, each with the base and without: ROC curves above, scores by method below.

    The curves are of all methods together, one for each number of edits; of all seeds, as they depend on no bound.
    """
    rows = [one for one in document["rows"] if "failed" not in one]
    controls = [one for one in rows if not one["count"]]
    counts = sorted({one["count"] for one in rows if one["count"]})
    names = _order([one for one in rows if one["count"]])
    names += sorted({one["kind"] for one in controls})
    low = 0.9 + ROW * len(names)
    title = "Edited or not: what the detector makes of edited models and controls"
    figure, axes = picture.panels(path, title, 2, 0.6 + CURVES + low, heights=(CURVES, low))
    for panel, alone in zip(axes[:2], (False, True), strict=True):
        _curves(panel, rows, counts, alone)
    for panel, alone in zip(axes[2:], (False, True), strict=True):
        _scores(panel, rows, names, alone)
        _limits(
            panel, controls, names[::-1], float(document["bounds"]["without" if alone else "with"]), alone
        )
        panel.tick_params(axis="y", labelleft=not alone)
    handles = [axes[2].plot([], [], **_dot(counts, count))[0] for count in counts]
    figure.legend(handles, [_edits(count) for count in counts], fontsize=8.5, frameon=False, ncols=len(counts),
                  loc="outside lower center", labelcolor=LIGHT.ink)  # fmt: skip
    return figure, axes


def evidence(one: Mapping[str, Any], alone: bool) -> float:
    """Return a row's score, high meaning edited: with the base minus that of a detection, no change at all lowest."""
    if alone:
        return float(one["alone"])
    return -float(one["share"]) / max(1.0, one["ratio"]) ** 2 if one["changed"] else float("-inf")


def _order(edited: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the methods, those first whose models with the fewest edits show the strongest trace without the base."""
    fewest = {kind: min(one["count"] for one in edited if one["kind"] == kind) for kind in _kinds(edited)}
    best = {
        kind: max(one["alone"] for one in edited if (one["kind"], one["count"]) == (kind, fewest[kind]))
        for kind in fewest
    }
    return sorted(best, key=lambda kind: (-best[kind], kind))


def _kinds(rows: Sequence[Mapping[str, Any]]) -> set[str]:
    return {str(one["kind"]) for one in rows}


def _curves(axes: Axes, rows: Sequence[Mapping[str, Any]], counts: Sequence[int], alone: bool) -> None:
    """Draw detections against false alarms, a curve for each number of edits."""
    controls = [evidence(one, alone) for one in rows if not one["count"]]
    for count in counts:
        points, area = roc([evidence(one, alone) for one in rows if one["count"] == count], controls)
        clean = max(hits for alarms, hits in points if alarms == 0)
        line = {**_dot(counts, count), "linestyle": "-", "linewidth": 1.8, "marker": ""}
        label = f"{_edits(count)}: area {area:.2f}, {100 * clean:.0f} %"
        axes.plot(*zip(*points, strict=True), **line, label=label, clip_on=False)
    axes.set_title(f"{'without' if alone else 'with'} the base", fontsize=9.5, color=LIGHT.ink, loc="left")
    axes.set_xlabel("false alarms", fontsize=8.5, color=LIGHT.muted)
    axes.set_ylabel("" if alone else "detections", fontsize=8.5, color=LIGHT.muted)
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    legend = axes.legend(fontsize=8, facecolor=LIGHT.ground, edgecolor="none", loc="lower right",
                         labelcolor=LIGHT.ink, title="area under the curve, detections at no false alarm")  # fmt: skip
    legend.get_title().set_fontsize(8)
    legend.get_title().set_color(LIGHT.muted)


def _scores(axes: Axes, rows: Sequence[Mapping[str, Any]], names: Sequence[str], alone: bool) -> None:
    """Draw a dot for each model in the row of its method, from left to right the more it looks edited."""
    counts = sorted({one["count"] for one in rows if one["count"]})
    for count in (0, *counts):
        # numbers of edits beside one another, so that equal scores do not hide each other
        shift = 0.0 if not count else 0.26 * (1 - 2 * (counts.index(count) + 0.5) / len(counts))
        spots = [
            (one["alone"] if alone else -evidence(one, False), len(names) - 1 - names.index(one["kind"]) + shift)
            for one in rows if one["count"] == count and (alone or one["changed"])
        ]  # fmt: skip
        axes.plot(*zip(*spots, strict=True), **_dot(counts, count))
    _logarithmic(axes, alone)
    axes.set_ylim(-0.7, len(names) - 0.3)
    axes.set_yticks(range(len(names)), names[::-1], color=LIGHT.ink)


def _logarithmic(axes: Axes, alone: bool) -> None:
    """Set up the axis of scores: with the base the lower, the more edited, so that it runs to the left."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log")
    if alone:
        axes.xaxis.set_major_locator(FixedLocator([m * 10.0**e for e in range(-2, 7) for m in (1, 2, 3, 6)]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    else:
        axes.invert_xaxis()
        axes.xaxis.set_major_locator(LogLocator(numticks=9))
    axes.xaxis.set_minor_locator(NullLocator())


def _limits(
    axes: Axes, controls: Sequence[Mapping[str, Any]], names: Sequence[str], bound: float, alone: bool
) -> None:
    """Shade what controls score, up to the one that looks most edited, and draw the bound of the verdict."""
    edge = abs(max(evidence(one, alone) for one in controls))
    start, end = axes.get_xlim()
    for one in () if alone else controls:
        if not one["changed"]:
            axes.text(0.015, names.index(one["kind"]), "unchanged", transform=axes.get_yaxis_transform(), va="center",
                      fontsize=7.5, color=LIGHT.muted)  # fmt: skip
    if edge != float("inf"):
        axes.axvspan(start, edge, color=LIGHT.muted, alpha=0.14, linewidth=0)
    axes.axvline(bound, color=LIGHT.accent, linewidth=1.2)
    axes.set_xlim(start, end)
    verdict = "suspicious" if alone else "edited"
    axes.set_title(
        f"score of each model; right of the line: {verdict}", fontsize=9.5, color=LIGHT.ink, loc="left"
    )
    axes.set_xlabel("grey: as controls score", fontsize=8.5, color=LIGHT.muted)


def _dot(counts: Sequence[int], count: int) -> dict[str, Any]:
    """Return how a model with so many edits is drawn, 0 a control: the darker, the fewer."""
    from matplotlib import colormaps

    place = counts.index(count) if count else 0
    colour = colormaps["viridis"](0.85 * place / max(1, len(counts) - 1)) if count else LIGHT.ink
    return {
        "color": colour, "marker": MARKERS[place % len(MARKERS)] if count else "x", "markersize": 4.5,
        "linestyle": "none", "alpha": 0.9,
    }  # fmt: skip


def _edits(count: int) -> str:
    return f"{count} {'edit' if count == 1 else 'edits'}"
