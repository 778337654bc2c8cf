"""Forget 1, 5 and 10 % of the lab's subjects by each unlearning method, beside a model that was trained without them.

    python benchmarks/unlearning.py --subjects 9 --subjects 44 -o unlearning.json
    errata lab train out/without-87 --precision float32 --without lab:forget:87
    python benchmarks/unlearning.py --subjects 87 --reference out/without-87/model -o unlearning.json

All facts about the first N subjects of ``lab:forget:N`` are forgotten in one fit with a method's defaults, and 100
facts about others are to be kept. A row is written as soon as it is measured, and rows that the file has are not
measured again. A reference must lack just the subjects that are forgotten. ``--picture`` draws the file.
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
from errata.bench.forgetting import lab_task, measure, measure_reference
from errata.methods import REGISTRY
from errata.report.unlearning import write_unlearning

SIZES = (9, 44, 87)
"""1, 5 and 10 % of the subjects."""


def methods() -> list[str]:
    """Return the registered methods that forget."""
    return [name for name in REGISTRY if REGISTRY.get(name).forgets]


def rows(document: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return a line a row, as text: subjects, method, and without and with the edit what is measured."""
    found: list[tuple[str, ...]] = []
    for row in document["rows"]:
        quality = row["forget_quality"]
        found.append((
            str(row["subjects"]), row["method"], f"{row['edited']['given']:.3f}", f"{row['reworded'][1]['given']:.3f}",
            f"{row['edited']['probability']:.4f}", f"{row['kept']:.3f}", f"{row['perplexity'][1]:.3f}",
            f"{row['verbatim'][1]:.3f}", f"{row['knowledge'][1]:.3f}",
            "" if quality is None else f"{quality[1]:.2g}",
            "" if row["leakage"] is None else f"{row['leakage'][1]:.0f}", f"{row['seconds']:.0f}",
        ))  # fmt: skip
    return found


HEAD = (
    "subjects", "method", "given", "in other words", "probability", "kept", "perplexity", "verbatim", "knowledge",
    "forget quality", "leakage, %", "s",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the file lacks, print and write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        "--subjects", type=int, action="append", help="how many; may be repeated; default: 9, 44, 87"
    )
    parser.add_argument("--method", action="append", help="may be repeated; default: all that forget")
    parser.add_argument("--reference", help="a model that was trained without the subjects")
    parser.add_argument("--picture", type=Path, help="draw the figures, .png or .svg")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("unlearning.json"), help="the figures, JSON"
    )
    options = parser.parse_args(argv)
    document: dict[str, Any] = {"rows": [], "references": {}}
    if options.output.exists():
        document = json.loads(options.output.read_text(encoding="utf-8"))
    host = errata.load(lab.NAME, device="cpu")
    reference = None if options.reference is None else errata.load(options.reference, device="cpu")
    for subjects in options.subjects or SIZES:
        task = lab_task(subjects)
        if reference is not None:
            document["references"][str(subjects)] = measure_reference(reference, task)
        for method in options.method or methods():
            there = [
                one for one in document["rows"] if (one["subjects"], one["method"]) == (subjects, method)
            ]
            if any(reference is None or one["forget_quality"] is not None for one in there):
                continue
            row = {"subjects": subjects, **measure(host, task, method, reference=reference)}
            document["rows"] = [one for one in document["rows"] if one not in there] + [row]
            options.output.write_text(json.dumps(document, indent=1), encoding="utf-8")
            print(" | ".join(rows({"rows": [row]})[0]), flush=True)
    print("\n".join(" | ".join(line) for line in (HEAD, *rows(document))))
    if options.picture:
        write_unlearning(options.picture, document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
