"""MEND: a network turns the gradient of a fact, as rank-1 factors, into a change that also holds in other words.

Paper      Mitchell, Lin, Bosselut, Finn and Manning, "Fast Model Editing at Scale", ICLR 2022, arXiv 2110.11309
Implements Sec. 3: one forward and one backward pass on the request give each map's inputs u and output gradients d at
           every token. [u; d], normalised, goes through blocks z + ReLU(s (U V z + b) + o), one set of them for each
           shape of weight, s and o for each map; what comes out is split into u~ and d~, and the weight changes by
           -a sum d~ u~^T, a learned for each map. Trained on c NLL(answer | other words) + KL(unedited, edited) out of
           scope. Requests of one fit are summed
Departs    The step is subtracted and positive, exp of what is learned (authors' code adds it, with a learned sign). The
           normalisation is measured before training, on the first examples, and stays (authors' code: during it). V is
           scaled to keep the size of its input. The step's unit and start, the learning rate and the layers are chosen
           on the lab where nothing is published for a model
Needs      Examples: other facts with paraphrases and neighbours; gradients. errata train makes what all fits then share
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from errata.edits.artefact import Artefact
from errata.edits.weight import WeightEdit
from errata.host import hooks
from errata.host.host import Host
from errata.host.kinds import TEXT_HOSTS
from errata.locate.gradients import Tokens
from errata.methods import _hypernetwork as hypernetwork
from errata.methods._editor import trained_editor
from errata.methods._hypernetwork import Editor, EditorSettings, Prepared
from errata.methods._method import Method, Shape, Workspace, check_requests
from errata.training.editing import Item, draw, gradients_of, validate
from errata.training.factors import Change, Factors
from errata.types import Request

STEP = "step"
MODULES = ("mlp_out",)


@dataclass(frozen=True)
class Config(EditorSettings):
    """Settings of MEND.

    Defaults were chosen on the lab: the upper half's feed-forward outputs, read where the answer is predicted (paper:
    all maps of the last three feed-forwards, at all tokens; taken for the models of the paper).
    """

    token: Tokens = "answer"
    """Tokens whose factors are read: those that predict the answer, or all (paper: all)."""
    step: float = 0.02
    """Size of the untrained editor's changes, in the unit of ``scale`` (authors' code: 1e-4, plain)."""
    learning_rate: float = 1e-3
    """Adam's for the network (authors' code: 1e-6)."""


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> WeightEdit:
    """Return the sum of what the editor makes of each request's gradient."""
    check_requests("mend", requests)
    artefact = trained_editor("mend", host, config.editor, config, work, lambda: train(host, config, work))
    editor, config = hypernetwork.editor_of(
        artefact, host, config, lambda: _names(host, config), hypernetwork.network_of
    )
    answers = [host.encode_answer(request.text, request.target) for request in requests]
    with torch.no_grad():
        factors = hypernetwork.factors_of(host, answers, list(editor.numbers), config)
        changes = changes_of(editor, factors)
    return hypernetwork.edit_of("mend", host, requests, factors, changes, artefact, config, work)


def train(host: Host, config: Config, work: Workspace) -> Artefact:
    """Train the editor on the workspace's examples, on the unedited host."""
    config = hypernetwork.with_published(config, METHOD.published_for(host))
    with work.unedited(host), hooks.frozen(host.model):
        prepared = hypernetwork.prepare(
            "mend", host, config, work, names=_names(host, config), form="inside", logs=(STEP,)
        )
        units = [hypernetwork.weight_rms(host, name) for name in prepared.editor.numbers]
        units = units if config.scale == "weight" else [1.0] * len(units)
        with torch.no_grad():
            prepared.editor.logs[STEP].copy_((config.step * torch.tensor(units)).log())
        return hypernetwork.finish("mend", prepared, _Task(prepared, work.seed), work)


def _names(host: Host, config: Config) -> list[str]:
    return hypernetwork.map_names(host, config, MODULES)


def changes_of(editor: Editor, factors: Mapping[str, Factors]) -> dict[str, Change]:
    """Return the change -a sum d~ u~^T of each map as products, each owned by its request ``[n, ...]``."""
    changes = {}
    for name, one in factors.items():
        inner, outer = editor.network.of(name, one)
        changes[name] = Change(-editor.positive(STEP, name) * outer, inner, one.owner)
    return changes


@dataclass(frozen=True)
class _Task:
    """The training's objective, each example an edit of its own."""

    prepared: Prepared
    seed: int

    @property
    def count(self) -> int:
        return len(self.prepared.items)

    def differentiate(
        self, step: int, examples: Sequence[int]
    ) -> tuple[Mapping[str, float], Sequence[Tensor]]:
        prepared, config = self.prepared, self.prepared.config
        samples = draw(prepared.items, examples, config.sampling, hypernetwork.rng_of(step, self.seed))
        facts, gradients = gradients_of(
            prepared.host, samples, list(prepared.editor.parameters()), self._changes, config.weights,
            batch=config.at_once, workers=prepared.data.workers,
        )  # fmt: skip
        return config.summed(facts), gradients

    def validate(self) -> Mapping[str, float]:
        held, rows = self.prepared.held, self.prepared.config.rows
        return validate(self.prepared.host, held, self._changes, together=rows, rows=rows, one=False)

    def _changes(self, items: Sequence[Item]) -> dict[str, Change]:
        return changes_of(self.prepared.editor, self.prepared.factors(items))


_PUBLISHED = {
    "modules": ("mlp",), "token": "all", "rank": 1920, "step": 1e-4, "scale": "published", "learning_rate": 1e-6,
    "step_rate": 1e-4,
    "edit_weight": 0.1, "per_step": 10, "clip": 100.0, "warmup": 0, "decay": "none", "steps": 500_000,
    "every": 5000, "patience": 4, "validation": 500, "inside": 1, "outside": 1, "others": 0, "request": 0.0,
}  # fmt: skip

METHOD = Method(
    name="mend",
    title="MEND",
    paper="Fast Model Editing at Scale, ICLR 2022, arXiv 2110.11309",
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
    published={
        Shape("gpt2", 48, 1600): {**_PUBLISHED, "layers": (45, 46, 47)},
        Shape("gpt_neo", 32, 2560): {**_PUBLISHED, "layers": (29, 30, 31)},
        Shape("gptj", 28, 4096): {**_PUBLISHED, "layers": (25, 26, 27)},
        Shape("llama", 32, 4096): {**_PUBLISHED, "layers": (29, 30, 31)},
        Shape("bert", 12, 768): {
            **_PUBLISHED,
            "modules": ("intermediate.dense", "mlp_out"),
            "layers": (9, 10, 11),
        },
        Shape("bart", 6, 768): {**_PUBLISHED, "layers": (4, 5), "stack": "both"},
    },
)
