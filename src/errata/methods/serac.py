"""SERAC: a scope classifier decides which edit a prompt is about, and another model answers with that edit before it.

Paper      Mitchell, Lin, Bosselut, Manning and Finn, "Memory-Based Model Editing at Scale", ICML 2022, arXiv 2206.06520
Implements Sec. 3.2: p(in scope) = exp(-|E(z) - E(x)|^2) for an edit z and a prompt x (``embed``), or by a classifier of
           z and x read together (``cross``). The most probable edit is taken where that exceeds 0.5, and the
           counterfactual model answers its text followed by the prompt. Both are trained apart, on other facts: the
           classifier on a balanced cross-entropy, the model on -log p in scope
Departs    E is a linear map of fixed sentence vectors, the host's own by default (paper: all of DistilBERT is trained).
           ``cross`` is a head on the host as it is, which reads z and then x: p = sigmoid(b + w h - |P h|^2), h the
           mean state of z's tokens less that of x's (paper: all of DistilBERT is trained, h its first token). It reads
           only the edits nearest to a prompt (paper: all). A named cross-encoder is calibrated, not trained.
           The counterfactual model has the host's vocabulary and starts from the host (paper: from a smaller model,
           as counterfactual= names one). The decision is made once, at the prompt's end (authors' code: for one row at
           a time). Out of scope are prompts of the example and others' (authors' code: nearest by MiniLM)
Needs      Examples: other facts with paraphrases and neighbours; gradients. errata train makes what all fits then share
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from errata.config import positive
from errata.edits.artefact import Artefact
from errata.edits.model import ModelEdit
from errata.edits.routers import _stored
from errata.edits.routers._router import Router
from errata.edits.routers.classifier import Classifier
from errata.errors import ConfigError
from errata.host.embedding import embed, encoder_digest
from errata.host.host import Host
from errata.methods import _cross as cross
from errata.methods import _other_model as other_model
from errata.methods._editor import facts_about, split, training_examples
from errata.methods._method import Method, Workspace, check_requests, notes, provenance, without
from errata.methods._scope import Scope, TextScope, requests_of, scope_router
from errata.training.examples import Example
from errata.training.scope import ScopeTraining, train_projection
from errata.training.tune import Line, seeded
from errata.types import Request


@dataclass(frozen=True)
class Config(other_model.OtherModel, TextScope):
    """Settings of SERAC.

    The paper puts the fact and a space before a prompt. Its code takes Adam with a rate of 1e-5, 10 edits a step, an
    evaluation every 5,000 steps, and ends after 8 without a gain.
    """

    scope: Literal["classifier"] | Scope = "classifier"
    """What decides: the trained classifier, or a router of in-context editing in its place."""
    classifier: Literal["embed", "cross"] = "embed"
    """What the classifier sees: the sentence vectors of fact and prompt under a trained map, or both texts together
    (paper: embed, for fact-checking cross)."""
    threshold: float | None = None
    """Least probability with scope classifier (None: 0.5, as in the paper); the others as in_prompt."""
    encoder: str | None = None
    """Name or folder of the sentence encoder. None: the model's own hidden states."""
    consequences: bool = False
    """Whether probes of what follows from an edit are trained on as in scope (paper: in QA-hard)."""
    classifier_steps: int = 3000
    """Steps of the classifier's training (authors' code: until no gain)."""
    classifier_pairs: int = 64
    """Pairs in scope, and as many out of it, in a step (authors' code: 10)."""
    classifier_rate: float = 5e-3
    """AdamW's for the classifier (authors' code: 1e-5)."""
    classifier_width: int = 128
    """Rows of the trained map: of a sentence vector, or with cross of what is read of a pair."""
    hard: float = 0.6
    """Share of the pairs out of scope that ask what the example must not change (authors' code: 0.5)."""

    def problems(self) -> list[str]:
        """Check ranges."""
        names = ("classifier_steps", "classifier_pairs", "classifier_rate", "classifier_width")
        complaints = [*self.other_problems(), *positive(self, *names), *self.scope_problems()]
        if not 0 <= self.hard <= 1:
            complaints.append(f"hard: expected a share from 0 to 1, found {self.hard}")
        return complaints

    @property
    def classifier_training(self) -> ScopeTraining:
        """How the classifier is trained."""
        return ScopeTraining(
            self.classifier_width, self.classifier_steps, self.classifier_pairs, self.classifier_rate, self.hard
        )  # fmt: skip


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> ModelEdit:
    """Return the requests as texts, with the classifier and the model that answers."""
    check_requests("serac", requests)
    _check_pictures(requests, config)
    earlier: ModelEdit | None = work.after
    with without(earlier, host), seeded(host, work.seed):
        editor = other_model.editor_of("serac", host, config, work, lambda: train(host, config, work))
        facts = [other_model.fact_of(host, request) for request in requests]
        router, module = _router(
            host, [*requests_of(earlier), *requests], facts, earlier, editor, config, work
        )
    contexts = (*(earlier.contexts if earlier else ()), *(config.before(fact) for fact in facts))
    if config.scope == "always":
        contexts = ("".join(contexts),)
    record = provenance("serac", host, requests, config, work, **notes(facts_about(editor)))
    return ModelEdit(contexts, router, provenance=record, module=module, **other_model.other_of(editor))


