"""errata refit and errata retract: combine edits into one, and remove requests from an edit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from errata.cli import common, outputs
from errata.cli._verb import Verb

if TYPE_CHECKING:
    from errata.edits import Edit

Files = Annotated[list[Path], typer.Argument(metavar="EDIT...", help="Files of closed-form edits.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Where to write the edit (.safetensors).")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Solve and report, write nothing.")]


def refit(
    edits: Files,
    output: Output,
    force: common.Force = False,
    dry_run: DryRun = False,
    json: common.Json = False,
) -> None:
    """Combine closed-form edits into one by solving all their requests jointly. No model needed."""
    from errata.edits import Edit
    from errata.edits.algebra import refit as solve

    outputs.check_new_edit(output, force=force)
    _finish(solve([Edit.load(path) for path in edits]), output, dry_run, json)


def retract(
    edit: Annotated[Path, typer.Argument(metavar="EDIT", help="A file of an edit.")],
    request: Annotated[
        list[str],
        typer.Option(
            "--request",
            "-r",
            help="Id of a request, or its number in errata show, from 1; repeatable.",
        ),
    ],
    output: Output,
    force: common.Force = False,
    dry_run: DryRun = False,
    json: common.Json = False,
) -> None:
    """Remove requests from an edit, as if they had never been made. No model needed.

    A closed-form edit is solved again without them. A memory or a prompt edit loses their entries, where each request
    has its own. Other edits are refused.

    Of a memory whose requests share blocks, whole blocks are removed. Prints the requests it removes. A text that
    is the id of one request and the number of another counts as the id, with a note.
    """
    from errata.edits import Edit
    from errata.edits.algebra import find_request
    from errata.edits.algebra import retract as without

    outputs.check_new_edit(output, force=force)
    original = Edit.load(edit)
    matches = [find_request(original, text) for text in request]
    places = sorted({place for place, _ in matches})
    result = without(original, places)
    retracted = [{"number": i + 1, **original.provenance.requests[i].to_dict()} for i in places]
    _finish(result, output, dry_run, json, retracted, [note for _, note in matches if note is not None])


def _finish(
    edit: Edit, output: Path, dry_run: bool, json: bool, retracted: Sequence[Mapping[str, Any]] = (),
    notes: Sequence[str] = (),
) -> None:  # fmt: skip
    from errata.edits import WeightEdit
    from errata.edits.algebra import leverages

    closed = isinstance(edit, WeightEdit)
    shares = leverages(edit) if closed else [None] * len(edit.provenance.requests)
    requests = edit.provenance.requests
    path = None if dry_run else edit.save(output)
    if json:
        own = zip(requests, shares, strict=True)
        table = [{**r.to_dict(), **({} if s is None else {"leverage": s})} for r, s in own]
        document = {"path": None if path is None else str(path), "requests": table, "digest": edit.digest}
        common.emit({**document, "retracted": retracted, "notes": notes} if retracted else document)
        return
    for note in notes:
        print(f"note: {note}")
    for one in retracted:
        what = (
            f"{one['prompt']!r} ({one['subject']}) -> {one['target']!r}"
            if "prompt" in one
            else one["concept"]
        )
        name = f" ({one['id']})" if "id" in one else ""
        print(f"removed request {one['number']}{name}: {what}")
    rows = []
    for i, (request, share) in enumerate(zip(requests, shares, strict=True), 1):
        fields = request.to_dict()
        shown = () if share is None else (f"{share:.3f}",)
        rows.append((i, *(fields.get(k, "") for k in ("id", "prompt", "subject", "target")), *shown))
    columns = ("", "id", "prompt", "subject", "target", *(("leverage",) if closed else ()))
    common.table(None, columns, rows, right=(0, 5))
    status = (
        "dry run: nothing was written" if path is None else f"edit written to {path} ({common.size(path)})"
    )
    size = f"norm {edit.norm():.4g}" if isinstance(edit, WeightEdit) else f"{edit.size / 1000:.1f} kB"
    print(f"{len(requests)} requests in one edit, {size}; {status}")


VERBS = (Verb("refit", refit, order=80), Verb("retract", retract, order=81))
