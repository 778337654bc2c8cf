"""errata export: write an edit as files that are used without errata."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from errata.cli import _ledger, common
from errata.cli._verb import Verb

if TYPE_CHECKING:
    from errata.edits import Edit
    from errata.edits.export import Export
    from errata.ledger.store import Ledger

SHOWN = 5
"""Most tensors whose loss is printed."""
SMALL = 1e-3
"""Loss that is not printed; in float32 it is a millionth."""


EditFile = Annotated[
    Path | None,
    typer.Argument(metavar="EDIT", help="A file, or an id of the ledger; default: all in place there."),
]
To = Annotated[str | None, typer.Option(help="The kind of files; see --list.")]
ModelName = Annotated[
    str | None,
    typer.Option("--model", help="The model that the edit was made for: lab, a hub name or a folder."),
]
DType = Annotated[
    str | None, typer.Option(help="Of a checkpoint: float32, float16 or bfloat16; default: as the model's.")
]
PadTo = Annotated[
    int | None,
    typer.Option(min=1, help="Widen a checkpoint's feed-forwards to a multiple of this; default: 64."),
]
Rank = Annotated[
    int | None,
    typer.Option(min=1, help="Largest rank of an adapter; what is above is approximated, and reported."),
]
Verify = Annotated[
    bool,
    typer.Option(
        "--verify/--no-verify",
        help="Read what was written and compare it with the edit; a checkpoint is one more model in memory.",
    ),
]


def command(
    file: EditFile = None, to: To = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The folder to write.")] = None,
    model: ModelName = None, dtype: DType = None, pad_to: PadTo = None, rank: Rank = None,
    list_: Annotated[bool, typer.Option("--list", help="List the exports and the edits that each takes.")] = False,
    repo: _ledger.Repo = None, foreign: common.Foreign = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
    verify: Verify = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Refuse or report; write nothing.")] = False,
    device: common.Device = "auto", json: common.Json = False,
) -> None:  # fmt: skip
    """Write an edit as files that are used without errata: a checkpoint, an adapter, prompts and others.

    The files do what the edit does, or the edit is refused with the reason: a checkpoint takes weight edits and added
    neurons (t_patcher, calinet), an adapter low-rank weight edits, prompts the texts of prompt edits. See --list. What
    was written is read again and compared with the edit in place before it counts.
    """
    from errata.edits import Edit
    from errata.edits.export import EXPORTERS, export
    from errata.edits.export._exporter import Options, check_options
    from errata.edits.export._folder import check_folder
    from errata.errors import ConfigError

    if list_:
        _list(json)
        return
    if to is None or output is None:
        raise ConfigError("an export needs --to and -o; see: errata export --list")
    exporter, options = EXPORTERS.get(to), Options(dtype, pad_to, rank, foreign)
    recorded = _recorded(repo, file)
    if recorded is not None and model is None and exporter.needs_host:
        model = recorded.ledger.settings.model
    check_options(exporter, options, host=model is not None)  # before a large model is opened
    check_folder(output, force=force)
    edit = recorded.edit if recorded is not None else Edit.load(file or "")
    host = None if model is None else common.open_host(model, device, "auto")
    receipt = export(
        edit, output, to=to, host=host, dtype=dtype, pad_to=pad_to, rank=rank, foreign=foreign, force=force,
        verify=verify, dry_run=dry_run,
    )  # fmt: skip
    if recorded is not None and not dry_run:
        recorded.note(to, output, receipt.verified)
    if json:
        common.emit({"dry_run": dry_run, **receipt.to_dict()})
    else:
        _show(receipt, dry_run)


class _Recorded(NamedTuple):
    """Edits of a ledger, as one."""

    ledger: Ledger
    digests: tuple[str, ...]
    edit: Edit

    def note(self, to: str, folder: Path, verified: Mapping[str, Any] | None) -> None:
        """Record that they were exported, and what was compared then."""
        body = {
            "to": to, "edits": list(self.digests), "folder": folder.name, "digest": self.edit.digest,
            "verified": None if verified is None else dict(verified),
        }  # fmt: skip
        self.ledger.append("exported", body=body)


def _recorded(repo: Path | None, file: Path | None) -> _Recorded | None:
    """Return an edit of a ledger by its id, without one all that are in place there; None where a file is named."""
    from errata.errors import ConfigError, LedgerError
    from errata.ledger import folders
    from errata.ledger.compiling import compiled
    from errata.ledger.contents import load_edit

    if file is not None and not _ledger.names_edit(file, repo):
        return None
    try:
        ledger = folders.find(repo)
    except LedgerError as error:
        raise ConfigError(f"{error}, or name the file of an edit") from error
    state = ledger.state()
    digests = state.active if file is None else (state.find_edit(str(file)).digest,)
    return _Recorded(ledger, digests, compiled([load_edit(ledger, digest) for digest in digests]))


def _list(json: bool) -> None:
    from errata.edits.export import EXPORTERS

    entries = [EXPORTERS.get(name) for name in EXPORTERS]
    if json:
        common.emit([
            {
                "name": e.name, "title": e.title, "takes": list(e.takes), "options": sorted(e.options),
                "model": e.needs_host,
            }
            for e in entries
        ])  # fmt: skip
        return
    rows = [(e.name, e.title, "\n".join(e.takes), _flags(e.options)) for e in entries]
    common.table(None, ("--to", "writes", "takes", "options"), rows)


def _show(receipt: Export, dry_run: bool) -> None:
    """Print what was written, and what rounding lost."""
    for note in receipt.overrides:
        print(f"overruled: {note}")
    print(f"edit {receipt.digest} as {receipt.to}")
    rows = [(name, _text(value)) for name, value in receipt.facts.items() if name != "lost" and value]
    common.table(None, ("", "value"), rows)
    lost = {name: share for name, share in receipt.facts.get("lost", {}).items() if share >= SMALL}
    if lost:
        worst = sorted(lost.items(), key=lambda item: -item[1])
        print(f"lost by rounding or approximation, as a share of the change ({len(lost)} tensors):")
        common.table(
            None, ("tensor", "lost"), [(name, f"{share:.2%}") for name, share in worst[:SHOWN]], right=(1,)
        )
    if receipt.verified is not None:
        print(f"verified: {_comparison(receipt.verified)}")
    if dry_run:
        print(f"it can be exported to {receipt.folder} (dry run: nothing was written)")
    else:
        count = sum((receipt.folder / name).stat().st_size for name in receipt.files)
        print(f"{len(receipt.files)} files, {common.bytes_text(count)}, written to {receipt.folder}")


def _comparison(verified: Mapping[str, Any]) -> str:
    """Describe what was compared on one line."""
    words = [f"{name} {_number(value)}" for name, value in verified.items() if name != "compared"]
    return f"{verified['compared']} ({', '.join(words)})"


def _number(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, float) else str(value)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_number(part)}" for name, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return _number(value) if isinstance(value, float) else str(value)


def _flags(options: Iterable[str]) -> str:
    """Write options as they are on the command line."""
    return ", ".join(f"--{name.replace('_', '-')}" for name in sorted(options))


VERB = Verb("export", command, order=85)
