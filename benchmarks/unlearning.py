"""Forget 1, 5 and 10 % of the lab's subjects by each unlearning method, beside a model that was trained without them.

    python benchmarks/unlearning.py --subjects 9 --subjects 44 -o unlearning.json
    errata lab train out/without-87 --precision float32 --without lab:forget:87
    python benchmarks/unlearning.py --only-compare --reference out/without-87/model -o unlearning.json

All facts about the first N subjects of ``lab:forget:N`` are forgotten in one fit with a method's defaults, and 100
facts about others are to be kept. A row is written as soon as it is measured, with the scores of every fact, and rows
that the file has are not measured again: with a reference they are compared with it by those scores. The reference must
lack the subjects that are forgotten, by its card, and may lack more: what is compared is about the forgotten ones, and
about others that both models were taught. ``--picture`` draws the file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import errata
from errata import lab
from errata.bench import runner
from errata.bench.forgetting import (
    RETRAINED,
    UNEDITED,
    Task,
    check_left_out,
    compare,
    kept_share,
    lab_task,
    left_out_of,
    look,
    measure,
)
from errata.bench.results import write_file
from errata.bench.unlearning import TEXTS
from errata.host.host import Host
from errata.job import workspace
from errata.methods import REGISTRY
from errata.report.unlearning import write_unlearning

SIZES = (9, 44, 87)
"""1, 5 and 10 % of the subjects."""
HEAD = (
    "subjects", "method", "given", "in other words", "probability", "kept", "perplexity", "verbatim", "knowledge",
    "s", "forget quality", "distance", "of kept", "leakage, %",
)  # fmt: skip


def methods() -> list[str]:
    """Return the registered methods that forget."""
    return [name for name in REGISTRY if REGISTRY.get(name).forgets]


def line(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what is measured of a row as text, in the order of :data:`HEAD`."""
    beside = row.get("beside", {})
    found = {
        "quality": ("forget_quality", ".2g"), "distance": ("distance", ".2f"),
        "of kept": ("kept_distance", ".2f"), "leakage": ("leakage", ".0f"),
    }  # fmt: skip
    return (
        str(row["subjects"]), row["method"], f"{row['forgotten']['given']:.3f}", f"{row['reworded']['given']:.3f}",
        f"{row['forgotten']['probability']:.4f}", f"{row['kept']:.3f}", f"{row['perplexity']:.3f}",
        f"{row['verbatim']:.3f}", f"{row['knowledge']:.3f}", f"{row['seconds']:.0f}" if "seconds" in row else "",
        *("" if beside.get(key) is None else f"{beside[key]:{form}}" for key, form in found.values()),
    )  # fmt: skip


class Board:
    """The file of figures: rows by number of subjects and name, written after each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if path.exists():
            self.rows = json.loads(path.read_text(encoding="utf-8"))["rows"]

    def get(self, subjects: int, name: str) -> dict[str, Any] | None:
        """Return a row, None where it is not measured yet."""
        key = (subjects, name)
        return next((row for row in self.rows if (row["subjects"], row["method"]) == key), None)

    def put(self, subjects: int, row: Mapping[str, Any]) -> dict[str, Any]:
        """Add a row, in place of one of its name, and write the file; a row's share of facts kept is added."""
        whole = {"subjects": subjects, **row}
        unedited = whole if row["method"] == UNEDITED else self.get(subjects, UNEDITED)
        assert unedited is not None
        whole["kept"] = kept_share(whole, unedited)
        key = (subjects, row["method"])
        self.rows = [one for one in self.rows if (one["subjects"], one["method"]) != key] + [whole]
        self.write()
        print(" | ".join(line(whole)), flush=True)
        return whole

    def write(self) -> None:
        """Write the file."""
        rows = ",\n".join(json.dumps(row, ensure_ascii=False) for row in self.rows)
        write_file(self.path, f'{{"rows": [\n{rows}\n]}}\n')


def fill(board: Board, subjects: int, names: Sequence[str], host: Host, neutral: Sequence[str]) -> None:
    """Measure the rows of methods that the board lacks, and of the model as it is."""
    task = lab_task(subjects)
    if board.get(subjects, UNEDITED) is None:
        board.put(subjects, {"method": UNEDITED, **look(host, task, neutral=neutral)})
    for name in names:
        if board.get(subjects, name) is None:
            board.put(subjects, measure(host, task, name, neutral=neutral))


def compare_all(
    board: Board, subjects: int, reference: Host, left_out: Sequence[str], neutral: Sequence[str]
) -> None:
    """Compare the board's rows of a size with a reference, which is measured where it is another than before."""
    task: Task = lab_task(subjects)
    check_left_out(task, left_out)
    own = board.get(subjects, RETRAINED)
    if own is None or own["fingerprint"] != reference.fingerprint:
        found = look(reference, task, neutral=neutral)
        names = {"fingerprint": reference.fingerprint, "left_out": len(left_out)}
        own = board.put(subjects, {"method": RETRAINED, **names, **found})
    for row in board.rows:
        if row["subjects"] == subjects:
            row["beside"] = compare(row, own, task, left_out)
    board.write()


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the file lacks, compare with a reference, print and write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        "--subjects", type=int, action="append", help="how many; may be repeated; default: 9, 44, 87"
    )
    parser.add_argument("--method", action="append", help="may be repeated; default: all that forget")
    parser.add_argument(
        "--reference", type=Path, help="folder of a lab model that was trained without the subjects"
    )
    parser.add_argument(
        "--only-compare", action="store_true", help="unlearn nothing: compare the rows that the file has"
    )
    parser.add_argument("--picture", type=Path, help="draw the figures, .png or .svg")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("unlearning.json"), help="the figures, JSON"
    )
    options = parser.parse_args(argv)
    if options.only_compare and options.reference is None:
        parser.error("--only-compare needs a --reference")
    board = Board(options.output)
    left_out = () if options.reference is None else left_out_of(options.reference)
    host = errata.load(lab.NAME, device="cpu")
    neutral = runner.neutral_texts(host, workspace(host, seed=0))[:TEXTS]
    sizes = options.subjects or SIZES
    if options.only_compare:
        there = {row["subjects"] for row in board.rows}
        sizes = [subjects for subjects in sizes if subjects in there]
    for subjects in () if options.only_compare else sizes:
        fill(board, subjects, options.method or methods(), host, neutral)
    if options.reference is not None:
        reference = errata.load(str(options.reference), device="cpu")
        for subjects in sizes:
            compare_all(board, subjects, reference, left_out, neutral)
    rows = sorted(board.rows, key=lambda row: row["subjects"])
    print("\n".join(" | ".join(one) for one in (HEAD, *(line(row) for row in rows))))
    if options.picture:
        write_unlearning(options.picture, {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
