"""A picture of a board of unlearning: what is forgotten against what is kept. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from errata.report import picture
from errata.report.figures import LIGHT
from errata.report.style import MARKERS, style_of

UNEDITED, RETRAINED = "unedited", "retrained"
"""Rows that no method has; the latter is drawn as a line, and the former, all given and all kept, is left out."""


def write_unlearning(path: Path, document: Mapping[str, Any]) -> Path:
    """Draw the file of benchmarks/unlearning.py, a panel for each number of subjects; bottom right is best.

    Raises ConfigError without matplotlib or for another ending than .png and .svg.
    """
    sizes = sorted({row["subjects"] for row in document["rows"]})
    figure, axes = picture.panels(path, "Old answers still given against facts kept", len(sizes), 4.2)
    for panel, size in zip(axes, sizes, strict=True):
        own = {row["method"]: row for row in document["rows"] if row["subjects"] == size}
        number = next(iter(own.values()))["requests"]
        panel.set_title(f"{size} subjects, {number} facts", fontsize=9.5, color=LIGHT.ink, loc="left")
        reference = own.pop(RETRAINED, None)
        own.pop(UNEDITED, None)
        for name, row in sorted(own.items()):
            style = style_of(name)
            panel.plot([row["kept"]], [row["forgotten"]["given"]], MARKERS[style.marker],
                       color=LIGHT.series[style.colour], label=name)  # fmt: skip
        if reference is not None:
            given = reference["forgotten"]["given"]
            panel.axhline(given, color=LIGHT.muted, linewidth=1, linestyle="--", label=RETRAINED)
        panel.set_xlim(-0.03, 1.03)
        panel.set_ylim(-0.03, 1.03)
        panel.set_xlabel("facts kept")
        panel.set_ylabel("old answers given")
        panel.legend(fontsize=7.5, frameon=False)
    return picture.write_picture(path, figure)
