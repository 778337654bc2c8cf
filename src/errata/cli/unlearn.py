"""errata unlearn: make a model forget answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from errata.cli import common, outputs
from errata.cli._verb import Verb

if TYPE_CHECKING:
    from errata.bench.forgetting import Task
    from errata.bench.unlearning import Audit, Recall
    from errata.types import Request

UNKNOWN = "unknown"
"""Target of a request that only forgets; no unlearning method trains it."""

What = Annotated[
    str,
    typer.Argument(
        metavar="PROMPT|FILE",
        help="A prompt with {} for the subject, a file of requests to forget, or lab:forget:N.",
    ),
]
Output = Annotated[Path, typer.Option("--output", "-o", help="Where to write the edit (.safetensors).")]
SubjectName = Annotated[str | None, typer.Option(help="The subject, spelled as in the prompt.")]
AnswerText = Annotated[
    str | None, typer.Option(help="The answer to forget; default: what the model answers now.")
]
MethodName = Annotated[
    str,
    typer.Option(
        help="npo, simnpo, gradient_difference, gradient_ascent, rmu, elm, unsir ...; see errata methods."
    ),
]
Keep = Annotated[
    Path | None,
    typer.Option(help="File of requests whose target is to be answered as before; only measured."),
]
Attacks = Annotated[
    bool, typer.Option("--attacks", help="Also ask after rounding the weights, and after relearning half.")
]
Outsiders = Annotated[
    Path | None,
    typer.Option(
        help="File of requests that nobody was taught, target included: privacy leakage beside --reference."
    ),
]
Reference = Annotated[
    str | None,
    typer.Option(
        help="A model trained without the answers, for forget quality: see errata lab train --without."
    ),
]


def command(
    what: What, model: common.Model, output: Output,
    subject: SubjectName = None, answer: AnswerText = None, method: MethodName = "npo",
    settings: common.Settings = None, keep: Keep = None, attacks: Attacks = False, reference: Reference = None,
    outsiders: Outsiders = None, corpus: common.CorpusFile = None,
    force: common.Force = False, dry_run: common.DryRun = False,
    device: common.Device = "auto", dtype: common.Dtype = "auto", seed: common.Seed = 0, json: common.Json = False,
) -> None:  # fmt: skip
    """Make a model forget answers: an edit in a file, and how much is left of them.

    Of a request in a file the old target is forgotten, or where it has none what the model answers now. The target is
    recorded and not trained. The result is a weight edit like any other: it is applied, combined, exported, reverted.

    Texts of --corpus are retained, less those that name a subject; default: the model's own corpus, or text that it
    writes. Printed: the share of the old answers that are still given and their probability, without and with the edit.
    """
    from errata import api
    from errata import config as configs
    from errata.bench.unlearning import audit
    from errata.errors import ConfigError
    from errata.methods import REGISTRY

    outputs.check_new_edit(output, force=force)
    entry, options = REGISTRY.get(method), configs.parse_assignments(settings or [])
    if not entry.forgets:
        able = [name for name in REGISTRY if REGISTRY.get(name).forgets]
        raise ConfigError(
            f"{method} makes a model give answers; methods that make it forget: {', '.join(able)}"
        )
    config = configs.make(entry.config, options, method)
    if outsiders is not None and reference is None:
        raise ConfigError("--outsiders is for privacy leakage, which needs a --reference beside it")
    task = _task(what, subject, answer, keep, outsiders)
    host = common.open_text_host(model, device, dtype)
    other = None if reference is None else common.open_text_host(reference, device, dtype)
    with common.progress(not (json or dry_run)) as tick:
        job = api.prepare(
            host, task.requests, method=method, options=config, seed=seed, corpus=corpus, on_progress=tick
        )
        if dry_run:
            common.show_dry(job.to_dict(), common.counted(len(task.requests), "request"), json)
            return
        edit = job.run()
        edit.save(output)
        measured = audit(
            host, edit, keep=task.keep, attacks=attacks, reference=other, outsiders=task.outsiders,
            reworded=task.reworded, seed=seed, on_progress=tick,
        )  # fmt: skip
    if json:
        common.emit({"path": str(output), "edit": edit.summary(), "audit": measured.to_dict()})
        return
    _show(measured)
    print(
        f"edit {edit.digest} by {method} written to {output} ({common.size(output)}); the model is unchanged"
    )


def _task(
    what: str, subject: str | None, answer: str | None, keep: Path | None, outsiders: Path | None
) -> Task:
    """Return what to forget and what it is measured by: the lab's, with files in place of its own, or one of files."""
    from errata.bench.forgetting import Task, lab_task
    from errata.data.requests import read_requests
    from errata.errors import RequestError

    task = Task(())
    if what.startswith("lab:forget:"):
        number = what.removeprefix("lab:forget:")
        if subject is not None or answer is not None or not number.isdecimal():
            raise RequestError(
                f"{what!r}: expected lab:forget:N with a number of subjects, without other options"
            )
        task = lab_task(int(number))
    else:
        task = replace(task, requests=tuple(_requests(what, subject, answer)))
    files = {"keep": keep, "outsiders": outsiders}
    given = {name: tuple(read_requests(path)) for name, path in files.items() if path is not None}
    return replace(task, **given)


def _requests(what: str, subject: str | None, answer: str | None) -> Sequence[Request]:
    """Return what to forget: a file's requests, or one of a prompt and its options."""
    from errata.errors import RequestError

    if subject is None and not common.names_file(what):
        raise RequestError(f"the prompt {what!r:.80} needs --subject; or name a file of requests")
    if subject is not None and common.names_file(what):
        raise RequestError(
            f"--subject is for a prompt, and {what!r:.80} is a file of requests, which have their own"
        )
    if subject is None:
        if answer is not None:
            raise RequestError("--answer is for a prompt with --subject; in a file it is the old target")
        return common.read_what(what, None, None)
    return common.read_what(what, subject, UNKNOWN, answer)


def _show(audit: Audit) -> None:
    rows = [_row("unedited", audit.unedited), _row("edited", audit.edited)]
    if audit.reworded is not None:
        plain, edited = audit.reworded
        rows += [_row("unedited, in other words", plain), _row("edited, in other words", edited)]
    for bits, (plain, edited) in audit.rounded.items():
        rows += [_row(f"unedited, {bits} bits", plain), _row(f"edited, {bits} bits", edited)]
    rows += [
        _row(f"edited, the others after {steps} steps on half", one) for steps, one in audit.relearned.items()
    ]
    count = len(audit.answers)
    title = f"{common.counted(count, 'answer')} to forget"
    common.table(title, ("", "still given", "probability"), rows, right=(1, 2))
    before, after = audit.perplexity
    print(f"perplexity of neutral text: {before:.3f} before, {after:.3f} after")
    if audit.forget_quality is not None:
        unedited, edited = audit.forget_quality
        print(f"forget quality (p-value against the reference): {unedited:.3g} unedited, {edited:.3g} edited")
    if audit.leakage is not None:
        unedited, edited = audit.leakage
        print(f"privacy leakage (0 is right): {unedited:.0f} % unedited, {edited:.0f} % edited")
    if audit.kept is not None:
        print(f"requests to keep, answered as before: {audit.kept:.3f}")


def _row(name: str, recall: Recall) -> tuple[Any, ...]:
    return name, f"{recall.given:.3f}", f"{recall.probability:.4f}"


VERB = Verb("unlearn", command, order=12)
