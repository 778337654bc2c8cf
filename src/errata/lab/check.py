"""Measure the lab's models: recall per relation, in-context episodes, compositions, and per layer whether an
answer can be changed at the subject's last token.

Models that answer prompts (T5, BERT) are measured by recall and compositions. Their text has no episodes, they score
no running text, and the layer test needs subject and answer in one row.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from errata.evaluation.metrics.matching import answered
from errata.evaluation.metrics.probability import perplexity
from errata.host import tokens
from errata.host.generate import generate_rows
from errata.host.host import Host
from errata.host.kinds import CAUSAL
from errata.lab.bilingual import is_taught, languages
from errata.lab.cases import neutral_texts
from errata.lab.text import Split, Writer, episode_document, episode_line
from errata.lab.world import Fact, World, default_world, sentence
from errata.locate.contexts import Context
from errata.locate.values import ValueConfig, optimise
from errata.progress import OnProgress, ignore
from errata.types import Request

BATCH_TOKENS = 16_384


@dataclass(frozen=True)
class Question:
    """A prompt with its accepted answers."""

    prompt: str
    answers: tuple[str, ...]


def check(
    host: Host, *, seed: int = 0, world: World | None = None, limit: int | None = None,
    requests: int = 24, bilingual: bool = False, tick: OnProgress = ignore,
) -> dict[str, Any]:  # fmt: skip
    """Compute every measurement of the model card that the kind of model has.

    ``limit``: maximum number of facts per wording, None: all; ``requests``: requests of the layer test;
    ``bilingual``: also recall in the second language.
    """
    world = world or default_world()
    rng = random.Random(f"errata-check-{seed}")
    facts = list(world.facts)
    if limit is not None:
        facts = rng.sample(facts, min(limit, len(facts)))
    report: dict[str, Any] = {"facts": len(facts), "seed": seed}
    report["recall"] = recall(host, world, facts, rng, tick)
    if bilingual:
        report["second_language"] = second_language(host, world, rng, tick, limit)
    if host.kind == CAUSAL:
        report["episodes"] = episodes(host, world, rng, tick)
    report["compositions"] = compositions(host, world, rng, tick)
    if host.kind == CAUSAL:
        report["perplexity"] = neutral_perplexity(host)
        report["layers"] = layers(host, world, rng, requests, tick)
    return report


def recall(
    host: Host, world: World, facts: Sequence[Fact], rng: random.Random, tick: OnProgress
) -> dict[str, Any]:
    """Return recall by free generation: overall, for facts without questions in training, and per relation."""
    wordings = {
        "seen": lambda r: r.phrasings,
        "held_out": lambda r: r.held_out,
        "question": lambda r: r.questions,
    }
    result: dict[str, Any] = {}
    for kind, of in wordings.items():
        questions = []
        for fact in facts:
            text = sentence(rng.choice(of(world.relations[fact.relation])), fact.subject)
            prompt = f"Question: {text}\nAnswer:" if kind == "question" else text
            questions.append(Question(prompt, world.names(fact.object)))
        right = ask(host, questions, f"recall {kind}", tick)
        result[kind] = share(right)
        by: dict[str, list[bool]] = {}
        for fact, ok in zip(facts, right, strict=True):
            by.setdefault(fact.relation, []).append(ok)
        result[f"{kind}_by_relation"] = {name: share(group) for name, group in sorted(by.items())}
        if kind == "question":
            never = [ok for fact, ok in zip(facts, right, strict=True) if not Split.has_questions(fact)]
            result["question_never_asked"] = share(never)
    return result


def second_language(
    host: Host, world: World, rng: random.Random, tick: OnProgress, limit: int | None = None
) -> dict[str, dict[str, float]]:
    """Return recall in the second language by wording, for subjects that its text is about and for those it is not."""
    _, second = languages(world)
    facts = rng.sample(second.facts, min(limit or len(second.facts), len(second.facts)))
    groups = {"taught": [f for f in facts if is_taught(f.subject)],
              "never_taught": [f for f in facts if not is_taught(f.subject)]}  # fmt: skip
    result: dict[str, dict[str, float]] = {}
    for name, group in groups.items():
        result[name] = {}
        for kind in ("seen", "held_out", "question"):
            questions = []
            for fact in group:
                relation = second.relations[fact.relation]
                of = {
                    "seen": relation.phrasings,
                    "held_out": relation.held_out,
                    "question": relation.questions,
                }
                text = sentence(rng.choice(of[kind]), fact.subject)
                prompt = f"Question: {text}\nAnswer:" if kind == "question" else text
                questions.append(Question(prompt, world.names(fact.object)))
            result[name][kind] = share(ask(host, questions, f"second language, {name} {kind}", tick))
    return result


def ask(host: Host, questions: Sequence[Question], what: str, tick: OnProgress) -> list[bool]:
    """Answer questions greedily in large batches; return which are right.

    A model that fills masks is given as many as the first answer has tokens.
    """
    rows = [_row(host, question) for question in questions]
    right = [False] * len(rows)
    completed = 0
    for group in tokens.by_length([[*row, *[0] * 12] for row in rows], BATCH_TOKENS):
        for i, text in zip(group, generate_rows(host, [rows[i] for i in group], 12), strict=True):
            right[i] = answered(text, questions[i].answers)
        completed += len(group)
        tick(what, completed, len(rows))
    return right


def _row(host: Host, question: Question) -> tokens.Ids:
    if not host.fills:
        return host.encode_prompt(question.prompt)
    slots = len(host.encode_answer(question.prompt, question.answers[0]).target)
    return host.encode_base(question.prompt, slots=slots)


def share(right: Sequence[bool]) -> float:
    """Return the share of true values, four digits."""
    return round(sum(right) / max(1, len(right)), 4)


def neutral_perplexity(host: Host, texts: Sequence[str] | None = None) -> float:
    """Return the perplexity per token of sentences that state no fact."""
    rows = [host.encode(text).ids for text in texts or neutral_texts(100)]
    logprob_rows = []
    for group in tokens.by_length(rows, BATCH_TOKENS):
        batch = host.batch([rows[i] for i in group])
        with torch.no_grad():
            logprobs = host.forward(batch).float().log_softmax(-1)
        of_targets = logprobs[:, :-1].gather(-1, batch.ids[:, 1:, None])[..., 0]
        logprob_rows.append(of_targets[batch.mask[:, 1:].bool()])
    return round(perplexity(torch.cat(logprob_rows)), 3)


def episodes(
    host: Host, world: World, rng: random.Random, tick: OnProgress, count: int = 300
) -> dict[str, float]:
    """Return how often a new fact in the context is used, and ignored where it is irrelevant.

    Only facts that occur in no training episode are used.
    """
    writer = Writer(world)
    fresh = [fact for fact in world.facts if not Split.in_episodes(fact)]
    questions: dict[str, list[Question]] = {"obeyed": [], "ignored": []}
    for _ in range(count):
        true_fact = rng.choice(fresh)
        new = Fact(true_fact.subject, true_fact.relation, writer.other_object(true_fact, rng))
        line = episode_line(new, writer, rng)
        other = true_fact
        while (other.subject, other.relation) == (true_fact.subject, true_fact.relation):
            other = rng.choice(rng.choice((fresh, world.by_subject[true_fact.subject])))
            if len(world.by_subject[true_fact.subject]) == 1:
                other = rng.choice(fresh)
        for kind, target in (("obeyed", new), ("ignored", other)):
            document = episode_document([line], target, writer, rng)
            assert document.loss_spans is not None
            prompt = document.text[: document.loss_spans[0][0]]
            questions[kind].append(Question(prompt, world.names(target.object)))
    return {kind: share(ask(host, group, f"episodes {kind}", tick)) for kind, group in questions.items()}


def compositions(
    host: Host, world: World, rng: random.Random, tick: OnProgress, count: int = 500
) -> dict[str, float]:
    """Return recall of compositions of two and three facts, for those in the training text and those not in it."""
    groups: dict[str, list[Question]] = {}
    for subject, chain, answer in world.chain_facts():
        training = "stated" if Split.in_training(subject, chain) else "never_stated"
        prompt = sentence(rng.choice(chain.phrasings), subject)
        groups.setdefault(f"of_{len(chain.path)}_{training}", []).append(
            Question(prompt, world.names(answer))
        )
    return {
        name: share(ask(host, rng.sample(group, min(count, len(group))), f"compositions {name}", tick))
        for name, group in sorted(groups.items())
    }


PROBE = ValueConfig(steps=60, learning_rate=0.1, clamp=3.0, decay=0.0, kl=0.0, stop_loss=0.02)
"""The layer test's search: the bare prompt only, a shift of at most three residual norms."""


