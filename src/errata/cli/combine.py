"""errata combine: arithmetic of weight edits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from errata.cli import common, outputs
from errata.cli._verb import Verb

if TYPE_CHECKING:
    from errata.edits import Edit
    from errata.edits.combining import Shares
    from errata.host.images import ImageHost
    from errata.ledger.interpolating import ImagePoint, ImageTask, Point


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
    float | None,
    typer.Option(min=0.0, max=1.0, help="paint: share of other answers that may change; default: 0.01."),
]
Patch = Annotated[
    Path | None,
    typer.Option(
        "--patch", help="paint, image models: labelled images of what the edit is for, a folder a class."
    ),
]
Supported = Annotated[
    list[Path] | None,
    typer.Option("--supported", help="paint, image models: labelled images of what is to stay; repeatable."),
]
Templates = Annotated[
    list[str] | None,
    typer.Option(
        "--template", help="paint, CLIP: prompt for names of classes; repeatable; default: a photo of a {}."
    ),
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
    patch: Patch = None, supported: Supported = None, template: Templates = None,
    interference: Interference = False, force: common.Force = False, dry_run: DryRun = False,
    device: common.Device = "auto", dtype: common.Dtype = "auto", seed: common.Seed = 0, json: common.Json = False,
) -> None:  # fmt: skip
    """Add, subtract, scale or merge weight edits as vectors into a new edit. No model needed, but for a search.

    A fine-tuned checkpoint becomes such an edit by errata import. A sum keeps edits low-rank; ties, dare and
    breadcrumbs work on single entries and give whole matrices. Closed-form edits are better joined by errata refit.

    paint interpolates one edit with the unedited model. Without --weights it tries several alphas on --model and takes
    the one that answers most requests among those that change at most --most-lost of the other answers; exit code 1,
    and nothing is written, if none of them answers any. On a model of images, --patch and --supported take the place
    of the requests and the other answers.
    """
    from errata.edits import Edit, combining

    searching = how == "paint" and weights is None
    _check(output, force, how, searching=searching, interference=interference, model=model,
           of_search={"--model": model, "--alphas": alphas, "--most-lost": most_lost, "--patch": patch,
                      "--supported": supported, "--template": template})  # fmt: skip
    shares = _shares(how, {"density": density, "drop": drop, "smallest": smallest, "largest": largest})
    loaded = [Edit.load(path) for path in edits]
    more: dict[str, Any] = {}
    if interference:
        more["interference"] = combining.interference(loaded)
    chosen = None if weights is None else _numbers("--weights", weights)
    if searching and output is not None:
        assert model is not None and len(loaded) >= 1
        search = _Search(alphas, most_lost, patch, supported or [], template)
        points, best = _search(loaded, model, search, device, dtype, json=json)
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
    of_search: Mapping[str, object],
) -> None:  # fmt: skip
    """Raise ConfigError for options that do not belong together."""
    from errata.errors import ConfigError

    given = [name for name, value in of_search.items() if value is not None]
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


@dataclass(frozen=True)
class _Search:
    """What was said about the search for alpha."""

    alphas: str | None
    most_lost: float | None
    patch: Path | None
    supported: Sequence[Path]
    templates: Sequence[str] | None


def _search(
    edits: Sequence[Edit], model: str, search: _Search, device: str, dtype: str, *, json: bool
) -> tuple[Sequence[Point] | Sequence[ImagePoint], Point | ImagePoint | None]:
    """Return what was measured of each interpolation, and the chosen one."""
    from errata.errors import ConfigError
    from errata.host.images import ImageHost
    from errata.host.kinds import check_asked
    from errata.ledger import interpolating

    if len(edits) != 1:
        raise ConfigError(f"paint takes 1 edit, found {len(edits)}; combine them first")
    values = interpolating.ALPHAS if search.alphas is None else _numbers("--alphas", search.alphas)
    bound = interpolating.MOST_LOST if search.most_lost is None else search.most_lost
    host: Any = common.open_host(model, device, dtype)
    check_asked(host.name, host.kind, "a search for a strength")
    if isinstance(host, ImageHost):
        if search.patch is None or not search.supported:
            raise ConfigError(
                f"{host.name} is a model of images: name --patch and --supported, folders of images"
            )
        patch, *others = (_task(host, model, folder, search) for folder in (search.patch, *search.supported))
        with common.progress(not json) as tick:
            seen = interpolating.scan_images(host, edits[0], patch, others, alphas=values, on_progress=tick)
        return seen, interpolating.choose_images(seen, bound)
    if any((search.patch, search.supported, search.templates)):
        raise ConfigError("--patch, --supported, --template: for models of images")
    with common.progress(not json) as tick:
        points = interpolating.scan(host, edits[0], alphas=values, on_progress=tick)
    return points, interpolating.choose(points, bound)


def _task(host: ImageHost, model: str, folder: Path, search: _Search) -> ImageTask:
    """Read a folder of labelled images. Raises ConfigError for classes that the model does not have."""
    import torch

    from errata.data.images import read_classes
    from errata.errors import ConfigError
    from errata.host import two_towers
    from errata.ledger.interpolating import ImageTask

    images, numbers, names = read_classes(folder, size=host.size, channels=host.channels)
    if two_towers.is_two_towers(host.model):
        tokenizer = two_towers.read_tokenizer(model)
        words = [name.replace("_", " ") for name in names]
        head = two_towers.text_head(host.model, tokenizer, words, search.templates or (two_towers.TEMPLATE,))
        return ImageTask(folder.name, images, torch.tensor(numbers), head)
    if search.templates:
        raise ConfigError(f"--template: {host.name} has classes of its own, and makes none of names")
    own = {str(name): int(number) for number, name in (getattr(host.config, "id2label", None) or {}).items()}
    unknown = [name for name in names if name not in own]
    if unknown:
        raise ConfigError(f"{folder}: {host.name} has no class {unknown[0]!r}; it has {', '.join(own)}")
    return ImageTask(folder.name, images, torch.tensor([own[names[number]] for number in numbers]))


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
        headings = {
            "answered": "requests answered", "kept": "other answers the same", "perplexity": "perplexity, times",
            "patched": "accuracy, patched", "supported": "accuracy, supported",
        }  # fmt: skip
        measured = [name for name in headings if name in more["scan"][0]]
        rows = [
            (f"{p['alpha']:g}", *(f"{p[name]:.3f}" for name in measured),
             "chosen" if p["alpha"] == more["alpha"] else "") for p in more["scan"]
        ]  # fmt: skip
        columns = ("alpha", *(headings[name] for name in measured), "")
        common.table(None, columns, rows, right=tuple(range(len(measured) + 1)))
    if edit is None:
        if "scan" in more:
            print("no alpha gains anything and keeps enough of the rest; nothing was written")
        return
    summary = edit.summary()
    rows = [(name, one["form"], f"{one['norm']:.4g}") for name, one in summary["weights"].items()]
    common.table(f"edit {edit.digest}", ("weight", "form", "norm"), rows, right=(2,))
    status = (
        "dry run: nothing was written"
        if path is None
        else f"edit written to {path} ({common.size(Path(path))})"
    )
    print(f"{common.counted(len(edit.provenance.requests), 'request')}, norm {summary['norm']:.4g}; {status}")


VERB = Verb("combine", command, order=82)
