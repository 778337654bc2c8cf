"""Measure what a memory costs: to write, when a prompt is looked up among many entries, and beside a forward pass.

    python benchmarks/memory.py --quick      few edits, each measured once, in a few minutes on one thread
    python benchmarks/memory.py              more edits
    python benchmarks/memory.py --million    a million vectors also far from the queries, wider, and around no centres

Writing: benchmarks/writing.py. Vectors are drawn around 2,000 centres, as keys of a model are; queries are near stored
vectors. The pass is that of the embedded model over 8 prompts, half of which name a subject, with a memory of 100,000
entries at one layer.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import errata
from errata.edits.edit import Provenance
from errata.edits.index import VectorIndex
from errata.edits.memory import Intervention, MemoryEdit
from errata.edits.names import NameTable
from errata.edits.routers.statement import Statement

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 256
"""Entries of a vector."""
ENTRIES = 100_000
"""Of the memory beside a forward pass."""


def names(count: int, seed: int = 0) -> list[str]:
    """Return different names of two words."""
    draw = random.Random(seed)
    letters = "bcdfghklmnprstvz", "aeiou"

    def word() -> str:
        return "".join(draw.choice(letters[i % 2]) for i in range(6)).capitalize()

    found: dict[str, None] = {}
    while len(found) < count:
        found[f"{word()} {word()}"] = None
    return list(found)


def vectors(count: int, width: int = WIDTH, *, centres: int = 2000, seed: int = 0) -> Tensor:
    """Return unit vectors around centres, without ``centres`` in all directions, ``[count, width]``."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, width, generator=generator)
    if centres:
        around = torch.randn(centres, width, generator=generator)
        noise = around[torch.randint(centres, (count,), generator=generator)] + 0.5 * noise
    return functional.normalize(noise, dim=1)


def median_ms(run: Callable[[int], Any], count: int) -> float:
    """Return the median CPU milliseconds of so many calls, each with its number."""
    seconds = []
    for number in range(count):
        start = time.process_time()
        run(number)
        seconds.append(time.process_time() - start)
    return 1000 * statistics.median(seconds)


def look_up_names(count: int) -> dict[str, Any]:
    """Look prompts up among names."""
    phrases = names(count)
    start = time.process_time()
    table = NameTable(phrases)
    made = time.process_time() - start
    prompts = [f"Where was {phrases[i * 7919 % count]} born, and who told you?" for i in range(500)]
    assert all(
        phrases[i * 7919 % count] in [phrases[n] for n in table.named(p)] for i, p in enumerate(prompts)
    )
    return {
        "entries": count,
        "made s": made,
        "ms a prompt": median_ms(lambda i: table.named(prompts[i]), 500),
    }


def look_up_vectors(
    count: int, *, exact: bool, width: int = WIDTH, centres: int = 2000, far: float = 0.32
) -> dict[str, Any]:
    """Look vectors up, all compared or those of near cells; recall against comparing all.

    ``far``: length of what is added to a stored vector to make a query; 0.32 gives a cosine of 0.95, 0.8 one of 0.78.
    """
    stored = vectors(count, width, centres=centres)
    index = VectorIndex(stored, "product", exact=count if exact else 0)
    generator = torch.Generator().manual_seed(1)
    near = stored[torch.randint(count, (500,), generator=generator)]
    noise = far / width**0.5 * torch.randn(500, width, generator=generator)
    queries = functional.normalize(near + noise, dim=1)
    start = time.process_time()
    index.nearest(queries[:1])
    made = time.process_time() - start
    expected = torch.cat([(part @ stored.mT).argmax(1) for part in queries.split(50)])
    found = torch.cat([index.nearest(queries[i : i + 1])[1] for i in range(500)])
    size = stored.numel() * stored.element_size() if exact else index.size
    return {
        "entries": count, "width": width, "made s": made,
        "ms a query": median_ms(lambda i: index.nearest(queries[i : i + 1]), 500),
        "recall@1": float((found == expected).float().mean()), "bytes an entry": size / count,
    }  # fmt: skip


