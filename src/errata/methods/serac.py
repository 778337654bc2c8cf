"""SERAC: a scope classifier decides which edit a prompt is about, and another model answers with that edit before it.

Paper      Mitchell, Lin, Bosselut, Manning and Finn, "Memory-Based Model Editing at Scale", ICML 2022, arXiv 2206.06520
Implements Sec. 3.2: p(in scope) = exp(-|E(z) - E(x)|^2) for an edit z and a prompt x, the most probable edit is taken
           where that exceeds 0.5, and the counterfactual model answers its text followed by the prompt. Both are
           trained apart, on other facts: the classifier on a balanced cross-entropy, the model on -log p in scope
Departs    E is a linear map of fixed sentence vectors, the host's own by default (paper: all of DistilBERT is trained).
           The counterfactual model has the host's vocabulary and starts from the host (paper: from a smaller model,
           as counterfactual= names one). The decision is made once, at the prompt's end (authors' code: for one row at
           a time). Out of scope are prompts of the example and others' (authors' code: nearest by MiniLM)
Needs      Examples: other facts with paraphrases and neighbours; gradients. errata train makes what all fits then share
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from errata import config as settings
from errata.config import positive
from errata.edits.artefact import Artefact
from errata.edits.edit import timestamp, versions
from errata.edits.model import ModelEdit, behind_context
from errata.edits.routers._router import Router
from errata.edits.routers.classifier import Classifier
from errata.errors import ConfigError
from errata.host.embedding import embed, encoder_digest
from errata.host.host import Host
from errata.host.open import load
from errata.host.replica import configuration, model_beside, weights_of
from errata.methods._method import Method, Workspace, check_requests, notes, provenance, without
from errata.methods._scope import Scope, TextScope, scope_router
from errata.training.examples import Example, examples_of
from errata.training.scope import ScopeTraining, train_projection
from errata.training.tune import Line, seeded
from errata.training.whole import WholeTraining, train_model
from errata.types import Request
from errata.writing import statement

STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Config(TextScope):
    """Settings of SERAC."""

    editor: str | None = None
    """File of a trained editor, see errata train. None: one is trained on the examples."""
    scope: Literal["classifier"] | Scope = "classifier"
    """What decides: the trained classifier, or a router of in-context editing in its place."""
    threshold: float | None = None
    """Least probability with scope classifier (None: 0.5, as in the paper); the others as in_prompt."""
    encoder: str | None = None
    """Name or folder of the sentence encoder. None: the model's own hidden states."""
    context: str = "New fact: {fact}\n"
    """What the counterfactual model reads before a prompt; ``{fact}`` is the statement (paper: it and a space)."""
    counterfactual: str | None = None
    """Name or folder of the model, of the same vocabulary, that training starts from. None: the edited model itself."""
    consequences: bool = False
    """Whether probes of what follows from an edit are trained on as in scope (paper: in QA-hard)."""
    most: int = 1000
    """Examples that are trained on at most."""
    held_out: float = 0.1
    """Share of the examples that are held out."""
    steps: int = 300
    """Steps of the counterfactual model's training at most; 0 leaves it as it is (authors' code: until no gain)."""
    per_step: int = 16
    """Rows in a step (authors' code: 10)."""
    learning_rate: float = 1e-4
    """AdamW's for the counterfactual model (authors' code: Adam, 1e-5)."""
    every: int = 50
    """Steps between evaluations on held-out examples (authors' code: 5000)."""
    patience: int = 2
    """Evaluations without a lower loss that end training (authors' code: 8)."""
    stored: Literal["float32", "bfloat16"] = "float32"
    """Precision in which the counterfactual model is kept; bfloat16 halves the file."""
    classifier_steps: int = 3000
    """Steps of the classifier's training (authors' code: until no gain)."""
    classifier_pairs: int = 64
    """Pairs in scope, and as many out of it, in a step (authors' code: 10)."""
    classifier_rate: float = 5e-3
    """AdamW's for the classifier (authors' code: 1e-5)."""
    classifier_width: int = 128
    """Numbers that a sentence vector is mapped to."""
    hard: float = 0.6
    """Share of the pairs out of scope that ask what the example must not change (authors' code: 0.5)."""

    def problems(self) -> list[str]:
        """Check ranges."""
        complaints = positive(
            self, "most", "per_step", "learning_rate", "every", "patience", "classifier_steps", "classifier_pairs",
            "classifier_rate", "classifier_width",
        )  # fmt: skip
        if self.steps < 0:
            complaints.append(f"steps: expected 0 or more, found {self.steps}")
        if not 0 <= self.held_out < 1 or not 0 <= self.hard <= 1:
            complaints.append("held_out, hard: expected shares from 0 to 1, held_out below 1")
        if "{fact}" not in self.context:
            complaints.append("context: expected a text with {fact}")
        return [*complaints, *self.scope_problems()]


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> ModelEdit:
    """Return the requests as texts, with the classifier and the model that answers."""
    check_requests("serac", requests)
    earlier: ModelEdit | None = work.after
    old = [r for r in earlier.provenance.requests if isinstance(r, Request)] if earlier else []
    with without(earlier, host), seeded(host, work.seed):
        editor = _editor(host, config, work)
        if earlier is not None and earlier.provenance.notes.get("editor") != editor.digest:
            raise ConfigError(
                f"the earlier edit was made with editor {earlier.provenance.notes.get('editor')}, this one with "
                f"{editor.digest}"
            )
        texts = [statement(r.text, r.target, host.prompt_format.join) for r in requests]
        router, module = _router(host, [*old, *requests], texts, earlier, editor, config, work)
    contexts = (
        *(earlier.contexts if earlier else ()),
        *(config.context.replace("{fact}", text) for text in texts),
    )
    if config.scope == "always":
        contexts = ("".join(contexts),)
    losses = {k: v for k, v in editor.card.items() if isinstance(v, float)}
    record = provenance("serac", host, requests, config, work, **notes({"editor": editor.digest, **losses}))
    weights = {n.removeprefix("model."): t for n, t in editor.tensors.items() if n.startswith("model.")}
    return ModelEdit(contexts, router, editor.body["config"], weights, record, module)


