"""Compare the speed of two checkouts: edits and their evaluation on the embedded model, in turn, as ratios of CPU time.

    git worktree add ../before REVISION
    python benchmarks/paired.py ../before                           this checkout over the other one
    python benchmarks/paired.py ../before --method memit --pairs 40

Both run in the same interpreter's environment, each in a process of its own on one thread, and only one at a time: a
pair is the same edit by both, the order of the two changing from pair to pair. So what else the machine does hits both
alike. Where a process's memory happens to lie is worth some per cent by itself, so the processes are started anew after
a part of the pairs. Beside the median of the ratios stands its 95 % interval (order statistics of the binomial
distribution), and what does not depend on the machine: the floating-point work of both, and the calls of functions,
Python's and built-in ones, of which torch's are each an operation on tensors.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("ft", "rome", "memit", "keel", "grace")
CASES = 4
"""Of an answer of a worker: edits, each fitted and evaluated once."""


class Worker:
    """A process that edits with the code of one checkout."""

    def __init__(self, checkout: Path) -> None:
        """Start it; ``checkout``: a folder with ``src/errata``."""
        source = checkout.resolve() / "src"
        if not (source / "errata").is_dir():
            raise SystemExit(f"{checkout} has no src/errata")
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def run(self, method: str, *, count: bool = False) -> dict[str, float]:
        """Return ``seconds`` of CPU and, with ``count``, ``operations`` of ``CASES`` edits and their evaluation."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps({"method": method, "count": count}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a worker has ended; what it wrote stands above")
        return json.loads(line)

    def end(self) -> None:
        """Have it finish, and wait for that."""
        self.process.communicate()


def work() -> None:
    """Edit and evaluate as each line of standard input says, and answer with a line."""
    import cProfile
    import pstats

    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers.utils import logging

    import errata
    from errata import lab
    from errata.evaluation.observe import observe
    from errata.types import AskOptions

    logging.disable_progress_bar()
    torch.set_num_threads(1)
    host, corpus, cases = errata.load("lab", device="cpu"), lab.corpus(), lab.cases(CASES, seed=3)
    known: set[str] = set()

    def once(method: str, of: Sequence[Any]) -> None:
        for case in of:
            edit = errata.edit(host, case.request, method=method, seed=0, corpus=corpus)
            with edit.on(host):
                observe(host, list(case.probes), AskOptions(max_new_tokens=8))

    for line in sys.stdin:
        task = json.loads(line)
        if task["method"] not in known:  # statistics, caches
            once(task["method"], cases[:1])
            known.add(task["method"])
        answer: dict[str, float] = {}
        if task["count"]:
            with FlopCounterMode(display=False) as counter:
                once(task["method"], cases)
            answer["operations"] = counter.get_total_flops()
            profile = cProfile.Profile()
            profile.runcall(once, task["method"], cases)
            answer["calls"] = sum(entry[1] for entry in pstats.Stats(profile).stats.values())  # type: ignore[attr-defined]
        else:
            start = time.process_time()
            once(task["method"], cases)
            answer["seconds"] = time.process_time() - start
        print(json.dumps(answer), flush=True)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the order statistics between which the median lies with at least 95 %, or least and largest value."""
    ordered, n = sorted(values), len(values)
    below, place = 0.0, 0
    while place < n // 2 and below + math.comb(n, place) / 2**n <= 0.025:
        below += math.comb(n, place) / 2**n
        place += 1
    place = max(place - 1, 0)
    return ordered[place], ordered[n - 1 - place]


def compare(checkouts: Sequence[Path], method: str, pairs: int, starts: int) -> dict[str, Any]:
    """Return both's seconds in pairs, their ratio, first over second, and both's operations and calls."""
    counts: list[dict[str, float]] = []
    seconds: list[list[float]] = [[], []]
    for part in range(starts):
        workers = [Worker(checkout) for checkout in checkouts]
        counts = counts or [worker.run(method, count=True) for worker in workers]
        for turn, _ in enumerate(range(part, pairs, starts), part):
            for which in (0, 1) if turn % 2 else (1, 0):
                seconds[which].append(workers[which].run(method)["seconds"])
        for worker in workers:
            worker.end()
    ratios = [a / b for a, b in zip(*seconds, strict=True)]
    return {
        "method": method, "pairs": pairs, "ratio": statistics.median(ratios), "interval": interval(ratios),
        "seconds": [statistics.median(own) / CASES for own in seconds],
        "operations": [count["operations"] for count in counts], "calls": [count["calls"] for count in counts],
    }  # fmt: skip


def main() -> None:
    """Compare method after method and print a line of each."""
    parser = argparse.ArgumentParser(description="Compare the speed of two checkouts.")
    parser.add_argument("before", type=Path, nargs="?", help="the other checkout")
    parser.add_argument("--method", action="append", help=f"repeatable; default: {', '.join(METHODS)}")
    parser.add_argument("--pairs", type=int, default=20, help="of runs; default: 20")
    parser.add_argument("--starts", type=int, default=4, help="of the two processes; default: 4")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work()
        return
    if options.before is None:
        parser.error("the other checkout is missing")
    results = list[dict[str, Any]]()
    print("method   ratio, 95 % interval    CPU s an edit, here  before   operations, here / before  calls")
    for method in options.method or METHODS:
        row = compare((ROOT, options.before), method, options.pairs, options.starts)
        results.append(row)
        low, high = row["interval"]
        here, before = row["seconds"]
        work_ratio, calls_ratio = (row[key][0] / row[key][1] for key in ("operations", "calls"))
        speed = f"{row['ratio']:.3f}  {low:.3f}-{high:.3f}          {here:12.3f} {before:12.3f}"
        print(f"{method:8} {speed}     {work_ratio:.4f}                    {calls_ratio:.4f}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
