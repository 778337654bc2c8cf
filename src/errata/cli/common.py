"""Options, tables and progress that several verbs share."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from errata.progress import OnProgress, ignore

if TYPE_CHECKING:
    from errata.host.host import Host
    from errata.types import AskOptions, Case, Concept, Request

Model = Annotated[
    str,
    typer.Option(
        "--model", help="lab, lab-t5 or another of the lab's, a hub name, or a saved model's folder."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")]
Seed = Annotated[int, typer.Option(help="Seed of all randomness.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="A setting of the method, key=value; repeatable.")
]
CorpusFile = Annotated[
    Path | None,
    typer.Option(
        "--corpus",
        help="Text file for statistics; default: text sampled from the model (lab: its own corpus).",
    ),
]
Examples = Annotated[
    str | None,
    typer.Option(
        "--examples",
        help="Facts with paraphrases and neighbours for methods that need them (ike): as for --cases.",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing file.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Validate inputs; do not fit or write.")]
Foreign = Annotated[
    bool, typer.Option("--foreign", help="Apply an edit to another model than it was made for; recorded.")
]

TemplateName = Annotated[
    str | None,
    typer.Option(
        "--template", help="Prompt format: raw, question, chat or auto; default: that of the edit, or raw."
    ),
]
Chat = Annotated[bool, typer.Option("--chat", help="Short for --template chat.")]
System = Annotated[
    str | None, typer.Option("--system", help="System prompt of a conversation.", metavar="TEXT")
]
Thinking = Annotated[
    str | None, typer.Option("--thinking", help="Whether the chat template enables thinking: on or off.")
]
JoinName = Annotated[
    str | None,
    typer.Option("--join", help="Between prompt and answer: auto (as the script requires), space or none."),
]


_UNSAFE = re.compile("[\x7f-\x9f\ud800-\udfff]")
_CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Characters with which a text could control a terminal: control characters except tabs and line breaks, and marks that
change the direction of writing; also half surrogate pairs, which cannot be printed."""
SHORT_LINE = 16
"""Longest cell, in columns, that is not broken while there is room for all words."""
PIPED_WIDTH, MIN_WIDTH = 120, 20
"""Width of tables in columns if the output is no terminal, and the smallest width."""


def open_host(model: str, device: str, dtype: str) -> Host:
    """Open a model without the loader's own progress bars."""
    from errata import api
    from errata.host.open import quiet

    quiet()
    return api.load(model, device=device, dtype=dtype)


def open_text_host(model: str, device: str, dtype: str) -> Host:
    """Open a model that answers in words. Raises HostError for one that reads or draws images."""
    from errata.errors import HostError
    from errata.host.kinds import check_asked

    host = open_host(model, device, dtype)
    check_asked(host.name, host.kind, "this command")
    if host.tokenizer is None:
        raise HostError(
            f"{host.name} is an image classifier ({host.family}): it reads images and gives no text; name a model "
            "that reads text"
        )
    return host


def ask_options(
    template: str | None, system: str | None, thinking: str | None, join: str | None = None, *,
    chat: bool = False, max_new_tokens: int | None = None, thinking_template: str | None = None,
    thought_tokens: int | None = None, evaluating: bool = False,
) -> AskOptions:  # fmt: skip
    """Return the options for prompts and answers.

    Raises ConfigError for --chat with another --template, and for forced thinking where nothing is evaluated.
    """
    from errata.errors import ConfigError
    from errata.types import AskOptions
    from errata.types.asking import MAX_NEW_TOKENS, THOUGHT_TOKENS

    if thinking == "forced" and not evaluating:
        raise ConfigError("--thinking forced is for errata eval; expected on or off")
    if thinking_template is not None:
        thinking_template = thinking_template.replace("\\n", "\n")  # as shells write it
    if chat and template not in (None, "chat"):
        raise ConfigError(
            f"--chat means --template chat, but --template {template} was given too; leave one out"
        )
    return AskOptions(
        "chat" if chat else template, system, thinking, join, max_new_tokens or MAX_NEW_TOKENS,
        thought_tokens=thought_tokens or THOUGHT_TOKENS, thinking_template=thinking_template,
    )  # fmt: skip


def read_what(
    what: str, subject: str | None, target: str | None, target_old: str | None = None,
    images: list[Path] | None = None,
) -> list[Request]:  # fmt: skip
    """Read requests from a file, or build one from a prompt and its options.

    ``images``: files of pictures that the prompt is about; what the prompt calls the first is the subject by default.
    """
    from errata.data.pictures import read_picture, subject_in
    from errata.data.requests import SUFFIXES, read_requests
    from errata.errors import RequestError
    from errata.types import Request

    if names_file(what):
        if subject or target or target_old or images:
            raise RequestError("give either a file of requests or a prompt with --subject and --target")
        return read_requests(what)
    picture, *more = [read_picture(image) for image in images or ()] or (None,)
    if subject is None and picture is not None:
        subject = subject_in(what)
    missing = [name for name, value in (("--subject", subject), ("--target", target)) if value is None]
    if missing:
        raise RequestError(f"a prompt needs {' and '.join(missing)}; or name a file ({', '.join(SUFFIXES)})")
    return [Request(what, subject or "", target or "", target_old, image=picture, more_images=tuple(more))]


def names_file(what: str) -> bool:
    """Whether an argument names a file of requests, there or not, and is no prompt."""
    from errata.data.requests import SUFFIXES

    try:
        return Path(what).suffix.lower() in SUFFIXES or Path(what).is_file()
    except (OSError, ValueError):  # a prompt may be no possible file name
        return False


