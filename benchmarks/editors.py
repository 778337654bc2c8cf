"""Measure what an edit by a trained editor costs, beside one forward and backward pass of the model.

    python benchmarks/editors.py            the lab's shipped editors, on one thread
    python benchmarks/editors.py --json editors.json

The pass is the least that fine-tuning takes for one step: the request with its target, gradients of all weights. Both
are timed on the same requests, in CPU seconds of the process, and their matrix products are counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import errata
from errata import lab
from errata.host.host import Host
from errata.types import Request

METHODS = ("mend", "malmen", "rledit")


def one_pass(host: Host, request: Request) -> None:
    """Run forward and backward, for the gradients of all weights."""
    answer = host.encode_answer(request.text, request.target)
    at = torch.arange(answer.start - 1, len(answer.ids) - 1)
    with torch.enable_grad():
        logits = host.forward_at(host.batch([answer.ids[:-1]]), torch.zeros_like(at), at)
        functional.cross_entropy(logits.float(), torch.tensor(answer.target), reduction="sum").backward()
    host.model.zero_grad(set_to_none=True)


def cost(run: Callable[[Request], object], requests: Sequence[Request]) -> tuple[float, float]:
    """Return the median CPU seconds of a run, and the mean floating-point operations of its matrix products."""
    run(requests[0])  # what is made once
    seconds = []
    for request in requests:
        begin = time.process_time()
        run(request)
        seconds.append(time.process_time() - begin)
    with FlopCounterMode(display=False) as counter:
        for request in requests:
            run(request)
    return statistics.median(seconds), counter.get_total_flops() / len(requests)


def measure(count: int) -> list[dict[str, Any]]:
    """Return a row for the pass, and one for each method."""
    host = lab.load(device="cpu")
    requests = [case.request for case in lab.cases(count, seed=6015, world=lab.world_of("test"))]
    base = cost(lambda request: one_pass(host, request), requests)
    rows = [{"name": "forward and backward", "seconds": base[0], "operations": base[1]}]
    for method in METHODS:
        job = errata.prepare(host, requests, method=method)
        seconds, operations = cost(lambda request, job=job: job.fit([request]), requests)
        rows.append({"name": method, "seconds": seconds, "operations": operations})
    for row in rows:
        row["times"], row["times_operations"] = row["seconds"] / base[0], row["operations"] / base[1]
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=20, help="requests")
    parser.add_argument("--json", type=Path, help="write the rows to a file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(options.count)
    for row in rows:
        print(
            f"{row['name']:22} {1000 * row['seconds']:8.1f} ms {row['times']:6.2f}   "
            f"{row['operations'] / 1e6:9.1f} MFLOP {row['times_operations']:6.2f}"
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
