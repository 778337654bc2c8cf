"""Compare what decides whether a memory's entry acts on a prompt: recall in scope, and how often it acts out of it.

    python benchmarks/routers.py                 100 requests of each of three draws, minutes on one thread
    python benchmarks/routers.py --count 30 --json routers.json

A memory has an entry for each request of a draw of the lab. In scope are held-out paraphrases and questions, where the
entry of the right request must act; out of scope other relations of the same subjects, the same relations of other
subjects, and texts about neither, where none may. Thresholds are calibrated on draw 1: once so that at most 5 % of the
prompts about another relation are accepted (``Router.calibrate``), once so that 95 % of those in scope are.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import errata
from errata import lab
from errata.edits.routers._router import NONE, Question, Router
from errata.edits.routers._stored import restore
from errata.edits.routers.classifier import Classifier
from errata.edits.routers.cosine import Cosine
from errata.edits.routers.cross import Cross
from errata.edits.routers.fulltext import FullText
from errata.edits.routers.gate import Gate
from errata.edits.routers.lexical import Lexical
from errata.edits.routers.radius import Radius
from errata.edits.routers.similarity import Similarity
from errata.edits.routers.statement import Statement
from errata.errors import HostError
from errata.host.embedding import embed
from errata.host.encoder import PACKAGED
from errata.host.pairs import read_pairs
from errata.locate.scope import ScopeData
from errata.methods._memory import editable_layer
from errata.methods._method import Workspace, resolve_layers, wide_layers
from errata.training.slots import last_activations
from errata.writing import statement

KINDS = {
    "paraphrase": ("paraphrase",), "question": ("question",), "same subject": ("same_subject",),
    "neighbours": ("neighbourhood",), "unrelated": (),
}  # fmt: skip
IN_SCOPE = ("paraphrase", "question")
RECALL, MOST_FALSE = 0.95, 0.05
CALIBRATED_ON = 1


class Draw:
    """Requests of the lab with prompts in and out of their scope, and what routers read of them."""

    def __init__(self, host: Any, count: int, seed: int, work: Workspace) -> None:
        self.host, self.work = host, work
        cases = lab.cases(count, seed=seed, together=True)
        self.requests = [case.request for case in cases]
        self.prompts: dict[str, list[str]] = {name: [] for name in KINDS}
        self.owners: dict[str, list[int]] = {name: [] for name in KINDS}
        for number, case in enumerate(cases):
            for probe in case.probes:
                for name, kinds in KINDS.items():
                    if probe.kind in kinds:
                        self.prompts[name].append(probe.prompt)
                        self.owners[name].append(number)
        self.prompts["unrelated"] = list(lab.neutral_texts(count, seed=seed))
        self.owners["unrelated"] = [NONE] * len(self.prompts["unrelated"])
        self._questions: dict[tuple[str, str, str | None], Question] = {}

    def question(self, name: str, module: str, encoder: str | None) -> Question:
        """Return prompts of a sort as a router sees them; states only where a module is named."""
        key = (name, module, encoder)
        if key not in self._questions:
            prompts = self.prompts[name]
            states = torch.zeros(len(prompts), 1), torch.zeros(len(prompts), 1)
            if module:
                states = last_activations(self.host, module, [self.host.encode_prompt(p) for p in prompts])
            vectors: list[Tensor] = []

            def embedded() -> Tensor:
                if not vectors:
                    vectors.append(embed(self.host, prompts, encoder=encoder))
                return vectors[0]

            self._questions[key] = Question(*states, lambda: prompts, embedded)
        return self._questions[key]

    @cached_property
    def statements(self) -> list[str]:
        """The requests with their targets, as running text."""
        return [statement(r.text, r.target, self.host.prompt_format.join) for r in self.requests]

    def keys(self, module: str) -> Tensor:
        """Return a module's input at the end of each request ``[n, d_in]``."""
        return last_activations(
            self.host, module, [self.host.encode_prompt(request.text) for request in self.requests]
        )[0]


