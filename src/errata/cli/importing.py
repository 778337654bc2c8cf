"""errata import: a LoRA adapter or a checkpoint as an edit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from errata.cli import _ledger, common, outputs
from errata.cli._verb import Verb

if TYPE_CHECKING:
    from errata.edits.weight import WeightEdit
    from errata.ledger.recording import Attempt


def command(
    folder: Annotated[Path, typer.Argument(help="Of a PEFT LoRA adapter, or of a checkpoint.")],
    model: Annotated[
        str | None,
        typer.Option("--model", help="The unedited model: lab, a hub name or a folder; default: the ledger's."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write the edit to this file (.safetensors) instead of the ledger."),
    ] = None,
    message: _ledger.Reason = "", source: _ledger.Source = "", author: _ledger.Author = "",
    guard: _ledger.GuardSwitch = True, repo: _ledger.Repo = None, foreign: common.Foreign = False,
    force: common.Force = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read and check; write nothing.")] = False,
    device: common.Device = "auto", dtype: common.Dtype = "auto", json: common.Json = False,
) -> None:  # fmt: skip
    """Turn a LoRA adapter, or the difference of a checkpoint from its model, into an edit.

    Taken exactly or refused with the reason; pickled files are never opened. A checkpoint is opened beside the model,
    one more in memory. The edit has no requests, so in a ledger the guard asks nothing of its targets; its other bounds
    (earlier requests, canaries, divergence, perplexity, norm) hold, and the exit code is 5 where one does not.
    """
    from errata.edits.imports import import_edit
    from errata.errors import ConfigError

    if output is not None:
        _check_file_options(message, source, author, repo, guard=guard)
        outputs.check_new_edit(output, force=force)
        if model is None:
            raise ConfigError("with -o the model has to be named: --model lab, a hub name or a folder")
        edit = import_edit(folder, common.open_host(model, device, dtype), foreign=foreign)
        if not dry_run:
            edit.save(output)
        _show(edit, json, {"path": str(output), "dry_run": dry_run})
        return
    if force:
        raise ConfigError("--force is for edits in files (-o); a ledger replaces nothing")
    _into_ledger(
        folder, model, repo, {"reason": message, "source": source, "author": author, "guard": guard},
        foreign=foreign, dry_run=dry_run, device=device, dtype=dtype, json=json,
    )  # fmt: skip


def _into_ledger(
    folder: Path, model: str | None, repo: Path | None, order: dict[str, Any], *, foreign: bool, dry_run: bool,
    device: str, dtype: str, json: bool,
) -> None:  # fmt: skip
    """Import an edit, measure it and apply it if it keeps the guard's bounds. Raises typer.Exit with 5 if not."""
    from errata.edits.imports import METHOD, import_edit
    from errata.errors import ConfigError, LedgerError
    from errata.ledger import folders
    from errata.ledger.adopting import adopt
    from errata.ledger.recording import Order

    try:
        ledger = folders.find(repo)
    except LedgerError as error:
        raise ConfigError(f"{error}, or name a file to write with -o") from error
    show = not (json or dry_run)
    with _ledger.open_working(ledger, device=device, dtype=dtype, show=show, model=model) as working:
        edit = import_edit(folder, working.host, foreign=foreign)
        attempt = None if dry_run else adopt(working, edit, Order(METHOD, **order))
    more: dict[str, Any] = {"ledger": str(ledger.folder), "dry_run": dry_run}
    if attempt is not None:
        more.update(
            {"applied": attempt.applied}, **({} if attempt.verdict is None else attempt.verdict.to_dict())
        )
    _show(edit, json, more, attempt)
    if attempt is not None and not attempt.applied:
        raise typer.Exit(_ledger.REFUSED)


def _check_file_options(message: str, source: str, author: str, repo: Path | None, *, guard: bool) -> None:
    """Raise ConfigError for options of a ledger where the edit goes into a file."""
    from errata.errors import ConfigError

    given = {"-m": message, "--source": source, "--author": author, "--repo": repo, "--no-guard": not guard}
    names = [name for name, value in given.items() if value]
    if names:
        raise ConfigError(f"{', '.join(names)}: for edits in a ledger; leave -o out, or leave these out")


def _show(edit: WeightEdit, json: bool, more: dict[str, Any], attempt: Attempt | None = None) -> None:
    """Print what was imported and where it went."""
    if json:
        common.emit({**more, "edit": edit.summary()})
        return
    rows = [(name, one["form"], f"{one['norm']:.4g}") for name, one in edit.summary()["weights"].items()]
    common.table(
        f"edit {edit.digest} from a {edit.provenance.config['kind']}",
        ("weight", "form", "norm"),
        rows,
        right=(2,),
    )
    if more["dry_run"]:
        print("it can be imported (dry run: nothing was written)")
    elif attempt is None:
        print(f"edit written to {more['path']}; the model is unchanged")
    else:
        if attempt.verdict is not None:
            failed = {failure.split(":")[0] for failure in attempt.verdict.failures}
            table = _ledger.measured_rows(attempt.verdict.to_dict())
            common.table(
                None, ("measured", "", "bound", ""),
                [(*row, "out of bounds" if row[0] in failed else "") for row in table], right=(1,),
            )  # fmt: skip
        word = common.mark("applied", "green") if attempt.applied else common.mark("refused", "red")
        print(f"edit {edit.digest[:12]} {word}")


VERB = Verb("import", command, order=86)