def _router(
    host: Host, requests: Sequence[Request], texts: Sequence[str], earlier: ModelEdit | None, editor: Artefact,
    config: Config, work: Workspace,
) -> tuple[Router, str]:  # fmt: skip
    before = earlier.router if earlier is not None else None
    if config.scope != "classifier":
        return scope_router(host, requests, earlier, config.scope, config, work, encoder=config.encoder)
    if before is not None and not isinstance(before, Classifier):
        raise ConfigError(f"scope: the earlier edit has a {before.name} router; go on with the same one")
    projection = editor.tensors["projection"]
    encoder = editor.body["encoder"]
    keys = embed(host, texts, encoder=encoder) @ projection.mT
    keys = keys if before is None else torch.cat([before.keys, keys])
    threshold = 0.5 if config.threshold is None else config.threshold
    return Classifier(keys, projection, threshold, encoder, encoder_digest(host, encoder)), ""


def _editor(host: Host, config: Config, work: Workspace) -> Artefact:
    """Return the editor that a file holds, or one that is trained on the examples, once in a workspace."""
    if config.editor is None:
        return work.remember(("serac", host.fingerprint, repr(config)), lambda: train(host, config, work))
    editor = Artefact.load(config.editor)
    editor.check("serac", host.fingerprint)
    if editor.body["context"] != config.context:
        raise ConfigError(
            f"context: the editor was trained with {editor.body['context']!r}, found {config.context!r}"
        )
    return editor


