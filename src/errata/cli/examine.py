"""errata diff, blame, bisect, check, merge: questions about a ledger that its model has to answer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from errata.cli import _ledger, common
from errata.cli._verb import Verb


def diff(
    revisions: Annotated[
        str, typer.Argument(metavar="A..B", help="Two revisions: tags, edits, events, base, now; A alone: A..now.")
    ] = "base..now",
    repo: _ledger.Repo = None, device: common.Device = "auto", dtype: common.Dtype = "auto",
    json: common.Json = False,
) -> None:  # fmt: skip
    """Show which answers change between two revisions: to all requests, and to what guards saw change."""
    from errata.ledger import folders, inspecting
    from errata.ledger.state import BASE, NOW

    ledger = folders.find(repo)
    first, _, second = revisions.partition("..")
    pair = ledger.active_at(first or BASE), ledger.active_at(second or NOW)
    with _ledger.open_working(ledger, device=device, dtype=dtype, show=not json) as working:
        rows, asked = inspecting.diff(working, *pair)
    if json:
        common.emit({"asked": asked, "differences": [one.to_dict() for one in rows]})
        return
    if rows:
        common.table(
            None, ("prompt", first or BASE, second or NOW, "recorded as", "edit"),
            [(one.prompt, one.first, one.second, one.kind, one.edit[:12]) for one in rows],
        )  # fmt: skip
    print(f"{len(rows)} of {asked} recorded prompts are answered differently")


def blame(
    prompt: Annotated[str, typer.Argument(help="A prompt whose answer is in question.")],
    most: Annotated[
        int, typer.Option(min=1, help="Edits to leave out in turn: those that move the model most at this prompt.")
    ] = 16,
    repo: _ledger.Repo = None, device: common.Device = "auto", dtype: common.Dtype = "auto",
    json: common.Json = False,
) -> None:  # fmt: skip
    """Find which edit makes the model answer a prompt as it does, by leaving out one edit at a time."""
    from dataclasses import asdict

    from errata.ledger import folders, inspecting

    ledger = folders.find(repo)
    with _ledger.open_working(ledger, device=device, dtype=dtype, show=not json) as working:
        found = inspecting.blame(working, prompt, most=most)
    if json:
        common.emit({**asdict(found), "together": found.together})
        return
    print(f"without edits: {found.base}")
    print(f"now:           {found.answer}")
    state = ledger.state()
    rows = [
        (common.mark("to blame", "red") if one.to_blame else "", one.edit[:12], f"{one.strength:.3f}",
         "" if one.answer is None else one.answer, "" if one.change is None else f"{one.change:+.2f}",
         _ledger.requests_line(state.edits[one.edit].requests))
        for one in found.suspects
    ]  # fmt: skip
    if rows:
        columns = ("", "edit", "moves", "answer without it", "nats", "first request")
        common.table(None, columns, rows, right=(2, 4))
    if found.together:
        print("no single edit is to blame: several have the same answer; see the column of nats")


def bisect(
    check: Annotated[Path, typer.Option("--check", help="Requests whose targets the model has to answer.")],
    repo: _ledger.Repo = None, device: common.Device = "auto", dtype: common.Dtype = "auto",
    json: common.Json = False,
) -> None:  # fmt: skip
    """Find the edit that broke some answers: the first, in the order in place, with which one of them fails.

    Exit code 1 where the model fails without any edit already.
    """
    from dataclasses import asdict

    from errata.data.requests import read_requests
    from errata.ledger import folders, inspecting

    ledger = folders.find(repo)
    requests = read_requests(str(check))
    with _ledger.open_working(ledger, device=device, dtype=dtype, show=not json) as working:
        found = inspecting.bisect(working, requests)
    if json:
        common.emit(asdict(found))
    elif found.edit is not None:
        one = ledger.state().edits[found.edit]
        print(f"first failing with edit {one.short}: {_ledger.requests_line(one.requests)}")
        print(f"by {one.event.author}, {one.event.created}: {one.event.reason or 'no reason given'}")
        print(f"fails: {', '.join(found.failing)}; {found.asked} states asked")
    elif found.base_passes:
        print(f"all {len(requests)} requests are answered with their target; nothing is broken")
    else:
        print(f"the model without edits fails already: {', '.join(found.failing)}; no edit is the cause")
    if not found.base_passes:
        raise typer.Exit(1)


def check(
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="More requests whose targets have to be answered.")
    ] = None,
    repo: _ledger.Repo = None, device: common.Device = "auto", dtype: common.Dtype = "auto",
    json: common.Json = False,
) -> None:  # fmt: skip
    """Check a ledger: files and hashes, requests of the edits in place, canaries; exit code 1 on failure.

    Made for continuous integration: nothing is written, and every failure is listed.
    """
    from dataclasses import asdict

    from errata.data.requests import read_requests
    from errata.ledger import folders, inspecting
    from errata.ledger.recording import guard_of

    ledger = folders.find(repo)
    given = read_requests(str(file)) if file else []
    with _ledger.open_working(ledger, device=device, dtype=dtype, show=not json) as working:
        found = inspecting.check(working, given, guard_of(working))
    if json:
        common.emit({**asdict(found), "passed": found.passed})
    else:
        if found.failures:
            common.table(
                None, ("", "prompt", "expected", "found", "edit"),
                [(f["kind"], f["prompt"], f["expected"], f["found"], f["edit"][:12]) for f in found.failures],
            )  # fmt: skip
        asked = f"{found.requests} requests, {found.canaries} canaries, {found.given} given"
        print(f"{asked}: {len(found.failures) or 'no'} failures")
    if not found.passed:
        raise typer.Exit(1)


def merge(
    other: Annotated[Path, typer.Argument(metavar="OTHER", help="Folder of another ledger of the same model.")],
    message: _ledger.Reason = "", author: _ledger.Author = "", conflicts: _ledger.Conflicts = None,
    guard: _ledger.GuardSwitch = True, repo: _ledger.Repo = None, device: common.Device = "auto",
    dtype: common.Dtype = "auto", json: common.Json = False,
) -> None:  # fmt: skip
    """Bring in the edits that another ledger has in place, each measured as a new edit is.

    Requests that contradict or repeat those of edits in place are reported with both ids, and so are requests in other
    words with nearly the same key. Exit code 5 if the guard refused one.
    """
    from errata.ledger import folders, merging
    from errata.ledger.recording import Order

    ledger, theirs = folders.find(repo), folders.find(other)
    order = Order("", reason=message, author=author, guard=guard, conflicts=_ledger.policy(conflicts))
    with _ledger.open_working(ledger, device=device, dtype=dtype, show=not json) as working:
        outcome = merging.merge(working, theirs, order)
    if json:
        common.emit(_merge_document(outcome))
    else:
        for one in outcome.conflicts:
            print(f"conflict: {one}")
        rows = [
            (a.edit[:12], "applied" if a.applied else "refused",
             "" if a.verdict is None else "; ".join(a.verdict.failures))
            for a in outcome.attempts
        ]  # fmt: skip
        if rows:
            common.table(None, ("edit", "", "out of bounds"), rows)
        count = sum(a.applied for a in outcome.attempts)
        print(f"{count} of {len(outcome.attempts)} edits applied, {len(outcome.known)} were in place already")
    if not outcome.passed:
        raise typer.Exit(_ledger.REFUSED)


def _merge_document(outcome: Any) -> dict[str, Any]:
    return {
        "edits": [
            {"edit": a.edit, "applied": a.applied, **({} if a.verdict is None else a.verdict.to_dict())}
            for a in outcome.attempts
        ],
        "known": list(outcome.known),
        "conflicts": [one.to_dict() for one in outcome.conflicts],
    }


VERBS = (
    Verb("diff", diff, order=23), Verb("blame", blame, order=27), Verb("bisect", bisect, order=28),
    Verb("check", check, order=28), Verb("merge", merge, order=29),
)  # fmt: skip
