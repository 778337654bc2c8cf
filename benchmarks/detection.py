"""Edit and fine-tune the lab's model, and count how often ``errata detect`` tells: a red team, on the lab alone.

    python benchmarks/detection.py -o detection.json --quick
    python benchmarks/detection.py -o detection.json --figure scores.png

Every registered weight method for causal language models makes checkpoints with some edits each; controls are trained
on text of the lab's world, whole, by low-rank changes, or in one layer, or are rounded. Facts are harmless, invented.
Rows are written as they are made, and a file that exists is continued.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch

import errata
from errata import lab
from errata.edits.weight import WeightEdit
from errata.errors import ErrataError
from errata.host.beside import start_factors
from errata.host.host import Host
from errata.inspect.detect import LEAST_SCORE, MOST_FOCUSED, detect
from errata.lab.text import Writer
from errata.methods import REGISTRY
from errata.report.detection import areas, write_scores
from errata.training.tune import Line
from errata.training.whole import WholeTraining, train_model

NAMES = 200
"""Candidate subjects beside the edited ones."""
CONTROLS = ("whole", "low rank", "one layer", "rounded")


def methods() -> list[str]:
    """Return the registered methods that write weights of the lab's model, with an editor that is shipped or none."""
    return [
        name for name in REGISTRY
        if REGISTRY.get(name).gives is WeightEdit and "causal_lm" in REGISTRY.get(name).hosts
        and (REGISTRY.get(name).train is None or lab.editor(name) is not None)
    ]  # fmt: skip


def row(host: Host, base: Host, subjects: Sequence[str], **facts: Any) -> dict[str, Any]:
    """Examine a host with and without its base, and return what was seen."""
    others = random.Random(1).sample(sorted(lab.world().by_subject), NAMES)
    names = list(dict.fromkeys([*subjects, *others]))
    with_base, alone = detect(host, base, names), detect(host, None, names)
    wanted, chance = set(subjects), max(1, len(subjects))
    ranked = [one.name for one in with_base.subjects[:chance]]
    return {
        **facts, "edits": len(subjects), "share": with_base.share,
        "ratio": with_base.subjects[0].ratio if with_base.subjects else 1.0, "changed": bool(with_base.changes),
        "alone": alone.score, "first": bool(with_base.subjects) and with_base.subjects[0].name in wanted,
        "subjects": sum(name in wanted for name in ranked) / min(chance, max(1, len(ranked))),
        "first_alone": bool(alone.subjects) and alone.subjects[0].name in wanted,
    }  # fmt: skip


def edited(host: Host, base: Host, method: str, count: int, seed: int) -> dict[str, Any]:
    """Make one edited model and examine it; a method that takes one request goes on from its own edit."""
    cases = lab.cases(count, seed=1000 + seed, together=True)
    size, edit = count if REGISTRY.get(method).batch else 1, None
    for start in range(0, count, size):
        requests = [case.request for case in cases[start : start + size]]
        edit = errata.edit(base, requests, method=method, seed=seed, after=edit)
    assert edit is not None
    with edit.on(host):
        return row(host, base, [case.request.subject for case in cases], kind=method, seed=seed)


def lines(host: Host, seed: int, count: int = 200) -> list[Line]:
    """Return documents of the lab's world, written anew, as rows that predict each next token."""
    texts = islice(Writer(lab.world()).documents(random.Random(f"control {seed}")), count)
    rows = [host.encode(document.text).ids[:96] for document in texts]
    return [Line(ids[:-1], tuple(range(len(ids) - 1)), ids[1:]) for ids in rows if len(ids) > 2]


