"""errata detect: has a model been edited, in which weights and about whom?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from errata.cli import common, outputs
from errata.cli._verb import Verb

if TYPE_CHECKING:
    from errata.edits.weight import WeightEdit
    from errata.host.host import Host
    from errata.inspect.detect import Detection

ROWS = 12
"""Weights in the terminal's table."""


Against = Annotated[
    str | None, typer.Option("--against", help="The model that it was made from; left out, spectra alone.")
]
Edits = Annotated[
    list[Path] | None,
    typer.Option("--edit", "-e", help="Examine the model with this weight edit; repeatable."),
]
Candidates = Annotated[
    Path | None,
    typer.Option(
        "--candidates",
        help="Names to try as subjects, one a line; default: the lab's, or the capitalised words of the vocabulary.",
    ),
]
Reverse = Annotated[
    Path | None,
    typer.Option("--reverse", help="Write an edit of the model here that takes off what was found."),
]
Figure = Annotated[Path | None, typer.Option("--figure", help="Draw the result here, .png or .svg.")]


def command(
    model: Annotated[str, typer.Argument(help="The model to examine: lab, a hub name, or a folder.")],
    against: Against = None, edit: Edits = None, candidates: Candidates = None, reverse: Reverse = None,
    figure: Figure = None,
    force: common.Force = False, dry_run: common.DryRun = False,
    device: common.Device = "auto", dtype: common.Dtype = "auto",
    json: common.Json = False,
) -> None:  # fmt: skip
    """Tell whether a model's weights were edited: which weights, which subjects; exit code 0 either way.

    With --against the differences of the weights are decomposed: edited (few directions), trained (many) or unchanged.
    Without it, only strong edits are seen, as those of the closed forms: suspicious or no trace.
    """
    from contextlib import ExitStack

    from errata.errors import ConfigError
    from errata.inspect.detect import detect
    from errata.inspect.detect_names import read_names
    from errata.inspect.detect_reverse import reversal

    if reverse is not None:
        outputs.check_new_edit(reverse, force=force)
        if edit:
            raise ConfigError(
                "--reverse is for checkpoints; an edit given with --edit is not merged: leave it off"
            )
    outputs.check_figure(figure)
    names = read_names(candidates) if candidates is not None else None
    edits = [_weight_edit(path) for path in edit or []]
    host = common.open_text_host(model, device, dtype)
    base = None if against is None else common.open_text_host(against, device, dtype)
    names = _default_names(host) if names is None else names
    if dry_run:
        _dry(host.name, base and base.name, len(names), json)
        return
    with ExitStack() as stack:
        for one in edits:
            stack.enter_context(one.on(host))
        found = detect(host, base, names)
    document = found.to_dict()
    if reverse is not None:
        taken = reversal(host, base, found if base is None else None)
        ranks = dict(taken.provenance.config["ranks"])
        document["reversal"] = {"path": str(taken.save(reverse)), "ranks": ranks}
    if figure is not None:
        document["figure"] = str(_draw(figure, document))
    if json:
        common.emit(document)
    else:
        _show(found, document)


def _weight_edit(path: Path) -> WeightEdit:
    """Load an edit of weights. Raises EditError for another kind."""
    from errata.edits import Edit
    from errata.edits.weight import WeightEdit
    from errata.errors import EditError

    edit = Edit.load(path)
    if not isinstance(edit, WeightEdit):
        raise EditError(
            f"{path} is a {edit.kind} edit: it changes no weights, and weights are what is examined"
        )
    return edit


def _dry(model: str, against: str | None, names: int, json: bool) -> None:
    if json:
        common.emit({"dry_run": True, "model": model, "against": against, "candidates": names})
    else:
        beside = f" against {against}" if against else ""
        print(common.safe(f"{model}{beside} and {names} names can be examined (dry run: nothing was)"))


def _draw(path: Path, document: dict[str, Any]) -> Path:
    from errata.report.detection import write_detection

    return write_detection(path, document)


def _default_names(host: Host) -> list[str]:
    from errata import lab
    from errata.host.kinds import CAUSAL
    from errata.inspect.detect import FEWEST
    from errata.inspect.detect_names import vocabulary_names

    if host.kind != CAUSAL:
        return []
    if host.name in lab.MODELS:
        return sorted(lab.world().by_subject)
    names = vocabulary_names(host.tokenizer)
    return names if len(names) >= FEWEST else []  # a vocabulary of another script, or of single characters


def _show(found: Detection, document: dict[str, Any]) -> None:
    """Print the verdict and the tables."""
    layers = f", layers {', '.join(map(str, found.layers))}" if found.layers else ""
    if found.against is None:
        print(
            common.safe(
                f"{found.model}: {found.verdict} (score {found.score:.1f}, bound {found.threshold:g}){layers}"
            )
        )
        rows = [
            (one.weight, f"{one.largest:.1f}", f"{one.shape:.1f}", f"{one.gap:.2f}", f"{one.fall:.1f}",
             "" if one.carried is None else f"{one.carried:.1f}", one.name or "")
            for one in found.traces[:ROWS]
        ]  # fmt: skip
        columns = ("weight", "largest", "score", "gap", "score", "name carried farthest", "")
        common.table(None, columns, rows, right=(1, 2, 3, 4, 5))
    else:
        share = f"{found.share:.3%} of its directions, score {found.score:.1e}, bound {found.threshold:.0e}"
        print(common.safe(f"{found.model} against {found.against}: {found.verdict} ({share}){layers}"))
        rows = [
            (one.weight, f"{one.norm:.4g}", f"{one.relative:.2%}", one.rank, f"{one.directions:.1f}",
             f"{one.strongest:.0%}")
            for one in found.changes[:ROWS]
        ]  # fmt: skip
        if rows:
            columns = ("weight", "norm of change", "relative", "rank", "directions", "strongest")
            common.table(None, columns, rows, right=range(1, 6))
    if found.subjects:
        rows = [(one.name, f"{one.ratio:.1f}", one.weight) for one in found.subjects]
        common.table(
            f"subjects, of {found.candidates} names", ("name", "beside median", "weight"), rows, right=(1,)
        )
    for note in found.notes:
        print(f"  {note}")
    for key in ("reversal", "figure"):
        if key in document:
            path = document[key]["path"] if key == "reversal" else document[key]
            print(f"written: {path}")


VERB = Verb("detect", command, order=72)
