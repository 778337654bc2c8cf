"""Compare attribution with training again: do scores of texts predict models that are trained without some of them?

    python benchmarks/retraining.py --facts 12 --subsets 16 -o retraining.json

The lab's model goes on training on sentences of another world, of the same grammar, which it has never read: each of
some facts is stated by one, two or three of them, the rest state others. That is a short continuation of a trained
model, not a training from the beginning. It is run on all the sentences, and on random halves of them. On the model of
all, every method scores every sentence for every fact, asked for in a phrasing that none of them has. The linear
datamodelling score (arXiv 2303.14186) of a method is Spearman's correlation, over the halves, of the fact's margin
log(p / (1 - p)) after training on a half with the sum of the scores of its sentences; the mean over facts.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import errata
from errata import lab
from errata.host.host import Host
from errata.inspect.attribute import GRADIENT, METHODS, Gradients, Query, ranking, scores
from errata.lab.text import Writer
from errata.lab.world import Fact, World, sentence
from errata.linalg import resampling

WORLD = 77
"""Seed of the world that the model has never read."""
BATCH = 6


def sentences(facts: int, others: int, seed: int) -> tuple[list[str], list[Query], list[list[int]]]:
    """Return sentences in random order, a query for each fact, and which sentences state it."""
    world, draw = World.make(WORLD), random.Random(f"errata-retraining-{seed}")
    known, writer = lab.world().entities, Writer(world)
    drawn: list[Fact] = []
    for fact in draw.sample(world.facts, len(world.facts)):
        if fact.subject not in known and all(fact.subject != one.subject for one in drawn):
            drawn.append(fact)
    asked, rest = drawn[:facts], drawn[facts : facts + others]
    texts: list[tuple[str, int | None]] = []
    for number, fact in enumerate(asked):
        wordings = writer.wordings(fact.relation)
        times = min(1 + number % 3, len(wordings))
        texts += [
            (f"{sentence(one, fact.subject)} {fact.object}.", number) for one in draw.sample(wordings, times)
        ]
    texts += [(writer.state(fact, draw), None) for fact in rest]
    draw.shuffle(texts)
    queries = [
        Query(sentence(draw.choice(world.relations[fact.relation].held_out), fact.subject), fact.object)
        for fact in asked
    ]
    stating = [[i for i, (_, own) in enumerate(texts) if own == number] for number in range(len(asked))]
    return [text for text, _ in texts], queries, stating


def train_(host: Host, texts: Sequence[str], *, epochs: int, rate: float, seed: int) -> None:
    """Train all weights on some sentences, in a random order each epoch."""
    model, draw = host.model, random.Random(seed)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    rows = [host.encode(text).ids for text in texts]
    for _ in range(epochs):
        draw.shuffle(rows)
        for first in range(0, len(rows), BATCH):
            batch = host.batch(rows[first : first + BATCH])
            logits = model(batch.ids, attention_mask=batch.mask, use_cache=False).logits[:, :-1]
            targets = batch.ids.masked_fill(batch.mask == 0, -100)[:, 1:]
            functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    for parameter in model.parameters():
        parameter.requires_grad_(False)


@torch.no_grad()
def margins(host: Host, queries: Sequence[Query]) -> Tensor:
    """Return log(p / (1 - p)) summed over each answer's tokens, float64 ``[q]``."""
    result = []
    for query in queries:
        row = host.encode_answer(query.prompt, query.answer)
        logs = host.forward(host.batch([row.ids[:-1]]))[0, row.start - 1 :].double().log_softmax(-1)
        own = logs.gather(1, torch.tensor(row.target)[:, None])[:, 0]
        result.append((own - torch.log(-torch.expm1(own.clamp_max(-1e-9)))).sum())
    return torch.stack(result)