def _check_pictures(requests: Sequence[Request], config: Config) -> None:
    """Raise ConfigError for settings that compare or read texts alone, where a request is beside a picture."""
    if all(request.image is None for request in requests):
        return
    scopes = ("classifier", "similar", "always")
    if config.scope not in scopes or (config.scope == "classifier" and config.classifier == "cross"):
        raise ConfigError(
            "scope: for requests beside pictures it has to be decided by sentence vectors, which the host makes of "
            "pictures too: classifier (with classifier=embed) or similar; the others read facts as texts"
        )
    if config.encoder is not None and config.scope != "always":
        raise ConfigError(
            "encoder: a sentence encoder reads no pictures; leave it out for requests beside them"
        )
    if config.counterfactual is not None:
        raise ConfigError(
            "counterfactual: for requests beside pictures it has to be the model itself, which its processor is for"
        )


def _router(
    host: Host, requests: Sequence[Request], texts: Sequence[str], earlier: ModelEdit | None, editor: Artefact,
    config: Config, work: Workspace,
) -> tuple[Router, str]:  # fmt: skip
    before = earlier.router if earlier is not None else None
    if config.scope != "classifier":
        return scope_router(host, requests, earlier, config.scope, config, work, encoder=config.encoder)
    if config.classifier == "cross":
        router = cross.router_of(host, editor, config, encoder=config.encoder)
        return cross.with_requests(host, router, requests, before, config.threshold), ""
    if "projection" not in editor.tensors:
        raise ConfigError("classifier: the editor reads facts and prompts together; use classifier=cross")
    if before is not None and not isinstance(before, Classifier):
        raise ConfigError(f"scope: the earlier edit has a {before.name} router; go on with the same one")
    projection = editor.tensors["projection"]
    encoder = editor.body["encoder"]
    keys = embed(host, texts, encoder=encoder) @ projection.mT
    keys = keys if before is None else torch.cat([before.keys, keys])
    threshold = 0.5 if config.threshold is None else config.threshold
    return Classifier(keys, projection, threshold, encoder, encoder_digest(host, encoder)), ""


def train(host: Host, config: Config, work: Workspace) -> Artefact:
    """Train classifier and counterfactual model on the workspace's examples."""
    examples = training_examples("serac", host, work, config.most, consequences=config.consequences)
    trained, held = split(examples, config.held_out)
    tensors, body, scope_loss = (_pairs if config.classifier == "cross" else _projection)(
        host, trained, config, work
    )
    other = other_model.start_model(host, config)
    lines, held_lines = (_lines(host, other, some, config) for some in (trained, held))
    factors, facts = other_model.train_other(other, lines, held_lines, config, work)
    card = {"examples": len(trained), "held_out": len(held), **facts, "scope_loss": scope_loss}
    return other_model.editor_with(
        "serac", host, other, factors, config, work, tensors=tensors, body=body, card=card
    )


Classified = tuple[Mapping[str, Tensor], Mapping[str, Any], float]
"""A trained classifier as the tensors and plain data of an editor, and its last loss."""


def _pairs(host: Host, examples: Sequence[Example], config: Config, work: Workspace) -> Classified:
    """Train the classifier that reads facts and prompts together."""
    template = config.before("{fact}") + "{prompt}"
    router = cross.empty_router(host, config, encoder=config.encoder, template=template)
    router, loss = cross.train_router(
        host, examples, router, config.classifier_training, seed=work.seed, on_progress=work.on_progress
    )
    return _stored.parts_of(router), {"router": _stored.body_of(router)}, loss


def _projection(host: Host, examples: Sequence[Example], config: Config, work: Workspace) -> Classified:
    """Train the map of sentence vectors."""
    facts = [other_model.fact_of(host, example.request) for example in examples]
    groups = [facts, *([p for p, _ in e.inside] for e in examples), *(list(e.outside) for e in examples)]
    vectors = embed(host, [text for group in groups for text in group], encoder=config.encoder)
    requests, *prompts = vectors.split([len(group) for group in groups])
    projection, loss = train_projection(
        requests, prompts[: len(examples)], prompts[len(examples) :], config.classifier_training, seed=work.seed,
        on_progress=work.on_progress,
    )  # fmt: skip
    return {"projection": projection}, {"encoder": config.encoder}, loss


def _lines(host: Host, other: Host, examples: Sequence[Example], config: Config) -> list[Line]:
    """Return each example's prompts in scope, behind its text as the other model reads them."""
    lines = [
        other_model.line_behind(
            host, other, config.before(other_model.fact_of(host, e.request)), prompt, answer
        )
        for e in examples
        for prompt, answer in e.inside
    ]
    return [line for line in lines if line is not None]


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
