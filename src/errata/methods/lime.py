"""LIME: an editor of gradients that weighs their features by the language of the edit.

Paper      Xu, Hou and Che, "Language Anisotropic Cross-Lingual Model Editing", Findings of ACL 2023, arXiv 2205.12677
Implements Sec. 4 on MEND as the editor: for each language a mask 1 + e z over the features of what the editor reads,
           the inputs u and the output gradients d, e learned and z hard-concrete gates; a request's language selects
           the mask. Trained on c NLL(answer | prompts in scope, of all languages) + KL out of scope (+ the expected
           share of open gates). Where examples and requests tell no language, all are of one
Departs    The masked features are normalised by what is measured before training (paper: layer normalisation). The
           published code's L0 term has no gradient; here it has one, and is off by default and as published
Needs      Examples in each language that is edited, with prompts in the others; gradients. errata train makes what all
           fits then share
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from errata.config import positive
from errata.edits.artefact import Artefact
from errata.edits.weight import WeightEdit
from errata.errors import ConfigError
from errata.host import hooks
from errata.host.host import Host
from errata.host.kinds import TEXT_HOSTS
from errata.locate.gradients import Tokens
from errata.methods import _hypernetwork as hypernetwork
from errata.methods._editor import trained_editor
from errata.methods._hypernetwork import Editor, EditorSettings, Prepared
from errata.methods._method import Method, Shape, Workspace, check_requests
from errata.methods._settings import at_least_zero
from errata.training.editing import Item, draw, gradients_of, validate
from errata.training.factors import Change, Factors
from errata.training.gates import FeatureMasks
from errata.types import Request

STEP = "step"
MODULES = ("mlp_out",)
UNTOLD = ""
"""The language of requests that tell none."""


@dataclass(frozen=True)
class Config(EditorSettings):
    """Settings of LiME; those of the editor are as MEND's on the lab."""

    token: Tokens = "answer"
    """Tokens whose factors are read: those that predict the answer, or all (paper: all)."""
    step: float = 0.02
    """Size of the untrained editor's changes, in the unit of ``scale`` (MEND's code: 1e-4, plain)."""
    learning_rate: float = 1e-3
    """Adam's for the network (paper: 1e-5)."""
    mask_rate: float = 1e-3
    """Adam's for the masks (paper: 1e-3)."""
    open_share: float = 0.5
    """Odds of the gates before training, as a share of open ones (paper: 0.5)."""
    spread: float = 0.01
    """Standard deviation of the gates' log odds before training (paper: 0.01)."""
    sparsity: float = 0.0
    """Weight of the expected share of open gates in the loss (paper: 1 times a norm that had no gradient)."""

    def problems(self) -> list[str]:
        """Check ranges."""
        complaints = [
            *super().problems(),
            *positive(self, "mask_rate"),
            *at_least_zero(self, "spread", "sparsity"),
        ]
        if not 0 < self.open_share < 1:
            complaints.append(f"open_share: expected a share between 0 and 1, found {self.open_share}")
        return complaints


class Masked(FeatureMasks):
    """An editor, and for each shape of map and each language a mask over what the editor reads."""

    def __init__(self, editor: Editor, languages: Sequence[str], config: Config, seed: int) -> None:
        sizes = set(editor.network.maps.values())
        super().__init__(sizes, len(languages), open_share=config.open_share, spread=config.spread, seed=seed)
        self.editor, self.languages = editor, tuple(languages)

    def numbers_of(self, requests: Sequence[Request]) -> Tensor:
        """Return the number of each request's language ``[n]``. Raises ConfigError for one that has no mask."""
        found = [request.language or UNTOLD for request in requests]
        unknown = sorted(set(found) - set(self.languages))
        if unknown:
            names = ", ".join(one or "(not told)" for one in self.languages)
            raise ConfigError(
                f"lime was trained on edits in {names}, found a request in {unknown[0] or '(not told)'}; set the "
                "requests' language, or train an editor on examples in it"
            )
        return torch.tensor([self.languages.index(one) for one in found])


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> WeightEdit:
    """Return the sum of what the editor makes of each request's gradient, weighed by its language's mask."""
    check_requests("lime", requests)
    artefact = trained_editor("lime", host, config.editor, config, work, lambda: train(host, config, work))
    masked, config = hypernetwork.editor_of(artefact, host, config, lambda: _names(host, config), masked_of)
    answers = [host.encode_answer(request.text, request.target) for request in requests]
    with torch.no_grad():
        factors = hypernetwork.factors_of(host, answers, list(masked.editor.numbers), config)
        changes = changes_of(masked, factors, masked.numbers_of(requests))
    return hypernetwork.edit_of("lime", host, requests, factors, changes, artefact, config, work)


