"""Steer the lab's model to write questions, by every steering method, and show what strength buys and costs.

    python benchmarks/steering.py -o steering.json --figure steering.png

Pairs are about different people in blocks that share none. On the first block a method is fitted and its strength
chosen under the perplexity limit, on people that the fit has not seen; with that strength it is fitted on each of the
other blocks and measured on unseen people there. What is written is scored by the lab's grammar. Rows are written as
they are made, and a file that exists is continued.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import errata
from errata import lab
from errata.edits.steer import SteerEdit
from errata.evaluation.steering import Gauge, Material, calibrate
from errata.host.host import Host
from errata.lab.steering import Scorer, contrast_pairs
from errata.methods import REGISTRY
from errata.types import Contrasts

TASK = "questions"
STRENGTHS = (0.25, 0.5, 1.0, 2.0)
"""Times a method's own strength."""
READ = {"alone": True, "behind": "\n"}
"""Where the model decides how to go on is the end of the line, and answers alone tell the styles apart."""
SETTINGS: dict[str, dict[str, Any]] = {
    "caa": {**READ, "positions": "last"},
    "repe": {**READ, "positions": "last"},
    "iti": {**READ, "positions": "last", "strength": 5.0},
    "angular": {**READ, "positions": "last"},
    "conceptor": {"positions": "last", "poles": "contrast"},
    "loreft": {"steps": 3, "learning_rate": 0.02, "layers": [2, 3]},
    "reps": {"steps": 1, "learning_rate": 0.05, "positions": "last"},
}
"""Settings that differ from the defaults."""
SETS = ("blocks", "size", "held", "texts", "tokens", "limit")
"""Options that rows depend on; a file is continued with the same ones only."""


def methods() -> list[str]:
    """Return the steering methods that need no file."""
    return [name for name in REGISTRY if REGISTRY.get(name).takes == "contrasts" and name != "sae"]


class Block:
    """Pairs about people who are in no other block: some to fit on, the others to measure on."""

    def __init__(self, host: Host, number: int, options: argparse.Namespace) -> None:
        first = number * options.size
        pairs = contrast_pairs(limit=first + options.size)[first:]
        self.fitted = Contrasts(TASK, tuple(pairs[options.held :]))
        held = Contrasts(TASK, tuple(pairs[: options.held]))
        texts = lab.neutral_texts(options.texts, seed=number)
        self.gauge = Gauge(host, Material(held, texts, Scorer(), options.tokens))


def run(host: Host, method: str, blocks: list[Block], limit: float) -> list[dict[str, Any]]:
    """Return a method's rows: the sweep of the first block, and one of each other block."""
    rows: list[dict[str, Any]] = []
    chosen = 0.0
    for number, block in enumerate(blocks):
        began = time.process_time()
        edit = errata.edit(host, block.fitted, method=method, **SETTINGS.get(method, {}))
        seconds = time.process_time() - began
        assert isinstance(edit, SteerEdit)
        facts = {"method": method, "block": number, "fit_seconds": round(seconds, 2), "bytes": edit.size}
        if number == 0:
            strengths = [s * edit.strength for s in STRENGTHS if s <= 1 or not edit.bounded]
            _, sweep = calibrate(block.gauge, edit, strengths=strengths, limit=limit, refine=3)
            chosen = sweep.chosen
            rows.append({**facts, **sweep.to_dict()})
        else:
            measured = block.gauge.at(edit, chosen)
            rows.append({**facts, "base": asdict(block.gauge.base), "steered": asdict(measured)})
    return rows


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the board: means over the blocks on which nothing was chosen."""
    lines = [
        "| method | strength | concept | instruction | fluency | overall | perplexity | KL | fit, CPU s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    shown = [row for row in rows if row["block"]]
    names = list(dict.fromkeys(row["method"] for row in shown))

    def line(name: str, points: list[dict[str, Any]], strength: str, seconds: str) -> str:
        mean = {key: sum(p[key] for p in points) / len(points) for key in points[0]}
        scores = " | ".join(f"{mean[key]:.2f}" for key in ("concept", "instruction", "fluency", "overall"))
        return f"| {name} | {strength} | {scores} | {mean['perplexity']:.2f} | {mean['divergence']:.3f} | {seconds} |"

    if shown:
        first = [row for row in shown if row["method"] == names[0]]
        lines.append(line("none", [row["base"] for row in first], "", ""))
    for name in names:
        own = [row for row in shown if row["method"] == name]
        seconds = sum(row["fit_seconds"] for row in own) / len(own)
        points = [row["steered"] for row in own]
        lines.append(line(f"`{name}`", points, f"{points[0]['strength']:g}", f"{seconds:.1f}"))
    return lines


def earlier_rows(file: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of a file that is continued; none where there is no file.

    Raises SystemExit for one made with other settings, or that names none.
    """
    if not file.exists():
        return []
    document = json.loads(file.read_text())
    found = document.get("settings")
    if found != settings:
        raise SystemExit(f"{file} was made with the settings {found}, expected {settings}: name another file")
    return document["rows"]


def main(words: list[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file of rows")
    parser.add_argument("--methods", nargs="*", default=None, help="default: all that need no file")
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--size", type=int, default=64, help="pairs of a block")
    parser.add_argument("--held", type=int, default=16, help="of these, pairs to measure on")
    parser.add_argument("--texts", type=int, default=16, help="neutral texts")
    parser.add_argument("--tokens", type=int, default=24, help="of a text that is written")
    parser.add_argument(
        "--limit", type=float, default=1.2, help="perplexity allowed, of the unsteered model's"
    )
    parser.add_argument("--figure", type=Path, help="draw the sweeps to a .png or .svg file")
    options = parser.parse_args(words)
    settings = {name: getattr(options, name) for name in SETS}
    rows = earlier_rows(options.output, settings)
    host = errata.load("lab")
    blocks: list[Block] = []
    for method in options.methods or methods():
        if any(row["method"] == method for row in rows):
            continue
        blocks = blocks or [Block(host, number, options) for number in range(options.blocks)]
        rows += run(host, method, blocks, options.limit)
        document = {"task": TASK, "limit": options.limit, "settings": settings, "rows": rows}
        options.output.write_text(json.dumps(document, indent=1) + "\n")
        print(f"{method}: {rows[-1].get('steered', rows[-1])}", file=sys.stderr)
    print("\n".join(table(rows)))
    if options.figure is not None:
        from errata.report.steering import write_sweeps

        write_sweeps(options.figure, json.loads(options.output.read_text()))


if __name__ == "__main__":
    main()
