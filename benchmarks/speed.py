"""Measure how fast errata edits, beside the least that could do and beside the plain way.

    python benchmarks/speed.py --quick            the ratios, in a few minutes on one thread
    python benchmarks/speed.py                    everything, GPT-2-small and Llama shapes
    python benchmarks/speed.py --device cuda --shape gptj --shape llama8b
    python benchmarks/speed.py --markdown docs/speed.md --json speed.json

What is measured, and what the floor is: docs/speed.md. This file plans and reports; every workload runs
in a process of its own (benchmarks/measure.py), so nothing heavy is loaded here.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- speed: begin -->", "<!-- speed: end -->"

STEPS = {"rome": 20, "memit": 25, "alphaedit": 25, "keel": 5}
FEW_STEPS = 5
"""Steps at which a quick run times the plain way."""


# --- what to run ----------------------------------------------------------------------------


def plan(shape: str, device: str, quick: bool) -> list[dict[str, Any]]:
    """List the workloads for a shape as plain data; fields as in ``measure.Task``."""
    from benchmarks.scene import LAB, SHAPES

    if shape == LAB:
        return early_stops(device)
    many = device != "cpu"
    layers = {"rome": (SHAPES[shape].rome,), "memit": SHAPES[shape].memit, "alphaedit": SHAPES[shape].memit}
    common = {"shape": shape, "device": device}

    def edit(method: str, count: int, batch: int, name: str, **more: Any) -> dict[str, Any]:
        return {
            **common, "name": name, "kind": "edit", "method": method, "count": count, "batch": batch,
            "steps": STEPS.get(method, 0), "layers": layers.get(method, ()), **more,
        }  # fmt: skip

    def plain(method: str) -> dict[str, Any]:
        scaled = f", scaled up from {FEW_STEPS} steps" if quick else ""
        return {
            **common, "name": f"{method}, plainly{scaled}", "kind": "naive", "method": method, "count": 1,
            "steps": STEPS[method], "timed": FEW_STEPS if quick else 0, "layers": layers[method],
        }  # fmt: skip

    def moments(count: int, repeats: int) -> dict[str, Any]:
        name = f"statistics of {len(layers['memit'])} layers"
        return {
            **common, "name": name, "kind": "statistics", "count": count, "repeats": repeats,
            "layers": layers["memit"],
        }  # fmt: skip

    # a random model would need other numbers of steps; five is what a trained one takes
    own = {"settings": {"stop_loss": 0.0}}
    baseline = [plain("rome"), plain("memit")]
    if quick:
        few = layers["alphaedit"][-2:]  # eigenvectors of every further layer take as long as all of ROME
        name = f"alphaedit x20 by 10, {len(few)} layers"
        return [
            edit("rome", 1, 1, "rome x1"),
            edit("memit", 10, 10, "memit x10"),
            edit("keel", 10, 10, "keel x10", **own),
            {**edit("alphaedit", 20, 10, name, sequential=True), "layers": few},
            moments(2048, 1),
            *baseline,
        ]
    large, turns = (1000, 100) if many else (100, 10)
    plans = [
        edit("rome", 5, 1, "rome x5"),
        edit("memit", 10, 10, "memit x10", repeats=3),
        edit("memit", large, large, f"memit x{large}"),
        edit("keel", 10, 1, "keel x1", **own),
        edit("keel", large, large, f"keel x{large}", **own),
        edit("alphaedit", large, turns, f"alphaedit x{large} by {turns}", sequential=True),
        edit("alphaedit", large, large, f"alphaedit x{large} by {large}"),
        moments(65536 if many else 8192, 3),
        *baseline,
    ]
    if many:
        plans.append(edit("ultraedit", 20000, 100, "ultraedit x20000 by 100", sequential=True))
    return plans


def early_stops(device: str) -> list[dict[str, Any]]:
    """List the workloads whose searches may stop early: on a trained model, at its usual settings."""
    common = {
        "kind": "edit", "shape": "lab", "device": device, "method": "memit", "count": 40, "batch": 40,
        "early": True,
    }  # fmt: skip
    stops = {"loss": "at a loss of 0.05", "top": "once the target comes first in every context"}
    return [
        {**common, "name": f"memit x40, stop {words}", "settings": {"stop": stop}}
        for stop, words in stops.items()
    ]


def spawn(task: Mapping[str, Any], threads: int) -> dict[str, Any]:
    """Run one workload in a fresh process and return its numbers, or ``missing`` if it broke."""
    quiet = {
        "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error",
        "PYTHONWARNINGS": "ignore", "TQDM_DISABLE": "1",
    }  # fmt: skip
    counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    done = subprocess.run(
        [sys.executable, __file__, "--task", json.dumps(task), "--threads", str(threads)],
        env={**os.environ, **quiet, **counts}, stdout=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        return {"task": dict(task), "missing": f"failed with exit code {done.returncode}", "broken": True}
    return json.loads(done.stdout.strip().splitlines()[-1])


def child(task: str, threads: int) -> None:
    """Run one workload here and print its numbers as one line of JSON."""
    import torch

    torch.set_num_threads(threads)
    from benchmarks import measure

    given = json.loads(task)
    given["layers"] = tuple(given.get("layers", ()))
    print(json.dumps(measure.run(measure.Task(**given))))


# --- one run --------------------------------------------------------------------------------


def write_block(path: Path, text: str) -> None:
    """Replace the marked block of a page."""
    page = path.read_text(encoding="utf-8")
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{path} has no block between {BEGIN} and {END}; expected one to put the tables in")
    path.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


def about(args: argparse.Namespace) -> dict[str, Any]:
    """Describe the machine and the run."""
    from errata.bench import machine

    seconds = "CPU seconds" if args.device == "cpu" else "wall seconds of the synchronised device"
    return {
        "processor": machine.processor(), "threads": args.threads, "device": args.device,
        "python": platform.python_version(),
        "seconds": seconds, "quick": args.quick,
    }  # fmt: skip


def main() -> int:
    """Plan, run and report; returns 1 if a workload broke."""
    from benchmarks import report
    from benchmarks.scene import LAB, SHAPES

    args = arguments([*sorted(SHAPES), LAB])
    if args.task:
        child(args.task, args.threads)
        return 0
    default = ["gpt2"] if args.quick else ["gpt2", "llama", LAB]
    if args.device != "cpu":
        default = ["gptj", "llama8b", LAB]
    results = []
    for shape in args.shape or default:
        for task in plan(shape, args.device, args.quick):
            if args.only and not any(word in task["name"] for word in args.only):
                continue
            result = spawn(task, args.threads)
            results.append(result)
            print(f"{shape}: {report.sentence(result)}", flush=True)
    machine = about(args)
    text = report.page(results, machine)
    print(f"\n{text}")
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1), encoding="utf-8")
    if args.markdown:
        write_block(args.markdown, text)
    return int(any(result.get("broken") for result in results))


def arguments(shapes: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Measure how fast errata edits.")
    parser.add_argument("--quick", action="store_true", help="few edits of one shape, a few minutes")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--shape", action="append", choices=shapes, help="model shape; may be repeated")
    parser.add_argument("--only", action="append", help="run the workloads whose names contain this")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    parser.add_argument("--markdown", type=Path, help="replace the marked block of this page")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