@contextmanager
def restored(host: Host) -> Iterator[None]:
    """Give a host its weights back after the block."""
    before = {name: weight.detach().clone() for name, weight in host.model.named_parameters()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, weight in host.model.named_parameters():
                weight.copy_(before[name])


def control(host: Host, base: Host, kind: str, seed: int) -> dict[str, Any]:
    """Make one model that was trained or rounded, and examine it."""
    draw = random.Random(seed)
    settings = WholeTraining(draw.choice((5, 10, 20)), 8, draw.choice((1e-5, 1e-4, 1e-3)), 1000, 1)
    options: dict[str, Any] = {"seed": seed, "on_progress": lambda *_: None}
    with restored(host):
        if kind == "rounded":
            with torch.no_grad():
                for weight in host.model.parameters():
                    weight.copy_(weight.bfloat16())
        elif kind == "low rank":
            blocks = [f"{block}.{part}" for block in host.layout.blocks for part in ("self_attn", "mlp")]
            maps = [name for name, module in host.model.named_modules()
                    if isinstance(module, torch.nn.Linear) and name.startswith(tuple(blocks))]  # fmt: skip
            factors = start_factors(host.model, maps, lambda: host.forward(host.batch([[1, 2, 3]])), 8)
            train_model(host, lines(host, seed), (), settings, factors=factors, **options)
            with torch.no_grad():
                for name, (outer, inner) in factors.items():
                    host.model.get_parameter(f"{name}.weight").add_(outer @ inner)
        else:
            train_model(host, lines(host, seed), (), settings, **options)
            if kind == "one layer":
                keep = host.layout.site(draw.randrange(len(host.layout.blocks))).parameter
                own = dict(base.model.named_parameters())
                with torch.no_grad():
                    for name, weight in host.model.named_parameters():
                        if name != keep:
                            weight.copy_(own[name])
        return row(host, base, (), kind=f"control: {kind}", seed=seed)


def plan(options: argparse.Namespace) -> Iterator[tuple[dict[str, Any], Callable[..., Any], tuple[Any, ...]]]:
    """Yield what identifies each row, and how it is made."""
    for count in options.counts:
        for seed in options.seeds:
            for method in options.methods or methods():
                single = options.rome if method == "rome" else options.singles
                for i in range(single if count == 1 else 1):
                    number = seed + 10 * i
                    yield {"kind": method, "count": count, "seed": number}, edited, (method, count, number)
            for kind in CONTROLS if count == options.counts[0] else ():
                for i in range(options.controls):
                    number = seed + 10 * i
                    yield {"kind": f"control: {kind}", "count": 0, "seed": number}, control, (kind, number)


def document(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what the file holds: the rows, and the scores up to which and from which a model counts as edited."""
    return {"bounds": {"with": MOST_FOCUSED, "without": LEAST_SCORE}, "rows": rows}


def print_areas(rows: Sequence[dict[str, Any]]) -> None:
    """Print a table of the areas under the ROC curves, by method and number of edits, with the base and without."""
    found = areas(rows)
    counts = sorted({count for _, count in found})
    heads = [
        f"with the base: {counts[0]}",
        *map(str, counts[1:]),
        f"without: {counts[0]}",
        *map(str, counts[1:]),
    ]
    print(" | ".join(["method", *heads]))
    for method in sorted({method for method, _ in found}):
        cells = [found.get((method, count)) for count in counts]
        both = [["" if cell is None else f"{cell[side]:.2f}" for cell in cells] for side in (0, 1)]
        print(" | ".join([method, *both[0], *both[1]]))


def main(argv: Sequence[str] | None = None) -> int:
    """Make the rows that are missing, write them, print the areas under the ROC curves, and draw the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="file of rows, JSON; continued")
    parser.add_argument("--methods", nargs="*", choices=methods(), help="default: all")
    parser.add_argument("--counts", nargs="*", type=int, default=[1, 10, 100], help="edits in a model")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2], help="below 10")
    parser.add_argument("--singles", type=int, default=2, help="models with one edit, a method and seed")
    parser.add_argument("--rome", type=int, default=10, help="the same for rome")
    parser.add_argument("--controls", type=int, default=2, help="models of each control and seed")
    parser.add_argument("--quick", action="store_true", help="rome alone, one edit, one seed")
    parser.add_argument("--figure", type=Path, help="draw ROC curves and scores here, .png or .svg")
    options = parser.parse_args(argv)
    if options.quick:
        options.methods, options.counts, options.seeds, options.rome = ["rome"], [1], [1], 1
        options.controls = 1
    rows = json.loads(options.output.read_text())["rows"] if options.output.exists() else []
    rows = [one for one in rows if "failed" not in one]  # tried again: what failed may have been mended
    known = {(one["kind"], one["count"], one["seed"]) for one in rows}
    base, host = errata.load(lab.NAME, device="cpu"), errata.load(lab.NAME, device="cpu")
    for facts, make, arguments in plan(options):
        if tuple(facts.values()) in known:
            continue
        start = time.process_time()
        try:
            result = make(host, base, *arguments)
        except ErrataError as error:
            result = {**facts, "failed": str(error)}
        rows.append({**result, **facts, "seconds": round(time.process_time() - start, 2)})
        options.output.write_text(json.dumps(document(rows), indent=1))
        print(json.dumps(rows[-1]), flush=True)
    if {bool(one["count"]) for one in rows if "failed" not in one} == {True, False}:
        print_areas(rows)
    if options.figure:
        write_scores(options.figure, document(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