@dataclass(frozen=True)
class Scorer:
    """A router over a draw's requests, and what it reads."""

    name: str
    build: Callable[[Draw], Sequence[Router]]
    """Of several routers the first one's score counts where all others accept."""
    module: str = ""
    encoder: str | None = None
    seen: dict[tuple[int, str], Tensor] = field(default_factory=dict[tuple[int, str], Tensor])
    """Scores that were computed already, by draw and sort."""

    def scores(self, draw: Draw, sort: str) -> Tensor:
        """Return scores of a sort's prompts ``[rows, entries]``, thresholds left out."""
        key = id(draw), sort
        if key not in self.seen:
            self.seen[key] = self._compute(draw, sort)
        return self.seen[key]

    def question(self, draw: Draw, sort: str) -> Question:
        """Return what the routers look at of a sort's prompts."""
        question, (first, *_) = draw.question(sort, self.module, self.encoder), self.build(draw)
        if not isinstance(first, Cross):
            return question
        reader = first.reader
        return replace(question, pairs=lambda facts, prompts: read_pairs(draw.host, reader, facts, prompts))

    def _compute(self, draw: Draw, sort: str) -> Tensor:
        first, *others = self.build(draw)
        question = self.question(draw, sort)
        scores = first.scores(question) + float(first.facts().get("threshold", 0.0))
        for other in others:
            scores = scores.masked_fill(other.scores(question) <= 0, -torch.inf)
        return scores


def scorers(host: Any) -> list[Scorer]:
    """List what is compared."""
    site = host.layout.site(editable_layer(host, None, 0.75)).name
    low = host.layout.site(resolve_layers(host, None, wide_layers)[0])
    gates: dict[int, tuple[Tensor, Tensor]] = {}

    def gates_of(draw: Draw) -> tuple[Tensor, Tensor]:
        if id(draw) not in gates:
            data = ScopeData(host, draw.work.tables(host), low, 8, draw.work.seed)
            found = [data.gate(request) for request in draw.requests]
            gates[id(draw)] = (
                torch.stack([one.weight for one in found]), torch.tensor([one.bias for one in found]),
            )  # fmt: skip
        return gates[id(draw)]

    def names(draw: Draw) -> Lexical:
        return Lexical(tuple(request.subject for request in draw.requests))

    def similar(encoder: str | None) -> Callable[[Draw], Similarity]:
        return lambda draw: Similarity(embed(host, draw.statements, encoder=encoder), -1.0, encoder)

    trained: dict[str, Router] = {}

    def serac(draw: Draw, classifier: str, recall: Any = "words") -> Router:
        """Return SERAC's classifier, trained once on the lab's examples, over a draw's requests."""
        if classifier not in trained:
            editor = errata.train(host, method="serac", classifier=classifier, steps=0)
            held = restore(editor.tensors, editor.body) if classifier == "cross" else None
            trained[classifier] = held or Classifier(torch.zeros(0, 1), editor.tensors["projection"])
        router = trained[classifier]
        if isinstance(router, Cross):
            phrases = subjects(draw) if recall == "names" else None
            return replace(router, statements=tuple(draw.statements), recall=recall, phrases=phrases)
        assert isinstance(router, Classifier)
        return replace(router, keys=embed(host, draw.statements) @ router.projection.mT)

    def subjects(draw: Draw) -> tuple[str, ...]:
        return tuple(request.subject for request in draw.requests)

    chosen = [
        Scorer("lexical", lambda draw: [names(draw)]),
        Scorer("statement", lambda draw: [Statement(subjects(draw), *gates_of(draw))], low.name),
        Scorer("gate, the relation alone", lambda draw: [Gate(*gates_of(draw))], low.name),
        Scorer("fulltext", lambda draw: [FullText(tuple(draw.statements))]),
        Scorer("similarity, own states", lambda draw: [similar(None)(draw)]),
        Scorer("similarity and lexical", lambda draw: [similar(None)(draw), names(draw)]),
        Scorer("cosine, GRACE's layer", lambda draw: [Cosine(draw.keys(site))], site),
        Scorer(
            "radius, GRACE's layer",
            lambda draw: [Radius(draw.keys(site), torch.zeros(len(draw.requests)))],
            site,
        ),
        Scorer("classifier, own states", lambda draw: [serac(draw, "embed")]),
        Scorer("classifier, own states, and lexical", lambda draw: [serac(draw, "embed"), names(draw)]),
        Scorer("cross, own states", lambda draw: [serac(draw, "cross")]),
        Scorer("cross, own states, by names", lambda draw: [serac(draw, "cross", "names")]),
    ]
    for encoder in PACKAGED:
        try:
            embed(host, ["a text"], encoder=encoder)
        except HostError:
            continue
        build = similar(encoder)
        chosen += [
            Scorer(f"similarity, {encoder}", lambda draw, build=build: [build(draw)], encoder=encoder),
            Scorer(
                f"similarity, {encoder}, and lexical",
                lambda draw, build=build: [build(draw), names(draw)],
                encoder=encoder,
            ),
        ]
    return chosen


