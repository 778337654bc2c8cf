"""Figures: boards with intervals, retention and collapse, as PNG and SVG, light and dark. Needs matplotlib."""

from __future__ import annotations

import io
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from errata.errors import ConfigError
from errata.report import kinds
from errata.report.board import Board, Entry, boards
from errata.report.curves import Curves
from errata.report.files import folder, write
from errata.report.measure import Measure
from errata.report.read import Run
from errata.report.style import MARKERS, style_of
from errata.report.tables import seed_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

WIDTH = 9.0
"""Inches; at :data:`DPI`, twice the width of a README on GitHub."""
DPI = 180
TRADEOFF = ("paraphrase", "same_subject")
"""Kinds whose measures are drawn against each other."""
MOST_COLOURED = 6
"""Number of methods with a colour in curves; the others are grey."""
LOG_SPAN = 15.0
"""From this ratio of largest to smallest value, an axis is logarithmic."""
FAR = 1000.0
"""The perplexity axis ends at this multiple of the unedited perplexity."""
DASHES = ("-", "--", ":", "-.")
"""Line styles for methods of equal colour in a figure: several seeds, or equal colours by chance."""


@dataclass(frozen=True)
class Theme:
    """Colours of one variant; :mod:`errata.report.style` assigns them to methods."""

    name: str
    ground: str
    ink: str
    muted: str
    rule: str
    accent: str
    series: tuple[str, ...]


LIGHT = Theme(
    "", "#ffffff", "#1b1e22", "#5a616a", "#dfe2e6", "#0b5cad",
    (
        "#0b5cad", "#c4500a", "#00805c", "#a8457f", "#8a6a00", "#1b1e22",
        "#6f45b8", "#b3261e", "#4f7a1c", "#007a94", "#7d5640", "#5f6f82",
    ),
)  # fmt: skip
DARK = Theme(
    "-dark", "#14171a", "#e7e9ec", "#a0a8b2", "#30363d", "#6cb2f5",
    (
        "#6cb2f5", "#f0934e", "#3fc79a", "#e39ac6", "#dcbc4c", "#e7e9ec",
        "#b89df2", "#f28b82", "#a5cf6f", "#5fc8de", "#cfa98f", "#a9b8c9",
    ),
)  # fmt: skip

Points = Sequence[tuple[float, float, float | None, float | None]]


def write_figures(place: str | os.PathLike[str], runs: Sequence[Run]) -> list[Path]:
    """Write every board's figures and return their paths.

    Raises ConfigError without matplotlib, DataError where the folder cannot be written.
    """
    require_matplotlib()
    target = folder(place)
    paths = []
    for board, slug in _with_slugs(boards(runs)):
        drawings: dict[str, Callable[[Board, Theme], Figure]] = {"board": _board}
        if sum(_tradeoff_point(entry) is not None for entry in board.entries) > 1:
            drawings["tradeoff"] = _tradeoff
        if any(entry.curves for entry in board.entries):
            drawings |= {"retention": _retention, "collapse": _collapse}
        for name, draw in drawings.items():
            for theme in (LIGHT, DARK):
                stem, figure = f"{name}-{slug}{theme.name}", fixed(draw(board, theme))
                paths += [write(target / f"{stem}.{form}", render(figure, form)) for form in ("png", "svg")]
    return paths


