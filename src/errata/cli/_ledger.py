"""Options and tables of the verbs that work with a ledger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from errata.cli import common

if TYPE_CHECKING:
    from collections.abc import Iterator

    from errata.ledger.events import Event
    from errata.ledger.state import Recorded
    from errata.ledger.store import Ledger
    from errata.ledger.working import Working

REFUSED = 5
"""Exit code of an edit that its guard refused."""

Repo = Annotated[
    Path | None,
    typer.Option(
        "--repo", help="Folder of the ledger; default: this folder or the nearest above that has one."
    ),
]
Reason = Annotated[str, typer.Option("--message", "-m", help="Why; recorded.")]
Author = Annotated[str, typer.Option("--author", help="Who; default: $ERRATA_AUTHOR, else user@machine.")]
Source = Annotated[str, typer.Option("--source", help="Where the new fact is from, say a URL; recorded.")]
GuardSwitch = Annotated[
    bool, typer.Option("--guard/--no-guard", help="Refuse what is out of the ledger's bounds; recorded.")
]
Conflicts = Annotated[
    str | None,
    typer.Option(
        help="A request that contradicts an edit in place: error, replace it, or keep both. Default: config.yaml."
    ),
]


@contextmanager
def open_working(
    ledger: Ledger, *, device: str, dtype: str, show: bool, model: str | None = None
) -> Iterator[Working]:  # fmt: skip
    """Open a ledger's model, with progress bars on stderr if ``show``."""
    from errata.host.open import quiet
    from errata.ledger.working import Working

    quiet()
    with common.progress(show) as tick:
        yield Working.open(
            ledger, model=model, device=None if device == "auto" else device,
            dtype=None if dtype == "auto" else dtype, on_progress=tick,
        )  # fmt: skip


def names_edit(file: Path, repo: Path | None) -> bool:
    """Whether a word means an edit of the ledger and no file: an id, or where there is a ledger also a tag."""
    import re

    from errata.errors import LedgerError
    from errata.ledger import folders

    if file.suffix or file.name != str(file) or file.exists():
        return False
    if re.fullmatch("[0-9a-fA-F]{4,64}", file.name):
        return True
    try:
        folders.find(repo)
    except LedgerError:
        return False
    return True


def policy(text: str | None) -> Any:
    """Return a policy for conflicts. Raises ConfigError for an unknown one."""
    from typing import get_args

    from errata.errors import ConfigError
    from errata.ledger.settings import Policy

    if text is not None and text not in get_args(Policy):
        raise ConfigError(f"--conflicts {text}: expected one of {', '.join(get_args(Policy))}")
    return text


def summary_of(event: Event) -> str:
    """Describe an event in a few words."""
    body = event.body
    if event.kind == "created":
        return f"model {body['name']}, host {body['fingerprint']}"
    if event.kind == "proposed":
        return f"{body['method']}: {requests_line(body['requests'])}"
    if event.kind == "verified":
        if "passed" not in body:
            return "not measured"
        off = "" if body["guard"] else "; guard off"
        return ("within bounds" if body["passed"] else "; ".join(body["failures"])) + off
    if event.kind == "applied":
        return f"in place of {_shorts(body['replaces'])}" if body.get("replaces") else "in place"
    if event.kind == "reverted":
        return f"{_shorts(body['restores'])} back in place" if body.get("restores") else "taken off"
    if event.kind == "reset":
        return f"to {body['to']}: {_shorts(body['active']) or 'no edits'}"
    if event.kind == "tagged":
        return f"{body['name']} is event {body['number']}"
    if event.kind == "merged":
        return (
            f"{len(body['edits'])} edits, {len(body['refused'])} refused, {len(body['conflicts'])} conflicts"
        )
    return str(body.get("to", ""))


def requests_line(requests: Sequence[Mapping[str, Any]]) -> str:
    """Describe an edit's requests on one line: the first one, and how many more there are."""
    from errata.ledger.conflicts import name_of

    if not requests:
        return "no requests"
    first = requests[0]
    text = first["prompt"].replace("{}", first["subject"], 1) if "prompt" in first else name_of(first)
    target = f" -> {first['target']}" if "target" in first else ""
    more = f" and {len(requests) - 1} more" if len(requests) > 1 else ""
    return f"{text}{target}{more}"


def measured_rows(body: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return the rows of a table of what a guard measured, each with its bound."""
    from errata.ledger.settings import LEAST, MOST

    measured, bounds = body.get("measured", {}), body.get("bounds", {})
    rows: list[tuple[str, str, str]] = []
    for names, word in ((LEAST, "at least"), (MOST, "at most")):
        for name, what in names.items():
            value = measured.get(name)
            if value is not None:
                shown = f"{value:.4g}" if isinstance(value, (int, float)) else str(value)
                rows.append((what, shown, f"{word} {bounds[name]:.4g}"))
    return rows


def edit_rows(edits: Sequence[Recorded]) -> list[tuple[Any, ...]]:
    """Return the rows of a table of edits in place."""
    return [
        (one.short, one.facts["method"], len(one.requests), requests_line(one.requests), one.event.reason)
        for one in edits
    ]


def _shorts(digests: Sequence[str]) -> str:
    from errata.ledger.events import SHORT

    return ", ".join(digest[:SHORT] for digest in digests)
