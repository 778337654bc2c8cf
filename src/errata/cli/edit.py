"""errata edit: fit an edit and write it to a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from errata.cli import checks, common, outputs
from errata.cli._verb import Verb

if TYPE_CHECKING:
    from errata.host.load import Host
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
    typer.Option("--after", help="An edit of the same method to go on from; the file stands for both."),
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
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, fit and write nothing.")]


def command(
    what: What,
    model: common.Model,
    output: Output,
    subject: Annotated[str | None, typer.Option(help="The subject, spelled as in the prompt.")] = None,
    target: Annotated[str | None, typer.Option(help="The new answer.")] = None,
    target_old: Annotated[str | None, typer.Option(help="The present answer, for the record.")] = None,
    method: Annotated[str, typer.Option(help="See: errata methods.")] = "memit",
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

    Afterwards every request is put to the model with the edit in place, and those that it does not answer with
    their target are named. A file that is there already is replaced only with --force, or by the same edit again.
    """
    from errata import api
    from errata import config as configs
    from errata.edits import Edit
    from errata.methods import REGISTRY

    options = configs.parse_assignments(settings or [])
    entry = REGISTRY.get(method)
    config = configs.make(entry.config, options, method)
    texts = _texts(what, subject, target, target_old, pictures="image_classifier" in entry.hosts)
    repeatable = bool(texts) and not (after or corpus)
    earlier = outputs.earlier_edit(output, force=force, repeatable=repeatable)
    before = Edit.load(after) if after else None
    host = common.open_host(model, device, dtype)
    api.check_kind(entry, host)
    host = common.put_prompts(host, template, system, thinking, join, chat=chat, after=before)
    requests = texts or [_pairs(what, host, subject, target)]
    api.check_requests(host, requests)
    outputs.check_repeat(
        output, earlier, host, texts, config=config, method=method, options=options, seed=seed
    )
    if dry_run:
        _report({"dry_run": True, "requests": len(requests), "method": method, "output": str(output)}, json)
        return
    with common.progress(not json) as tick:
        made = api.edit(
            host, requests, method=method, seed=seed, after=before, batch_size=batch_size, corpus=corpus,
            examples=examples, on_progress=tick, **options,
        )  # fmt: skip
        path = outputs.save_edit(made, output, earlier)
        outcome = checks.texts(host, made, tick) if texts else checks.images(host, made, requests)
    checks.report(outcome, path, made, model, json=json, strict=strict)


def _texts(
    what: str, subject: str | None, target: str | None, target_old: str | None, *, pictures: bool
) -> list[Request]:
    """Read requests in words; none where the method takes pictures."""
    from errata.errors import RequestError

    folder = _is_folder(what)
    if not pictures:
        if folder and _is_folder(str(Path(what) / "original")):
            raise RequestError(f"{what} is a folder of image pairs; those need --method rewrite")
        return common.read_what(what, subject, target, target_old)
    if not folder:
        raise RequestError(f"expected a folder with original/, changed/ and mask/, found no folder {what!r}")
    if target_old:
        raise RequestError("pairs of images have no --target-old: the originals show it")
    return []


def _is_folder(what: str) -> bool:
    try:
        return Path(what).is_dir()
    except (OSError, ValueError):  # a prompt may be no possible file name
        return False


def _pairs(what: str, host: Host, subject: str | None, target: str | None) -> ImageRequest:
    """Read pairs of images in the host's size; subject names what the changed ones show, target the originals."""
    from errata.data.images import read_pairs
    from errata.host.images import ImageHost

    assert isinstance(host, ImageHost)
    return read_pairs(
        what,
        size=host.size,
        channels=host.channels,
        concept=target or "original",
        replacement=subject or "changed",
    )


def _report(document: dict, json: bool) -> None:
    if json:
        common.emit(document)
    else:
        print(
            f"{document['requests']} requests and all settings are fine; {document['method']} would write "
            f"{document['output']} (dry run: nothing was fitted or written)"
        )


VERB = Verb("edit", command, order=10)