def require_matplotlib() -> None:
    """Raise ConfigError where matplotlib is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "figures need matplotlib, which is not installed: pip install errata[report]"
        ) from error


def _with_slugs(every_board: Sequence[Board]) -> Iterator[tuple[Board, str]]:
    """Yield every board with a unique name for its files."""
    count_of: dict[str, int] = {}
    for board in every_board:
        text = f"{board.model.rpartition('/')[2]}-{board.tag.get('dataset', '')}-{board.schedule}"
        slug = re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower()
        count_of[slug] = count_of.get(slug, 0) + 1
        yield board, slug if count_of[slug] == 1 else f"{slug}-{count_of[slug]}"


def fixed(figure: Figure) -> Figure:
    """Lay a figure out and fix the positions, identical for identical data; return it, its texts as they are."""
    _literal(figure)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axes in figure.axes:  # the layout solver is not deterministic in the last bits
        x, bottom, width, height = (round(place, 5) for place in axes.get_position().bounds)
        axes.set_position((x, bottom, width, height))
    return figure


def _literal(figure: Figure) -> None:
    """Have texts drawn as they are: a prompt or name with dollar signs is no formula, and may not even be a valid one.

    Numbers on logarithmic axes are formulas of matplotlib's own.
    """
    from matplotlib.axis import Axis
    from matplotlib.text import Text

    powers = {
        text
        for axis in figure.findobj(Axis)
        if axis.get_scale() == "log"  # type: ignore[attr-defined]
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks())  # type: ignore[attr-defined]
        for text in tick.findobj(Text)
    }
    for text in figure.findobj(Text):
        if text not in powers:
            text.set_parse_math(False)  # type: ignore[attr-defined]


def render(figure: Figure, form: str) -> bytes:
    """Return the bytes of a figure with fixed positions, identical for identical data."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    metadata = {"Date": None} if form == "svg" else {"Software": None}
    with rc_context({"svg.hashsalt": "errata"}):
        figure.savefig(buffer, format=form, dpi=DPI, metadata=metadata, facecolor=figure.get_facecolor())
    return buffer.getvalue()


def _figure(board: Board, theme: Theme, height: float, title: str, columns: int) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), facecolor=theme.ground, layout="constrained")
    figure.get_layout_engine().set(rect=(0.005, 0.3 / height, 0.99, 1 - 0.95 / height))  # type: ignore[union-attr]
    figure.text(0.012, 1 - 0.14 / height, title, color=theme.ink, fontsize=12, fontweight="bold", va="top")
    figure.text(0.012, 1 - 0.40 / height, board.title, color=theme.muted, fontsize=9, va="top")
    figure.text(0.012, 0.1 / height, _footer(board), color=theme.muted, fontsize=7.5, va="bottom")
    axes = figure.subplots(1, columns, sharey=title.startswith("Board"), squeeze=False)
    return figure, [styled(one, theme) for one in axes[0]]


def _footer(board: Board) -> str:
    tag = board.tag
    words = ["free generation, 95 % intervals over resampled cases"]
    sha = str(tag.get("dataset_sha256") or "")[:8]
    words += [f"data {sha}"] if sha else []
    words += [str(tag[name]) for name in ("dtype", "convention") if tag.get(name)]
    words += [f"{tag['max_new_tokens']} new tokens"] if tag.get("max_new_tokens") else []
    return " · ".join(words)


def styled(axes: Axes, theme: Theme) -> Axes:
    """Return axes in the style of a theme: a rule below, a grid behind, no other frame."""
    axes.set_facecolor(theme.ground)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(theme.rule)
    axes.tick_params(colors=theme.muted, labelsize=8.5, length=0)
    axes.grid(color=theme.rule, linewidth=0.7)
    axes.set_axisbelow(True)
    return axes


def _board(board: Board, theme: Theme) -> Figure:
    """Draw the headline score and its parts as bars, one panel each, baselines on top."""
    entries = list(board.entries)
    height = 1.5 + 0.27 * len(entries)
    columns = ["headline", *board.headline]
    figure, panels = _figure(board, theme, height, "Board: per cent", len(columns))
    places = range(len(entries))[::-1]
    for axes, column in zip(panels, columns, strict=True):
        for place, entry in zip(places, entries, strict=True):
            measure = entry.headline if column == "headline" else entry.main_measure(column)
            if measure is not None:
                _bar(axes, place, measure, theme, theme.accent if column == "headline" else theme.muted,
                     soft=bool(entry.role))  # fmt: skip
        axes.set_xlim(0, 104)
        axes.set_xticks([0, 50, 100])
        axes.grid(axis="y", visible=False)
        suffix = "\nkept" if column in board.preserved else ""  # panels are narrow where names are long
        axes.set_title(kinds.label(column) + suffix, fontsize=9.5, color=theme.ink, loc="left")
        axes.tick_params(axis="y", labelleft=axes is panels[0])
    panels[0].set_yticks(list(places), [_name(entry, board) for entry in entries], color=theme.ink)
    return figure


