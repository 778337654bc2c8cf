"""KAFT: a model trained to follow relevant contexts and to ignore others answers prompts with the nearest fact.

Paper      Li et al., "Large Language Models with Controllable Working Memory", Findings of ACL 2023, arXiv 2211.05110
Implements Sec. 4: training on a mixture of contexts: one that states the answer; one that states another answer, which
           is then the label; one about something else, easy (another example's) or hard (the example's, for a prompt
           that it must not change), and none, where the label is what the model answers by itself before training
Departs    Contexts are statements (paper: passages of question answering datasets). The model is a copy beside the
           host, which answers for it: the host's weights stay (paper: the model itself is trained; no code is
           published). As an editor the fact most like a prompt stands before it, whatever the likeness: the training
           is to keep the other answers. Rewrite is then the paper's controllability, what is kept its robustness
Needs      Examples: other facts with paraphrases and neighbours; gradients. errata train makes what all fits then share
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from errata.config import positive
from errata.edits.artefact import Artefact
from errata.edits.model import ModelEdit
from errata.host.host import Host
from errata.methods import _other_model as other_model
from errata.methods._editor import facts_about, split, training_examples
from errata.methods._method import Method, Workspace, check_requests, notes, provenance, without
from errata.methods._scope import Retrieval, passage_router
from errata.methods._settings import at_least_zero
from errata.training.examples import Example
from errata.training.tune import Line, seeded
from errata.types import Request
from errata.writing import statement


@dataclass(frozen=True)
class Config(other_model.OtherModel, Retrieval):
    """Settings of KAFT."""

    threshold: float | None = None
    """Likeness that a fact has to exceed to stand before a prompt. None: a cosine of -1, a BM25 of 0, so that every
    prompt that can gets a fact."""
    prompts: int = 2
    """Prompts of either sort, in scope and out of it, that are drawn from an example."""
    counterfactual_weight: float = 1.0
    """How often a context states another answer, to the others below; drawn in proportion."""
    relevant_weight: float = 1.0
    """How often it states the old answer, for examples that have one."""
    irrelevant_weight: float = 1.0
    """How often it is another example's."""
    hard_weight: float = 1.0
    """How often it is the example's own, for a prompt that it must not change."""
    empty_weight: float = 1.0
    """How often there is none."""
    answer_tokens: int = 16
    """Tokens of the model's own answers at most."""

    def problems(self) -> list[str]:
        """Check ranges."""
        weights = (
            "counterfactual_weight",
            "relevant_weight",
            "irrelevant_weight",
            "hard_weight",
            "empty_weight",
        )
        complaints = [*positive(self, "prompts", "answer_tokens"), *at_least_zero(self, *weights)]
        return [*self.other_problems(), *complaints]


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> ModelEdit:
    """Return the facts of all requests so far, with the model that answers."""
    check_requests("kaft", requests)
    earlier: ModelEdit | None = work.after
    with without(earlier, host), seeded(host, work.seed):
        editor = other_model.editor_of("kaft", host, config, work, lambda: train(host, config, work))
        facts = [other_model.fact_of(host, request) for request in requests]
        router = passage_router(
            host, facts, earlier, config.retriever, threshold=config.threshold, encoder=config.encoder
        )
    contexts = (*(earlier.contexts if earlier else ()), *(config.before(fact) for fact in facts))
    record = provenance("kaft", host, requests, config, work, **notes(facts_about(editor)))
    return ModelEdit(contexts, router, provenance=record, **other_model.other_of(editor))


def train(host: Host, config: Config, work: Workspace) -> Artefact:
    """Train the other model on contexts of all sorts, made of the workspace's examples."""
    examples = training_examples("kaft", host, work, config.most)
    trained, held = split(examples, config.held_out)
    other = other_model.start_model(host, config)
    lines, held_lines = (
        _lines(host, other, some, config, random.Random(f"kaft {work.seed} {name}"))
        for name, some in (("trained", trained), ("held out", held))
    )
    factors, facts = other_model.train_other(other, lines, held_lines, config, work)
    card = {"examples": len(trained), "held_out": len(held), "rows": len(lines), **facts}
    return other_model.editor_with("kaft", host, other, factors, config, work, card=card)


@dataclass(frozen=True)
class _Row:
    """A prompt behind a context; ``answer`` None: what the host answers by itself."""

    context: str
    prompt: str
    answer: str | None


def _lines(
    host: Host, other: Host, examples: Sequence[Example], config: Config, draw: random.Random
) -> list[Line]:
    """Return rows of all sorts, as the other model reads them."""
    rows = [row for example in examples for row in _rows(host, example, examples, config, draw)]
    own = other_model.own_answers(
        host, (row.prompt for row in rows if row.answer is None), config.answer_tokens
    )
    lines = [
        other_model.line_behind(host, other, row.context, row.prompt, answer)
        for row in rows
        if (answer := own[row.prompt] if row.answer is None else row.answer)  # a host may answer nothing
    ]
    return [line for line in lines if line is not None]


def _rows(
    host: Host, example: Example, examples: Sequence[Example], config: Config, draw: random.Random
) -> list[_Row]:
    """Return rows of one example, each sort as often as its weight says."""
    request, fact = example.request, config.before(other_model.fact_of(host, example.request))
    inside = draw.sample(example.inside, min(config.prompts, len(example.inside)))
    outside = draw.sample(example.outside, min(config.prompts, len(example.outside)))
    rest = [one for one in examples if one.request.subject != request.subject]
    sorts: list[tuple[float, list[_Row]]] = [
        (config.counterfactual_weight, [_Row(fact, prompt, answer) for prompt, answer in inside]),
        (config.hard_weight, [_Row(fact, prompt, None) for prompt in outside]),
        (config.empty_weight, [_Row("", prompt, None) for prompt in (*(p for p, _ in inside), *outside)]),
    ]
    if request.target_old is not None:
        truth = config.before(statement(request.text, request.target_old, host.prompt_format.join))
        sorts.append(
            (config.relevant_weight, [_Row(truth, prompt, request.target_old) for prompt, _ in inside])
        )
    if rest:
        strange = config.before(other_model.fact_of(host, draw.choice(rest).request))
        sorts.append((config.irrelevant_weight, [_Row(strange, prompt, None) for prompt, _ in inside]))
    largest = max((weight for weight, rows in sorts if rows), default=0.0)
    return [row for weight, rows in sorts for row in rows if largest and draw.random() < weight / largest]


METHOD = Method(
    name="kaft",
    title="KAFT",
    paper="Large Language Models with Controllable Working Memory, Findings of ACL 2023, arXiv 2211.05110",
    config=Config,
    fit=fit,
    train=train,
    undo="any",
    gives=ModelEdit,
    blind="it teaches its other model to read facts in texts",
    batch=True,
    sequential=True,
    cumulative=True,
    needs=("examples", "gradients"),
)
