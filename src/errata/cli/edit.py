"""errata edit: fit an edit and write it to a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from errata.cli import common

if TYPE_CHECKING:
    from errata.edits import Edit
    from errata.host.load import Host
    from errata.types import Request


def command(
    what: Annotated[
        str,
        typer.Argument(
            metavar="PROMPT|FILE",
            help="A prompt with {} for the subject, or a file of requests (.jsonl .json .csv .yaml).",
        ),
    ],
    model: common.Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the edit (.safetensors).")],
    subject: Annotated[str | None, typer.Option(help="The subject, spelled as in the prompt.")] = None,
    target: Annotated[str | None, typer.Option(help="The new answer.")] = None,
    target_old: Annotated[str | None, typer.Option(help="The present answer, for the record.")] = None,
    method: Annotated[str, typer.Option(help="See: errata methods.")] = "memit",
    settings: common.Settings = None,
    corpus: common.CorpusFile = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, fit and write nothing.")] = False,
    device: common.Device = "auto",
    dtype: common.Dtype = "auto",
    seed: common.Seed = 0,
    json: common.Json = False,
) -> None:  # fmt: skip
    """Fit an edit and write it to a file; the model itself is not changed."""
    from errata import api
    from errata import config as configs
    from errata.edits.format import check_writable
    from errata.methods import REGISTRY

    options = configs.parse_assignments(settings or [])
    entry = REGISTRY.get(method)
    configs.make(entry.config, options, method)
    requests = common.read_what(what, subject, target, target_old)
    check_writable(output)
    host = common.open_host(model, device, dtype)
    api.check_requests(host, requests)
    if dry_run:
        _report({"dry_run": True, "requests": len(requests), "method": method, "output": str(output)}, json)
        return
    with common.progress(not json) as tick:
        made = api.edit(host, requests, method=method, seed=seed, corpus=corpus, on_progress=tick, **options)
    path = made.save(output)
    answers = _answers(host, made, requests)
    if json:
        common.emit(
            {"path": str(path), "bytes": path.stat().st_size, "answers": answers, "edit": made.summary()}
        )
        return
    common.table(None, ("prompt", "target", "before", "after"), [tuple(a.values()) for a in answers])
    print(f"edit written to {path} ({common.size(path)}); the model is unchanged")
    print(f"try it:  errata ask --model {model} --edit {path} {answers[0]['prompt']!r}")


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
