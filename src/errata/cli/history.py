"""errata init, log, status, tag, revert, reset: the history of a model's edits. Only init opens the model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from errata.cli import _ledger, common
from errata.cli._verb import Verb

Id = Annotated[
    str,
    typer.Argument(
        metavar="ID|TAG", help="The first digits of an edit's id, or a tag: the last edit in place there."
    ),
]
TO_BASE = "base"


def init(
    model: common.Model,
    repo: Annotated[Path | None, typer.Option("--repo", help="Folder to make .errata in; default: this one.")] = None,
    author: _ledger.Author = "",
    device: common.Device = "auto", dtype: common.Dtype = "auto", json: common.Json = False,
) -> None:  # fmt: skip
    """Make a ledger: a folder .errata with the history of one model's edits.

    Opens the model once, to record its fingerprint. Settings, among them the guard's bounds, are in
    .errata/config.yaml.
    """
    from errata.errors import LedgerError
    from errata.ledger import folders
    from errata.ledger.settings import LedgerSettings
    from errata.ledger.working import describe

    if folders.exists(repo):
        raise LedgerError(f"{Path(repo or '.') / folders.NAME} exists already; see errata status")
    host = common.open_host(model, device, dtype)
    settings = LedgerSettings(model=_lasting(model), device=device, dtype=dtype)
    ledger = folders.create(repo, settings, describe(host, model), author=author)
    facts = ledger.state().model
    if json:
        common.emit({"path": str(ledger.folder), "model": dict(facts)})
    else:
        print(
            f"ledger made in {ledger.folder} for {model}: host {facts['fingerprint']}, weights {facts['weights']}"
        )


def _lasting(model: str) -> str:
    """Return a model's name as it can be opened from any folder."""
    folder = Path(model).expanduser()
    return str(folder.absolute()) if folder.is_dir() and model != "lab" else model


def log(
    repo: _ledger.Repo = None,
    edit: Annotated[str | None, typer.Option(help="Only events about this edit.")] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Most events to show, the newest.")] = 30,
    json: common.Json = False,
) -> None:
    """List the events of a ledger, newest first; every one is checked against its hash."""
    from errata.ledger import folders

    ledger = folders.find(repo)
    events = ledger.events()
    if edit is not None:
        digest = ledger.state().find_edit(edit).digest
        events = [event for event in events if event.edit == digest]
    newest = list(reversed(events))[:limit]
    if json:
        common.emit([event.to_dict() for event in newest])
        return
    rows = [
        (e.number, e.created.replace("T", " ").removesuffix("+00:00"), e.author, e.kind, e.edit[:12],
         _ledger.summary_of(e), e.reason)
        for e in newest
    ]  # fmt: skip
    common.table(None, ("", "when (UTC)", "who", "event", "edit", "", "why"), rows, right=(0,))
    if len(events) > limit:
        print(f"{len(events) - limit} earlier events; --limit shows more")


def status(
    repo: _ledger.Repo = None,
    weights: Annotated[
        bool, typer.Option("--weights", help="Open the model and hash its weights, without and with the edits.")
    ] = False,
    device: common.Device = "auto", dtype: common.Dtype = "auto", json: common.Json = False,
) -> None:  # fmt: skip
    """Show what is in place: model, revision, edits in their order, tags."""
    from errata.ledger import folders

    ledger = folders.find(repo)
    state = ledger.state()
    edits = [state.edits[digest] for digest in state.active]
    hashes: dict[str, Any] = {}
    if weights:
        with _ledger.open_working(ledger, device=device, dtype=dtype, show=not json) as working:
            hashes["base"] = working.host.weights_hash()
            with working.showing(state.active) as host:
                hashes["edited"] = host.weights_hash()
    if json:
        common.emit({
            "path": str(ledger.folder), "model": dict(state.model), "revision": state.revision,
            "edits": [
                {"edit": one.digest, "method": one.facts["method"], "requests": one.requests,
                 "reason": one.event.reason, "author": one.event.author} for one in edits
            ],
            "tags": dict(state.tags), "events": len(state.ids), "weights": hashes,
        })  # fmt: skip
        return
    model = state.model
    print(f"{ledger.folder}: {model['name']}, host {model['fingerprint']}, revision {state.revision}")
    if edits:
        common.table(
            None, ("edit", "method", "requests", "first", "why"), _ledger.edit_rows(edits), right=(2,)
        )
    else:
        print("no edits in place")
    if state.tags:
        print("tags: " + ", ".join(f"{name} (event {number})" for name, number in state.tags.items()))
    if hashes:
        same = (
            "as when the ledger was made" if hashes["base"] == model["weights"] else "NOT as when it was made"
        )
        print(f"weights {hashes['base']}, {same}; with the edits {hashes['edited']}")


