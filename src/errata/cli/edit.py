"""errata edit: fit an edit and write it to a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from errata.cli import checks, common, outputs
from errata.cli._verb import Verb
from errata.methods import DEFAULT

if TYPE_CHECKING:
    from errata.host.host import Host
    from errata.job import Job
    from errata.types import ImageRequest, Request


What = Annotated[
    str,
    typer.Argument(
        metavar="PROMPT|FILE|FOLDER",
        help="A prompt with {} for the subject, or a file of requests (.jsonl .json .csv .yaml); for an "
        "image classifier a folder with original/, changed/ and mask/.",
    ),
]
Output = Annotated[Path, typer.Option("--output", "-o", help="Where to write the edit (.safetensors).")]
After = Annotated[
    Path | None,
    typer.Option("--after", help="Continue from this edit (same method); the new file includes it."),
]
BatchSize = Annotated[
    str,
    typer.Option(
        "--batch-size", help="Requests run at once: auto, or a number; halved when memory runs out."
    ),
]
Strict = Annotated[
    bool,
    typer.Option("--strict", help="Exit code 1 if any request is not answered with its target afterwards."),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Validate inputs and print the job; do not fit or write.")
]


def command(
    what: What,
    model: common.Model,
    output: Output,
    subject: Annotated[str | None, typer.Option(help="The subject, spelled as in the prompt.")] = None,
    target: Annotated[str | None, typer.Option(help="The new answer.")] = None,
    target_old: Annotated[str | None, typer.Option(help="The current answer; only recorded.")] = None,
    method: Annotated[str, typer.Option(help="See: errata methods.")] = DEFAULT,
    settings: common.Settings = None,
    after: After = None,
    batch_size: BatchSize = "auto",
    corpus: common.CorpusFile = None, examples: common.Examples = None,
    template: common.TemplateName = None, chat: common.Chat = False, system: common.System = None,
    thinking: common.Thinking = None, join: common.JoinName = None,
    force: common.Force = False, strict: Strict = False, dry_run: DryRun = False,
    device: common.Device = "auto", dtype: common.Dtype = "auto", seed: common.Seed = 0, json: common.Json = False,
) -> None:  # fmt: skip
    """Fit an edit and write it to a file; the model itself is not changed.

    Afterwards the model is asked every request with the edit applied, and those that it does not answer with
    their target are listed. An existing file is replaced only with --force, or by the same edit again.
    """
    from errata import api
    from errata import config as configs
    from errata.edits import Edit
    from errata.methods import REGISTRY

    options = configs.parse_assignments(settings or [])
    entry = REGISTRY.get(method)
    config = configs.make(entry.config, options, method)  # before a large model is opened
    pictures = "image_classifier" in entry.hosts
    texts = _texts(what, subject, target, target_old, pictures=pictures)
    repeatable = bool(texts) and not (after or corpus)
    earlier = outputs.earlier_edit(output, force=force, repeatable=repeatable)
    before = Edit.load(after) if after else None
    ask = common.ask_options(template, system, thinking, join, chat=chat)
    host = common.open_host(model, device, dtype)
    with common.progress(not (json or dry_run)) as tick:
        job = api.prepare(
            host, texts or _pairs(what, host, subject, target), method=method, options=config, seed=seed,
            after=before, batch_size=batch_size, corpus=corpus, examples=examples, ask=ask, on_progress=tick,
        )  # fmt: skip
        outputs.check_repeat(output, earlier, job, options)
        if not dry_run:
            edit = job.run()
            path = outputs.save_edit(edit, output, earlier)
            outcome = (
                checks.texts(job.host, edit, tick) if texts else checks.images(job.host, edit, job.requests)
            )
    if dry_run:
        _show_job(job, output, json)
    else:
        checks.report(outcome, path, edit, model, json=json, strict=strict)


def _texts(
    what: str, subject: str | None, target: str | None, target_old: str | None, *, pictures: bool
) -> list[Request]:
    """Read requests about text; an empty list if the method edits image models."""
    from errata.errors import RequestError

    folder = _is_folder(what)
    if not pictures:
        if folder and _is_folder(str(Path(what) / "original")):
            raise RequestError(f"{what} is a folder of image pairs; those need --method rewrite")
        return common.read_what(what, subject, target, target_old)
    if not folder:
        raise RequestError(f"expected a folder with original/, changed/ and mask/, found no folder {what!r}")
    if target_old:
        raise RequestError("pairs of images take no --target-old: the original images show it")
    return []


def _is_folder(what: str) -> bool:
    try:
        return Path(what).is_dir()
    except (OSError, ValueError):  # a prompt may be no possible file name
        return False


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


def _show_job(job: Job, output: Path, json: bool) -> None:
    """Print what a fit would do."""
    document = job.to_dict()
    if json:
        common.emit({"dry_run": True, **document, "output": str(output)})
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


VERB = Verb("edit", command, order=10)
