"""errata train: train the editor of a method that learns one, and write it to a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from errata.cli import common, outputs
from errata.cli._verb import Verb

if TYPE_CHECKING:
    from errata.edits.artefact import Artefact

Output = Annotated[Path, typer.Option("--output", "-o", help="Where to write the editor (.safetensors).")]
Cases = Annotated[
    str | None,
    typer.Option(
        "--cases",
        help="Facts with paraphrases and neighbours to train on: a dataset, a file, lab:train or lab:N:SEED; default: "
        "the model's own examples (lab). Never those that measure.",
    ),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on from the checkpoint beside the output, if there is one.")
]
Log = Annotated[Path | None, typer.Option("--log", help="Write a JSON line for every step and validation.")]
TrackerName = Annotated[
    str | None,
    typer.Option(
        "--tracker", help="Also tell a tracker of experiments: trackio, wandb or mlflow, offline by default."
    ),
]
Quick = Annotated[
    bool, typer.Option("--quick", help="A short training, to see that everything works; --set overrides.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Validate inputs; do not train or write.")]


def command(
    method: Annotated[str, typer.Argument(metavar="METHOD", help="A method that learns an editor, such as serac.")],
    model: common.Model,
    output: Output,
    cases: Cases = None,
    settings: common.Settings = None,
    quick: Quick = False, resume: Resume = False, log: Log = None, tracker: TrackerName = None,
    force: common.Force = False, dry_run: DryRun = False,
    device: common.Device = "auto", dtype: common.Dtype = "auto", seed: common.Seed = 0, json: common.Json = False,
) -> None:  # fmt: skip
    """Train a method's editor on a model once; edits then use it: errata edit ... --set editor=FILE.

    The model itself is not changed. The file is bound to the model that the editor was trained on. Long trainings keep
    a checkpoint beside the output, OUTPUT.checkpoint, until they end. Started by torchrun, several processes share
    every step; the first one writes and prints.
    """
    from errata import api
    from errata import config as configs
    from errata.methods import REGISTRY
    from errata.training.loop import TrainingFiles
    from errata.training.workers import device_of, joined

    options = configs.parse_assignments(settings or [])
    configs.make(REGISTRY.get(method).config, options, method)
    outputs.check_new_edit(output, force=force)
    checkpoint = _checkpoint(output, resume=resume, force=force)
    files = TrainingFiles(checkpoint, resume, log, tracker, output.stem)
    with joined() as workers:
        host = common.open_host(model, device_of(device), dtype)
        with common.progress(workers.first and not (json or dry_run)) as tick:
            job = api.prepare_training(
                host,
                method=method,
                options=options,
                seed=seed,
                cases=cases,
                quick=quick,
                files=files,
                workers=workers,
                on_progress=tick,
            )
            artefact = None if dry_run else job.run()
    if not workers.first:
        return
    if artefact is None:
        _print_plan(job.to_dict(), json)
        return
    document = {"path": str(artefact.save(output)), **artefact.summary()}
    checkpoint.unlink(missing_ok=True)
    if json:
        common.emit({"dry_run": False, **document})
    else:
        _print(artefact, output, model)


def _print_plan(document: dict[str, Any], json: bool) -> None:
    if json:
        common.emit({"dry_run": True, **document})
        return
    print(
        f"{document['examples']} examples and all settings are valid (dry run: nothing was trained or written)"
    )


def _checkpoint(output: Path, *, resume: bool, force: bool) -> Path:
    """Return where a training's checkpoint is. Raises EditError for one that neither option says what to do with."""
    from errata.errors import EditError

    path = output.with_name(f"{output.name}.checkpoint")
    if path.exists() and not (resume or force):
        raise EditError(
            f"{path} is the checkpoint of a training that did not end: --resume goes on from it, --force starts anew"
        )
    return path


def _print(artefact: Artefact, output: Path, model: str) -> None:
    common.table("trained", ("", "value"), common.card_rows(artefact.card))
    print(f"{output}  {common.size(output)}  editor {artefact.digest} of {artefact.method}")
    print(
        f"use it: errata edit FACTS --model {model} --method {artefact.method} --set editor={output} -o EDIT"
    )


VERB = Verb("train", command, order=15)
