"""FT-L: fine-tune one feed-forward weight, no entry further than a given bound from where it was.

Paper      Meng et al., "Locating and Editing Factual Associations in GPT", NeurIPS 2022, arXiv 2202.05262,
           baseline FT+L; after Zhu et al., "Modifying Memories in Transformer Models", arXiv 2012.00363
Implements Adam on the facts' loss; after each step every entry is put back into [W0 - epsilon, W0 + epsilon]
Departs    The name has come to stand for two things: the box, and a loss that reads every target
           token from the one distribution at the prompt's last token. Here it means the box, as in
           the ROME paper; the loss is a setting, autoregressive by default, ``objective: prompt_last``
           as published. (Survey code calls "FT-L" runs that have that loss and no box: that is ``ft``
           with ``objective: prompt_last, epsilon: null``.)
           epsilon and rate are in units of the weight's root mean square, so that they carry over
           between models; ``scale: published`` takes both in plain numbers, as the authors' code does.
           Ends when every request is below stop_loss; a mean over requests hides the unfinished ones.
Needs      Gradients of the weight
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from errata.config import positive
from errata.edits.weight import WeightEdit
from errata.errors import ConfigError
from errata.host.load import Host
from errata.methods._method import Method, Workspace, notes, provenance, resolve_layers, resolved
from errata.training.tune import Plan, Stop, rms, tune
from errata.types import Request


@dataclass(frozen=True)
class Config:
    """Settings of FT-L."""

    layers: tuple[int, ...] | None = None
    """Layers whose feed-forward output projection is trained. None: the first (ROME's choice for FT+L)."""
    objective: Literal["target", "prompt_last"] = "target"
    """Loss: autoregressive on the target tokens, or all of them from the prompt's last token (published)."""
    scale: Literal["weight", "published"] = "weight"
    """Unit of epsilon and learning_rate: the weight's root mean square, or plain numbers."""
    epsilon: float | None = None
    """How far an entry may go. None: 0.2 in root mean squares, chosen on the lab; 5e-4 in plain numbers (ROME:
    5e-4 for GPT-2 XL, 1e-3 large, 2e-3 medium, 5e-5 for GPT-J)."""
    learning_rate: float | None = None
    """Adam's rate. None: 0.02 in root mean squares, 5e-4 in plain numbers (ROME: 5e-4)."""
    steps: int = 25
    """Passes over the requests at most (ROME: 25)."""
    stop_loss: float = 1e-2
    """Stop once the loss is below this (authors' code: 1e-2)."""
    stop: Literal["each", "mean"] = "each"
    """Whose loss that is: every request's own, or the mean over requests (authors' code)."""
    bias: bool = False
    """Whether the bias beside the weight is trained too, at its rate and within its bound (paper: not; ROME's code,
    which trains every parameter whose name holds the layer's, does so in GPT-2 and GPT-J)."""
    per_step: int | None = None
    """Requests per Adam step, in the order given; all of them are still one of ``steps``. None: all at once."""

    def problems(self) -> list[str]:
        """Check ranges."""
        return positive(self, "steps", "learning_rate", "epsilon", "per_step")


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> WeightEdit:
    """Return the dense edit that lowers the targets' loss inside the box."""
    if not requests:
        raise ConfigError("ft_l needs at least one request")
    layers = resolve_layers(host, config.layers, lambda depth: (0,))
    config = _resolve(config, layers)
    assert config.epsilon is not None and config.learning_rate is not None
    sites = [host.layout.site(layer) for layer in layers]
    plain = config.scale == "published"
    units = [1.0 if plain else rms(host.weight(site)) for site in sites]
    plan = Plan(
        objective=config.objective,
        steps=config.steps,
        rates=tuple(config.learning_rate * unit for unit in units),
        stop=Stop(config.stop_loss, config.stop),
        bounds=tuple(config.epsilon * unit for unit in units),
        per_step=config.per_step,
        bias=config.bias,
    )
    changes, outcome = tune(
        host, requests, sites, plan, rows=work.batch_size, tick=lambda *at: work.on_progress("ft_l", *at)
    )
    return WeightEdit(
        dict(changes),
        frozenset(site.parameter for site in sites if site.transposed),
        provenance("ft_l", host, requests, config, work, **notes(outcome.facts())),
    )


def _resolve(config: Config, layers: tuple[int, ...]) -> Config:
    """Fill in what depends on the unit."""
    epsilon, rate = (5e-4, 5e-4) if config.scale == "published" else (0.2, 0.02)
    return resolved(
        config,
        layers=layers,
        epsilon=epsilon if config.epsilon is None else config.epsilon,
        learning_rate=rate if config.learning_rate is None else config.learning_rate,
    )


METHOD = Method(
    name="ft_l",
    title="FT-L",
    paper="Locating and Editing Factual Associations in GPT, NeurIPS 2022, arXiv 2202.05262 (baseline FT+L)",
    config=Config,
    fit=fit,
    gives=WeightEdit,
    batch=True,
    sequential=True,
    needs=("gradients",),
)
