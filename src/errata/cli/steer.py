"""errata steer: have a model show a behaviour that contrast pairs show, at a strength chosen by measurement."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from errata.cli import common, outputs
from errata.cli._verb import Verb

if TYPE_CHECKING:
    from collections.abc import Callable

    from errata.edits.steer import SteerEdit
    from errata.evaluation.steering import Calibration, Gauge, Point
    from errata.host.host import Host
    from errata.types import Contrasts

Pairs = Annotated[
    Path,
    typer.Argument(
        metavar="PAIRS",
        help="Contrast pairs: records with positive and negative, two answers, and optionally prompt and subject.",
    ),
]
Output = Annotated[Path, typer.Option("--output", "-o", help="Write the edit to this file (.safetensors).")]
Strength = Annotated[
    str,
    typer.Option(
        help="A number, or auto: the best one within the perplexity limit is chosen.", metavar="TEXT"
    ),
]
Limit = Annotated[
    float,
    typer.Option("--limit", min=1.0, help="With auto, perplexity allowed: times the unsteered model's."),
]
HeldOut = Annotated[
    float,
    typer.Option(
        "--held-out", min=0.01, max=0.45,
        help="Share of the subjects to choose the strength on; as many more are measured on at the end.",
    ),
]  # fmt: skip
Score = Annotated[
    str | None,
    typer.Option("--score", help="Score written texts by the lab's grammar: lab:questions."),
]
Texts = Annotated[
    Path | None,
    typer.Option(
        "--texts", help="Texts, one a line, to measure perplexity on; default: the model's own (lab)."
    ),
]
Tokens = Annotated[int, typer.Option("--max-new-tokens", min=4, help="Tokens of a text that is written.")]
Figure = Annotated[
    Path | None, typer.Option("--figure", help="With auto, draw the trade-off to a .png or .svg file.")
]


def command(
    pairs: Pairs,
    model: common.Model,
    output: Output,
    method: Annotated[str, typer.Option(help="caa, repe, iti or another that takes contrast pairs.")] = "caa",
    settings: common.Settings = None,
    strength: Strength = "auto", limit: Limit = 1.2, held_out: HeldOut = 0.2, score: Score = None,
    texts: Texts = None, max_new_tokens: Tokens = 24, figure: Figure = None,
    force: common.Force = False, dry_run: common.DryRun = False,
    device: common.Device = "auto", dtype: common.Dtype = "auto", seed: common.Seed = 0, json: common.Json = False,
) -> None:  # fmt: skip
    """Steer a model to what the positive answers of contrast pairs show, at a strength chosen by measurement.

    Of the subjects some are fitted on, some choose the strength, and some are only measured on: how much likelier the
    positive answers are, what the model writes, and the perplexity of neutral text. The edit is applied, served and
    reverted as any other.
    """
    from errata import api
    from errata import config as configs
    from errata.data.contrasts import read_contrasts
    from errata.errors import ConfigError
    from errata.job import check_takes
    from errata.methods import REGISTRY

    options, entry = configs.parse_assignments(settings or []), REGISTRY.get(method)
    outputs.check_new_edit(output, force=force)
    fixed = _number(strength)
    if fixed is not None and figure is not None:
        raise ConfigError("--figure draws the strengths that were tried: it needs --strength auto")
    outputs.check_figure(figure)
    config = configs.make(entry.config, _with_strength(options, fixed), method)
    check_takes(entry, [whole := read_contrasts(pairs)])
    fitted, choosing, shown = whole.split((held_out, held_out), seed=seed)
    scorer = _scorer(score)
    host = common.open_text_host(model, device, dtype)
    with common.progress(not (json or dry_run)) as tick:
        job = api.prepare(host, fitted, method=method, options=config, seed=seed, on_progress=tick)
        if dry_run:
            counts = [len(part.pairs) for part in (fitted, choosing, shown)]
            uses = "fitted on {}, strength chosen on {}, shown on {}".format(*counts)
            common.show_dry(job.to_dict(), f"{sum(counts)} pairs ({uses})", json, pairs=counts)
            return
        gauge = _gauges(host, common.text_lines(texts, host), scorer, max_new_tokens)
        edit, sweep = _fit(job.run(), None if fixed is not None else gauge(choosing), limit, tick)
        measured = gauge(shown)
        points = measured.base, measured.at(edit, edit.strength)
    path = outputs.save_edit(edit, output, None)
    if figure is not None and sweep is not None:
        from errata.report.steering import write_calibration

        write_calibration(figure, sweep.to_dict(), f"{whole.name} by {method}")
    if json:
        common.emit(
            {
                "path": str(path), "edit": edit.summary(), "calibration": None if sweep is None else sweep.to_dict(),
                "unsteered": asdict(points[0]), "steered": asdict(points[1]), "held_out": len(shown.pairs),
            }
        )  # fmt: skip
    else:
        _show(edit, sweep, points, path, len(shown.pairs))


def _with_strength(options: dict[str, Any], fixed: float | None) -> dict[str, Any]:
    """Return settings with a strength that was given. Raises ConfigError where they have one themselves."""
    from errata.errors import ConfigError

    if "strength" in options:
        raise ConfigError("the strength is chosen by measurement, or given with --strength, not with --set")
    return options if fixed is None else {**options, "strength": fixed}


def _number(strength: str) -> float | None:
    """Return a strength, None for auto. Raises ConfigError for other texts."""
    import math

    from errata.errors import ConfigError

    if strength == "auto":
        return None
    try:
        number = float(strength)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"--strength {strength!r}: expected a number or auto")
    return number


def _scorer(score: str | None) -> Any:
    """Return what scores written texts; None where nothing does. Raises ConfigError for an unknown name."""
    from errata.errors import ConfigError

    if score is None:
        return None
    if score != "lab:questions":
        raise ConfigError(f"--score {score!r}: expected lab:questions")
    from errata.lab.steering import Scorer

    return Scorer()


def _gauges(host: Host, texts: list[str], scorer: Any, tokens: int) -> Callable[[Contrasts], Gauge]:
    """Return what makes a gauge of some pairs."""
    from errata.evaluation.steering import Gauge, Material

    return lambda part: Gauge(host, Material(part, texts, scorer, tokens))


def _fit(edit: Any, gauge: Gauge | None, limit: float, tick: Any) -> tuple[SteerEdit, Calibration | None]:
    """Return the edit at the strength to save, and the sweep that chose it where there is a gauge for one."""
    from errata.evaluation.steering import calibrate

    return (edit, None) if gauge is None else calibrate(gauge, edit, limit=limit, on_progress=tick)


COLUMNS = (
    "margin", "preferred", "concept", "instruction", "fluency", "overall", "perplexity", "divergence", "repetition",
)  # fmt: skip


def _row(point: Point) -> tuple[str, ...]:
    values = asdict(point)
    return tuple(f"{values[name]:.3f}" for name in COLUMNS if values[name] is not None)


def _show(
    edit: SteerEdit, sweep: Calibration | None, points: tuple[Point, Point], path: Path, held_out: int
) -> None:
    columns = tuple(name for name in COLUMNS if asdict(points[0])[name] is not None)
    right = tuple(range(1, len(columns) + 1))
    if sweep is not None:
        rows = [
            (f"{one.strength:g}{' *' * (one.strength == sweep.chosen)}", *_row(one)) for one in sweep.points
        ]
        common.table(
            f"strengths; * the best with perplexity up to {sweep.limit:g} times the unsteered one",
            ("strength", *columns), rows, right=right,
        )  # fmt: skip
    measured = zip(columns, _row(points[0]), _row(points[1]), strict=True)
    common.table(
        f"on {held_out} other pairs",
        ("", "unsteered", f"strength {edit.strength:g}"),
        list(measured),
        right=(1, 2),
    )
    if edit.strength == 0 and sweep is not None:
        print("no strength is better than none within the limit: the edit changes nothing")
    print(
        f"{path}  {common.size(path)}  edit {edit.digest} of {edit.provenance.method}; the model is unchanged"
    )


VERB = Verb("steer", command, order=18)
