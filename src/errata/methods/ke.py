"""KnowledgeEditor: a network reads an edit as text and masks the gradient of each weight for it.

Paper      De Cao, Aziz and Titov, "Editing Factual Knowledge in Language Models", EMNLP 2021, arXiv 2104.08164
Implements Sec. 3: the text "old >> new || input" goes through a bidirectional LSTM and a feed-forward to a vector, from
           which each weight's head writes a, c, b, d and n: the weight changes by s sigmoid(n) (A * G + B), A the
           product of softmax(a) and c, B that of softmax(b) and d, G the gradient of -log p(new | input). Trained on
           -log p(new | input and other words) subject to KL(unedited, edited) <= m on prompts out of scope: a Lagrange
           multiplier rises with what is above m, and m falls after each validation with a success above 0.9
Departs    G is of the plain loss (authors' code: smoothed by 0.1). Out of scope are prompts of the example and others'
           requests (authors' code: the others of a batch alone). The encoder reads the model's own embeddings as they
           are (authors' code: a trained copy). ``scale: weight`` starts as a step of descent: c about -1, A and B in
           units of the weight's norm, A * G over the gradients' mean norm. Applied once (authors' code: also until the
           prediction changes)
Needs      Examples: other facts with paraphrases and neighbours; gradients. errata train makes what all fits then share
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from errata.config import positive
from errata.edits.artefact import Artefact
from errata.edits.weight import WeightEdit
from errata.host import hooks
from errata.host.host import Host
from errata.host.kinds import TEXT_HOSTS
from errata.methods import _conditional as conditional
from errata.methods import _hypernetwork as hypernetwork
from errata.methods._conditional import ConditionalSettings
from errata.methods._editor import trained_editor
from errata.methods._hypernetwork import Data
from errata.methods._method import Method, Workspace, check_requests
from errata.training.conditional import ConditionalEditor
from errata.training.editing import Item, draw, gradients_of, means, validate
from errata.training.factors import Change
from errata.types import Request


@dataclass(frozen=True)
class Config(ConditionalSettings):
    """Settings of KnowledgeEditor.

    The authors train all matrices but embeddings, norms and classifiers, for 200,000 steps of RMSprop with a rate of
    3e-4 and a linear warm-up over 1,000.
    """

    margin: float = 0.1
    """Divergence that is allowed at first, in nats per token (authors' code: 1e-3 for BART, 0.1 for BERT)."""
    margin_factor: float = 0.8
    """What it is multiplied by after a validation with a success above 0.9 (authors' code: 0.8)."""
    least_margin: float = 1e-3
    """Where that ends (authors' code: 1e-5 for BART, 1e-3 for BERT)."""
    multiplier_rate: float = 0.1
    """Rate at which the Lagrange multiplier rises (authors' code: 0.1)."""

    def problems(self) -> list[str]:
        """Check ranges."""
        complaints = [*super().problems(), *positive(self, "margin", "least_margin", "multiplier_rate")]
        if not 0 < self.margin_factor <= 1:
            complaints.append(f"margin_factor: expected above 0 and at most 1, found {self.margin_factor}")
        return complaints


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> WeightEdit:
    """Return the sum of what the editor writes for each request."""
    check_requests("ke", requests)
    artefact = trained_editor("ke", host, config.editor, config, work, lambda: train(host, config, work))
    editor, config = hypernetwork.editor_of(
        artefact, host, config, lambda: conditional.names_of(host, config), conditional.build
    )
    old = conditional.old_answers(host, requests, config, work)
    answers = [host.encode_answer(request.text, request.target) for request in requests]
    texts = [conditional.text_of(host, request, old[request.text]) for request in requests]
    with torch.no_grad():
        factors = hypernetwork.factors_of(host, answers, editor.names, config)
        changes = editor.changes(editor.conditions(texts), factors)
    return hypernetwork.edit_of("ke", host, requests, factors, changes, artefact, config, work)


def train(host: Host, config: Config, work: Workspace) -> Artefact:
    """Train the editor on the workspace's examples, on the unedited host."""
    with work.unedited(host), hooks.frozen(host.model):
        data, editor, body = conditional.start("ke", host, config, work)
        with torch.no_grad():
            editor.margin.fill_(config.margin)
        task = _Task(host, config, data, editor, work.seed)
        optimizer = torch.optim.RMSprop(editor.parameters(), lr=config.learning_rate, centered=True)
        return hypernetwork.conclude("ke", host, config, data, editor, optimizer, body, task, work)


@dataclass(frozen=True)
class _Task:
    """The training's objective under its constraint."""

    host: Host
    config: Config
    data: Data
    editor: ConditionalEditor
    seed: int

    @property
    def count(self) -> int:
        return len(self.data.items)

    def differentiate(
        self, step: int, examples: Sequence[int]
    ) -> tuple[Mapping[str, float], Sequence[Tensor]]:
        config, editor = self.config, self.editor
        samples = draw(self.data.items, examples, config.sampling, hypernetwork.rng_of(step, self.seed))
        multiplier = float(editor.multiplier)
        facts, gradients = gradients_of(
            self.host, samples, list(editor.parameters()), self._changes, (1.0, multiplier), batch=config.at_once,
            workers=self.data.workers,
        )  # fmt: skip
        edit, locality = means(facts)
        with torch.no_grad():  # the same step of ascent, whatever the network's own
            above = locality - float(editor.margin)
            editor.multiplier.add_(config.multiplier_rate * above).clamp_(min=0)
        loss = edit + multiplier * locality
        return {"loss": loss, "edit": edit, "locality": locality, "multiplier": multiplier}, gradients

    def validate(self) -> Mapping[str, float]:
        config, rows = self.config, self.config.rows
        facts = validate(self.host, self.data.held, self._changes, together=rows, rows=rows, one=False)
        if facts["success"] > 0.9:
            self.editor.margin.mul_(config.margin_factor).clamp_(min=config.least_margin)
        return facts

    def _changes(self, items: Sequence[Item]) -> dict[str, Change]:
        return conditional.changes_of(self.host, items, self.editor, self.config)


METHOD = Method(
    name="ke",
    title="KE",
    paper="Editing Factual Knowledge in Language Models, EMNLP 2021, arXiv 2104.08164",
    config=Config,
    fit=fit,
    train=train,
    gives=WeightEdit,
    batch=True,
    sequential=True,
    needs=("examples", "gradients"),
    writes="linear",
    hosts=TEXT_HOSTS,
    resumes=True,
    parallel=True,
    quick=hypernetwork.QUICK,
    blind="its editor reads a request by the word embeddings of texts, and a picture has none",
)
