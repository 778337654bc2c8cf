"""LTE: a model trained to obey updated information answers prompts behind the stored facts that are nearest to them.

Paper      Jiang et al., "Learning to Edit: Aligning LLMs with Knowledge Editing", ACL 2024, arXiv 2402.11905
Implements Alignment: fine-tuning on parallel data, queries in scope behind facts with the new answer, queries out of
           scope and free text behind facts with the model's own, and all of them without facts, with its own answer
           again. Half of the rows have the one fact; the others one or two more, near to it. Inference: the three
           nearest facts by sentence vectors stand before a query. Source of all details is the authors' code: how the
           data are mixed, the marks, LoRA of rank 8 or all weights. What the paper's text alone says is not in here
Departs    The aligned model is a change beside the host that acts where it answers; the host's weights stay (paper: the
           model itself is aligned). What the model answers without facts is asked of the host (authors' code: the old
           answer of the dataset, or GPT-4's), and free text is the host's own (authors' code: Evol-Instruct). Several
           facts stand on a line each (authors' code: numbered), without the sentence "Please acknowledge the updated
           information provided below and respond to the subsequent query." before them, which ``context`` may hold.
           The rate is constant and the best weights on held-out examples are kept (authors' code: a cosine, 3 epochs).
           The default trains on far fewer examples at a higher rate than the paper
Needs      Examples: other facts with paraphrases and neighbours; gradients. errata train makes what all fits then share
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from errata.config import positive
from errata.edits.artefact import Artefact
from errata.edits.model import SLOT, ModelEdit
from errata.host.embedding import embed
from errata.host.host import Host
from errata.methods import _other_model as other_model
from errata.methods._editor import facts_about, split, training_examples
from errata.methods._method import Method, Workspace, check_requests, notes, provenance, without
from errata.methods._scope import Retrieval, check_room, passage_router
from errata.methods._settings import at_least_zero
from errata.training.examples import Example
from errata.training.tune import Line, seeded
from errata.types import Request


@dataclass(frozen=True)
class Config(other_model.OtherModel, Retrieval):
    """Settings of LTE.

    The authors' scripts take AdamW with a rate of 3e-4, rank 8 and alpha 16, or 2e-5 and all weights, 128 rows in a
    step and 3 epochs.
    """

    context: str = "[Updated Information]:\n{fact}\n\n[Query]:\n"
    """What stands before a prompt; ``{fact}`` are the facts, one a line, the nearest first."""
    rank: int = 8
    """Rank of the changes of the model's linear maps (authors' code: 8); 0: all weights of a copy."""
    steps: int = 400
    """Steps of the training at most; 0 leaves the model as it is."""
    learning_rate: float = 3e-3
    """AdamW's (authors' code: 3e-4 with a rank, 2e-5 for all weights)."""
    facts: int = 3
    """Nearest facts that stand before a prompt at most (paper: 3)."""
    threshold: float | None = None
    """Likeness that a fact has to exceed to stand before a prompt. None: a cosine of -1, a BM25 of 0, so that every
    prompt that can gets facts."""
    alone: float = 0.5
    """Share of the rows with facts that have the example's alone (authors' code: 0.5); the others have up to ``facts``,
    each number as often."""
    near: int = 5
    """Nearest facts of other subjects from which those further ones are drawn (authors' code: 5)."""
    prompts: int = 2
    """Prompts of either sort, in scope and out of it, that are drawn from an example."""
    bare: bool = True
    """Whether each prompt is trained on without facts too, with the model's own answer."""
    texts: int = 64
    """Texts of the host's own that are trained on, behind facts and without; 0: none."""
    text_tokens: int = 48
    """Tokens of a text; the first third is the prompt."""
    answer_tokens: int = 16
    """Tokens of the model's own answers at most."""

    def problems(self) -> list[str]:
        """Check ranges."""
        complaints = positive(self, "facts", "near", "prompts", "answer_tokens")
        complaints += at_least_zero(self, "texts")
        if not 0 <= self.alone <= 1:
            complaints.append(f"alone: expected a share from 0 to 1, found {self.alone}")
        if self.text_tokens < 6:
            complaints.append(f"text_tokens: expected 6 or more, found {self.text_tokens}")
        return [*self.other_problems(), *complaints]


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> ModelEdit:
    """Return the facts of all requests so far, with the aligned model."""
    check_requests("lte", requests)
    check_room(host, "context", config.context)
    earlier: ModelEdit | None = work.after
    if config.editor is None:
        _texts(host, config, work)  # takes the earlier edit off by itself
    with without(earlier, host), seeded(host, work.seed):
        editor = other_model.editor_of("lte", host, config, work, lambda: train(host, config, work))
        facts = [other_model.fact_of(host, request) for request in requests]
        router = passage_router(
            host, facts, earlier, config.retriever, threshold=config.threshold, encoder=config.encoder
        )
    record = provenance("lte", host, requests, config, work, **notes(facts_about(editor)))
    return ModelEdit(
        (*(earlier.contexts if earlier else ()), *facts), router, provenance=record, count=config.facts,
        template=config.before(SLOT), **other_model.other_of(editor),
    )  # fmt: skip


def train(host: Host, config: Config, work: Workspace) -> Artefact:
    """Align a model on the workspace's examples."""
    examples = training_examples("lte", host, work, config.most)
    trained, held = split(examples, config.held_out)
    other = other_model.start_model(host, config)
    texts = _texts(host, config, work)
    own, spared = split(texts, config.held_out)
    lines, held_lines = (
        _lines(host, other, _rows(host, some, free, config, random.Random(f"lte {work.seed} {name}")), config)
        for name, some, free in (("trained", trained, own), ("held out", held, spared))
    )
    factors, facts = other_model.train_other(other, lines, held_lines, config, work)
    card = {"examples": len(trained), "held_out": len(held), "rows": len(lines), **facts}
    return other_model.editor_with("lte", host, other, factors, config, work, card=card)


def _texts(host: Host, config: Config, work: Workspace) -> list[str]:
    """Return texts of the host's own, written once in a workspace."""
    if not config.texts:
        return []
    return [text for text, _ in work.texts(host, config.texts, config.text_tokens, own=True)]


@dataclass(frozen=True)
class _Row:
    """A prompt behind a context; ``answer`` None: what the host answers by itself."""

    context: str
    prompt: str
    answer: str | None


def _rows(
    host: Host, examples: Sequence[Example], texts: Sequence[str], config: Config, draw: random.Random
) -> list[_Row]:
    """Return the parallel data: each prompt behind facts, and without."""
    if not examples:
        return []
    facts = [other_model.fact_of(host, example.request) for example in examples]
    vectors = embed(host, facts, encoder=config.encoder)
    rows: list[_Row] = []
    contexts: list[str] = []
    for number, example in enumerate(examples):
        order = [int(i) for i in (vectors @ vectors[number]).argsort(descending=True)]
        others = [i for i in order if examples[i].request.subject != example.request.subject][: config.near]
        more = 0 if draw.random() < config.alone else draw.randint(1, max(1, config.facts - 1))
        chosen = [number, *draw.sample(others, min(more, len(others), config.facts - 1))]
        contexts.append(config.before("\n".join(facts[i] for i in chosen)))
        inside = draw.sample(example.inside, min(config.prompts, len(example.inside)))
        outside = draw.sample(example.outside, min(config.prompts, len(example.outside)))
        rows += [_Row(contexts[-1], prompt, answer) for prompt, answer in inside]
        rows += [_Row(contexts[-1], prompt, None) for prompt in outside]
        rows += [_Row("", prompt, None) for prompt in (*(p for p, _ in inside), *outside) if config.bare]
    for text in texts:
        words = text.split(" ")
        prompt, rest = " ".join(words[: -(-len(words) // 3)]), " ".join(words[-(-len(words) // 3) :])
        if prompt.strip() and rest.strip():
            rows += [
                _Row(draw.choice(contexts), prompt, rest),
                *([_Row("", prompt, rest)] if config.bare else []),
            ]
    return rows


def _lines(host: Host, other: Host, rows: Sequence[_Row], config: Config) -> list[Line]:
    """Return rows as the aligned model reads them, with the host's own answers where there is none."""
    own = other_model.own_answers(
        host, (row.prompt for row in rows if row.answer is None), config.answer_tokens
    )
    lines = [
        other_model.line_behind(host, other, row.context, row.prompt, answer)
        for row in rows
        if (answer := own[row.prompt] if row.answer is None else row.answer)  # a host may answer nothing
    ]
    return [line for line in lines if line is not None]


METHOD = Method(
    name="lte",
    title="LTE",
    paper="Learning to Edit: Aligning LLMs with Knowledge Editing, ACL 2024, arXiv 2402.11905",
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
