"""errata eval: measure a method or an edit on cases."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from errata.cli import common

if TYPE_CHECKING:
    from errata.bench.runner import Report


def command(
    cases: Annotated[str, typer.Option(help="A file of cases, or lab:N for N cases of the lab's world.")],
    model: common.Model = "lab",
    method: Annotated[str | None, typer.Option(help="Fit this method anew for each case.")] = None,
    edit: Annotated[Path | None, typer.Option("--edit", "-e", help="Measure this edit on all cases.")] = None,
    settings: common.Settings = None,
    corpus: common.CorpusFile = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the JSON document here.")] = None,
    device: common.Device = "auto",
    dtype: common.Dtype = "auto",
    seed: common.Seed = 0,
    json: common.Json = False,
) -> None:  # fmt: skip
    """Measure a method (edit, observe, take back, case by case) or one edit, before and after."""
    from errata import api
    from errata import config as configs
    from errata.edits import Edit
    from errata.edits.format import check_writable
    from errata.errors import ConfigError

    if (method is None) == (edit is None):
        raise ConfigError("errata eval takes either --method or --edit")
    options = configs.parse_assignments(settings or [])
    if output is not None:
        check_writable(output)
    given = Edit.load(edit) if edit else None
    table = common.read_cases(cases, seed)
    host = common.open_host(model, device, dtype)
    with common.progress(not json) as tick:
        report = api.evaluate(
            host, table, method=method, edit=given, seed=seed, corpus=corpus, on_progress=tick, **options
        )
    document = report.to_dict()
    if output is not None:
        _write(output, document)
    if json:
        common.emit(document)
    else:
        show(report)


def _write(path: Path, document: dict[str, Any]) -> None:
    from errata.bench.results import write_report

    write_report(path, document)


def show(report: Report) -> None:
    """Print the summary as a table, protocols as columns of their own."""
    kinds: dict[str, dict[str, Any]] = {}
    for key, entry in report.summary.items():
        kind, _, protocol = key.rpartition(".")
        kinds.setdefault(kind, {})[protocol] = entry
    protocols = ("generate", "teacher_forced", "probability")
    rows = []
    for kind, found in kinds.items():
        cells = [kind, str(max(e["n"] for e in found.values()))]
        for protocol in protocols:
            cells.append(_span(found.get(protocol)))
        kl = found.get("kl")
        cells.append(f"{kl['after']:.4f}" if kl and kl["after"] is not None else "")
        rows.append(cells)
    meta = report.meta
    title = f"{meta['method']} on {meta['cases']} cases, {meta['host']}: before > after [95 % interval]"
    common.table(
        title, ("probe", "n", "generate", "teacher-forced", "probability", "KL, nats"), rows, right=(1, 5)
    )
    scores = meta["rome_scores"]
    if scores:
        print("probability scores in per cent: " + "  ".join(f"{k} {v:.1f}" for k, v in scores.items()))
    print(
        f"{meta['seconds']:.1f} s, {meta['cpu_seconds']:.1f} CPU s, peak {meta['peak_memory_mb']:.0f} MB; "
        f"fit {meta['fit_seconds_per_case']:.2f} s and observe {meta['observe_seconds_per_case']:.2f} s a case; "
        f"weights {'restored bit-identically' if meta['weights_restored'] else 'NOT RESTORED'}"
    )


def _span(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return ""
    before = "-" if entry["before"] is None else f"{entry['before']:.3f}"
    if entry["after"] is None:
        return f"{before} > -"
    low, high = entry["ci"]
    return f"{before} > {entry['after']:.3f} [{low:.2f}, {high:.2f}]"