def _bar(axes: Axes, place: int, measure: Measure, theme: Theme, colour: str, *, soft: bool) -> None:
    axes.barh(
        place, 100 * measure.value, height=0.62, color=colour, alpha=0.35 if soft else 0.85, linewidth=0
    )
    if measure.low is not None and measure.high is not None:
        axes.plot([100 * measure.low, 100 * measure.high], [place, place], color=theme.ink, linewidth=1.3,
                  solid_capstyle="butt", clip_on=False)  # fmt: skip


def _tradeoff_point(entry: Entry) -> tuple[Measure, Measure] | None:
    """Return how far an edit generalises and how much of the subject it keeps; None unless both were measured."""
    paraphrase, subject = (entry.main_measure(kind) for kind in TRADEOFF)
    return None if paraphrase is None or subject is None else (paraphrase, subject)


def _tradeoff(board: Board, theme: Theme) -> Figure:
    """Draw held-out paraphrases against other facts of the same subject, a point for each method."""
    title = "Generalisation against damage to the subject, per cent"
    figure, (axes,) = _figure(board, theme, 5.4, title, 1)
    for entry in board.entries:
        style = style_of(entry.cell.name)
        measures = _tradeoff_point(entry)
        if measures is None:
            continue
        paraphrase, subject = measures
        colour, x, y = theme.series[style.colour], 100 * paraphrase.value, 100 * subject.value
        for measure, along in ((paraphrase, True), (subject, False)):
            if measure.low is not None and measure.high is not None:
                ends, place = [100 * measure.low, 100 * measure.high], [y, y] if along else [x, x]
                axes.plot(*((ends, place) if along else (place, ends)), color=colour, linewidth=1, alpha=0.4)
        axes.plot([x], [y], color=colour, marker=MARKERS[style.marker], markersize=7, linestyle="none",
                  alpha=0.45 if entry.role else 1.0, label=_name(entry, board))  # fmt: skip
    axes.set_xlim(-3, 103)
    axes.set_ylim(-3, 103)
    axes.set_xlabel("held-out paraphrases answered with the target", fontsize=9, color=theme.muted)
    axes.set_ylabel("other facts of the subject kept", fontsize=9, color=theme.muted)
    _legend(axes, theme)
    return figure


def _retention(board: Board, theme: Theme) -> Figure:
    """Draw success over the age of an edit."""
    figure, (axes,) = _figure(board, theme, 4.6, "Retention: still answered with the target, per cent", 1)
    _lines(axes, board, theme, lambda curves: [
        ((a.first + a.last) / 2, 100 * a.success.value, _times(a.success.low), _times(a.success.high))
        for a in curves.retention
    ])  # fmt: skip
    axes.set_ylim(-2, 102)
    axes.set_xlabel("number of later edits", fontsize=9, color=theme.muted)
    _legend(axes, theme)
    return figure


def _collapse(board: Board, theme: Theme) -> Figure:
    """Draw efficacy over all edits so far, and perplexity of neutral text, over the number of edits."""
    figure, (efficacy_axes, perplexity_axes) = _figure(
        board, theme, 4.6, "Efficacy and perplexity as edits accumulate", 2
    )
    _lines(efficacy_axes, board, theme, lambda curves: [
        (c.edits, 100 * c.efficacy.value, _times(c.efficacy.low), _times(c.efficacy.high))
        for c in curves.checkpoints if c.efficacy
    ])  # fmt: skip
    efficacy_axes.set_ylim(-2, 102)
    efficacy_axes.set_title(
        "efficacy over all edits so far, per cent", fontsize=9.5, color=theme.ink, loc="left"
    )
    _lines(perplexity_axes, board, theme, lambda curves: [
        (c.edits, c.perplexity, None, None)
        for c in curves.checkpoints if c.perplexity is not None and math.isfinite(c.perplexity)
    ])  # fmt: skip
    title = "perplexity of neutral text"
    low, high = perplexity_axes.dataLim.intervaly
    top = FAR * max((one for e in board.entries if e.curves for one in _unedited(e.curves)), default=low)
    if high > top or any(_overflows(e.curves) for e in board.entries if e.curves):
        title += f", up to {FAR:,.0f} times the unedited one"
    perplexity_axes.set_title(title, fontsize=9.5, color=theme.ink, loc="left")
    if low > 0 and high / low >= LOG_SPAN:
        perplexity_axes.set_yscale("log")
        _plain_ticks(perplexity_axes.yaxis, [m * 10.0**e for e in range(-3, 12) for m in (1, 3)])
        perplexity_axes.set_ylim(low / 1.15, min(high, top) * 1.15)
    for axes in (efficacy_axes, perplexity_axes):
        axes.set_xlabel("edits in place", fontsize=9, color=theme.muted)
    _legend(perplexity_axes, theme)
    return figure


