"""Plant a bias in a copy of the lab's model, take it out by LSDM and DAMA, and measure both on people held out.

    python benchmarks/bias.py -o bias.json --seed 1

The pronoun after a person follows the first name (:mod:`errata.lab.biased`). Methods are fitted on some people of the
sentences that planted it, LSDM with the first name as the subject, and measured on people who occur in none of them;
facts are the lab's. The methods' defaults were chosen with seed 0.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import errata
from errata import lab
from errata.data.sets.professions import SENTENCES
from errata.evaluation import debiasing
from errata.host.host import Host
from errata.lab import biased
from errata.lab.text import Writer
from errata.types import Request

METHODS = ("dama", "lsdm")
FITTED, HELD, FACTS = 80, 60, 60
"""How many people a method is fitted on, and how many people and facts it is measured on."""


def facts(seed: int) -> list[Request]:
    """Return facts of the lab, in phrasings that its text uses."""
    world = lab.world()
    draw, writer = random.Random(f"bias facts {seed}"), Writer(world)
    return [
        Request(draw.choice(writer.wordings(one.relation)).replace("{s}", "{}"), one.subject, one.object)
        for one in draw.sample(world.facts, FACTS)
    ]


QUICK = {"dama": {"contexts": 0}, "lsdm": {"contexts": 0, "tokens": 15_000}}
"""Settings other than the defaults, which cost more."""


def prompts(method: str, seed: int) -> debiasing.Prompts:
    """Return what an edit is fitted on and measured on: people of the sentences, and those of none."""
    draw = random.Random(f"bias people {seed}")
    fitted, held = (
        draw.sample(biased.people(planted=planted), count)
        for planted, count in ((True, FITTED), (False, HELD))
    )
    near = biased.requests(fitted, seed=seed, first=method == "lsdm")
    far = biased.requests(held, seed=seed + 1000)
    return debiasing.Prompts(("he", "she"), near, far, facts(seed), lab.neutral_texts(50))


def measure(host: Host, method: str, seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """Fit one method and measure it, with the slopes of DAMA on held-out people and on words that say a gender."""
    asked, start = prompts(method, seed), time.process_time()
    edit = errata.edit(host, asked.fitted, method=method, seed=seed, corpus=lab.corpus(), **options)
    seconds = time.process_time() - start
    slopes = debiasing.paper_scores(
        host, edit, biased.cases([one.subject for one in asked.held_out[:20]], SENTENCES[:3])
    )
    return {
        "method": method, "seed": seed, "options": options, "seconds": round(seconds, 1),
        **debiasing.measure(host, edit, asked).to_dict(), "slopes": slopes,
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Plant, edit, measure, print and write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=METHODS)
    parser.add_argument("--start", help="a folder of --save, to plant more in; default: the lab's model")
    parser.add_argument(
        "--phases", nargs="*", default=[], help="steps:rate, as 25:8e-4; default: the plant's own"
    )
    parser.add_argument("--save", type=Path, help="write the model with the bias here, a folder")
    parser.add_argument("-o", "--output", type=Path, help="write the figures here, JSON")
    options = parser.parse_args(argv)
    phases = tuple((int(steps), float(rate)) for steps, rate in (one.split(":") for one in options.phases))
    plant = biased.Plant(seed=options.seed, phases=phases or biased.Plant.phases)
    host = errata.load(options.start or lab.NAME, device="cpu")
    document: dict[str, Any] = {
        "plant": asdict(plant),
        "training": biased.plant_bias(host, plant),
        "rows": [],
    }
    if options.save:
        host.model.save_pretrained(options.save)
        host.tokenizer.save_pretrained(options.save)
    for method in options.methods:
        document["rows"].append(measure(host, method, options.seed, QUICK[method]))
        print(json.dumps(document["rows"][-1]), flush=True)
    if options.output:
        options.output.write_text(json.dumps(document, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