def acting(scores: Tensor, threshold: float) -> Tensor:
    """Return the entry that acts on each row ``[rows]``."""
    best, entry = scores.max(1)
    return torch.where(best > threshold, entry, NONE)


def thresholds(scorer: Scorer, draw: Draw) -> dict[str, float]:
    """Return the thresholds by both rules; names alone have none, and where 95 % cannot be had it is the most."""
    if scorer.name == "lexical":
        return {"none": 0.0}
    inside = torch.cat([scorer.scores(draw, sort) for sort in IN_SCOPE])
    owners = torch.tensor([owner for sort in IN_SCOPE for owner in draw.owners[sort]])
    outside = scorer.scores(draw, "same subject").amax(1)
    first, *others = scorer.build(draw)
    if "threshold" in first.facts() and not others:
        questions = [scorer.question(draw, sort) for sort in (*IN_SCOPE, "same subject")]
        _, found = first.calibrate(joined(questions[:-1]), questions[-1], most_false=MOST_FALSE)
        least_false = found.threshold
    else:
        allowed = int(MOST_FALSE * len(outside))
        least_false = float(outside.sort(descending=True).values[allowed])
    best, entry = inside.max(1)
    right = torch.where(entry == owners, best, -torch.inf).sort(descending=True).values
    reached = right[right > -torch.inf]
    bound = float(reached[min(int(RECALL * len(right)), len(reached) - 1)])
    return {"5 % of another relation": least_false, "95 % recall": bound - 1e-6 * abs(bound)}


def joined(questions: Sequence[Question]) -> Question:
    """Return several questions as one."""
    return Question(
        torch.cat([one.inputs for one in questions]), torch.cat([one.outputs for one in questions]),
        lambda: [text for one in questions for text in one.texts()],
        lambda: torch.cat([one.vectors() for one in questions]), pairs=questions[0].pairs,
    )  # fmt: skip


def measure(scorer: Scorer, draw: Draw, threshold: float) -> dict[str, float]:
    """Return recall of each sort in scope, the share accepted of each sort out of it, and precision over all."""
    shares, right, wrong = dict[str, float](), 0, 0
    for sort in KINDS:
        entries = acting(scorer.scores(draw, sort), threshold)
        owners = torch.tensor(draw.owners[sort])
        if sort in IN_SCOPE:
            correct = entries == owners
            shares[sort] = float(correct.float().mean())
            right += int(correct.sum())
            wrong += int(((entries != NONE) & ~correct).sum())
        else:
            shares[sort] = float((entries != NONE).float().mean())
            wrong += int((entries != NONE).sum())
    return {**shares, "precision": right / max(1, right + wrong)}


def main() -> None:
    """Print a table for each rule and draw."""
    parser = argparse.ArgumentParser(description="Compare routers of memories on the lab.")
    parser.add_argument("--count", type=int, default=100, help="requests of a draw (100)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 2], help="draws that are shown (0 2)")
    parser.add_argument("--only", default="", help="scorers whose names begin with this")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    host = errata.load(lab.NAME)
    work = Workspace()
    calibration = Draw(host, options.count, CALIBRATED_ON, work)
    shown = {seed: Draw(host, options.count, seed, work) for seed in options.seeds}
    rows: list[dict[str, Any]] = []
    print("| scorer | threshold so that | draw | threshold |", " | ".join([*KINDS, "precision"]), "|")
    print("|---" * (len(KINDS) + 5) + "|")
    for scorer in (one for one in scorers(host) if one.name.startswith(options.only)):
        for rule, threshold in thresholds(scorer, calibration).items():
            for seed, draw in shown.items():
                found = measure(scorer, draw, threshold)
                rows.append(
                    {"scorer": scorer.name, "rule": rule, "draw": seed, "threshold": threshold, **found}
                )
                numbers = " | ".join(f"{value:.3f}" for value in found.values())
                print(f"| {scorer.name} | {rule} | {seed} | {threshold:.3f} | {numbers} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