def layers(
    host: Host, world: World, rng: random.Random, count: int, tick: OnProgress
) -> dict[str, list[float]]:
    """Return per layer the share of answers that a shift at the subject's last token changes.

    The shift is added to the block's output and optimised on one wording; ``rewrites`` use that wording,
    ``paraphrases`` another training wording; both begin with the subject if two wordings do.
    """
    facts = rng.sample(world.facts, count)
    trials = []
    for fact in facts:
        wordings = world.relations[fact.relation].phrasings
        leading = [w for w in wordings if w.startswith("{s} ")]
        first, second = rng.sample(leading if len(leading) > 1 else wordings, 2)
        target = Writer(world).other_object(fact, rng)
        trials.append((fact, first, second, target))
    requests = [Request(sentence(w, "{}"), f.subject, t, f.object) for f, w, _, t in trials]
    result: dict[str, list[float]] = {"rewrites": [], "paraphrases": []}
    depth = len(host.layout.blocks)
    for layer in range(depth):
        values = optimise(host, requests, [Context("", 1.0)], layer=layer, where="block_out", config=PROBE)
        hits: dict[str, list[bool]] = {"rewrites": [], "paraphrases": []}
        for (fact, first, second, target), value in zip(trials, values, strict=True):
            for kind, wording in (("rewrites", first), ("paraphrases", second)):
                text = _changes_answer(
                    host, sentence(wording, "{}"), fact.subject, target, layer, value.shift
                )
                hits[kind].append(text)
        for kind, group in hits.items():
            result[kind].append(share(group))
        tick("layers", layer + 1, depth)
    return result


def _changes_answer(
    host: Host, wording: str, subject: str, target: str, layer: int, shift: torch.Tensor
) -> bool:
    """Whether greedy decoding gives the target while a vector is added at the subject's last token."""
    from errata.host import hooks

    request = Request(wording, subject, target)
    answer = host.encode_answer(request.text, target)
    place = host.encode(request.text).last_of(*request.span)

    def push(hidden: torch.Tensor) -> torch.Tensor:
        changed = hidden.clone()
        changed[0, place] += shift.to(changed)
        return changed

    block = host.model.get_submodule(host.layout.blocks[layer])
    with torch.no_grad(), hooks.on_output(block, push):
        logits = host.forward(host.batch([answer.ids]))[0]
    # every target token is the argmax given those before it, so greedy decoding would generate the target
    best = logits[answer.start - 1 : -1].argmax(-1)
    return best.tolist() == list(answer.target)
