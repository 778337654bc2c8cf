"""errata train: train the editor of a method that learns one, and write it to a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
        help="Facts with paraphrases and neighbours to train on: a dataset, a file or lab:N:SEED; default: the "
        "model's own examples (lab). Never those that measure.",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Validate inputs; do not train or write.")]


def command(
    method: Annotated[str, typer.Argument(metavar="METHOD", help="A method that learns an editor, such as serac.")],
    model: common.Model,
    output: Output,
    cases: Cases = None,
    settings: common.Settings = None,
    force: common.Force = False, dry_run: DryRun = False,
    device: common.Device = "auto", dtype: common.Dtype = "auto", seed: common.Seed = 0, json: common.Json = False,
) -> None:  # fmt: skip
    """Train a method's editor on a model once; edits then use it: errata edit ... --set editor=FILE.

    The model itself is not changed. The file is bound to the model that the editor was trained on.
    """
    from errata import api
    from errata import config as configs
    from errata.methods import REGISTRY

    entry = REGISTRY.get(method)
    config = configs.make(entry.config, configs.parse_assignments(settings or []), method)
    outputs.check_new_edit(output, force=force)
    host = common.open_host(model, device, dtype)
    with common.progress(not (json or dry_run)) as tick:
        job = api.prepare_training(
            host, method=method, options=config, seed=seed, cases=cases, on_progress=tick
        )
        if dry_run:
            document = job.to_dict()
        else:
            artefact = job.run()
            document = {"path": str(artefact.save(output)), **artefact.summary()}
    if json:
        common.emit({"dry_run": dry_run, **document})
    elif dry_run:
        print(
            f"{document['examples']} examples and all settings are valid (dry run: nothing was trained or written)"
        )
    else:
        _print(artefact, output, model)


def _print(artefact: Artefact, output: Path, model: str) -> None:
    facts = {name: value for name, value in artefact.card.items() if name not in ("settings", "versions")}
    common.table(
        "trained", ("", "value"), [(n, f"{v:.4g}" if isinstance(v, float) else v) for n, v in facts.items()]
    )
    print(f"{output}  {common.size(output)}  editor {artefact.digest} of {artefact.method}")
    print(
        f"use it: errata edit FACTS --model {model} --method {artefact.method} --set editor={output} -o EDIT"
    )


VERB = Verb("train", command, order=15)
