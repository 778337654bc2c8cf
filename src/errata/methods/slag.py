"""SLAG: KnowledgeEditor's network, trained for updates that follow one another and for what they entail.

Paper      Hase et al., "Methods for Measuring, Updating, and Visualizing Factual Beliefs in Language Models", EACL
           2023, arXiv 2111.13654
Implements Sec. 4: the objective sum_k l_k L_k / sum_k l_k of the updated input, prompts of other facts, the input in
           other words, what follows from it, and what is near it and stays true; the second and the last are
           KL(unedited, edited), the others -log p(answer). An update is the editor applied up to K times, until the
           answer is right, each time to the gradient of the model as it is by then. A step of training makes r updates
           one after another, earlier ones in place and not differentiated
Departs    Only the last application of an update is differentiated, those before it are in place. KL is from the
           unedited model, not from that before the update. As ``ke``: the plain loss's gradient, the model's own
           embeddings, a start as a step of descent. Targets are those of the examples (authors' code: other beams of
           the model)
Needs      Examples: other facts with paraphrases and neighbours, and what follows where they have it; gradients. errata
           train makes what all fits then share
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
from errata.methods._hypernetwork import Course, Data
from errata.methods._method import Method, Workspace, check_requests
from errata.methods._settings import at_least_zero
from errata.training.conditional import ConditionalEditor
from errata.training.editing import (
    Item,
    Sample,
    answered,
    apart,
    draw,
    line_of,
    log_probabilities,
    loss_scale,
    losses_of,
    validate,
)  # fmt: skip
from errata.training.factors import Change, Factors, beside
from errata.types import Request


@dataclass(frozen=True)
class Config(ConditionalSettings):
    """Settings of SLAG."""

    applications: int = 5
    """How often the editor is applied to a fact at most, K (authors' code: 5)."""
    steps: int = 60
    """Steps of training at most."""
    per_step: int = 4
    """Facts in a step, updated one after another, r (authors' code: 10)."""
    main_weight: float = 1.0
    """Weight of the request itself (authors' code: 1, as of all)."""
    other_weight: float = 1.0
    """Weight of other facts' prompts."""
    paraphrase_weight: float = 1.0
    """Weight of the request in other words."""
    entailed_weight: float = 1.0
    """Weight of what follows from it, for examples that have such prompts."""
    neutral_weight: float = 1.0
    """Weight of what is near it and stays true."""

    def problems(self) -> list[str]:
        """Check ranges."""
        weights = ("other_weight", "paraphrase_weight", "entailed_weight", "neutral_weight")
        complaints = positive(self, "applications", "main_weight")
        return [*super().problems(), *complaints, *at_least_zero(self, *weights)]


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> WeightEdit:
    """Return the sum of all applications of the editor, one request after another."""
    check_requests("slag", requests)
    artefact = trained_editor("slag", host, config.editor, config, work, lambda: train(host, config, work))
    editor, config = hypernetwork.editor_of(
        artefact, host, config, lambda: conditional.names_of(host, config), conditional.build
    )
    old = conditional.old_answers(host, requests, config, work)
    course = Course(host)
    with torch.no_grad(), hooks.frozen(host.model), course.kept():
        for request in requests:
            answer = host.encode_answer(request.text, request.target)
            line = line_of(host, request.text, request.target)
            item = Item(request, old[request.text], answer, (line,) if line else (), (), None)
            for factors, changes, _ in _applications(host, item, editor, config):
                course.add(factors, changes)
    return hypernetwork.edit_after(course, "slag", host, requests, artefact, config, work)


def train(host: Host, config: Config, work: Workspace) -> Artefact:
    """Train the editor on the workspace's examples; every step begins with the unedited host."""
    with work.unedited(host), hooks.frozen(host.model):
        data, editor, body = conditional.start("slag", host, config, work)
        optimizer = torch.optim.Adam(editor.parameters(), lr=config.learning_rate)
        task = _Task(host, config, data, editor, work.seed)
        return hypernetwork.conclude("slag", host, config, data, editor, optimizer, body, task, work)


def _applications(
    host: Host, item: Item, editor: ConditionalEditor, config: Config
) -> Iterator[tuple[dict[str, Factors], dict[str, Change], bool]]:
    """Yield one application after another, each to be put in place before the next, and whether it is the last.

    The last is the one after which the request is answered, or that no other may follow.
    """
    for number in range(config.applications):
        factors = conditional.factors_of(host, [item], editor, config)
        text = conditional.text_of(host, item.request, item.old)
        changes = editor.changes(editor.conditions([text]), factors)
        with beside(host, changes, (0,)):
            right = all(answered(host, item.inside[:1]))
        last = right or number + 1 == config.applications
        yield factors, changes, last
        if last:
            return


@dataclass(frozen=True)
class _Task:
    """The objective of updates that follow one another."""

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
        config, parameters = self.config, list(self.editor.parameters())
        rng = hypernetwork.rng_of(step, self.seed)
        # a prompt that another update of the step is to change is no measure of this one's harm
        samples = apart(self.host, draw(self.data.items, examples, config.sampling, rng))
        with torch.no_grad():
            before = [
                log_probabilities(self.host, s.outside)[0].split([len(line.at) for line in s.outside])
                if s.outside else () for s in samples
            ]  # fmt: skip
        total, losses = [torch.zeros_like(parameter) for parameter in parameters], list[float]()
        course, scale = Course(self.host), loss_scale(self.host)
        with course.kept():
            for sample, unedited in zip(samples, before, strict=True):
                for factors, changes, last in _applications(self.host, sample.item, self.editor, config):
                    if last:
                        value = self._loss(sample, unedited, changes)
                        found = torch.autograd.grad(
                            scale / len(samples) * value, parameters, allow_unused=True
                        )
                        total = [a if b is None else a + b / scale for a, b in zip(total, found, strict=True)]
                        losses.append(float(value.detach()))
                    course.add(factors, changes)
        return {"loss": sum(losses) / len(losses)}, total

    def _loss(self, sample: Sample, unedited: Sequence[Tensor], changes: Mapping[str, Change]) -> Tensor:
        """Return the objective of one update, with its last change beside the model as it is."""
        config, item = self.config, sample.item
        own = len(sample.outside) - sample.others
        groups = (
            (config.main_weight, item.inside[:1], config.other_weight, slice(own, None)),
            (config.paraphrase_weight, sample.inside, config.neutral_weight, slice(0, own)),
            (config.entailed_weight, item.entailed[: config.inside], 0.0, slice(0, 0)),
        )
        total, weights = torch.zeros((), device=self.host.device), 0.0
        for edit_weight, inside, locality_weight, part in groups:
            if not inside:
                continue
            known = torch.cat(list(unedited[part])) if unedited[part] else None
            losses = losses_of(self.host, [inside], [sample.outside[part]], changes, (0,), known)
            total = total + edit_weight * losses.edit[0] + locality_weight * losses.locality[0]
            weights += edit_weight + (locality_weight if known is not None else 0.0)
        return total / weights

    def validate(self) -> Mapping[str, float]:
        shares: list[Mapping[str, float]] = []
        for item in self.data.held:
            course = Course(self.host)
            with torch.no_grad(), course.kept():
                for factors, changes, _ in _applications(self.host, item, self.editor, self.config):
                    course.add(factors, changes)
                shares.append(
                    validate(self.host, [item], lambda _: {}, together=1, rows=self.config.rows, one=True)
                )
        return {name: sum(share[name] for share in shares) / len(shares) for name in shares[0]}


METHOD = Method(
    name="slag",
    title="SLAG",
    paper="Methods for Measuring, Updating, and Visualizing Factual Beliefs in Language Models, EACL 2023, "
    "arXiv 2111.13654",
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
    quick=hypernetwork.QUICK,
    blind="its editor reads a request by the word embeddings of texts, and a picture has none",
)
