"""errata data: list, check, show, export and download datasets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from errata.cli import common, outputs
from errata.cli._verb import Verb

if TYPE_CHECKING:
    from errata.data._base import Dataset
    from errata.data.checking import Check, Fault
    from errata.types import Case, Probe

SHOWN = 10
"""Maximum number of omitted rows that a table lists."""

app = typer.Typer(no_args_is_help=True, help="Datasets: list, check, show, export, fetch.")

SourceName = Annotated[
    str,
    typer.Argument(
        help="NAME, NAME/VARIANT, a file, or NAME/VARIANT@FILE; append :N for the first N cases. "
        "lab:N: N cases of the lab's world, lab:N:SEED: drawn with that seed."
    ),
]


@app.command("list")
def list_(json: common.Json = False) -> None:
    """List the datasets: variants, paper, licence, source, and whether each is in the data folder."""
    from errata.data import fetching
    from errata.data.sets import REGISTRY

    entries = [REGISTRY.get(name) for name in REGISTRY]
    folder = fetching.data_folder()
    if json:
        datasets = [
            {
                "name": entry.name, "title": entry.title, "variants": list(entry.variants),
                "paper": entry.paper, "licence": entry.licence, "home": entry.home,
                "files": {
                    variant: {
                        "path": str(folder / fetching.file_name(entry, variant)),
                        "here": (folder / fetching.file_name(entry, variant)).is_file(),
                        "fetched_from": fetching.origin(entry, variant),
                    }
                    for variant in entry.variants
                },
            }
            for entry in entries
        ]  # fmt: skip
        common.emit({"folder": str(folder), "datasets": datasets})
        return
    rows = []
    for entry in entries:
        here = [v for v in entry.variants if (folder / fetching.file_name(entry, v)).is_file()]
        name = "\n".join([entry.name, *(f"  /{variant}" for variant in entry.variants if variant)])
        state = "" if not here else "yes" if len(here) == len(entry.variants) else f"{len(here)} variants"
        rows.append((name, entry.paper, entry.licence, _way(entry), state))
    common.table(f"data folder: {folder}", ("dataset", "paper", "licence", "source", "here"), rows)
    print(
        "the first variant is the default; lab:N is N cases of the lab's world, lab:N:SEED drawn with that seed"
    )


def _way(entry: Dataset) -> str:
    from errata.data import fetching

    fetched = any(fetching.origin(entry, variant) for variant in entry.variants)
    return f"errata data fetch {entry.name}" if fetched else entry.home


@app.command("check")
def check(
    source: SourceName,
    dataset: Annotated[
        str | None, typer.Option(help="Read the file as this dataset, NAME or NAME/VARIANT; default: recognised.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="List every omitted row, not only the first ten.")] = False,
    json: common.Json = False,
) -> None:  # fmt: skip
    """Report what a dataset's file holds: counts, duplicates, conflicts, and omitted rows with the reason.

    Exit code 0, even if rows were omitted; 1 if the file is truncated (only its beginning is read) or no row has the
    dataset's schema; 2 if it cannot be read.
    """
    from errata.bench.sources import is_lab
    from errata.data import reading
    from errata.errors import ConfigError

    if is_lab(source):
        raise ConfigError(
            f"{source} is generated from the lab's world, so there is no file to check; see: errata data show {source}"
        )
    report = reading.check(f"{dataset}@{source}" if dataset else source)
    if json:
        common.emit(report.to_dict())
    else:
        _show_check(report, every)
    if report.broken is not None or report.unusable:
        raise typer.Exit(1)


def _show_check(report: Check, every: bool) -> None:
    rows: list[tuple[str, Any]] = [
        ("file", report.path),
        ("sha256", report.sha256),
        ("rows", report.rows if report.limit is None else f"{report.rows}, up to case {report.limit}"),
        ("cases", report.cases if report.no_cases is None else f"none: {report.no_cases}"),
        ("requests", f"{report.requests}, {report.prompts} distinct prompts"),
        ("probes", _counts(report.probes)),
        ("duplicates", f"{report.duplicates} requests with the prompt, subject and target of an earlier one"),
        ("conflicts", _conflicts(report)),
        ("subject not in the prompt", f"{report.subject_absent} rows, omitted"),
        ("skipped", f"{len(report.skipped)} rows"),
        ("malformed", f"{len(report.malformed)} rows"),
    ]
    if report.subject_is_prompt:
        rows.append(("whole prompt as subject", f"{report.subject_is_prompt} requests"))
    if report.renamed:
        rows.append(("renamed", f"{report.renamed} cases whose name was already taken"))
    rows += [
        (name, _counts(value) if isinstance(value, dict) else value) for name, value in report.facts.items()
    ]
    common.table(report.name, ("", "value"), rows)
    _show_faults("malformed rows", report.malformed, every)
    _show_faults("skipped rows", report.skipped, every)
    if report.broken is not None:
        print(f"BROKEN: {report.broken}")
    if report.unusable:
        print(f"UNUSABLE: no row has the schema of {report.name}; name another dataset, NAME@PATH")


def _counts(counts: Any) -> str:
    return ", ".join(f"{name} {number}" for name, number in counts.items()) or "none"


def _conflicts(report: Check) -> str:
    conflicts = report.conflicts
    text = f"{conflicts.prompts} prompts with different targets, in {conflicts.cases} cases"
    return text + (f": {', '.join(conflicts.examples[:5])} ..." if conflicts.cases else "")


def _show_faults(title: str, faults: Sequence[Fault], every: bool) -> None:
    if not faults:
        return
    listed_faults = faults if every else faults[:SHOWN]
    more = (
        f", the first {len(listed_faults)} of {len(faults)}; --all lists every one"
        if len(listed_faults) < len(faults)
        else ""
    )
    common.table(title + more, ("where", "reason"), [(fault.where, fault.reason) for fault in listed_faults])


@app.command("show")
def show(
    source: SourceName,
    name: Annotated[str, typer.Option("--case", help="Its name, or its number counted from 1.")] = "1",
    json: common.Json = False,
) -> None:
    """Show one case: its requests and its probes."""
    from dataclasses import asdict

    case = _case(source, name)
    if json:
        common.emit(asdict(case))
        return
    requests = [(r.text, r.subject, r.target, r.target_old or "") for r in case.requests]
    common.table(case.id, ("prompt", "subject", "target", "old target"), requests)
    common.table(
        f"{len(case.probes)} probes", ("kind", "prompt", "answers", "before", "rival"),
        [(_kind(p), p.prompt, _answers(p), _before(p), p.rival or "") for p in case.probes],
    )  # fmt: skip


def _case(source: str, name: str) -> Case:
    """Return a case by name or number, reading no further than needed."""
    from errata.bench.sources import is_lab
    from errata.data import reading
    from errata.errors import DataError

    cases = common.read_cases(source, 0) if is_lab(source) else reading.iterate(source)
    number = 0
    for number, case in enumerate(cases, 1):
        if name in (case.id, str(number)):
            return case
    if not number:
        check = reading.check(source)
        why = check.no_cases or next(
            (f"{fault.where}: {fault.reason}" for fault in check.malformed), "no rows"
        )
        raise DataError(f"{source} is {check.name} and holds no cases: {why}")
    raise DataError(f"{source} has no case {name!r}: expected a number from 1 to {number}, or a case's name")


def _kind(probe: Probe) -> str:
    notes = [probe.form] if probe.form != "short" else []
    if probe.group is not None:
        notes.append(f"{probe.need} of {probe.group}")
    return probe.kind + (f"\n({', '.join(notes)})" if notes else "")


def _answers(probe: Probe) -> str:
    """Format the accepted answers, for a multiple-choice probe with all options."""
    return _few(probe.answers) + (f"\nof: {' | '.join(probe.choices)}" if probe.choices else "")


def _before(probe: Probe) -> str:
    return "the same" if not probe.changes else _few(probe.before) or "unknown"


def _few(answers: Sequence[str]) -> str:
    """Join the first spellings of an answer."""
    more = f" | and {len(answers) - 3} more" if len(answers) > 3 else ""
    return " | ".join(answers[:3]) + more


@app.command("export")
def export(
    source: SourceName,
    file: Annotated[Path, typer.Argument(help="Where to write the cases, FILE.jsonl.")],
    force: common.Force = False,
    json: common.Json = False,
) -> None:  # fmt: skip
    """Write the cases of a source, or of lab:N, to a JSONL file that can be edited.

    Every command that takes cases reads it, as FILE or cases@FILE, and gets the same cases.
    """
    from errata.bench import sources
    from errata.data import fetching
    from errata.data.requests import check_target, write_cases

    check_target(file)
    if not force:
        outputs.check_new(file)
    cases, facts = sources.read(source)
    count = write_cases(file, cases)
    probes = sum(len(case.probes) for case in cases)
    omitted = len(facts["check"].get("skipped", ())) + len(facts["check"].get("malformed", ()))
    if json:
        sha = fetching.sha256(file)
        common.emit({"path": str(file), "sha256": sha, "cases": count, "probes": probes, "left_out": omitted})
        return
    print(f"{file}: {count} cases, {probes} probes")
    if omitted:
        print(f"{omitted} rows of {source} were omitted; see: errata data check {source}")


@app.command("fetch")
def fetch(
    name: Annotated[str, typer.Argument(help="NAME or NAME/VARIANT; without a variant, all of them.")],
    revision: Annotated[
        str | None,
        typer.Option(help="Commit or branch on the hub; default: the newest, pinned at the first download."),
    ] = None,
    json: common.Json = False,
) -> None:  # fmt: skip
    """Download a dataset into the data folder, with a lock file that later reads are checked against."""
    from dataclasses import asdict

    from errata.data import fetching, reading

    with common.progress(not json) as tick:
        paths = reading.fetch(name, revision=revision, tick=tick)
    locks = [(path, fetching.read_lock(path)) for path in paths]
    if json:
        common.emit([{"path": str(path), **(asdict(lock) if lock else {})} for path, lock in locks])
        return
    rows = [
        (path, common.size(path), lock.source, lock.commit or "", lock.sha256) for path, lock in locks if lock
    ]
    common.table(None, ("file", "size", "from", "commit", "sha256"), rows)


VERB = Verb("data", app, order=130)