def datamodelling(values: Tensor, halves: Tensor, truth: Tensor) -> Tensor:
    """Return Spearman's correlation for each query, float64 ``[q]``.

    ``values``: scores ``[q, n]``; ``halves``: which texts each training had ``[runs, n]``; ``truth`` ``[runs, q]``.
    """
    predicted = values.double() @ halves.double().mT  # [q, runs]
    found = [
        resampling.rank_correlation(*pair) for pair in zip(predicted, truth.mT.contiguous(), strict=True)
    ]
    return torch.tensor(found, dtype=torch.float64).nan_to_num(0.0)


def summary(
    host: Host, texts: Sequence[str], queries: Sequence[Query], stating: Sequence[Sequence[int]], halves: Tensor,
    truth: Tensor,
) -> list[dict[str, Any]]:  # fmt: skip
    """Return, by method, the linear datamodelling score with its 95 % interval over facts, and the rank of sources."""
    gradients = Gradients(host, texts)
    rows = []
    for method in METHODS:
        values = scores(host, queries, texts, method, gradients=gradients if method in GRADIENT else None)
        each = datamodelling(values, halves, truth)
        low, high = resampling.mean_interval(each)
        by_count = {}
        for count in sorted({len(own) for own in stating}):
            places = [i for i, own in enumerate(stating) if len(own) == count]
            by_count[count] = {
                **asdict(ranking(values[places], [stating[i] for i in places])),
                "lds": round(float(each[places].mean()), 4),
            }
        rows.append({
            "method": method, "lds": round(float(each.mean()), 4), "low": round(float(low), 4),
            "high": round(float(high), 4), "mrr": round(ranking(values, stating).mrr, 4), "by_count": by_count,
        })  # fmt: skip
    return rows


def effect(stating: Sequence[Sequence[int]], halves: Tensor, truth: Tensor) -> dict[int, dict[str, float]]:
    """Return, by the number of sentences in a half that state a fact, the mean margin over facts and halves."""
    found: dict[int, list[float]] = {}
    for i, own in enumerate(stating):
        for run, count in enumerate(halves[:, list(own)].sum(1).tolist()):
            found.setdefault(int(count), []).append(float(truth[run, i]))
    return {
        count: {"runs": len(one), "margin": round(sum(one) / len(one), 3)}
        for count, one in sorted(found.items())
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Train, measure, compare, print and write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--facts", type=int, default=12)
    parser.add_argument("--others", type=int, default=20, help="facts that are stated once and not asked for")
    parser.add_argument("--subsets", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, help="write the figures here, JSON")
    options = parser.parse_args(argv)
    torch.manual_seed(options.seed)
    start = time.process_time()
    host = errata.load(lab.NAME, device="cpu")
    texts, queries, stating = sentences(options.facts, options.others, options.seed)
    base = copy.deepcopy(host.model.state_dict())
    settings = {"epochs": options.epochs, "rate": options.rate}
    before = margins(host, queries)
    generator = torch.Generator().manual_seed(options.seed)
    halves = torch.stack([
        torch.randperm(len(texts), generator=generator) < len(texts) // 2 for _ in range(options.subsets)
    ])  # fmt: skip
    truth = []
    for run, half in enumerate(halves):
        host.model.load_state_dict(base)
        train_(
            host, [text for text, own in zip(texts, half.tolist(), strict=True) if own], seed=run, **settings
        )
        truth.append(margins(host, queries))
        print(
            f"half {run + 1} of {len(halves)}: {time.process_time() - start:.0f} s",
            file=sys.stderr,
            flush=True,
        )
    host.model.load_state_dict(base)
    train_(host, texts, seed=options.subsets, **settings)
    measured = torch.stack(truth)
    after = margins(host, queries)
    document = {
        **vars(options), "output": None, "texts": len(texts),
        "margin": {"before": round(float(before.mean()), 3), "after_all": round(float(after.mean()), 3)},
        "effect": effect(stating, halves, measured),
        "rows": summary(host, texts, queries, stating, halves, measured),
        "seconds": round(time.process_time() - start),
    }  # fmt: skip
    print(json.dumps(document, indent=1))
    if options.output:
        options.output.write_text(json.dumps(document, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
