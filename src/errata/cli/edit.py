"""errata edit: fit an edit and write it to a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from errata.cli import _edit, _ledger, common
from errata.cli._edit import EditCommand
from errata.cli._verb import Verb
from errata.methods import DEFAULT

if TYPE_CHECKING:
    from errata.types import Request


What = Annotated[
    str,
    typer.Argument(
        metavar="PROMPT|FILE|FOLDER",
        help="A prompt with {} for the subject, or a file of requests (.jsonl .json .csv .yaml); for an "
        "image classifier a folder with original/, changed/ and mask/.",
    ),
]
ModelName = Annotated[
    str | None, typer.Option("--model", help="lab, a hub name, or a folder; default: the ledger's model.")
]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Write the edit to this file (.safetensors) instead of the ledger."),
]
After = Annotated[
    str | None,
    typer.Option(
        "--after", help="Continue from this edit of the same method, a file or an id; it is included."
    ),
]
Whole = Annotated[bool, typer.Option("--whole", help="Refuse a batch as a whole instead of halving it.")]
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


Images = Annotated[
    list[Path] | None,
    typer.Option(
        help="A picture that the prompt is about; <image> marks its place. Repeat it for several, with as many <image>."
    ),
]


def command(
    what: What,
    model: ModelName = None,
    output: Output = None,
    subject: Annotated[str | None, typer.Option(help="The subject, spelled as in the prompt.")] = None,
    target: Annotated[str | None, typer.Option(help="The new answer.")] = None,
    target_old: Annotated[str | None, typer.Option(help="The current answer; only recorded.")] = None,
    image: Images = None,
    method: Annotated[str, typer.Option(help="See: errata methods.")] = DEFAULT,
    settings: common.Settings = None,
    message: _ledger.Reason = "", source: _ledger.Source = "", author: _ledger.Author = "",
    conflicts: _ledger.Conflicts = None, guard: _ledger.GuardSwitch = True, whole: Whole = False,
    repo: _ledger.Repo = None,
    after: After = None, batch_size: BatchSize = "auto",
    corpus: common.CorpusFile = None, examples: common.Examples = None,
    template: common.TemplateName = None, chat: common.Chat = False, system: common.System = None,
    thinking: common.Thinking = None, join: common.JoinName = None,
    force: common.Force = False, strict: Strict = False, dry_run: DryRun = False,
    device: common.Device = "auto", dtype: common.Dtype = "auto", seed: common.Seed = 0, json: common.Json = False,
) -> None:  # fmt: skip
    """Fit an edit: into the ledger, where it is measured and applied, or with -o into a file.

    In a ledger (errata init) an edit counts if it keeps the guard's bounds; otherwise nothing is applied, the attempt
    is recorded, and the exit code is 5. A batch that fails is halved, and what passes is applied.

    With -o the model is asked every request with the edit applied, and those that it does not answer with their target
    are listed. An existing file is replaced only with --force, or by the same edit again. The model's own files are
    never changed.
    """
    entry, options = _method(method, settings)
    texts = _texts(what, subject, target, target_old, image, pairs="image_classifier" in entry.hosts)
    asked = EditCommand(
        what, texts, subject, target, method, options, seed, corpus, examples,
        common.ask_options(template, system, thinking, join, chat=chat), batch_size,
    )  # fmt: skip
    opened = _edit.Opened(model, device, dtype, json)
    if output is None:
        order = {
            "reason": message, "source": source, "author": author, "guard": guard, "halve": not whole,
            "conflicts": _ledger.policy(conflicts),
        }  # fmt: skip
        _edit.into_ledger(asked, opened, repo, after, order, force=force, strict=strict, dry_run=dry_run)
    else:
        _edit.check_file_options(message, source, author, conflicts, repo, guard=guard, whole=whole)
        _edit.into_file(asked, opened, output, after, force=force, strict=strict, dry_run=dry_run)


def _method(method: str, settings: list[str] | None) -> tuple[Any, dict[str, Any]]:
    """Return a method and its options, validated before a large model is opened."""
    from errata import config as configs
    from errata.job import check_settings
    from errata.methods import REGISTRY

    options = configs.parse_assignments(settings or [])
    entry = REGISTRY.get(method)
    check_settings(entry, options)
    return entry, options


def _texts(
    what: str, subject: str | None, target: str | None, target_old: str | None, images: list[Path] | None, *,
    pairs: bool,
) -> list[Request]:  # fmt: skip
    """Read requests about text; an empty list if the method edits image models."""
    from errata.errors import RequestError

    folder = _is_folder(what)
    if not pairs:
        if folder and _is_folder(str(Path(what) / "original")):
            raise RequestError(f"{what} is a folder of image pairs; those need --method rewrite")
        return common.read_what(what, subject, target, target_old, images)
    if not folder:
        raise RequestError(f"expected a folder with original/, changed/ and mask/, found no folder {what!r}")
    if target_old or images:
        raise RequestError("pairs of images take no --target-old and no --image: the original images show it")
    return []


def _is_folder(what: str) -> bool:
    try:
        return Path(what).is_dir()
    except (OSError, ValueError):  # a prompt may be no possible file name
        return False


VERB = Verb("edit", command, order=10)
