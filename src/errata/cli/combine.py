"""errata combine: arithmetic of weight edits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from errata.cli import common, outputs
from errata.cli._verb import Verb

if TYPE_CHECKING:
    from errata.edits import Edit
    from errata.edits.combining import Shares
    from errata.ledger.interpolating import Point


Files = Annotated[list[Path], typer.Argument(metavar="EDIT...", help="Files of weight edits of one model.")]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Where to write the edit (.safetensors).")
]
How = Annotated[
    str, typer.Option(help="sum, analogy (of A B C: C + (B - A)), paint, ties, dare or breadcrumbs.")
]
Weights = Annotated[
    str | None, typer.Option(help="One number for each edit, as 1,-0.5; default: 1. Of paint: alpha.")
]
Density = Annotated[
    float | None, typer.Option(help="ties: share of entries kept of each edit; default: 0.2.")
]
Drop = Annotated[float | None, typer.Option(help="dare: probability to leave an entry out; default: 0.9.")]
Smallest = Annotated[
    float | None,
    typer.Option(help="breadcrumbs: share of each row's smallest entries left out; default: 0.2."),
]
Largest = Annotated[
    float | None,
    typer.Option(help="breadcrumbs: share of each row's largest entries left out; default: 0.1."),
]
ModelName = Annotated[
    str | None,
    typer.Option("--model", help="paint without --weights: the unedited model to search alpha on."),
]
Alphas = Annotated[
    str | None, typer.Option(help="paint: the alphas to try, as 0.5,1,1.5; default: 0.1 to 1 by 0.1.")
]
MostLost = Annotated[
    float | None, typer.Option(help="paint: share of other answers that may change; default: 0.01.")
]
Interference = Annotated[
    bool,
    typer.Option("--interference", help="Show the cosines of the edits' changes; needs no -o."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Combine and report, write nothing.")]


def command(
    edits: Files, output: Output = None, how: How = "sum", weights: Weights = None,
    scale: Annotated[float, typer.Option(help="Factor of the result.")] = 1.0,
    density: Density = None, drop: Drop = None, smallest: Smallest = None, largest: Largest = None,
    model: ModelName = None, alphas: Alphas = None, most_lost: MostLost = None,
    interference: Interference = False, force: common.Force = False, dry_run: DryRun = False,
    device: common.Device = "auto", dtype: common.Dtype = "auto", seed: common.Seed = 0, json: common.Json = False,
) -> None:  # fmt: skip
    """Add, subtract, scale or merge weight edits as vectors into a new edit. No model needed, but for a search.

    A fine-tuned checkpoint becomes such an edit by errata import. A sum keeps edits low-rank; ties, dare and
    breadcrumbs work on single entries and give whole matrices. Closed-form edits are better joined by errata refit.

    paint interpolates one edit with the unedited model. Without --weights it tries several alphas on --model and takes
    the one that answers most requests among those that change at most --most-lost of the other answers; exit code 1,
    and nothing is written, if none of them answers any.
    """
    from errata.edits import Edit, combining

    searching = how == "paint" and weights is None
    _check(output, force, how, searching=searching, interference=interference, model=model, alphas=alphas,
           most_lost=most_lost)  # fmt: skip
    shares = _shares(how, {"density": density, "drop": drop, "smallest": smallest, "largest": largest})
    loaded = [Edit.load(path) for path in edits]
    more: dict[str, Any] = {}
    if interference:
        more["interference"] = combining.interference(loaded)
    chosen = None if weights is None else _numbers("--weights", weights)
    if searching and output is not None:
        assert model is not None and len(loaded) >= 1
        points, best = _search(loaded, model, alphas, most_lost, device, dtype, json=json)
        more |= {"scan": [point.to_dict() for point in points], "alpha": None if best is None else best.alpha}
        chosen = None if best is None else [best.alpha]
    result = None
    if output is not None and (chosen is not None or not searching):
        result = combining.combine(loaded, how, weights=chosen, scale=scale, shares=shares, seed=seed)
        if not dry_run:
            result.save(output)
    _show(result, output, edits, more, dry_run=dry_run, json=json)
    if searching and output is not None and result is None:
        raise typer.Exit(1)


def _check(
    output: Path | None, force: bool, how: str, *, searching: bool, interference: bool, model: str | None,
    alphas: str | None, most_lost: float | None,
) -> None:  # fmt: skip
    """Raise ConfigError for options that do not belong together."""
    from errata.errors import ConfigError

    given = [
        n for n, v in (("--model", model), ("--alphas", alphas), ("--most-lost", most_lost)) if v is not None
    ]
    if given and not searching:
        raise ConfigError(f"{', '.join(given)}: for the search of --how paint without --weights, found {how}")
    if output is None and not interference:
        raise ConfigError("name a file for the new edit with -o, or ask for --interference alone")
    if output is not None:
        outputs.check_new_edit(output, force=force)
        if searching and model is None:
            raise ConfigError(
                "paint searches alpha on the unedited model: name it with --model, or give --weights"
            )


def _shares(how: str, given: dict[str, float | None]) -> Shares | None:
    """Return what is kept of entries. Raises ConfigError for a share that another way of merging takes."""
    from errata.edits.combining import Shares
    from errata.errors import ConfigError

    values = {name: value for name, value in given.items() if value is not None}
    takes = {"ties": ["density"], "dare": ["drop"], "breadcrumbs": ["smallest", "largest"]}
    wrong = [f"--{name}" for name in values if name not in takes.get(how, [])]
    if wrong:
        raise ConfigError(f"--how {how} takes no {', '.join(wrong)}")
    return Shares(**values) if values else None


def _numbers(option: str, text: str) -> list[float]:
    from errata.errors import ConfigError

    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option}: expected numbers with commas between, found {text!r}") from None


def _search(
    edits: Sequence[Edit], model: str, alphas: str | None, most_lost: float | None, device: str, dtype: str, *,
    json: bool,
) -> tuple[list[Point], Point | None]:  # fmt: skip
    """Return what was measured of each interpolation, and the chosen one."""
    from errata.errors import ConfigError
    from errata.ledger import interpolating

    if len(edits) != 1:
        raise ConfigError(f"paint takes 1 edit, found {len(edits)}; combine them first")
    host = common.open_text_host(model, device, dtype)
    values = interpolating.ALPHAS if alphas is None else _numbers("--alphas", alphas)
    with common.progress(not json) as tick:
        points = interpolating.scan(host, edits[0], alphas=values, on_progress=tick)
    bound = interpolating.MOST_LOST if most_lost is None else most_lost
    return points, interpolating.choose(points, bound)


def _show(
    edit: Edit | None,
    output: Path | None,
    files: Sequence[Path],
    more: dict[str, Any],
    *,
    dry_run: bool,
    json: bool,
) -> None:
    path = None if dry_run or edit is None else str(output)
    if json:
        common.emit({"path": path, **more, "edit": None if edit is None else edit.summary()})
        return
    names = [path.name for path in files]
    if "interference" in more:
        rows = [(n, *(f"{c:.3f}" for c in row)) for n, row in zip(names, more["interference"], strict=True)]
        common.table("cosines of the changes", ("", *names), rows, right=tuple(range(1, len(names) + 1)))
    if "scan" in more:
        rows = [
            (f"{p['alpha']:g}", f"{p['answered']:.3f}", f"{p['kept']:.3f}", f"{p['perplexity']:.3f}",
             "chosen" if p["alpha"] == more["alpha"] else "") for p in more["scan"]
        ]  # fmt: skip
        columns = ("alpha", "requests answered", "other answers the same", "perplexity, times", "")
        common.table(None, columns, rows, right=(0, 1, 2, 3))
    if edit is None:
        if "scan" in more:
            print("no alpha answers a request and keeps enough of the other answers; nothing was written")
        return
    summary = edit.summary()
    rows = [(name, one["form"], f"{one['norm']:.4g}") for name, one in summary["weights"].items()]
    common.table(f"edit {edit.digest}", ("weight", "form", "norm"), rows, right=(2,))
    status = (
        "dry run: nothing was written"
        if path is None
        else f"edit written to {path} ({common.size(Path(path))})"
    )
    print(f"{len(edit.provenance.requests)} requests, norm {summary['norm']:.4g}; {status}")


VERB = Verb("combine", command, order=82)
