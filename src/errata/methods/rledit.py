"""RLEdit: MALMEN's editor, trained on whole sequences of edits so that later ones spare the earlier.

Paper      Li et al., "Reinforced Lifelong Editing for Language Models", ICML 2025, arXiv 2502.05759
Implements Sec. 4: editing one batch of facts after another is a decision process; its state is the edited model, its
           action MALMEN's regression. A sequence is walked with all edits staying in place, and each batch costs
           sum_i m^i (NLL(answer | other words) + c KL) over itself and the batches before it, as far as memory reaches,
           and h |S|^2 (eqs. 5 to 9). One step of the optimiser follows a sequence
Departs    The norm of a change is differentiated: 2 h S is added to the loss's gradient (authors' code takes it of
           tensors without one). Losses are differentiated while the change is in place (authors' code: after it was
           taken back). KL is from the unedited model, so that drift over a sequence counts (authors' code: from the
           model before the batch), at prompts that no other edit of the sequence changes. The terms of a batch are
           differentiated in parts. By default sequences are short and follow a drawn number of edits (earlier=0:
           authors' code), a batch is charged for any of those before it (charged=last), and the regression's ridge
           costs more along directions that all inputs share, as changes there reach every prompt (damped=0)
Needs      Examples: other facts with paraphrases and neighbours; gradients. errata train makes what all fits then share
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from errata.config import positive
from errata.edits.artefact import Artefact
from errata.edits.weight import WeightEdit
from errata.host import hooks
from errata.host.host import Host
from errata.host.kinds import TEXT_HOSTS
from errata.locate.gradients import Tokens
from errata.methods import _hypernetwork as hypernetwork
from errata.methods import _ridge as regression
from errata.methods._hypernetwork import EditorSettings, Prepared
from errata.methods._method import Method, Shape, Workspace
from errata.methods._settings import at_least_zero
from errata.training.editing import Sample, apart, draw, gradients_of, log_probabilities, validate
from errata.training.loop import Loop
from errata.types import Request


@dataclass(frozen=True)
class Config(EditorSettings):
    """Settings of RLEdit."""

    token: Tokens = "answer"
    """Tokens whose factors are read: those that predict the answer (authors' code), or all."""
    blocks: int = 4
    """Residual blocks (authors' code: 4)."""
    steps: int = 40
    """Sequences of training at most."""
    every: int = 10
    """Sequences from one validation, and checkpoint, to the next."""
    warmup: int = 5
    """Steps over which the rates rise."""
    held_out: float = 0.15
    """Share of the examples that are held out for validation, all of which are edited one batch after another."""
    validation: int = 150
    """Examples of a validation at most."""
    statistics: int = 256
    """Examples whose factors the normalisation and the damping are measured on, before training."""
    step: float = 0.5
    """Size of the untrained editor's changes at a key, in the unit of ``scale`` (authors' code: 1e-6, plain)."""
    ridge: float = 0.03
    """Ridge of the untrained editor, in mean squared norms of the inputs, or plain as published (authors' code: 1)."""
    damped: int = 128
    """Directions that the inputs have in common along which changes are damped (authors' code: 0)."""
    floor: float = 0.03
    """Second moment along a direction at which damping sets in, relative to the mean over all of them."""
    per_step: int = 8
    """Facts in a batch (authors' code: 20)."""
    length: int = 4
    """Batches in a sequence, after which the model is as before (authors' code: 400)."""
    earlier: int = 150
    """Facts edited at most, a number drawn for each sequence, before its first batch is charged (authors' code: 0):
    long sequences at the price of short ones."""
    reach: int = 3
    """How many batches each batch is charged for, itself included (authors' code: 10)."""
    charged: Literal["last", "any"] = "any"
    """Which: itself and the last ones (authors' code), or itself and any of those before it."""
    discount: float = 0.95
    """What a batch counts less for every batch after it (authors' code: 0.95)."""
    norm_weight: float = 1e-4
    """Weight of the squared norm of a change (authors' code: 1e-4)."""

    def problems(self) -> list[str]:
        """Check ranges."""
        names = ("ridge", "floor", "length", "reach", "discount")
        more = ("norm_weight", "damped", "earlier")
        return [*super().problems(), *positive(self, *names), *at_least_zero(self, *more)]

    @property
    def loop(self) -> Loop:
        """How it is trained: a step is a whole sequence."""
        size = self.per_step * self.length
        return Loop(self.steps, size, self.clip, self.warmup, self.decay, self.every, self.patience)


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> WeightEdit:
    """Return the regression on what the editor makes of all requests' gradients, on the model as it is."""
    return regression.fit("rledit", host, requests, config, work, lambda: train(host, config, work), MODULES)


def train(host: Host, config: Config, work: Workspace) -> Artefact:
    """Train the editor on sequences of the workspace's examples, which begin with the unedited host."""
    config = hypernetwork.with_published(config, METHOD.published_for(host))
    with work.unedited(host), hooks.frozen(host.model):
        prepared = regression.start(
            "rledit", host, config, work, MODULES, config.step, config.ridge, config.damped, config.floor
        )
        return hypernetwork.finish("rledit", prepared, _Task(prepared, config, work.seed), work)


MODULES = ("mlp_out",)


@dataclass(frozen=True)
class _Task:
    """The cost of a sequence of edits."""

    prepared: Prepared
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
        chosen = [*self._earlier(rng, examples), *examples]
        samples = apart(prepared.host, draw(prepared.items, chosen, config.sampling, rng))
        batches = [samples[i : i + config.per_step] for i in range(0, len(samples), config.per_step)]
        first = len(batches) - config.length
        charges = {t: self._charged(rng, t) for t in range(first, len(batches))}
        before = {i: self._unedited(batches[i]) for i in sorted({i for one in charges.values() for i in one})}
        total = [torch.zeros_like(parameter) for parameter in prepared.editor.parameters()]
        facts: list[tuple[float, float]] = []
        state = hypernetwork.Course(prepared.host)
        with state.kept():
            for t, batch in enumerate(batches):
                factors = prepared.factors([sample.item for sample in batch])
                solved = regression.solve(prepared.editor, factors)
                if t >= first:
                    gradients = regression.norm_gradients(solved, config.norm_weight / config.length)
                    for back, i in enumerate(charges[t]):
                        share = config.discount**back / config.length
                        losses, more = self._cost(batches[i], before[i], solved, share)
                        gradients = [a + b for a, b in zip(gradients, more, strict=True)]
                        facts += losses if back == 0 else []
                    own = regression.differentiate(prepared.editor, factors, solved, gradients)
                    total = [a + b for a, b in zip(total, own, strict=True)]
                state.add(factors, solved.changes)
        return config.summed(facts), total

    def _earlier(self, rng: random.Random, examples: Sequence[int]) -> list[int]:
        """Draw the examples that are edited before those of a sequence, whole batches of others."""
        config = self.config
        others = sorted(set(range(len(self.prepared.items))) - set(examples))
        most = min(config.earlier, len(others)) // config.per_step
        return rng.sample(others, rng.randint(0, most) * config.per_step) if most else []

    def _charged(self, rng: random.Random, batch: int) -> list[int]:
        """Return the numbers of the batches that a batch is charged for, itself first."""
        count = min(self.config.reach, batch + 1) - 1
        if self.config.charged == "last":
            return [batch - back for back in range(count + 1)]
        return [batch, *rng.sample(range(batch), count)]

    def _unedited(self, samples: Sequence[Sample]) -> list[Tensor | None]:
        """Return the unedited host's log probabilities at each sample's tokens out of scope."""
        found: list[Tensor | None] = []
        with torch.no_grad():
            for sample in samples:
                lines = sample.outside
                found.append(log_probabilities(self.prepared.host, lines)[0] if lines else None)
        return found

    def _cost(
        self,
        samples: Sequence[Sample],
        before: Sequence[Tensor | None],
        solved: regression.Solved,
        share: float,
    ) -> tuple[list[tuple[float, float]], list[Tensor]]:
        """Return the losses of a batch with a change beside the model as it is, and their share's gradients."""
        facts, gradients = gradients_of(
            self.prepared.host, samples, solved.coefficients, lambda _: solved.changes, self.config.weights,
            batch=self.config.at_once, one=True, before=before, workers=self.prepared.data.workers,
        )  # fmt: skip
        return facts, [share * gradient for gradient in gradients]

    def validate(self) -> Mapping[str, float]:
        prepared, config = self.prepared, self.config
        held = prepared.held
        state = hypernetwork.Course(prepared.host)
        with state.kept():
            for first in range(0, len(held), config.per_step):
                factors = prepared.factors(held[first : first + config.per_step])
                state.add(factors, regression.changes_of(prepared.editor, factors))
            return validate(prepared.host, held, lambda _: {}, together=len(held), rows=config.rows, one=True)


_PUBLISHED = {
    "rank": 1024, "step": 1e-6, "ridge": 1.0, "scale": "published", "learning_rate": 1e-5, "step_rate": 1e-5,
    "per_step": 20, "length": 400, "reach": 10, "locality_weight": 0.6, "warmup": 0, "decay": "none", "inside": 1,
    "outside": 1, "others": 0, "request": 0.0, "damped": 0,
    "earlier": 0, "charged": "last",
}  # fmt: skip

METHOD = Method(
    name="rledit",
    title="RLEdit",
    paper="Reinforced Lifelong Editing for Language Models, ICML 2025, arXiv 2502.05759",
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
        Shape("llama", 32, 4096, 14336): {**_PUBLISHED, "modules": ("gate_proj@22-30", "up_proj@22-30")},
        Shape("gemma2", 42, 3584): {**_PUBLISHED, "modules": ("gate_proj@32-40", "up_proj@32-40")},
        Shape("mistral", 32, 4096): {**_PUBLISHED, "modules": ("mlp_out@17-18",)},
    },
)
