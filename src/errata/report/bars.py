"""Pictures of ranked texts, from the documents that verbs print. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from errata.report import picture
from errata.report.figures import LIGHT

LONGEST = 60
"""Characters of a text beside its bar."""


def write_sources(path: Path, document: Mapping[str, Any]) -> Path:
    """Draw the scores of texts, as ``errata attribute --json`` prints them, and return the picture's path.

    Raises ConfigError without matplotlib or for another ending than .png and .svg.
    """
    shown = document["sources"][::-1]
    title = f"{document['prompt']} {document['answer']}: sources by {document['method']}"
    figure, (axes,) = picture.panels(path, title, columns=1, height=1.2 + 0.3 * len(shown))
    axes.barh(range(len(shown)), [one["score"] for one in shown], height=0.62, color=LIGHT.accent)
    texts = [" ".join(one["text"].split())[:LONGEST] for one in shown]
    axes.set_yticks(range(len(shown)), texts, color=LIGHT.ink, fontsize=7)
    axes.grid(axis="y", visible=False)
    return picture.write_picture(path, figure)


def write_discovery(path: Path, document: Mapping[str, Any]) -> Path:
    """Draw which share of continuations n samples give, a line a prefix, as ``errata extract --json`` prints it.

    Raises ConfigError without matplotlib or for another ending than .png and .svg.
    """
    rows = document["discovered"]
    title = f"{document['model']}: the next {rows[0]['suffix']} tokens of {document['texts']} texts"
    figure, (axes,) = picture.panels(path, title, columns=1, height=4.2)
    for number, one in enumerate(rows):
        counts = [int(n) for n in one["within"]]
        axes.plot(counts, [100 * share for share in one["within"].values()], color=LIGHT.series[number % 12],
                  marker="o", label=f"after {one['prefix']} tokens")  # fmt: skip
    axes.set_xscale("log")
    axes.set_ylim(-2, 102)
    axes.set_xlabel("samples", fontsize=9, color=LIGHT.muted)
    axes.set_ylabel("per cent of texts given with probability 0.9", fontsize=9, color=LIGHT.muted)
    axes.legend(fontsize=8.5, frameon=False, labelcolor=LIGHT.ink)
    return picture.write_picture(path, figure)
