"""Rank documents of the lab's training text for facts they are known to state, by every method of attribution.

    python benchmarks/attribution.py --documents 200 --facts 150 -o attribution.json

Queries are in phrasings that never occur in the text. ``named``: with the subject's name; ``alias``: with its other
name, for facts that documents state under the first name alone, so that words of the subject do not help.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

import errata
from errata import lab
from errata.inspect.attribute import GRADIENT, METHODS, Gradients, Query, ranking, scores
from errata.lab.known import stated, training_documents
from errata.lab.text import Document
from errata.lab.world import Fact, World, sentence


def queries(facts: Sequence[Fact], draw: random.Random, *, alias: bool) -> list[Query]:
    """Return a query for each fact in a held-out phrasing."""
    world = lab.world()
    result = []
    for fact in facts:
        wording = draw.choice(world.relations[fact.relation].held_out)
        name = world.names(fact.subject)[1] if alias else fact.subject
        result.append(Query(sentence(wording, name), fact.object))
    return result


def above(values: Tensor, known: Sequence[Sequence[int]], marks: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return what texts have in common with a query that stand above the first known one: shares of all of them.

    ``values`` ``[q, n]``; ``marks``: by query and text, what they share.
    """
    found: Counter[str] = Counter()
    for row, right, shared in zip(values, known, marks, strict=True):
        best = max(float(row[i]) for i in right)
        found.update(shared[i] for i, value in enumerate(row.tolist()) if value > best and i not in right)
    total = sum(found.values())
    return {name: round(count / total, 4) for name, count in sorted(found.items())} if total else {}


def shares(world: World, fact: Fact, document: Document, own: set[Fact]) -> str:
    """Return what a document has in common with a fact: the first of subject, object, relation, or nothing."""
    if any(name in document.text for name in world.names(fact.subject)):
        return "subject"
    if fact.object in document.text:
        return "object"
    return "relation" if any(one.relation == fact.relation for one in own) else "nothing"


def main(argv: Sequence[str] | None = None) -> int:
    """Rank, compare with what documents state, print and write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--documents", type=int, default=400)
    parser.add_argument("--facts", type=int, default=200)
    parser.add_argument("--loss", action="store_true", help="gradients of the loss in place of the margin")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, help="write the figures here, JSON")
    options = parser.parse_args(argv)
    world, host, draw = lab.world(), errata.load(lab.NAME, device="cpu"), random.Random(options.seed)
    documents = training_documents(options.documents)
    texts = [document.text for document in documents]
    known: dict[Fact, list[int]] = {}
    own = [stated(world, document) for document in documents]
    for i, facts_of in enumerate(own):
        for fact in facts_of:
            known.setdefault(fact, []).append(i)
    facts = sorted(known, key=lambda fact: (fact.subject, fact.relation))
    groups = {"named": draw.sample(facts, min(options.facts, len(facts)))}
    hidden = [
        fact for fact in facts
        if len(world.names(fact.subject)) > 1
        and not any(world.names(fact.subject)[1] in texts[i] for i in known[fact])
    ]  # fmt: skip
    groups["alias"] = draw.sample(hidden, min(options.facts, len(hidden)))
    gradients = Gradients(host, texts, margin=not options.loss)
    rows: list[dict[str, Any]] = []
    for group, chosen in groups.items():
        asked = queries(chosen, draw, alias=group == "alias")
        right = [known[fact] for fact in chosen]
        marks = [[shares(world, fact, *one) for one in zip(documents, own, strict=True)] for fact in chosen]
        for method in METHODS:
            start = time.process_time()
            values = scores(host, asked, texts, method, gradients=gradients if method in GRADIENT else None)
            quality = asdict(ranking(values, right))
            rows.append({"queries_by": group, "method": method, **quality, "above": above(values, right, marks),
                         "seconds": round(time.process_time() - start, 1)})  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
    if options.output:
        stating = sum(len(known[fact]) for fact in groups["named"]) / max(1, len(groups["named"]))
        document = {**vars(options), "output": None, "stating": stating, "rows": rows}
        options.output.write_text(json.dumps(document, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