def read_cases(source: str, seed: int, *, together: bool = False) -> list[Case]:
    """Read cases from a file, a named dataset, or the lab: ``lab:N``; ``together``: for edits in place at once."""
    from errata.bench.sources import read

    return read(source, seed=seed, together=together)[0]


def text_lines(path: Path | None, host: Host) -> list[str]:
    """Read texts, one a line, or return the model's own neutral texts. Raises DataError where there are none."""
    from errata.errors import DataError
    from errata.evaluation.erasure import neutral_texts

    if path is None:
        return neutral_texts(host)
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the texts of {path}: {error}") from error
    if not any(lines):
        raise DataError(f"{path} holds no texts")
    return [line for line in lines if line]


def read_concept(source: str, concept: str) -> Concept:
    """Read a file's labelled texts, or those of the lab."""
    from errata.data.labelled import read_concept as read
    from errata.types import Concept

    if source != "lab":
        return read(Path(source), concept)
    from errata.lab.labels import labelled_texts

    return Concept(concept, tuple(labelled_texts(concept)))


def emit(document: Any) -> None:
    """Print one JSON document; numbers that JSON does not have, as texts: inf, -inf, nan."""
    from errata.bench.results import finite

    text = json.dumps(finite(document), indent=2, ensure_ascii=False, default=str, allow_nan=False)
    # json.dumps does not escape control characters beyond ASCII and half surrogate pairs
    print(_UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text))


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, which takes an s: 1 request, 2,000 requests."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def show_dry(document: Mapping[str, Any], what: str, json: bool, **more: Any) -> None:
    """Print that a fit would begin: what was read, and with ``json`` the job's document."""
    if json:
        emit({"dry_run": True, **document, **more})
    else:
        print(f"{what} and all settings are valid (dry run: nothing was fitted)")


@contextmanager
def progress(show: bool = True) -> Iterator[OnProgress]:
    """Show progress bars on stderr if it is a terminal, one for each phase."""
    if not show or not sys.stderr.isatty():
        yield ignore
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:>22}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def tick(what: str, completed: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=completed, total=total)

        yield tick


def card_rows(card: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return the rows of a table of how an editor was trained, but for its settings."""
    data = card.get("data", {})
    rows = [
        (name, f"{value:.4g}" if isinstance(value, float) else value)
        for name, value in card.items()
        if name not in ("settings", "versions", "data")
    ]
    if data:
        rows.append(("data", f"{data['source']}, {data['cases']:,} cases, sha256 {data['sha256'][:12]}"))
    if left_out := data.get("check", {}).get("left_out"):
        subjects = f"{len(left_out['subjects'])} subjects (--json names them)"
        rows.append(("left out", f"{subjects}, phrasings of the kind {left_out['phrasings']}"))
    return rows


def table(
    title: str | None, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, right: Sequence[int] = ()
) -> None:
    """Print a table to stdout, without styles if that is no terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=_width(), highlight=False)
    grid = Table(
        title=None if title is None else Text(safe(title)),
        box=box.SIMPLE_HEAD,
        title_justify="left",
        pad_edge=False,
    )
    heads = [Text(safe(column)) for column in columns]
    cells = [[cell if isinstance(cell, Text) else Text(safe(str(cell))) for cell in row] for row in rows]
    texts = [[one.plain for one in column] for column in zip(heads, *cells, strict=True)]
    for i, (head, width) in enumerate(zip(heads, _column_widths(texts, console.width), strict=True)):
        grid.add_column(head, justify="right" if i in right else "left", overflow="fold", width=width)
    for row in cells:
        grid.add_row(*row)
    with console.capture() as text:  # printed here: rich would exit the program itself on a broken pipe
        console.print(grid)
    print(text.get(), end="")


def _column_widths(columns: Sequence[Sequence[str]], room: int) -> list[int | None]:
    """Return widths that break no word, for a table that is too wide for its longest lines; else None each."""
    from rich.cells import cell_len

    room -= 3 * len(columns)  # between columns
    lines = [max(cell_len(line) for text in texts for line in text.split("\n")) for texts in columns]
    words = [max((cell_len(word) for text in texts for word in text.split()), default=0) for texts in columns]
    spare = room - sum(words)
    if sum(lines) <= room or spare < 0:
        return [None] * len(columns)
    widths: list[int | None] = [None] * len(columns)
    order = sorted(range(len(columns)), key=lambda i: lines[i] - words[i])
    for place, i in enumerate(order):
        # cells of a few words stay on one line; longer ones share what is left
        share = spare if lines[i] <= SHORT_LINE else spare // (len(order) - place)
        widths[i] = words[i] + min(lines[i] - words[i], share)
        spare -= min(lines[i] - words[i], share)
    return widths


def _width() -> int | None:
    """Return the width of tables: COLUMNS if set, else the terminal's, else 120."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns) > 0:
        return max(MIN_WIDTH, int(columns))
    return None if sys.stdout.isatty() else PIPED_WIDTH


def plain_warnings() -> None:
    """Show each warning as one line on stderr, without its line of source code."""
    import warnings

    def show(
        message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None
    ) -> None:
        print(f"warning: {' '.join(str(message).split())}", file=file or sys.stderr)

    warnings.showwarning = show


def safe(text: str) -> str:
    """Escape the characters with which a text could control a terminal, see ``_CONTROLS``."""
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def mark(text: str, style: str) -> Any:
    """Return styled text for a table cell."""
    from rich.text import Text

    return Text(safe(text), style=style)


def size(path: Path) -> str:
    """Format a file's size."""
    return bytes_text(path.stat().st_size)


def bytes_text(count: int) -> str:
    """Format a number of bytes."""
    return f"{count / 1000:.1f} kB" if count < 1_000_000 else f"{count / 1e6:.1f} MB"