def tag(
    name: Annotated[str, typer.Argument(help="Letters, digits and . _ - /; not base, now, or what could be an id.")],
    revision: Annotated[str, typer.Argument(help="What to name; default: what is in place now.")] = "now",
    repo: _ledger.Repo = None, message: _ledger.Reason = "", author: _ledger.Author = "",
    json: common.Json = False,
) -> None:  # fmt: skip
    """Give a revision a name. A name that is there already moves; the log keeps both."""
    from errata.ledger import folders
    from errata.ledger.state import check_tag

    ledger = folders.find(repo)
    check_tag(name)
    state = ledger.state()
    number, active = state.find_event(revision), ledger.active_at(revision)
    body = {"name": name, "number": number, "edit": active[-1] if active else ""}
    event = ledger.append("tagged", body=body, reason=message, author=author)
    if json:
        common.emit(event.to_dict())
    else:
        print(f"{name} is event {number}: {len(active)} edits in place")


def revert(
    edit: Id,
    request: Annotated[
        list[str] | None, typer.Option("--request", help="Only this request, by id or number from 1; repeatable.")
    ] = None,
    repo: _ledger.Repo = None, message: _ledger.Reason = "", author: _ledger.Author = "",
    json: common.Json = False,
) -> None:  # fmt: skip
    """Take an edit off, wherever it stands in the order. Edits in whose place it came are back in place.

    An edit that a later one includes (--after) is taken out of that one exactly, as if it had never been made. The
    model is not needed; errata check asks it what the others answer now.
    """
    from errata.ledger import folders, reverting

    ledger = folders.find(repo)
    if request:
        from errata.edits.algebra import request_index
        from errata.ledger.contents import load_edit

        digest = ledger.state().find_edit(edit).digest
        whole = load_edit(ledger, digest)
        numbers = [request_index(whole, _number(one)) for one in request]
        event = reverting.take_out(ledger, digest, numbers, reason=message, author=author)
    else:
        event = reverting.revert(ledger, edit, reason=message, author=author)
    _report(ledger, event, json)


def _number(text: str) -> str | int:
    """Return a request's number from 0 where a text is a number from 1, else the text: an id."""
    return int(text) - 1 if text.isdecimal() else text


def reset(
    revision: Annotated[
        str, typer.Argument(help="A tag, an edit, an event, or base: the model without edits.")
    ] = TO_BASE,
    repo: _ledger.Repo = None, message: _ledger.Reason = "", author: _ledger.Author = "",
    json: common.Json = False,
) -> None:  # fmt: skip
    """Have exactly the edits of a revision in place; nothing is lost, the log says how to come back."""
    from errata.ledger import folders, reverting

    ledger = folders.find(repo)
    _report(ledger, reverting.reset(ledger, revision, reason=message, author=author), json)


def _report(ledger: Any, event: Any, json: bool) -> None:
    state = ledger.state()
    if json:
        common.emit({**event.to_dict(), "revision": state.revision, "active": list(state.active)})
        return
    name = f" {event.edit[:12]}" if event.edit else ""
    print(f"event {event.number}: {event.kind}{name}, {_ledger.summary_of(event)}")
    print(f"revision {state.revision}: {len(state.active)} edits in place")


VERBS = (
    Verb("init", init, order=2), Verb("log", log, order=21), Verb("status", status, order=22),
    Verb("tag", tag, order=24), Verb("revert", revert, order=25), Verb("reset", reset, order=26),
)  # fmt: skip
