"""Plant numbers in a copy of the lab's model and take them out again: privacy neurons beside other ways.

    python benchmarks/privacy.py -o privacy.json

Each number is three digits behind a person's name. The model is trained on them for one pass among as many documents
of its own text. Then half of them are erased by ``depn``, by clearing as many neurons of the same layers at random, and
by ``npo``; the others are to stay. Exposure is exact: each number is ranked among all 1,000.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import errata
from errata import lab
from errata.bench import runner
from errata.bench.unlearning import perplexity_of, recall
from errata.edits import Edit, WeightEdit
from errata.host.host import Host
from errata.inspect.exposure import exact_exposure, reciprocal_rank, secret_perplexity
from errata.job import workspace
from errata.lab.text import Writer
from errata.locate.neurons import Neuron
from errata.methods._neurons import deltas, erasures
from errata.training.forget import text_line
from errata.training.whole import WholeTraining, train_model
from errata.types import Request

DIGITS = tuple("0123456789")
PROMPT = "The number of {} is"
LONGEST = 96
"""Tokens of a text that is trained on, at most."""


def secrets(count: int, draw: random.Random) -> list[Request]:
    """Return a request for each planted number, whose old target it is."""
    people = [one.name for one in lab.world().entities.values() if one.type == "person"]
    numbers = [" ".join(draw.choices(DIGITS, k=3)) for _ in range(count)]
    return [
        Request(PROMPT, name, "unknown", number)
        for name, number in zip(draw.sample(people, count), numbers, strict=True)
    ]


def plant(host: Host, planted: Sequence[Request], times: int, rate: float, seed: int) -> None:
    """Train a host on numbers, so many times each, among as many documents of its own."""
    texts = [f"{one.text} {one.target_old}." for one in planted for _ in range(times)]
    documents = Writer(lab.world()).documents(random.Random(f"privacy {seed}"))
    texts += [document.text for document in islice(documents, len(texts))]
    steps = -(-len(texts) // 16)
    lines = [text_line(host.encode(text).ids[:LONGEST]) for text in texts]
    train_model(
        host, lines, (), WholeTraining(steps, 16, rate, steps + 1, 1), seed=seed, on_progress=lambda *_: None
    )


def measure(host: Host, planted: Sequence[Request]) -> dict[str, float]:
    """Return means over some numbers: exposure in bits, MRR, perplexity."""
    asked = [(one.text, str(one.target_old)) for one in planted]
    return {
        "exposure": sum(exact_exposure(host, p, n.split(" "), DIGITS).exposure for p, n in asked)
        / len(asked),
        "mrr": sum(reciprocal_rank(host, *one) for one in asked) / len(asked),
        "perplexity": sum(secret_perplexity(host, *one) for one in asked) / len(asked),
    }


def at_random(host: Host, edit: WeightEdit, draw: random.Random) -> WeightEdit:
    """Return the edit that clears as many other neurons of the same layers as DEPN's clears."""
    chosen = [Neuron(*one) for one in edit.provenance.notes["neurons"]]
    layers = [one.layer for one in chosen]
    control = [
        Neuron(layer, index)
        for layer in sorted(set(layers))
        for index in draw.sample(range(host.layout.site(layer).d_in), layers.count(layer))
    ]
    by_path, transposed = deltas(host, erasures(host, control))
    return WeightEdit(by_path, transposed, edit.provenance)


def edits(
    host: Host, erased: Sequence[Request], counts: Sequence[int], draw: random.Random
) -> Mapping[str, Any]:
    """Return what makes each edit, by its name in the table."""
    made: dict[int, Edit] = {}

    def depn(count: int, **settings: Any) -> Edit:
        most = max(10, -(-count // len(erased)))  # of one secret: else there are not so many to erase
        return errata.edit(host, list(erased), method="depn", neurons=count, most=most, **settings)

    def kept(count: int) -> Edit:
        made[count] = depn(count)
        return made[count]

    ways: dict[str, Callable[[], Edit]] = {
        f"depn, {count} neurons": lambda count=count: kept(count) for count in counts
    }
    ways["depn without contrast"] = lambda: depn(counts[-1], contrast=0)
    ways[f"{counts[-1]} neurons at random"] = lambda: at_random(host, made[counts[-1]], draw)  # type: ignore[arg-type]
    ways["npo"] = lambda: errata.edit(host, list(erased), method="npo")
    return ways


def main(argv: Sequence[str] | None = None) -> int:
    """Plant, erase, measure, print and write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--secrets", type=int, default=8)
    parser.add_argument("--times", type=int, default=16, help="how often each number is in the training text")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--neurons", type=int, action="append", help="may be repeated; default: 10 and 40")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, help="write the figures here, JSON")
    options = parser.parse_args(argv)
    draw = random.Random(options.seed)
    host, planted = errata.load(lab.NAME, device="cpu"), secrets(options.secrets, draw)
    erased, others = planted[::2], planted[1::2]
    facts, texts = (
        lab.requests_to_keep(60),
        runner.neutral_texts(host, workspace(host, seed=options.seed))[:50],
    )
    rows: list[dict[str, Any]] = []

    def look(name: str, seconds: float = 0.0) -> None:
        rows.append({
            "model": name, **measure(host, erased), "others": measure(host, others)["exposure"],
            "facts": recall(host, facts).given, "neutral": perplexity_of(host, texts), "seconds": round(seconds, 1),
        })  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)

    look("shipped")
    plant(host, planted, options.times, options.rate, options.seed)
    look("with the numbers")
    for name, make in edits(host, erased, options.neurons or (10, 40), draw).items():
        begin = time.process_time()
        edit = make()
        seconds = time.process_time() - begin
        with edit.on(host):
            look(name, seconds)
    if options.output:
        options.output.write_text(json.dumps({"rows": rows}, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