def beside_a_pass() -> dict[str, Any]:
    """Compare a forward pass with a memory of many entries with one without."""
    host = errata.load("lab")
    site = host.layout.site(0)
    phrases = names(ENTRIES)
    generator = torch.Generator().manual_seed(0)
    router = Statement(
        tuple(phrases), 0.01 * torch.randn(ENTRIES, site.d_in, generator=generator), torch.ones(ENTRIES)
    )
    values = 0.01 * torch.randn(ENTRIES, site.d_out, generator=generator)
    edit = MemoryEdit(
        (Intervention(site.name, "add", {"values": values}, "last"),), router,
        Provenance("benchmark", (), {}, host.fingerprint),
    )  # fmt: skip
    prompts = [
        f"{phrases[i]} was born in the town of" if i % 2 else "The rain fell on the old road to"
        for i in range(8)
    ]
    batch = host.batch([host.encode_prompt(prompt) for prompt in prompts], side="left")
    host.forward(batch)
    before = host.forward(batch, keep=1)
    without, with_memory = [], []
    for _ in range(40):
        without.append(median_ms(lambda _: host.forward(batch, keep=1), 1))
        with edit.on(host):
            after = host.forward(batch, keep=1)
            with_memory.append(median_ms(lambda _: host.forward(batch, keep=1), 1))
    changed = [not torch.equal(after[i], before[i]) for i in range(8)]
    assert changed == [bool(i % 2) for i in range(8)]
    plain, beside = statistics.median(without), statistics.median(with_memory)
    return {
        "entries": ENTRIES, "ms without": plain, "ms with": beside, "added": beside / plain - 1,
        "bytes an entry": edit.size / ENTRIES,
    }  # fmt: skip


def main() -> None:
    """Run all workloads on one thread and print them."""
    from benchmarks.writing import writing

    parser = argparse.ArgumentParser(description="Measure what looking entries of a memory up costs.")
    parser.add_argument("--quick", action="store_true", help="few edits, each measured once")
    parser.add_argument(
        "--million", action="store_true", help="look up among more kinds of a million vectors"
    )
    parser.add_argument("--only", help="run the workloads whose names begin with this")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, dict[str, Any]] = {}

    def show(name: str, found: dict[str, Any]) -> None:
        results[name] = found
        shown = (
            f"{k} {v:,}" if isinstance(v, int) else f"{k} {v:.3g}" if isinstance(v, float) else f"{k}: {v}"
            for k, v in found.items()
        )
        print(f"{name}: {', '.join(shown)}", flush=True)

    chosen = options.only or ""
    for shape, count in (("lab", 50), ("gpt2", 20 if options.quick else 50)):
        alone, repeats = (1, 1) if options.quick else (3, 3)
        if "writing".startswith(chosen):
            for name, found in writing(shape, count, alone=alone, repeats=repeats).items():
                show(name, found)
    workloads: dict[str, Callable[[], dict[str, Any]]] = {
        "a pass of 8 prompts": beside_a_pass,
        "names": lambda: look_up_names(100_000),
        "names, a million": lambda: look_up_names(1_000_000),
        "vectors, all compared": lambda: look_up_vectors(100_000, exact=True),
        "vectors, cells": lambda: look_up_vectors(100_000, exact=False),
        "million": lambda: look_up_vectors(1_000_000, exact=False),
    }
    if options.million:
        million = 1_000_000
        workloads |= {
            "million, far queries": lambda: look_up_vectors(million, exact=False, far=0.8),
            "million, 384 wide": lambda: look_up_vectors(million, exact=False, width=384),
            "million, no centres": lambda: look_up_vectors(million, exact=False, centres=0),
        }
    for name, run in workloads.items():
        if name.startswith(chosen):
            show(name, run())
    if options.json:
        options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