def train(host: Host, config: Config, work: Workspace) -> Artefact:
    """Train the editor and its masks on the workspace's examples, on the unedited host."""
    config = hypernetwork.with_published(config, METHOD.published_for(host))
    with work.unedited(host), hooks.frozen(host.model):
        prepared = hypernetwork.prepare(
            "lime", host, config, work, names=_names(host, config), form="inside", logs=(STEP,)
        )
        editor = prepared.editor
        units = [hypernetwork.weight_rms(host, name) for name in editor.numbers]
        units = units if config.scale == "weight" else [1.0] * len(units)
        with torch.no_grad():
            editor.logs[STEP].copy_((config.step * torch.tensor(units)).log())
        languages = sorted({item.request.language or UNTOLD for item in (*prepared.items, *prepared.held)})
        masked = Masked(editor, languages, config, work.seed).to(host.device)
        groups = [
            {"params": list(editor.network.parameters()), "lr": config.learning_rate},
            {"params": list(editor.logs.parameters()), "lr": config.step_rate},
            {"params": [*masked.gates.parameters(), *masked.scales.parameters()], "lr": config.mask_rate},
        ]
        body = {
            "logs": [STEP], "rank": config.rank, "blocks": config.blocks, "form": editor.network.form,
            "languages": languages,
        }  # fmt: skip
        return hypernetwork.conclude(
            "lime", host, config, prepared.data, masked, torch.optim.Adam(groups), body,
            _Task(prepared, masked, config, work.seed), work,
        )  # fmt: skip


def _names(host: Host, config: Config) -> list[str]:
    return hypernetwork.map_names(host, config, MODULES)


def masked_of(maps: Mapping[str, tuple[int, int]], body: Mapping[str, Any]) -> Masked:
    """Return an editor with masks of the shape that a file's plain data tell."""
    return Masked(hypernetwork.network_of(maps, body), body["languages"], Config(), 0)


def changes_of(
    masked: Masked,
    factors: Mapping[str, Factors],
    language: Tensor,
    noise: Mapping[str, Tensor] | None = None,
) -> dict[str, Change]:
    """Return the change of each map as products; ``language``: the number of each text's language ``[n]``."""
    changes = {}
    editor = masked.editor
    for name, one in factors.items():
        rows = masked.mask(one.shape, noise)[language.to(one.owner.device)[one.owner]]
        at_input, at_output = rows.tensor_split([one.keys.shape[1]], 1)
        weighed = replace(one, keys=one.keys * at_input, gradients=one.gradients * at_output)
        inner, outer = editor.network.of(name, weighed)
        changes[name] = Change(-editor.positive(STEP, name) * outer, inner, one.owner)
    return changes


@dataclass(frozen=True)
class _Task:
    """The training's objective, each example an edit of its own."""

    prepared: Prepared
    masked: Masked
    config: Config
    seed: int

    @property
    def count(self) -> int:
        return len(self.prepared.items)

    def differentiate(
        self, step: int, examples: Sequence[int]
    ) -> tuple[Mapping[str, float], Sequence[Tensor]]:
        prepared, config = self.prepared, self.config
        rng = hypernetwork.rng_of(step, self.seed)
        samples = draw(prepared.items, examples, config.sampling, rng)
        noise = self.masked.noise(torch.Generator().manual_seed(rng.getrandbits(62)))
        variables = list(self.masked.parameters())
        facts, gradients = gradients_of(
            prepared.host, samples, variables, lambda items: self._changes(items, noise), config.weights,
            batch=config.at_once,
        )  # fmt: skip
        summed = config.summed(facts)
        if config.sparsity:
            share = self.masked.open_share()
            more = torch.autograd.grad(config.sparsity * share, variables, allow_unused=True)
            gradients = [a if b is None else a + b for a, b in zip(gradients, more, strict=True)]
            summed = {**summed, "loss": summed["loss"] + config.sparsity * share.item(), "open": share.item()}
        return summed, gradients

    def validate(self) -> Mapping[str, float]:
        held, rows = self.prepared.held, self.config.rows
        return validate(self.prepared.host, held, self._changes, together=rows, rows=rows, one=False)

    def _changes(self, items: Sequence[Item], noise: Mapping[str, Tensor] | None = None) -> dict[str, Change]:
        numbers = self.masked.numbers_of([item.request for item in items])
        return changes_of(self.masked, self.prepared.factors(items), numbers, noise)


METHOD = Method(
    name="lime",
    title="LiME",
    paper="Language Anisotropic Cross-Lingual Model Editing, Findings of ACL 2023, arXiv 2205.12677",
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
    published={
        Shape("bert", 12, 768): {
            "modules": ("intermediate.dense", "mlp_out"), "layers": (9, 10, 11), "token": "all", "rank": 1920,
            "step": 1e-4, "scale": "published", "learning_rate": 1e-5, "step_rate": 1e-2, "mask_rate": 1e-3,
            "edit_weight": 0.1, "locality_weight": 1.0, "warmup": 0, "decay": "none", "request": 0.0,
        },
    },
)  # fmt: skip