def train(host: Host, config: Config, work: Workspace) -> Artefact:
    """Train classifier and counterfactual model on the workspace's examples."""
    examples = examples_of(work.examples[: config.most], consequences=config.consequences)
    if len(examples) < 2 or not any(example.outside for example in examples):
        raise ConfigError(
            "serac needs at least two examples to be trained on, with prompts that they must not change: give a "
            "dataset or a file of cases with paraphrases and neighbours (examples=, --examples)"
        )
    held = round(config.held_out * len(examples))
    trained, kept = examples[held:], examples[:held]
    projection, scope_loss = _projection(host, trained, config, work)
    other = _start(host, config)
    plan = WholeTraining(config.steps, config.per_step, config.learning_rate, config.every, config.patience)
    facts = train_model(
        other, _lines(host, other, trained, config), _lines(host, other, kept, config), plan, seed=work.seed,
        on_progress=work.on_progress,
    )  # fmt: skip
    kind = STORED[config.stored]
    weights = {f"model.{n}": t.to(kind) if t.is_floating_point() else t for n, t in weights_of(other).items()}
    body = {"config": configuration(other), "context": config.context, "encoder": config.encoder}
    card: dict[str, Any] = {
        "settings": settings.plain(replace(config, editor=None)), "seed": work.seed, "examples": len(trained),
        "held_out": len(kept), "versions": versions(), **facts, "scope_loss": scope_loss,
    }  # fmt: skip
    return Artefact("serac", host.fingerprint, {"projection": projection, **weights}, body, card, timestamp())


def _projection(
    host: Host, examples: Sequence[Example], config: Config, work: Workspace
) -> tuple[Tensor, float]:
    facts = [statement(e.request.text, e.request.target, host.prompt_format.join) for e in examples]
    groups = [facts, *([p for p, _ in e.inside] for e in examples), *(list(e.outside) for e in examples)]
    vectors = embed(host, [text for group in groups for text in group], encoder=config.encoder)
    requests, *prompts = vectors.split([len(group) for group in groups])
    plan = ScopeTraining(
        config.classifier_width,
        config.classifier_steps,
        config.classifier_pairs,
        config.classifier_rate,
        config.hard,
    )
    return train_projection(
        requests, prompts[: len(examples)], prompts[len(examples) :], plan, seed=work.seed,
        on_progress=work.on_progress,
    )  # fmt: skip


def _start(host: Host, config: Config) -> Host:
    """Return the model that training starts from, in float32: a copy of the host's, or another of its vocabulary."""
    source = host if config.counterfactual is None else load(config.counterfactual, device="cpu")
    if source is not host and source.tokenizer.get_vocab() != host.tokenizer.get_vocab():
        raise ConfigError(f"counterfactual: {config.counterfactual} has another vocabulary than {host.name}")
    other = model_beside(host, configuration(source), weights_of(source), name="the counterfactual model")
    other.model.float()
    return other


def _lines(host: Host, other: Host, examples: Sequence[Example], config: Config) -> list[Line]:
    """Return each example's prompts in scope, behind its text as the other model reads them."""
    lines: list[Line] = []
    for example in examples:
        request = example.request
        fact = statement(request.text, request.target, host.prompt_format.join)
        context = config.context.replace("{fact}", fact)
        for prompt, answer in example.inside:
            row = host.encode_answer(prompt, answer)
            ids, inserted = behind_context(other, context, row.ids)
            first = row.start - 1 + inserted
            if first >= 0:  # else the window does not hold the prompt
                lines.append(Line(ids[:-1], tuple(range(first, len(ids) - 1)), row.target))
    return lines


METHOD = Method(
    name="serac",
    title="SERAC",
    paper="Memory-Based Model Editing at Scale, ICML 2022, arXiv 2206.06520",
    config=Config,
    fit=fit,
    train=train,
    undo="any",
    gives=ModelEdit,
    batch=True,
    sequential=True,
    cumulative=True,
    needs=("examples", "gradients"),
)
