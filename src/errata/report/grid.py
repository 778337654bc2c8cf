"""Grids of shares with a text in each cell: what a lens reads by layer and token, or by layer and layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from errata.report import picture
from errata.report.figures import LIGHT

LONGEST = 12
"""Characters of a cell's text."""


def write_grid(
    path: Path, title: str, values: Sequence[Sequence[float]], *, rows: Sequence[str], columns: Sequence[str],
    texts: Sequence[Sequence[str]] | None = None, axes: tuple[str, str] = ("", ""), label: str = "probability",
) -> Path:  # fmt: skip
    """Draw numbers by row and column, the first row on top, and return the picture's path.

    Numbers of one sign are shaded from 0 upwards, others by sign around 0. ``texts``: written in the cells. ``axes``:
    what rows and columns are. Raises ConfigError without matplotlib or for another ending than .png and .svg.
    """
    height = 1.5 + 0.32 * len(rows)
    figure, (panel,) = picture.panels(path, title, columns=1, height=height)
    flat = [value for row in values for value in row]
    top = max(map(abs, flat), default=0.0) or 1e-6
    signed = min(flat, default=0.0) < 0
    mesh = panel.pcolormesh(
        [list(row) for row in values], cmap="RdBu" if signed else "Blues", vmin=-top if signed else 0, vmax=top,
        edgecolors=LIGHT.ground, linewidth=0.5,
    )  # fmt: skip
    panel.invert_yaxis()
    panel.grid(visible=False)
    panel.set_yticks(
        [i + 0.5 for i in range(len(rows))], [_plain(one) for one in rows], color=LIGHT.ink, fontsize=8
    )
    panel.set_xticks([i + 0.5 for i in range(len(columns))], [_plain(one) for one in columns], fontsize=8)
    panel.set_ylabel(axes[0], fontsize=9, color=LIGHT.muted)
    panel.set_xlabel(axes[1], fontsize=9, color=LIGHT.muted)
    for i, line in enumerate(texts or []):
        for j, text in enumerate(line):
            dark = abs(values[i][j]) > 0.6 * top
            panel.text(j + 0.5, i + 0.5, _plain(text), ha="center", va="center", fontsize=7,
                       color=LIGHT.ground if dark else LIGHT.ink)  # fmt: skip
    bar = figure.colorbar(mesh, ax=panel, fraction=0.04, pad=0.015)
    bar.set_label(label, fontsize=8.5, color=LIGHT.muted)
    bar.ax.tick_params(labelsize=7.5, colors=LIGHT.muted, length=0)
    bar.outline.set_visible(False)  # type: ignore[operator]
    return picture.write_picture(path, figure)


def _plain(text: str) -> str:
    """Return a text on one line, shortened."""
    line = " ".join(text.split()) or text.replace("\n", "\\n") or " "
    return line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"


def write_reading(path: Path, document: Mapping[str, Any]) -> Path:
    """Draw what ``errata lens --json`` reads of a prompt: first choices and their probabilities by layer and token."""
    return write_grid(
        path, f"First choice after each token: {document['prompt']}", document["probability"],
        rows=[str(layer) for layer in range(len(document["top"]))], columns=document["tokens"],
        texts=document["top"], axes=("layer", ""),
    )  # fmt: skip


def write_scope(path: Path, document: Mapping[str, Any]) -> Path:
    """Draw what ``errata lens --into --json`` reads: texts and the answer's probability by source and target layer."""
    grid = document["probability"]
    answer = document["answer"]["token"].strip()
    return write_grid(
        path, f"{answer}: states of {document['source']} in {document['target']!r}", grid,
        rows=[str(layer) for layer in range(len(grid))], columns=[str(1 + layer) for layer in range(len(grid[0]))],
        texts=document["texts"], axes=("source layer", "target layer"), label=f"probability of {answer}",
    )  # fmt: skip


def write_attention(path: Path, document: Mapping[str, Any]) -> Path:
    """Draw ``errata trace --attention --json``: what the last token reads by layer; of cases, the heads."""
    if "reads" in document:
        grid = document["heads"]
        title = f"Largest attribution of an edge by head, mean over {document['facts']} facts"
        columns, axis = [str(head) for head in range(len(grid[0]))], "head"
    else:
        grid, columns, axis = document["last"], document["tokens"], ""
        title = f"{document['prompt']} {document['answer']}: what the last token reads"
    texts = [[f"{value:.2f}" if abs(value) >= 0.01 else "" for value in row] for row in grid]
    return write_grid(
        path, title, grid, rows=[str(layer) for layer in range(len(grid))], columns=columns, texts=texts,
        axes=("layer", axis), label="probability of the answer",
    )  # fmt: skip
