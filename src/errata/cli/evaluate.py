"""errata eval: evaluate a method or an edit on cases."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from errata.cli import common, outputs
from errata.cli._verb import Verb

if TYPE_CHECKING:
    from errata.bench.evaluate import Report
    from errata.edits import Edit
    from errata.evaluation.metrics import Metric

ScheduleName = Annotated[
    str,
    typer.Option(
        help="single: one case at a time, undone after each; batch:N: N cases per fit, undone; sequential:N: N cases "
        "per fit, edits accumulate."
    ),
]
Checkpoints = Annotated[
    str | None,
    typer.Option(
        "--at",
        help="Evaluate after these numbers of edits (sequential only): 10,50,100, each, every:N, decades or end.",
    ),
]
Kinds = Annotated[
    str | None, typer.Option("--probes", help="Kinds of probes to ask: efficacy,paraphrase; default: all.")
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", help="Also write the JSON document here; sequential: at every checkpoint."
    ),
]
KeepEdit = Annotated[
    Path | None, typer.Option("--keep-edit", help="Sequential: write the edit here at every checkpoint.")
]
RunFolder = Annotated[
    Path | None,
    typer.Option(
        "--run-folder", help="Save the run in this folder, or continue it there; default: a temporary one."
    ),
]
After = Annotated[
    Path | None, typer.Option("--after", help="Sequential: continue from this edit of the first cases.")
]

ThinkingMode = Annotated[
    str | None,
    typer.Option(
        "--thinking",
        help="Whether the model thinks before short answers: on, off, or forced: for --thought-tokens at most.",
    ),
]
ThinkingTemplate = Annotated[
    str | None,
    typer.Option(
        help=r"For a model without a chat template: a text with {prompt} and an open block, '{prompt}\n<think>\n'."
    ),
]
ThoughtTokens = Annotated[
    int | None, typer.Option(help="Longest thoughts and chains of thought, in tokens; 200 by default.", min=1)
]


def command(
    cases: Annotated[str, typer.Option(help="A file, a dataset such as zsre/true:100, lab:N, or lab:N:SEED.")],
    model: common.Model = "lab",
    method: Annotated[str | None, typer.Option(help="The method to evaluate; see: errata methods.")] = None,
    edit: Annotated[
        list[Path] | None,
        typer.Option("--edit", "-e", help="Evaluate this saved edit on all cases; repeatable: applied together."),
    ] = None,
    schedule: ScheduleName = "single", at: Checkpoints = None, probes: Kinds = None,
    template: common.TemplateName = None, chat: common.Chat = False, system: common.System = None,
    thinking: ThinkingMode = None, thinking_template: ThinkingTemplate = None, thought_tokens: ThoughtTokens = None,
    join: common.JoinName = None, settings: common.Settings = None,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum number of tokens of a short answer.")] = 24,
    corpus: common.CorpusFile = None, examples: common.Examples = None, force: common.Force = False,
    output: Output = None, keep_edit: KeepEdit = None, after: After = None, run_folder: RunFolder = None,
    device: common.Device = "auto", dtype: common.Dtype = "auto", seed: common.Seed = 0, json: common.Json = False,
) -> None:  # fmt: skip
    """Evaluate a method, or saved edits: ask every probe before and after, then undo the edit.

    An evaluation is a benchmark run of one cell; --run-folder saves it, for errata report. The same command with
    the same folder continues an interrupted evaluation.
    """
    from errata import config as configs
    from errata.bench.evaluate import evaluate
    from errata.bench.schedule import Schedule
    from errata.edits import Edit
    from errata.errors import ConfigError

    if (method is None) == (not edit):
        raise ConfigError("errata eval takes either --method or --edit")
    options = configs.parse_assignments(settings or [])
    parsed = Schedule.parse(schedule)
    _check_outputs(output, keep_edit, force=force or keep_edit == after, run_folder=run_folder)
    edits = [Edit.load(path) for path in edit or []]
    earlier = Edit.load(after) if after else None
    ask = common.ask_options(
        template, system, thinking, join, chat=chat, max_new_tokens=max_new_tokens, evaluating=True,
        thinking_template=thinking_template, thought_tokens=thought_tokens,
    )  # fmt: skip
    source = common.read_cases(cases, seed, together=parsed.together)
    host = common.open_host(model, device, dtype)
    keep = _keeper(output, keep_edit) if keep_edit or (output and parsed.kind == "sequential") else None
    with _hint(run_folder), common.progress(not json) as tick:
        report = evaluate(
            host, source, method=method, edit=edits or None, options=options, seed=seed, schedule=parsed, at=at,
            probes=[kind.strip() for kind in probes.split(",")] if probes else None, after=earlier,
            keep=keep, ask=ask, corpus=corpus, examples=examples, run_folder=run_folder, on_progress=tick,
        )  # fmt: skip
    document = report.to_dict()
    if output is not None:
        _write(output, document)
    if keep_edit is not None and not keep_edit.exists():
        print(
            f"warning: {keep_edit} not written: {run_folder} is finished and was saved without its edit",
            file=sys.stderr,
        )
    if json:
        common.emit(document)
    else:
        show(report)


def _check_outputs(
    output: Path | None, keep_edit: Path | None, *, force: bool, run_folder: Path | None
) -> None:
    """Raise EditError for files that cannot be written, or exist; a resumed sequence may write its edit again."""
    from errata.bench import eval_folder

    if output is not None:
        outputs.check_report_name(output)
    if keep_edit is not None:
        resumes = run_folder is not None and eval_folder.exists(run_folder)
        outputs.check_new_edit(keep_edit, force=force or resumes)


@contextmanager
def _hint(run_folder: Path | None) -> Iterator[None]:
    """Add to the message of an interruption how to continue."""
    try:
        yield
    except KeyboardInterrupt:
        if run_folder is None:
            raise
        raise KeyboardInterrupt("completed cases are saved; repeat the command to continue") from None


def _keeper(output: Path | None, keep_edit: Path | None) -> Any:
    """Return a callback that writes the edit and the report so far; the edit first, as it is costlier to make again."""

    def keep(report: Report, edit: Edit) -> None:
        if keep_edit is not None:
            edit.save(keep_edit)
        if output is not None:
            _write(output, report.to_dict())

    return keep


def _write(path: Path, document: dict[str, Any]) -> None:
    from errata.bench.results import write_report

    write_report(path, document)


def show(report: Report) -> None:
    """Print the summary as a table, a column for each metric; of a sequence, a line for each checkpoint."""
    meta = report.meta
    sequence = str(meta["schedule"]).startswith("sequential")
    if sequence:
        _show_checkpoints(report)
    else:
        _show_kinds(report)
    scores = meta["rome_scores"]
    if scores:
        print("probability scores in per cent: " + "  ".join(f"{k} {v:.1f}" for k, v in scores.items()))
    if report.checkpoints and not sequence:
        points = report.checkpoints
        mean = sum(point.perplexity_after for point in points) / len(points)
        before = points[0].perplexity_before
        print(f"perplexity of neutral text: {before:.2f} -> {mean:.2f}, mean over batches")
        drifts = [point.routing_drift for point in points if point.routing_drift is not None]
        if drifts:
            print(
                f"routing drift on neutral text: {100 * sum(drifts) / len(drifts):.1f} % of tokens and layers, "
                "mean over batches"
            )
    print(
        f"{meta['seconds']:.1f} s, {meta['cpu_seconds']:.1f} CPU s, peak {meta['peak_memory_mb']:.0f} MB; "
        f"per case: fit {meta['fit_seconds_per_case']:.2f} s, evaluation {meta['observe_seconds_per_case']:.2f} s; "
        f"weights {'restored bit-identically' if meta['weights_restored'] else 'NOT RESTORED'}"
    )


def _show_kinds(report: Report) -> None:
    from errata.evaluation.metrics import REGISTRY, metric_of

    kinds: dict[str, dict[str, Any]] = {}
    for key, entry in report.summary.items():
        kind, _, name = key.rpartition(".")
        kinds.setdefault(kind, {})[name] = entry
    measured = {name for entries in kinds.values() for name in entries}
    metrics = [metric for metric in REGISTRY.values() if metric.name in measured]
    metrics += [metric_of(name) for name in sorted(measured - set(REGISTRY.names()))]
    rows = [
        [
            kind,
            str(max(entry["n"] for entry in entries.values())),
            *(_number(entries.get(metric.name), metric) for metric in metrics),
        ]
        for kind, entries in kinds.items()
    ]
    meta = report.meta
    how = f", {meta['schedule']}" if report.checkpoints else ""
    title = f"{meta['method']} on {meta['cases']} cases{how}, {meta['host']}: before -> after [95 % interval]"
    columns = ("probe", "n", *(metric.label_and_unit for metric in metrics))
    right = (1, *(place for place, metric in enumerate(metrics, 2) if metric.compares))
    common.table(title, columns, rows, right=right)


def _show_checkpoints(report: Report) -> None:
    from errata.evaluation.metrics import headline_metric
    from errata.types import KINDS

    points, metric = report.checkpoints, headline_metric()
    kinds = {
        f"{kind.name}.{metric.name}": kind.short_label + (" kept" if kind.group == "kept" else "")
        for kind in KINDS.values()
        if kind.main and any(f"{kind.name}.{metric.name}" in point.summary for point in points)
    }
    rows = []
    for point in points:
        shares = [point.summary.get(key, {}).get("after") for key in kinds]
        rows.append([
            point.edits,
            *("-" if share is None else f"{share:.3f}" for share in (*shares, point.last_batch_efficacy)),
            f"{point.perplexity_before:.2f} -> {point.perplexity_after:.2f}",
            "-" if point.norm is None else f"{point.norm:.3g}",
            f"{point.fit_seconds:.1f}",
            *([] if point.routing_drift is None else [f"{100 * point.routing_drift:.1f} %"]),
        ])  # fmt: skip
    meta = report.meta
    title = f"{meta['method']} on {meta['cases']} cases, {meta['schedule']}, {meta['host']}: {metric.title}"
    columns = ["edits", *kinds.values(), "last batch", "perplexity", "norm of the edit", "fit, s"]
    columns += [] if points[0].routing_drift is None else ["routing drift"]
    common.table(title, columns, rows, right=range(len(columns)))


def _number(entry: dict[str, Any] | None, metric: Metric) -> str:
    """Format a summary's entry: before -> after [95 % interval], or one number if the metric compares the two."""
    if entry is None:
        return ""
    if metric.compares:
        return "" if entry["after"] is None else f"{entry['after']:.4f}"
    before = "-" if entry["before"] is None else f"{entry['before']:.3f}"
    if entry["after"] is None:
        return f"{before} -> -"
    low, high = entry["ci"]
    interval = "" if low is None else f" [{low:.2f}, {high:.2f}]"
    return f"{before} -> {entry['after']:.3f}{interval}"


VERB = Verb("eval", command, order=30)
