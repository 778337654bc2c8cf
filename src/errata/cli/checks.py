"""What errata edit reports on an edit it has saved: which requests the model now answers with their target."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from errata.cli import common
from errata.progress import OnProgress

if TYPE_CHECKING:
    from errata.edits import Edit
    from errata.host.host import Host
    from errata.types import Picture

ROWS = 20
"""Maximum number of answers in the table; those that miss their target come first."""
CHARACTERS = 160
"""Maximum length of a text in the table."""


@dataclass(frozen=True)
class Outcome:
    """Answers to all requests of an edit, one record each."""

    answers: tuple[dict[str, Any], ...]
    """``answered``: whether the answer contains the target; the other fields are texts, or a number."""
    noun: str
    """What the records are called in messages: requests or images."""
    texts: bool
    """Whether the answers are to text prompts, which ``errata ask`` can repeat."""

    @property
    def missed(self) -> list[dict[str, Any]]:
        """Answers that do not give their target."""
        return [answer for answer in self.answers if not answer["answered"]]

    def document(self, path: Path, edit: Edit) -> dict[str, Any]:
        """Return the JSON document of an edit that was written."""
        missed = self.missed
        return {
            "path": str(path),
            "bytes": path.stat().st_size,
            "answered": len(self.answers) - len(missed),
            "total": len(self.answers),
            "missed": missed,
            "answers": list(self.answers),
            "edit": edit.summary(),
        }

    def counts(self) -> str:
        """Return a sentence on how many answers contain their target."""
        total = len(self.answers)
        right = total - len(self.missed)
        return f"with the edit the model answers {right} of {total} {self.noun} with their target"

    def show(self, path: Path, model: str) -> None:
        """Print the answers, their counts, and a next step."""
        self._table()
        print(f"edit written to {path} ({common.size(path)}); the model is unchanged")
        missed, counts = self.missed, self.counts()
        if missed:
            names = ", ".join(_name(answer) for answer in missed[:ROWS])
            more = f" and {len(missed) - ROWS} more" if len(missed) > ROWS else ""
            print(f"{counts}; missed: {names}{more}")
            print("other settings or another method may do better; see errata methods and errata eval")
        else:
            print(counts)
        example = next((answer for answer in self.answers if answer["answered"]), None)
        if (
            self.texts
            and example is not None
            and all(Path(name).is_file() for name in example.get("image", ()))
        ):
            beside = [word for name in example.get("image", ()) for word in ("--image", name)]
            command = ["errata", "ask", "--model", model, "--edit", str(path), *beside, example["prompt"]]
            print(f"try it:  {shlex.join(command)}")

    def _table(self) -> None:
        """Print answers, misses first; beyond :data:`ROWS` they are counted."""
        rows = sorted(self.answers, key=lambda answer: bool(answer["answered"]))
        if not rows:
            return
        columns = [name for name in rows[0] if name not in ("answered", "id", "image")]
        common.table(
            None, ["" if name in ("number", "pair") else name for name in columns] + [""],
            [[*(_cut(answer[name]) for name in columns), _verdict(answer)] for answer in rows[:ROWS]],
        )  # fmt: skip
        if len(rows) > ROWS:
            print(f"{len(rows) - ROWS} more {self.noun} not shown; --json has all")


def texts(host: Host, edit: Edit, tick: OnProgress) -> Outcome:
    """Ask the host every request of an edit, without and with it."""
    from errata import api
    from errata.types.picture import without_mark

    check = api.check_edit(host, edit, on_progress=tick)
    return Outcome(
        tuple(
            {
                "number": one.number, **({} if one.request.id is None else {"id": one.request.id}),
                "prompt": without_mark(one.request.text, one.request.image, one.request.more_images),
                **_names(one.request.pictures), "target": one.request.target, "before": one.before,
                "after": one.after, "answered": one.answered,
            }
            for one in check.requests
        ), "requests", texts=True,
    )  # fmt: skip


def _names(pictures: Sequence[Picture]) -> dict[str, list[str]]:
    """Return the files of a request's pictures as a field of its record; none for a request without pictures."""
    return {"image": [picture.name for picture in pictures]} if pictures else {}


def images(host: Host, edit: Edit, requests: Sequence[Any]) -> Outcome:
    """Classify all originals, and the changed images without and with the edit; the original's label is the target."""
    from errata.host.images import ImageHost

    assert isinstance(host, ImageHost)
    original = [label for r in requests for label in host.labels(r.original)]
    before = [label for r in requests for label in host.labels(r.changed)]
    with edit.on(host):
        after = [label for r in requests for label in host.labels(r.changed)]
    return Outcome(
        tuple(
            {"pair": str(i), "original": o, "changed, before": b, "changed, after": a, "answered": a == o}
            for i, (o, b, a) in enumerate(zip(original, before, after, strict=True), 1)
        ), "images", texts=False,
    )  # fmt: skip


@dataclass(frozen=True)
class Concepts:
    """Distances of keys and values that an edit of a text-to-image pipeline was measured by."""

    distances: tuple[Any, ...]

    @property
    def missed(self) -> list[Any]:
        """Edited phrases that are not nearer to their target than half of the way."""
        return [one for one in self.distances if one.left is not None and not one.left < 0.5]

    def counts(self) -> str:
        """Return a sentence on how many phrases are nearer to their target than half of the way."""
        total = sum(one.left is not None for one in self.distances)
        return f"with the edit {total - len(self.missed)} of {total} phrases are read as their target, or nearly so"

    def document(self, path: Path, edit: Edit) -> dict[str, Any]:
        """Return the JSON document of an edit that was written."""
        return {
            "path": str(path), "bytes": path.stat().st_size, "distances": [one.to_dict() for one in self.distances],
            "missed": len(self.missed), "edit": edit.summary(),
        }  # fmt: skip

    def show(self, path: Path, model: str) -> None:
        """Print the distances, what they are, and the counts."""
        rows = [
            (one.kind, _cut(one.phrase), "" if one.target is None else _cut(repr(one.target)),
             "" if one.left is None else f"{one.left:.3f}", f"{one.moved:.3f}") for one in self.distances
        ]  # fmt: skip
        common.table(
            "keys and values of cross-attention",
            ("", "phrase", "target", "distance left", "moved"),
            rows,
            right=(3, 4),
        )
        print(f"edit written to {path} ({common.size(path)}); the pipeline {model} is unchanged")
        print(f"{self.counts()} (distance left: 1 nothing done, 0 exact); no image was drawn")


def concepts(host: Any, edit: Edit) -> Concepts:
    """Measure how far an edit of a text-to-image pipeline moves keys and values."""
    from errata.evaluation.concepts import distances

    return Concepts(tuple(distances(host, edit)))


def report(
    outcome: Outcome | Concepts, path: Path, edit: Edit, model: str, *, json: bool, strict: bool
) -> None:
    """Print the outcome of an edit. Raises typer.Exit with code 1 if ``strict`` and an answer misses its target."""
    if json:
        common.emit(outcome.document(path, edit))
        if outcome.missed:
            print(f"warning: {outcome.counts()}", file=sys.stderr)
    else:
        outcome.show(path, model)
    if strict and outcome.missed:
        raise typer.Exit(1)


def _name(answer: dict[str, Any]) -> str:
    return str(answer.get("id") or answer.get("number") or answer["pair"])


def _verdict(answer: dict[str, Any]) -> Any:
    return common.mark("as wanted", "green") if answer["answered"] else common.mark("not as wanted", "red")


def _cut(value: Any) -> str:
    text = str(value)
    return text if len(text) <= CHARACTERS else text[: CHARACTERS - 3] + "..."