def _name(entry: Entry, board: Board) -> str:
    return entry.cell.name + seed_of(entry, board)


def _unedited(curves: Curves) -> list[float]:
    return [checkpoint.perplexity_before for checkpoint in curves.checkpoints if checkpoint.perplexity_before]


def _overflows(curves: Curves) -> bool:
    return any(
        checkpoint.perplexity is not None and math.isinf(checkpoint.perplexity)
        for checkpoint in curves.checkpoints
    )


def _times(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _coloured(board: Board) -> list[Entry]:
    """Return the methods with a colour: the best ones, and fine-tuning."""
    sequential = [entry for entry in board.entries if entry.curves]
    tuning = [entry for entry in sequential if entry.role == "fine-tuning"][:1]
    return [entry for entry in sequential if not entry.role][: MOST_COLOURED - len(tuning)] + tuning


def _lines(axes: Axes, board: Board, theme: Theme, points: Callable[[Curves], Points]) -> None:
    coloured, colour_count = _coloured(board), Counter[int]()
    spots: list[float] = []
    for entry in board.entries:
        curve_points = points(entry.curves) if entry.curves else []
        spots += [x for x, *_ in curve_points]
        if not curve_points:
            continue
        xs, ys = [x for x, *_ in curve_points], [y for _, y, *_ in curve_points]
        if entry not in coloured:
            axes.plot(xs, ys, color=theme.muted, alpha=0.35, linewidth=1)
            continue
        style = style_of(entry.cell.name)
        colour, dash = theme.series[style.colour], DASHES[colour_count[style.colour] % len(DASHES)]
        colour_count[style.colour] += 1
        role = f" ({entry.role})" if entry.role and entry.role != entry.cell.name else ""
        axes.plot(xs, ys, color=colour, linewidth=2, linestyle=dash, marker=MARKERS[style.marker], markersize=4.5,
                  label=_name(entry, board) + role)  # fmt: skip
        for x, _, low, high in curve_points:
            if low is not None and high is not None:
                axes.plot([x, x], [low, high], color=colour, linewidth=1, alpha=0.5)
    _horizontal(axes, spots)


def _horizontal(axes: Axes, spots: Sequence[float]) -> None:
    """Set up the horizontal axis: logarithmic for a wide range, with ticks at the points if they are few."""
    different = sorted(set(spots))
    positive = [x for x in different if x > 0]
    if positive and positive[-1] / positive[0] >= LOG_SPAN:
        # age 0 cannot be on a logarithmic axis: below the first positive age it is linear
        axes.set_xscale("symlog", linthresh=positive[0], linscale=0.4)
        if different[0] > 0:
            axes.set_xlim(different[0] * 0.9, different[-1] * 1.1)
    few = len(different) <= MOST_COLOURED and all(float(x).is_integer() for x in different)
    _plain_ticks(axes.xaxis, different if few else None)


def _plain_ticks(axis: Axis, places: Sequence[float] | None) -> None:
    """Format ticks without exponents; ``places``: tick positions."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

    if places is not None:
        axis.set_major_locator(FixedLocator(places))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def _legend(axes: Axes, theme: Theme) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(
            fontsize=8.5, frameon=False, labelcolor=theme.ink, loc="upper left", bbox_to_anchor=(1.0, 1.0)
        )
