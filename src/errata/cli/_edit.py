"""The two ways of ``errata edit``: into a file, and into a ledger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from errata.cli import _ledger, checks, common, outputs
from errata.progress import OnProgress

if TYPE_CHECKING:
    from errata.edits import Edit
    from errata.host.host import Host
    from errata.job import Job
    from errata.ledger.recording import Attempt, Recording
    from errata.types import AskOptions, ImageRequest, Request

SHOWN = 20
"""Most requests or changed answers listed of an attempt."""


@dataclass(frozen=True)
class EditCommand:
    """What is to be edited, and how."""

    what: str
    texts: list[Request]
    """Requests about text; empty for pairs of images."""
    subject: str | None
    target: str | None
    method: str
    options: Mapping[str, Any]
    seed: int
    corpus: Path | None
    examples: str | None
    ask: AskOptions
    batch_size: str

    def requests(self, host: Host) -> Sequence[Request | ImageRequest]:
        """Return the requests, pairs of images scaled to the host's input size."""
        return self.texts or _pairs(self.what, host, self.subject, self.target)


@dataclass(frozen=True)
class Opened:
    """Which model is opened and how the outcome is printed."""

    model: str | None
    device: str
    dtype: str
    json: bool


def check_file_options(
    message: str, source: str, author: str, conflicts: str | None, repo: Path | None, *, guard: bool, whole: bool
) -> None:  # fmt: skip
    """Raise ConfigError for options of a ledger where the edit goes into a file."""
    from errata.errors import ConfigError

    given = {
        "-m": message, "--source": source, "--author": author, "--conflicts": conflicts, "--repo": repo,
        "--no-guard": not guard, "--whole": whole,
    }  # fmt: skip
    names = [name for name, value in given.items() if value]
    if names:
        raise ConfigError(f"{', '.join(names)}: for edits in a ledger; leave -o out, or leave these out")


def into_file(
    asked: EditCommand, opened: Opened, output: Path, after: str | None, *, force: bool, strict: bool, dry_run: bool
) -> None:  # fmt: skip
    """Fit an edit and write it to a file; ask the model every request with it."""
    from errata import api
    from errata.edits import Edit
    from errata.errors import ConfigError

    if opened.model is None:
        raise ConfigError("with -o the model has to be named: --model lab, a hub name or a folder")
    repeatable = bool(asked.texts) and not (after or asked.corpus)
    earlier = outputs.earlier_edit(output, force=force, repeatable=repeatable)
    before = Edit.load(after) if after else None
    host = common.open_host(opened.model, opened.device, opened.dtype)
    with common.progress(not (opened.json or dry_run)) as tick:
        job = api.prepare(
            host, asked.requests(host), method=asked.method, options=asked.options, seed=asked.seed, after=before,
            batch_size=asked.batch_size, corpus=asked.corpus, examples=asked.examples, ask=asked.ask,
            on_progress=tick,
        )  # fmt: skip
        outputs.check_repeat(output, earlier, job, asked.options)
        if dry_run:
            _show_job(job, str(output), opened.json)
            return
        edit = job.run()
        path = outputs.save_edit(edit, output, earlier)
        outcome = _outcome(job, edit, tick)
    checks.report(outcome, path, edit, opened.model, json=opened.json, strict=strict)


def _outcome(job: Job, edit: Edit, tick: OnProgress) -> checks.Outcome | checks.Concepts:
    """Measure an edit that was fitted: by answers, by labels of images, or by keys and values of texts."""
    from errata.host.kinds import IMAGES, TEXT_TO_IMAGE

    if job.host.kind == TEXT_TO_IMAGE:
        return checks.concepts(job.host, edit)
    if job.host.kind == IMAGES:
        return checks.images(job.host, edit, job.requests)
    return checks.texts(job.host, edit, tick)


