"""What tracing says of a model's layers beside how well edits at them succeed. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.report import picture
from errata.report.figures import LIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def write_localisation(path: Path, document: Mapping[str, Any]) -> Path:
    """Draw ``errata trace --against-editing --json``, and return the picture's path.

    On the left the means of each layer with their 95 % intervals over facts, on the right every fact at every layer.
    Raises ConfigError without matplotlib or for another ending than .png and .svg.
    """
    title = f"Tracing against edits by {document['method']}, {document['facts']} facts"
    figure, (means, points) = picture.panels(path, title, columns=2, height=3.9)
    _means(means, document["by_layer"])
    for number, layer in enumerate(document["layers"]):
        own = [[row[number] for row in document["points"][name]] for name in ("score", "success")]
        points.scatter(*own, s=13, color=LIGHT.series[number % 12], alpha=0.75, label=f"layer {layer}")
    points.set_xlabel("tracing score of a fact at a layer", fontsize=9, color=LIGHT.muted)
    points.set_ylabel("success of the edit there", fontsize=9, color=LIGHT.muted)
    points.set_title(_words(document), fontsize=9.5, color=LIGHT.ink, loc="left")
    points.legend(
        fontsize=7.5, frameon=False, labelcolor=LIGHT.ink, ncols=max(1, len(document["layers"]) // 8 + 1)
    )
    return picture.write_picture(path, figure)


def _means(axes: Axes, rows: list[dict[str, Any]]) -> None:
    layers = [row["layer"] for row in rows]
    for number, (name, label) in enumerate((("score", "tracing score"), ("success", "success of edits"))):
        colour = LIGHT.series[number]
        axes.plot(
            layers, [row[name] for row in rows], color=colour, marker="os"[number], markersize=4, label=label
        )
        axes.fill_between(layers, [row[f"{name}_low"] for row in rows], [row[f"{name}_high"] for row in rows],
                          color=colour, alpha=0.18, linewidth=0)  # fmt: skip
    axes.set_xticks(layers[:: max(1, len(layers) // 8)])
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("layer", fontsize=9, color=LIGHT.muted)
    axes.set_title("mean over facts", fontsize=9.5, color=LIGHT.ink, loc="left")
    axes.legend(fontsize=8.5, frameon=False, labelcolor=LIGHT.ink)


def _words(document: Mapping[str, Any]) -> str:
    one = document["increment"]
    return f"tracing adds {one['value']:.3f} to R2 ({one['low']:.3f} to {one['high']:.3f})"
