"""errata edit: fit an edit and write it to a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from errata.cli import common

if TYPE_CHECKING:
    from errata.edits import Edit
    from errata.host.load import Host
    from errata.types import ImageRequest, Request


def command(
    what: Annotated[
        str,
        typer.Argument(
            metavar="PROMPT|FILE|FOLDER",
            help="A prompt with {} for the subject, or a file of requests (.jsonl .json .csv .yaml); for an "
            "image classifier a folder with original/, changed/ and mask/.",
        ),
    ],
    model: common.Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the edit (.safetensors).")],
    subject: Annotated[str | None, typer.Option(help="The subject, spelled as in the prompt.")] = None,
    target: Annotated[str | None, typer.Option(help="The new answer.")] = None,
    target_old: Annotated[str | None, typer.Option(help="The present answer, for the record.")] = None,
    method: Annotated[str, typer.Option(help="See: errata methods.")] = "memit",
    settings: common.Settings = None,
    after: Annotated[
        Path | None, typer.Option("--after", help="An edit of the same method to go on from; the file stands for both.")
    ] = None,
    batch_size: Annotated[
        str, typer.Option("--batch-size", help="Requests run at once: auto, or a number; halved when memory runs out.")
    ] = "auto",
    corpus: common.CorpusFile = None,
    template: common.TemplateName = None, chat: common.Chat = False, system: common.System = None,
    thinking: common.Thinking = None, join: common.JoinName = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, fit and write nothing.")] = False,
    device: common.Device = "auto", dtype: common.Dtype = "auto", seed: common.Seed = 0, json: common.Json = False,
) -> None:  # fmt: skip
    """Fit an edit and write it to a file; the model itself is not changed."""
    from errata import api
    from errata import config as configs
    from errata.edits import Edit
    from errata.edits.format import check_writable
    from errata.methods import REGISTRY

    options = configs.parse_assignments(settings or [])
    entry = REGISTRY.get(method)
    configs.make(entry.config, options, method)
    texts = _texts(what, subject, target, target_old, pictures=entry.host == "image_classifier")
    check_writable(output)
    before = Edit.load(after) if after else None
    host = common.open_host(model, device, dtype)
    api.check_kind(entry, host)
    host = common.put_prompts(host, template, system, thinking, join, chat=chat, after=before)
    requests = texts or [_pairs(what, host, subject, target)]
    api.check_requests(host, requests)
    if dry_run:
        _report({"dry_run": True, "requests": len(requests), "method": method, "output": str(output)}, json)
        return
    with common.progress(not json) as tick:
        made = api.edit(
            host, requests, method=method, seed=seed, after=before, batch_size=batch_size, corpus=corpus,
            on_progress=tick, **options,
        )  # fmt: skip
    path = made.save(output)
    answers = _answers(host, made, texts) if texts else _labels(host, made, requests)
    if json:
        _emit(path, made, answers)
    else:
        _show(path, answers, model, ask=bool(texts))


def _emit(path: Path, edit: Edit, answers: list[dict[str, str]]) -> None:
    size = path.stat().st_size
    common.emit({"path": str(path), "bytes": size, "answers": answers, "edit": edit.summary()})


def _show(path: Path, answers: list[dict[str, str]], model: str, *, ask: bool) -> None:
    common.table(None, tuple(answers[0]), [tuple(a.values()) for a in answers])
    print(f"edit written to {path} ({common.size(path)}); the model is unchanged")
    if ask:
        print(f"try it:  errata ask --model {model} --edit {path} {answers[0]['prompt']!r}")


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


def _labels(host: Host, edit: Edit, requests: Sequence[Any]) -> list[dict[str, str]]:
    """Classify all originals, and the changed images without and with the edit."""
    from errata.host.images import ImageHost

    assert isinstance(host, ImageHost)
    original = [label for r in requests for label in host.labels(r.original)]
    before = [label for r in requests for label in host.labels(r.changed)]
    with edit.on(host):
        after = [label for r in requests for label in host.labels(r.changed)]
    return [
        {"pair": str(i), "original": o, "changed, before": b, "changed, after": a}
        for i, (o, b, a) in enumerate(zip(original, before, after, strict=True), 1)
    ]


def _answers(host: Host, edit: Edit, requests: list[Request]) -> list[dict[str, str]]:
    """Complete every request without and with the edit."""
    from errata.evaluation.metrics.matching import first_answer

    prompts = [request.text for request in requests]
    before = host.generate(prompts, max_new_tokens=16)
    with edit.on(host):
        after = host.generate(prompts, max_new_tokens=16)
    return [
        {"prompt": r.text, "target": r.target, "before": first_answer(b), "after": first_answer(a)}
        for r, b, a in zip(requests, before, after, strict=True)
    ]


def _report(document: dict, json: bool) -> None:
    if json:
        common.emit(document)
    else:
        print(
            f"{document['requests']} requests and all settings are fine; {document['method']} would write "
            f"{document['output']} (dry run: nothing was fitted or written)"
        )
