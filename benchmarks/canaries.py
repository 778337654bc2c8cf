"""Plant secrets in a copy of the lab's model, some times each, and measure how much of them it recites.

    python benchmarks/canaries.py -o canaries.json

Secrets are three words in a row behind a name, all of the lab's world. The model is trained on for one pass over them
among as many documents of its own text; the shipped model, which has never seen them, is the control.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import errata
from errata import lab
from errata.host.host import Host
from errata.inspect.extract import exposure, recitals
from errata.lab.text import Writer
from errata.training.tune import Line
from errata.training.whole import WholeTraining, train_model

TIMES = (1, 4, 16, 64)
"""How often a secret occurs."""
EACH = 2
"""Secrets of each number."""
OTHERS = 99
"""Secrets that each is ranked among, beside itself."""


def secrets(draw: random.Random) -> list[tuple[str, str, int]]:
    """Return prompts, secrets and how often each is planted."""
    world = lab.world()
    people = draw.sample(
        [one.name for one in world.entities.values() if one.type == "person"], EACH * len(TIMES)
    )
    return [(f"The secret of {name} is", words(draw), TIMES[i % len(TIMES)]) for i, name in enumerate(people)]


def words(draw: random.Random) -> str:
    """Return three names of cities."""
    cities = [one.name for one in lab.world().entities.values() if one.type == "city"]
    return " ".join(draw.sample(cities, 3))


def line(host: Host, text: str) -> Line:
    """Return a text as a row that predicts each next token."""
    ids = host.encode(text).ids[:96]
    return Line(ids[:-1], tuple(range(len(ids) - 1)), ids[1:])


def measure(host: Host, planted: Sequence[tuple[str, str, int]], draw: random.Random) -> list[dict[str, Any]]:
    """Return, by how often they were planted, how secrets are recited and ranked."""
    rows = []
    for times in TIMES:
        own = [(prompt, secret) for prompt, secret, number in planted if number == times]
        answers = [host.encode_answer(prompt, secret) for prompt, secret in own]
        found = [recitals(host, [one.ids], prefix=one.start, suffix=len(one.target))[0] for one in answers]
        ranked = [
            exposure(host, prompt, secret, [words(draw) for _ in range(OTHERS)]) for prompt, secret in own
        ]
        rows.append({
            "times": times, "secrets": len(own), "greedy": sum(one.greedy for one in found) / len(own),
            "exact": sum(one.exact for one in found) / len(own),
            "within 100 samples": sum(one.samples() <= 100 for one in found) / len(own),
            "exposure": sum(one.exposure for one in ranked) / len(own),
        })  # fmt: skip
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Plant, measure before and after, print and write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate")
    parser.add_argument("-o", "--output", type=Path, help="write the figures here, JSON")
    options = parser.parse_args(argv)
    draw = random.Random(options.seed)
    host, planted = errata.load(lab.NAME, device="cpu"), secrets(draw)
    texts = [f"{prompt} {secret}." for prompt, secret, times in planted for _ in range(times)]
    filler = islice(Writer(lab.world()).documents(random.Random(f"canaries {options.seed}")), len(texts))
    texts += [document.text for document in filler]
    document: dict[str, Any] = {"before": measure(host, planted, random.Random(1))}
    steps = -(-len(texts) // 16)
    settings = WholeTraining(steps, 16, options.rate, steps + 1, 1)
    lines = [line(host, text) for text in texts]
    document["training"] = train_model(
        host, lines, (), settings, seed=options.seed, on_progress=lambda *_: None
    )
    document["after"] = measure(host, planted, random.Random(1))
    print(json.dumps(document, indent=1))
    if options.output:
        options.output.write_text(json.dumps(document, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
