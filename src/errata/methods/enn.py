"""ENN: the model is trained so that a few steps of gradient descent edit it, and edits are such steps.

Paper      Sinitsin, Plokhotnyuk, Pyrkin, Popov and Babenko, "Editable Neural Networks", ICLR 2020, arXiv 2004.00345
Implements Sec. 3: the editor takes at most K steps of gradient descent on one fact, until its answer leads by a margin;
           the model is trained on L_base + c_edit L_edit(edited) + c_loc KL(base, edited) through those steps, with
           gradients of gradients. Steps are divided by their root mean square (authors' code), their sizes are learned
           for each map (MEND's re-implementation)
Departs    What is trained is a low-rank change of the maps that are edited, not the whole model. It belongs to the
           edits: each is that change and its steps in one, so a model without an edit stays as it is, and nothing is
           written but by placing one. L_base is KL(unedited, changed), and the other KL is from the unedited model too.
           Steps descend the negative log-likelihood of all the answer's tokens (authors' code: the margin of a class),
           and L_edit is that of the request and other words. Requests of one fit are edited one after another
Needs      Examples: other facts with paraphrases and neighbours; gradients. errata train makes what all fits then share
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from errata.config import positive
from errata.edits.artefact import Artefact
from errata.edits.weight import WeightEdit
from errata.errors import ConfigError
from errata.host import hooks
from errata.host.host import Host
from errata.methods import _hypernetwork as hypernetwork
from errata.methods._editor import trained_editor
from errata.methods._hypernetwork import Course, Data, TrainingSettings
from errata.methods._method import Method, Workspace, check_requests
from errata.methods._settings import at_least_zero
from errata.training.editable import Descent, Editable, descend, twice_differentiable
from errata.training.editing import (
    Item,
    Sample,
    draw,
    log_probabilities,
    loss_scale,
    losses_of,
    means,
    validate,
)  # fmt: skip
from errata.training.factors import Change
from errata.training.gradients import sum_gradients
from errata.types import Request


@dataclass(frozen=True)
class Config(TrainingSettings):
    """Settings of ENN."""

    steps: int = 40
    """Steps of training at most."""
    every: int = 10
    """Steps from one validation, and checkpoint, to the next."""
    rank: int = 16
    """Rank of the change of each map that is trained."""
    descent: int = 3
    """Steps of an edit at most, K (paper: 10; MEND's re-implementation: 1)."""
    step: float = 0.01
    """Root mean square of the first steps of training, relative to the weight's; they are learned, for each map."""
    normalise: bool = True
    """Whether a gradient is divided by its root mean square (authors' code), or taken as it is."""
    margin: float = 1.0
    """Nats by which the answer leads where an edit ends."""
    edit_weight: float = 1.0
    """Weight of the loss in scope, once edited (paper: about 0.01 beside a loss of a task)."""
    locality_weight: float = 1.0
    """Weight of the KL divergence out of scope, once edited."""
    base_weight: float = 1.0
    """Weight of the KL divergence of the model that is trained, before an edit."""
    step_rate: float = 1e-2
    """Adam's for the logarithm of the step sizes."""

    def problems(self) -> list[str]:
        """Check ranges."""
        names = ("rank", "descent", "step", "edit_weight", "step_rate")
        return [
            *super().problems(),
            *positive(self, *names),
            *at_least_zero(self, "margin", "locality_weight", "base_weight"),
        ]

    @property
    def how(self) -> Descent:
        """How an edit descends."""
        return Descent(self.descent, self.margin, self.normalise, self.token)


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> WeightEdit:
    """Return the trained change and the steps of each request, or the steps alone after an edit that has the change."""
    check_requests("enn", requests)
    twice = next((one for one in work.beneath if one.provenance.method == "enn"), None)
    if twice is not None:
        raise ConfigError(
            f"enn: edit {twice.digest} is in place and has the change that all its edits begin with; go on from it "
            "(after=, --after), or take it off first"
        )
    artefact = trained_editor("enn", host, config.editor, config, work, lambda: train(host, config, work))
    editor, config = hypernetwork.editor_of(artefact, host, config, lambda: _names(host, config), _build)
    answers = [host.encode_answer(request.text, request.target) for request in requests]
    course = Course(host)
    with torch.no_grad(), hooks.frozen(host.model), course.kept():
        factors = hypernetwork.factors_of(host, answers[:1], editor.names, config)
        if work.after is None:
            course.add(factors, editor.change())
        for answer in answers:
            changes = descend(host, [answer], editor, config.how, graph=False)
            if any(len(change.outer) for change in changes.values()):
                course.add(factors, changes)
    return hypernetwork.edit_after(course, "enn", host, requests, artefact, config, work)


def train(host: Host, config: Config, work: Workspace) -> Artefact:
    """Train the change and the sizes of steps on the workspace's examples; the model itself stays as it is."""
    with work.unedited(host), hooks.frozen(host.model):
        data = hypernetwork.read("enn", host, config, work, _names(host, config))
        editor = Editable(data.maps, config.rank, work.seed).to(host.device)
        units = [hypernetwork.weight_rms(host, name) for name in data.maps]
        units = units if config.normalise else [1.0] * len(units)
        with torch.no_grad():
            editor.steps.copy_((config.step * torch.tensor(units)).log())
        groups = [
            {"params": [*editor.inner, *editor.outer], "lr": config.learning_rate},
            {"params": [editor.steps], "lr": config.step_rate},
        ]
        task = _Task(host, config, data, editor, work.seed)
        return hypernetwork.conclude(
            "enn", host, config, data, editor, torch.optim.Adam(groups), {"rank": config.rank}, task, work
        )


def _names(host: Host, config: TrainingSettings) -> list[str]:
    return hypernetwork.map_names(host, config, ("mlp_out",))


def _build(maps: Mapping[str, tuple[int, int]], body: Mapping[str, Any]) -> Editable:
    return Editable(maps, body["rank"], 0)


@dataclass(frozen=True)
class _Task:
    """The objective through the steps of an edit, each example an edit of its own."""

    host: Host
    config: Config
    data: Data
    editor: Editable
    seed: int

    @property
    def count(self) -> int:
        return len(self.data.items)

    def differentiate(
        self, step: int, examples: Sequence[int]
    ) -> tuple[Mapping[str, float], Sequence[Tensor]]:
        config, scale = self.config, loss_scale(self.host)
        samples = draw(self.data.items, examples, config.sampling, hypernetwork.rng_of(step, self.seed))

        def loss_of(numbers: Sequence[int]) -> tuple[Tensor, list[tuple[float, ...]]]:
            edit, locality, base = self._losses([samples[i] for i in numbers])
            whole = config.edit_weight * edit + config.locality_weight * locality + config.base_weight * base
            facts = list(zip(edit.tolist(), locality.tolist(), base.tolist(), strict=True))
            return scale * whole.sum() / len(samples), facts

        parameters = list(self.editor.parameters())
        with twice_differentiable():
            facts, gradients = sum_gradients(range(len(samples)), parameters, loss_of, batch=config.at_once)
        edit, locality = means([(one[0], one[1]) for one in facts])
        base = sum(one[2] for one in facts) / len(facts)
        loss = config.edit_weight * edit + config.locality_weight * locality + config.base_weight * base
        return (
            {"loss": loss, "edit": edit, "locality": locality, "base": base},
            [one / scale for one in gradients],
        )

    def _losses(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor, Tensor]:
        """Return each sample's losses in scope and out of it, edited, and out of it before the edit ``[n]``."""
        host, outside = self.host, [line for sample in samples for line in sample.outside]
        with torch.no_grad():
            before = log_probabilities(host, outside)[0] if outside else None
        with self.editor.beneath(host):
            answers = [sample.item.answer for sample in samples]
            changes = descend(host, answers, self.editor, self.config.how, graph=True)
            inside = [(*sample.item.inside[:1], *sample.inside) for sample in samples]
            losses = losses_of(host, inside, [s.outside for s in samples], changes, before=before)
            if before is None:
                return losses.edit, losses.locality, torch.zeros_like(losses.edit)
            after, row = log_probabilities(host, outside)
        divergence = functional.kl_div(after, before, reduction="none", log_target=True).sum(-1)
        owner = torch.tensor([i for i, s in enumerate(samples) for _ in s.outside], device=row.device)[row]
        count = torch.bincount(owner, minlength=len(samples)).clamp_min(1)
        base = divergence.new_zeros(len(samples)).index_add(0, owner, divergence) / count
        return losses.edit, losses.locality, base

    def validate(self) -> Mapping[str, float]:
        rows = self.config.rows
        with self.editor.beneath(self.host):
            return validate(self.host, self.data.held, self._changes, together=rows, rows=rows, one=False)

    def _changes(self, items: Sequence[Item]) -> dict[str, Change]:
        return descend(self.host, [item.answer for item in items], self.editor, self.config.how, graph=False)


METHOD = Method(
    name="enn",
    title="ENN",
    paper="Editable Neural Networks, ICLR 2020, arXiv 2004.00345",
    config=Config,
    fit=fit,
    train=train,
    gives=WeightEdit,
    batch=True,
    sequential=True,
    needs=("examples", "gradients"),
    writes="linear",
    resumes=True,
    quick={"steps": 20, "every": 5, "most": 200, "validation": 8},
)
