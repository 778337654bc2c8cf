"""errata show: print the contents of an edit, of a file or of a ledger."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from errata.cli import _ledger, common
from errata.cli._verb import Verb

if TYPE_CHECKING:
    from errata.bench.survival import Survival
    from errata.edits import Edit
    from errata.edits.artefact import Artefact


def command(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE|ID", help="A file of an edit or a trained editor; or an id of the ledger."
        ),
    ],
    repo: _ledger.Repo = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Also measure what merging into this model's precision loses."),
    ] = None,
    survives: Annotated[
        list[str] | None,
        typer.Option(
            "--survives",
            metavar="GRID",
            help="With --model: ask all requests again, the written weights rounded to int8, int4 or nf4; repeatable.",
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="With --survives: exit 1 if a request is lost.")
    ] = False,
    foreign: common.Foreign = False,
    json: common.Json = False,
    device: common.Device = "auto",
    dtype: common.Dtype = "auto",
) -> None:
    """Show an edit: requests, method, settings, host, and what it changes.

    Opens no model, except that with --model the edit is applied to that one and reverted, to measure per
    weight the share of the change that is lost to rounding: ||(W' - W) - delta|| / ||delta||. --survives asks whether
    its requests would still hold in a model quantised after the edit, with the weights it writes rounded.
    """
    from errata.edits import Edit
    from errata.edits.artefact import Artefact, holds_artefact
    from errata.errors import EditError

    if _ledger.names_edit(file, repo):
        file = _recorded(repo, str(file), json)
    try:
        edit = Edit.load(file)
    except EditError:
        if not holds_artefact(file):
            raise
        _show_editor(Artefact.load(file), file, json)
        return
    host = None if model is None else common.open_host(model, device, dtype)
    losses = _rounding_losses(edit, host, foreign)
    outcomes = _survivals(edit, host, survives or [], foreign, json, strict)
    facts = {**edit.summary(), **({} if losses is None else {"model": model, "lost": losses})}
    facts |= {"survives": [_survival_facts(one) for one in outcomes]} if outcomes else {}
    if json:
        common.emit({"path": str(file), "bytes": file.stat().st_size, **facts})
    else:
        _show_edit(file, facts, losses)
        for one in outcomes:
            _show_survival(one)
    if strict and any(not one.survives for one in outcomes):
        raise typer.Exit(1)


def _show_edit(file: Path, facts: dict[str, Any], losses: dict[str, float] | None) -> None:
    """Print an edit's summary."""
    print(f"{file}  {common.size(file)}  {facts['kind']} edit {facts['digest']}")
    versions = ", ".join(f"{name} {value}" for name, value in facts["versions"].items())
    print(f"made by {facts['method']} (seed {facts['seed']}) for host {facts['host']} ({facts['host_name']})")
    print(f"with {versions}")
    common.table("requests", *_requests(facts["requests"]))
    _changes(facts, losses)
    common.table("settings", ("name", "value"), list(facts["config"].items()))


def _survivals(
    edit: Edit, host: Any, grids: list[str], foreign: bool, json: bool, strict: bool
) -> list[Survival]:
    """Measure what rounding to each grid leaves of an edit, asked in the format that it was fitted in."""
    from errata.bench.survival import survives
    from errata.errors import ConfigError
    from errata.host.kinds import check_asked
    from errata.job import with_prompt_options
    from errata.types import DEFAULT_ASK

    if strict and not grids:
        raise ConfigError("--strict is about requests that rounding loses: name a grid with --survives")
    if not grids:
        return []
    if host is None:
        raise ConfigError("--survives asks a model: name it with --model")
    check_asked(host.name, host.kind, "--survives")
    host = with_prompt_options(host, DEFAULT_ASK, edits=[edit])
    with common.progress(not json) as tick:
        return [survives(host, edit, grid, foreign=foreign, on_progress=tick) for grid in grids]


def _survival_facts(one: Survival) -> dict[str, Any]:
    return {
        "grid": one.grid, "kept": dict(one.kept), "noise": dict(one.noise), "total": len(one.merged.requests),
        "answered": one.merged.answered, "answered_rounded": one.rounded.answered, "lost": list(one.lost),
    }  # fmt: skip


def _show_survival(one: Survival) -> None:
    """Print what is left of an edit's weights and requests on a grid."""
    rows = [(name, f"{share:.1%}", f"{one.noise[name]:.2f}") for name, share in one.kept.items()]
    common.table(
        f"after rounding to {one.grid}",
        ("name", "change kept", "rounding error / change"),
        rows,
        right=(1, 2),
    )
    print(
        f"{one.merged.answered} of {len(one.merged.requests)} requests answered with their target, "
        f"{one.rounded.answered} after rounding to {one.grid}"
        + (f"; lost: {', '.join(one.lost)}" if one.lost else "")
    )
    if one.lost:
        print("quantise first and edit the quantised model, which places the edit beside its weights")


def _recorded(repo: Path | None, name: str, json: bool) -> Path:
    """Print what a ledger's events say about an edit; return its file."""
    from errata.ledger import folders

    ledger = folders.find(repo)
    state = ledger.state()
    one = state.find_edit(name)
    if not json:
        where = "in place" if one.digest in state.active else "not in place"
        print(f"edit {one.digest}, {where}; by {one.event.author}, {one.event.created}")
        for label, text in (("why", one.event.reason), ("source", one.event.source)):
            if text:
                print(f"{label}: {text}")
        rows = [] if one.verified is None else _ledger.measured_rows(one.verified.body)
        if rows:
            common.table("guard", ("measured", "", "bound"), rows, right=(1,))
    return ledger.file(one.digest)


def _show_editor(editor: Artefact, file: Path, json: bool) -> None:
    """Print what a trained editor is and how it was trained."""
    facts = editor.summary()
    if json:
        common.emit({"path": str(file), **facts})
        return
    card = facts["card"]
    print(
        f"{file}  {common.size(file)}  editor {editor.digest}, trained by {editor.method} for host {editor.host}"
    )
    common.table("training", ("", "value"), common.card_rows(card))
    common.table("settings", ("name", "value"), list(card.get("settings", {}).items()))


def _changes(facts: dict[str, Any], losses: dict[str, float] | None) -> None:
    """Print what an edit changes: its weights, or its interventions with the router that selects entries."""
    if "weights" in facts:
        weights = [
            (n, "x".join(map(str, w["shape"])), w["form"], f"{w['norm']:.4g}", *_share(losses, n))
            for n, w in facts["weights"].items()
        ]
        columns = ("name", "shape", "change", "norm", *(() if losses is None else ("lost if merged",)))
        common.table("weights", columns, weights, right=(3, 4))
    if "sites" in facts:
        sites = [(one["module"], one["operation"], one["positions"]) for one in facts["sites"]]
        common.table("interventions", ("module", "operation", "positions"), sites)
    if "router" in facts:
        print(f"{facts['entries']} entries, selected by the {facts['router']} router")


def _requests(requests: list[dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """Return columns and rows of a table of requests. Pairs of images are recorded by name and content only."""
    fields = ("prompt", "subject", "target_old", "target")
    names = ("prompt", "subject", "old", "new")
    if any("prompt" not in r for r in requests):
        fields, names = (
            ("concept", "replacement", "pairs", "digest"),
            ("concept", "replacement", "pairs", "content"),
        )
    if any("id" in r for r in requests):
        fields, names = ("id", *fields), ("id", *names)
    # the numbers that errata retract takes
    rows = [(i, *(r.get(field, "") for field in fields)) for i, r in enumerate(requests, 1)]
    return ("", *names), rows


def _rounding_losses(edit: Edit, host: Any, foreign: bool) -> dict[str, float] | None:
    """Measure what merging loses, by weight; None where no model is named."""
    from errata.edits import WeightEdit
    from errata.errors import EditError

    if host is None:
        return None
    if not isinstance(edit, WeightEdit):
        raise EditError(f"{edit.kind} edits change no weights, so merging loses nothing; leave out --model")
    return edit.trial(host, foreign=foreign)


def _share(losses: dict[str, float] | None, name: str) -> tuple[str, ...]:
    if losses is None:
        return ()
    return (f"{losses[name]:.2%}" if name in losses else "quantised: not merged",)


VERB = Verb("show", command, order=90)
