"""errata ask: generate answers to prompts, with and without edits."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from errata.cli import _ledger, common
from errata.cli._verb import Verb

if TYPE_CHECKING:
    from errata.edits import Edit
    from errata.edits.edit import Placement
    from errata.host.host import Host
    from errata.types import Picture

Images = Annotated[
    list[Path] | None,
    typer.Option(
        "--image",
        help="A picture that every prompt is about; <image> marks its place. Repeat it for several.",
    ),
]


def command(
    prompts: Annotated[list[str], typer.Argument(help="One or more prompts to continue.")],
    model: Annotated[
        str | None,
        typer.Option("--model", help="lab, a hub name, or a folder; default: the ledger's model and edits."),
    ] = None,
    edit: Annotated[list[Path] | None, typer.Option("--edit", "-e", help="An edit file; repeatable.")] = None,
    merge: Annotated[
        bool,
        typer.Option(
            "--merge/--no-merge",
            help="Write edits into the weights, or add them to module outputs (exact in 16-bit models).",
        ),
    ] = True,
    repo: _ledger.Repo = None,
    image: Images = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest continuation.")] = 32,
    template: common.TemplateName = None,
    chat: common.Chat = False,
    system: common.System = None,
    thinking: common.Thinking = None,
    foreign: common.Foreign = False,
    device: common.Device = "auto",
    dtype: common.Dtype = "auto",
    json: common.Json = False,
) -> None:
    """Continue prompts greedily; with --edit, or in a ledger, side by side without and with the edits.

    Without --model the model is the ledger's, and the edits are those in place there. Edits are merged into the
    weights, which rounds them to a 16-bit model's precision; with --no-merge they stay exact. Quantised weights are
    never merged.
    """
    from errata.data.pictures import read_picture
    from errata.edits import Edit
    from errata.job import with_prompt_options

    pictures = [read_picture(path) for path in image or ()]
    names, edits = [path.name for path in edit or []], [Edit.load(path) for path in edit or []]
    if model is None:
        model, edits = _of_ledger(repo, edits)
        names = [one.digest[:12] for one in edits]
    host = common.open_text_host(model, device, dtype)
    ask = common.ask_options(template, system, thinking, chat=chat)
    host = with_prompt_options(host, ask, edits=edits)
    asked = _beside(host, prompts, pictures)
    plain = host.generate(asked, max_new_tokens=max_new_tokens)
    edited, placements = _with_edits(host, edits, asked, max_new_tokens, foreign=foreign, merge=merge)
    if json:
        common.emit({"model": host.name, **_document(prompts, plain, edited, placements)})
        return
    columns = ("prompt", "without edit", "with edit") if edited else ("prompt", "answer")
    rows = [(p, plain[i].strip(), *([edited[i].strip()] if edited else [])) for i, p in enumerate(prompts)]
    common.table(None, columns, rows)
    for name, placement in zip(names, placements, strict=True):
        _print_notes(name, placement, str(host.dtype).removeprefix("torch."))


def _with_edits(
    host: Host, edits: Sequence[Edit], prompts: Sequence[str], tokens: int, *, foreign: bool, merge: bool
) -> tuple[Sequence[str] | None, list[Placement]]:
    """Return the answers with edits in place and how each was placed; None without edits."""
    placements: list[Placement] = []
    if not edits:
        return None, placements
    with ExitStack() as stack:
        for one in edits:
            placed = one.on(host, foreign=foreign, merge=None if merge else False)
            placements.append(stack.enter_context(placed))
        return host.generate(prompts, max_new_tokens=tokens), placements


def _beside(host: Host, prompts: Sequence[str], pictures: Sequence[Picture]) -> list[str]:
    """Return prompts with the marks of the pictures that all of them are about, which the host is given."""
    from errata.types import Probe

    first, more = next(iter(pictures), None), tuple(pictures[1:])
    probes = [Probe("asked", prompt, (), (), image=first, more_images=more) for prompt in prompts]
    host.see(probes)
    return [probe.prompt for probe in probes]


def _document(
    prompts: list[str], plain: Sequence[str], edited: Sequence[str] | None, placements: list[Placement]
) -> dict[str, Any]:
    answers = [
        {"prompt": p, "without": plain[i], **({"with": edited[i]} if edited else {})}
        for i, p in enumerate(prompts)
    ]
    overrides = [note for one in placements for note in one.overrides]
    return {"answers": answers, "overrides": overrides, "lost": [dict(one.lost) for one in placements]}


def _of_ledger(repo: Path | None, given: list[Edit]) -> tuple[str, list[Edit]]:
    """Return a ledger's model and the edits in place there. Raises ConfigError where edits were named too."""
    from errata.errors import ConfigError, LedgerError
    from errata.ledger import folders
    from errata.ledger.contents import load_edit

    try:
        ledger = folders.find(repo)
    except LedgerError as error:
        raise ConfigError(f"{error}, or name a model with --model") from error
    if given:
        raise ConfigError("--edit needs --model: without it the edits are those that the ledger has in place")
    return ledger.settings.model, [load_edit(ledger, digest) for digest in ledger.state().active]


def _print_notes(name: str, placement: Placement, dtype: str) -> None:
    """Print which warnings were overruled, and how much of an edit was lost to rounding."""
    for note in placement.overrides:
        print(f"overruled: {note}")
    worst = max(placement.lost.values(), default=0.0)
    if worst >= 1e-3:  # in float32 it is a millionth
        print(
            f"{name}: rounding to {dtype} lost up to {worst:.1%} of a weight's change; --no-merge avoids this"
        )


VERB = Verb("ask", command, order=20)
