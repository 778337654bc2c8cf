"""errata ask: generate answers to prompts, with and without edits."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from errata.cli import common
from errata.cli._verb import Verb

if TYPE_CHECKING:
    from errata.edits.edit import Placement


def command(
    prompts: Annotated[list[str], typer.Argument(help="One or more prompts to continue.")],
    model: common.Model,
    edit: Annotated[list[Path] | None, typer.Option("--edit", "-e", help="An edit file; repeatable.")] = None,
    merge: Annotated[
        bool,
        typer.Option(
            "--merge/--no-merge",
            help="Write edits into the weights, or add them to module outputs (exact in 16-bit models).",
        ),
    ] = True,
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
    """Continue prompts greedily; with --edit, side by side without and with the edits.

    Edits are merged into the weights, which rounds them to a 16-bit model's precision; with --no-merge they
    stay exact. Quantised weights are never merged.
    """
    from errata.edits import Edit
    from errata.job import with_prompt_options

    edits = [Edit.load(path) for path in edit or []]
    host = common.open_text_host(model, device, dtype)
    ask = common.ask_options(template, system, thinking, chat=chat)
    host = with_prompt_options(host, ask, edits=edits)
    plain = host.generate(prompts, max_new_tokens=max_new_tokens)
    edited = None
    placements: list[Placement] = []
    if edits:
        with ExitStack() as stack:
            for one in edits:
                placements.append(
                    stack.enter_context(one.on(host, foreign=foreign, merge=None if merge else False))
                )
            edited = host.generate(prompts, max_new_tokens=max_new_tokens)
    if json:
        answers = [
            {"prompt": p, "without": plain[i], **({"with": edited[i]} if edited else {})}
            for i, p in enumerate(prompts)
        ]
        overrides = [note for one in placements for note in one.overrides]
        losses = [dict(one.lost) for one in placements]
        common.emit({"model": host.name, "answers": answers, "overrides": overrides, "lost": losses})
        return
    columns = ("prompt", "without edit", "with edit") if edited else ("prompt", "answer")
    rows = [(p, plain[i].strip(), *([edited[i].strip()] if edited else [])) for i, p in enumerate(prompts)]
    common.table(None, columns, rows)
    for path, placement in zip(edit or [], placements, strict=True):
        _print_notes(path.name, placement, str(host.dtype).removeprefix("torch."))


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
