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
from dataclasses import dataclass, replace
from typing import Literal

from errata.edits.weight import WeightEdit
from errata.host.host import Host
from errata.host.kinds import TEXT_HOSTS
from errata.methods._fine_tune import FineTuneConfig, fine_tune, prepare
from errata.methods._method import Layers, Method, Workspace
from errata.training.tune import Stop
from errata.types import Request


@dataclass(frozen=True)
class Config(FineTuneConfig):
    """Settings of FT-L."""

    layers: Layers = None
    """Layers whose feed-forward output projection is trained. None: the first (ROME's choice for FT+L)."""
    scale: Literal["weight", "published"] = "weight"
    """Unit of epsilon and learning_rate: the weight's root mean square, or plain numbers."""
    epsilon: float | None = None
    """How far an entry may go. None: 0.2 in root mean squares, chosen on the lab; 5e-4 in plain numbers (ROME:
    5e-4 for GPT-2 XL, 1e-3 large, 2e-3 medium, 5e-5 for GPT-J)."""
    learning_rate: float | None = None
    """Adam's rate. None: 0.02 in root mean squares, 5e-4 in plain numbers (ROME: 5e-4)."""
    stop: Literal["each", "mean"] = "each"
    """Whose loss that is: every request's own, or the mean over requests (authors' code)."""


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> WeightEdit:
    """Return the dense edit that lowers the targets' loss inside the box."""
    epsilon = config.epsilon or (5e-4 if config.scale == "published" else 0.2)
    config = replace(config, epsilon=epsilon)
    prepared = prepare("ft_l", host, requests, config, layers=lambda depth: (0,), rate=0.02)
    return fine_tune(
        "ft_l", host, requests, prepared, work, bounds=prepared.bounds(epsilon),
        stop=Stop(config.stop_loss, config.stop),
    )  # fmt: skip


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
    hosts=TEXT_HOSTS,
)
