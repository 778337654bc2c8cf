"""Heat maps of what restored states bring back: one fact by token and layer, several facts by role and layer.

Drawn as in Meng et al. (arXiv 2202.05262), Figs. 1 and 2: a panel for each kind of state, tokens downwards, those of
the subject marked with a star. Read from the documents that ``errata trace --json`` prints. Needs matplotlib.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.errors import ConfigError
from errata.report.figures import LIGHT, WIDTH, fixed, render, require_matplotlib
from errata.report.files import write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHADES = {"hidden": "Purples", "mlp": "Greens", "attn": "Reds"}
TITLES = {"hidden": "block outputs", "mlp": "feed-forward outputs", "attn": "attention outputs"}
LONGEST = 26
"""Characters of a row's label."""


def write_heatmap(path: str | os.PathLike[str], document: Mapping[str, Any]) -> Path:
    """Draw a trace, of one fact or the average of several, to a .png or .svg file; return its path.

    ``document``: what :meth:`errata.inspect.tracing.Trace.to_dict` or ``Average.to_dict`` gives. Raises ConfigError
    for another suffix or without matplotlib, DataError where the file cannot be written.
    """
    form = check_suffix(path)
    require_matplotlib()
    return write(path, render(fixed(_heatmap(document)), form))


def check_suffix(path: str | os.PathLike[str]) -> str:
    """Return the form that a file's suffix names. Raises ConfigError for another than .png or .svg."""
    form = Path(path).suffix.lower().removeprefix(".")
    if form not in ("png", "svg"):
        raise ConfigError(f"{path}: a picture is written as .png or .svg")
    return form


def _labels(document: Mapping[str, Any]) -> list[str]:
    if "roles" in document:
        return [str(role) for role in document["roles"]]
    tokens: list[str] = [str(token) for token in document["tokens"]]
    subject = set(document["subject_tokens"])
    rows = [
        f"{tokens[at].strip() or repr(tokens[at])}{'*' if at in subject else ''}"
        for at in map(int, document["positions"])
    ]
    return [*(row[:LONGEST] for row in rows), "all of the subject*"]


def _heatmap(document: Mapping[str, Any]) -> Figure:
    """Draw one panel for each map; every panel has its own scale, whose upper end is the total effect at most."""
    from matplotlib.figure import Figure

    labels, maps = _labels(document), document["maps"]
    by_role = "roles" in document
    height = 1.75 + 0.27 * len(labels)
    figure = Figure(figsize=(WIDTH, height), facecolor=LIGHT.ground, layout="constrained")
    figure.get_layout_engine().set(rect=(0.005, 0.3 / height, 0.99, 1 - 0.95 / height))  # type: ignore[union-attr]
    title, words = _words(document)
    figure.text(0.012, 1 - 0.14 / height, title, color=LIGHT.ink, fontsize=12, fontweight="bold", va="top")
    figure.text(0.012, 1 - 0.40 / height, words, color=LIGHT.muted, fontsize=9, va="top")
    panels = figure.subplots(1, len(maps), sharey=True, squeeze=False)[0]
    for axes, (name, one) in zip(panels, maps.items(), strict=True):
        effect = one["effect"] if by_role else [list(row) for row in zip(*one["effect"], strict=True)]
        grid = [[float("nan") if value is None else value for value in row] for row in effect]
        top = max((value for row in grid for value in row if value == value), default=0.0)
        kind = name.partition(",")[0]
        mesh = axes.pcolormesh(
            grid, cmap=SHADES[kind], vmin=0, vmax=max(top, 1e-6), edgecolors=LIGHT.ground, linewidth=0.5
        )
        axes.invert_yaxis()
        axes.set_xticks(
            [layer + 0.5 for layer in _ticks(document["layers"])],
            [str(i) for i in _ticks(document["layers"])],
        )
        axes.set_yticks([row + 0.5 for row in range(len(labels))], labels, color=LIGHT.ink)
        axes.tick_params(colors=LIGHT.muted, labelsize=8.5, length=0)
        axes.tick_params(axis="y", labelcolor=LIGHT.ink)
        for spine in axes.spines.values():
            spine.set_visible(False)
        rest = name.partition(", ")[2]
        axes.set_title(
            TITLES[kind] + (f"\n{rest}" if rest else ""), fontsize=9.5, color=LIGHT.ink, loc="left"
        )
        width = document["window"]
        span = "one layer" if kind == "hidden" or width == 1 else f"centre of {width} layers"
        axes.set_xlabel(f"layer ({span})", fontsize=8.5, color=LIGHT.muted)
        bar = figure.colorbar(mesh, ax=axes, fraction=0.05, pad=0.02)
        bar.ax.tick_params(labelsize=7.5, colors=LIGHT.muted, length=0)
        bar.outline.set_visible(False)  # type: ignore[operator]
    return figure


def _words(document: Mapping[str, Any]) -> tuple[str, str]:
    noise = f"noise of deviation {document['deviation']:.3g}, {document['draws']} draws"
    if "roles" in document:
        low, high = document["total_effect_interval"]
        words = f"total effect {document['total_effect']:.3f} ({low:.3f} to {high:.3f}); {noise}"
        return f"Average indirect effect over {document['facts']} facts", words
    runs = f"clean {document['clean']:.3f}, corrupted {document['corrupted']:.3f}"
    words = f"answer {document['answer']!r}: {runs}; {noise}"
    prompt = str(document["prompt"])
    return f"Indirect effect: {prompt if len(prompt) < 70 else prompt[:69] + '…'}", words


def _ticks(layers: int) -> list[int]:
    step = max(1, layers // 8)
    return list(range(0, layers, step))