def into_ledger(
    asked: EditCommand, opened: Opened, repo: Path | None, after: str | None, order: Mapping[str, Any], *, force: bool,
    strict: bool, dry_run: bool,
) -> None:  # fmt: skip
    """Fit an edit on top of a ledger's, measure it, and apply it if it keeps the guard's bounds.

    Raises typer.Exit with code 5 if the guard refused any request.
    """
    from errata.errors import ConfigError, LedgerError
    from errata.ledger import folders
    from errata.ledger.recording import Order, record

    if force or strict:
        raise ConfigError("--force and --strict are for edits in files (-o); in a ledger the guard decides")
    try:
        ledger = folders.find(repo)
    except LedgerError as error:
        raise ConfigError(f"{error}, or name a file to write with -o") from error
    digest = None if after is None else ledger.state().find_edit(after).digest
    if digest is not None and digest not in ledger.state().active:
        raise LedgerError(
            f"edit {digest[:12]} is not in place, so nothing can continue it; see errata status"
        )
    with _ledger.open_working(
        ledger,
        device=opened.device,
        dtype=opened.dtype,
        show=not (opened.json or dry_run),
        model=opened.model,
    ) as working:
        full = Order(
            asked.method, asked.options, asked.seed, digest, asked.corpus, asked.examples, asked.ask,
            asked.batch_size, **order,
        )  # fmt: skip
        requests = asked.requests(working.host)
        if dry_run:
            working.show(ledger.state().active)
            job = working.prepare(
                requests, method=asked.method, options=asked.options, seed=asked.seed, after=digest,
                corpus=asked.corpus, examples=asked.examples, ask=asked.ask, batch_size=asked.batch_size,
            )  # fmt: skip
            _show_job(job, str(ledger.folder), opened.json)
            return
        outcome = record(working, requests, full)
    if opened.json:
        common.emit(_document(outcome))
    else:
        _show(outcome)
    if not outcome.passed:
        raise typer.Exit(_ledger.REFUSED)


def _document(outcome: Recording) -> dict[str, Any]:
    from errata.ledger.recording import request_dict

    return {
        "passed": outcome.passed,
        "attempts": [
            {"edit": a.edit, "applied": a.applied, "replaces": list(a.replaced),
             "requests": [request_dict(r) for r in a.requests],
             **({} if a.verdict is None else a.verdict.to_dict())} for a in outcome.attempts
        ],
        "failed": [request_dict(r) for r in outcome.failed],
        "conflicts": [one.to_dict() for one in outcome.conflicts],
    }  # fmt: skip


def _show(outcome: Recording) -> None:
    for one in outcome.conflicts:
        print(f"conflict: {one}")
    for attempt in outcome.attempts:
        _show_attempt(attempt)
    total = sum(len(a.requests) for a in outcome.applied)
    if outcome.failed:
        names = [_ledger.requests_line([_plain(one)]) for one in outcome.failed]
        more = f"\n  and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        print("not applied:\n  " + "\n  ".join(names[:SHOWN]) + more)
    print(f"{total} of {total + len(outcome.failed)} requests applied; the model's own files are unchanged")


def _show_attempt(attempt: Attempt) -> None:
    verdict = attempt.verdict
    word = common.mark("applied", "green") if attempt.applied else common.mark("refused", "red")
    line = _ledger.requests_line([_plain(one) for one in attempt.requests])
    print(f"edit {attempt.edit[:12]} {word}: {line}")
    if verdict is None:
        return
    rows = _ledger.measured_rows(verdict.to_dict())
    failed = {failure.split(":")[0] for failure in verdict.failures}
    common.table(
        None, ("measured", "", "bound", ""), [(*row, "out of bounds" if row[0] in failed else "") for row in rows],
        right=(1,),
    )  # fmt: skip
    changed = verdict.measured.changed
    if changed:
        common.table(
            "answers that changed", ("", "prompt", "before", "after"),
            [(c["kind"], c["prompt"], c["before"], c["after"]) for c in changed[:SHOWN]],
        )  # fmt: skip


def _plain(request: Request | ImageRequest) -> dict[str, Any]:
    from errata.ledger.recording import request_dict

    return request_dict(request)


def _pairs(what: str, host: Host, subject: str | None, target: str | None) -> list[ImageRequest]:
    """Read pairs of images, scaled to the host's input size; an empty list for a host that takes no images.

    ``target`` names what the original images show, ``subject`` what the changed ones show.
    """
    from errata.data.images import read_pairs
    from errata.host.images import ImageHost

    if not isinstance(host, ImageHost):
        return []
    concept, replacement = target or "original", subject or "changed"
    return [
        read_pairs(what, size=host.size, channels=host.channels, concept=concept, replacement=replacement)
    ]


def _show_job(job: Job, output: str, json: bool) -> None:
    """Print what a fit would do."""
    document = job.to_dict()
    if json:
        common.emit({"dry_run": True, **document, "output": output})
        return
    rows = [(name, value) for name, value in document.items() if name not in ("settings", "prompt_format")]
    rows += [(name, value) for name, value in document["prompt_format"].items() if value is not None]
    rows += [
        (name, "chosen for the model" if value is None else value)
        for name, value in document["settings"].items()
    ]
    common.table("job", ("", "value"), rows)
    print(
        f"{document['requests']} requests and all settings are valid; {document['method']} would write "
        f"{output} (dry run: nothing was fitted or written)"
    )
