"""MALMEN: one ridge regression for many facts, on values that a network reads off their gradients.

Paper      Tan, Zhang and Fu, "Massive Editing for Large Language Models via Meta Learning", ICLR 2024, arXiv 2311.04661
Implements Sec. 3: inputs U and output gradients G at the tokens that predict the answers go through a network like
           MEND's, with scale and shift outside of the ReLU; d = -e <u, u~> g~ is what the output at u shall change by,
           and all facts together give S = argmin |U S - D|^2 + l |S|^2, e and l learned for each map (eqs. 4 to 6).
           Training is decoupled: the loss of the edited model gives its gradient for S, that gives the gradient for D
           and l in closed form, and the network is run again, in parts, for its own. The loss is NLL(answer | other
           words) + c KL(unedited, edited)
Departs    Solved in the dual where there are fewer tokens than inputs, and never as a matrix of a weight's size: the
           model's gradient is that for C, S = U^T C. e is positive, exp of what is learned. The normalisation is
           measured before training, exactly. Units and starts are chosen on the lab where nothing is published for a
           model. No request is dropped where their number is not a multiple of a batch
Needs      Examples: other facts with paraphrases and neighbours; gradients. errata train makes what all fits then share
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
from errata.training.editing import Item, apart, draw, gradients_of, validate
from errata.training.factors import Change
from errata.types import Request


@dataclass(frozen=True)
class Config(EditorSettings):
    """Settings of MALMEN."""

    token: Tokens = "answer"
    """Tokens whose factors are read: those that predict the answer (paper), or all."""
    step: float = 0.5
    """Size of the untrained editor's changes at a key, in the unit of ``scale`` (authors' code: 1e-6, plain)."""
    ridge: float = 0.03
    """Ridge of the untrained editor, in mean squared norms of the inputs, or plain as published (paper: 1)."""
    per_step: int = 16
    """Facts in a step, which make one edit (paper: 512 to 8,192)."""
    steps: int = 60
    """Steps of training at most."""

    def problems(self) -> list[str]:
        """Check ranges."""
        return [*super().problems(), *positive(self, "ridge")]


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> WeightEdit:
    """Return the regression on what the editor makes of all requests' gradients."""
    return regression.fit("malmen", host, requests, config, work, lambda: train(host, config, work), MODULES)


def train(host: Host, config: Config, work: Workspace) -> Artefact:
    """Train the editor on the workspace's examples, on the unedited host."""
    config = hypernetwork.with_published(config, METHOD.published_for(host))
    with work.unedited(host), hooks.frozen(host.model):
        prepared = regression.start("malmen", host, config, work, MODULES, config.step, config.ridge)
        return hypernetwork.finish("malmen", prepared, _Task(prepared, work.seed), work)


MODULES = ("mlp_out",)


@dataclass(frozen=True)
class _Task:
    """The training's objective, all examples of a step one edit."""

    prepared: Prepared
    seed: int

    @property
    def count(self) -> int:
        return len(self.prepared.items)

    def differentiate(
        self, step: int, examples: Sequence[int]
    ) -> tuple[Mapping[str, float], Sequence[Tensor]]:
        prepared, config = self.prepared, self.prepared.config
        rng = hypernetwork.rng_of(step, self.seed)
        samples = apart(prepared.host, draw(prepared.items, examples, config.sampling, rng))
        factors = prepared.factors([sample.item for sample in samples])
        solved = regression.solve(prepared.editor, factors)
        facts, gradients = gradients_of(
            prepared.host, samples, solved.coefficients, lambda _: solved.changes, config.weights,
            batch=config.at_once, one=True, workers=prepared.data.workers,
        )  # fmt: skip
        return config.summed(facts), regression.differentiate(prepared.editor, factors, solved, gradients)

    def validate(self) -> Mapping[str, float]:
        prepared, config = self.prepared, self.prepared.config
        return validate(
            prepared.host, prepared.held, self._changes, together=config.per_step, rows=config.rows, one=True
        )

    def _changes(self, items: Sequence[Item]) -> dict[str, Change]:
        return regression.changes_of(self.prepared.editor, self.prepared.factors(items))


_PUBLISHED = {
    "modules": ("mlp_out",), "rank": 1920, "step": 1e-6, "ridge": 1.0, "scale": "published", "learning_rate": 1e-5,
    "step_rate": 1e-5, "per_step": 1024, "warmup": 0, "decay": "none", "inside": 1, "outside": 1, "others": 0,
    "request": 0.0,
}  # fmt: skip

METHOD = Method(
    name="malmen",
    title="MALMEN",
    paper="Massive Editing for Large Language Models via Meta Learning, ICLR 2024, arXiv 2311.04661",
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
        Shape("gpt2", 48, 1600): {**_PUBLISHED, "layers": (42, 43, 44, 45, 46, 47)},
        Shape("gptj", 28, 4096): {**_PUBLISHED, "layers": (22, 23, 24, 25, 26, 27)},
        Shape("t5", 24, 2048): {**_PUBLISHED, "modules": ("wi_0", "wo"), "layers": (22, 23), "stack": "both"},
        Shape("bert", 12, 768): {**_PUBLISHED, "layers": (6, 7, 8, 9, 10, 11)},
    },
)
