"""LocFT-BF: plain fine-tuning of one feed-forward weight, breadth first: shuffled mini-batches, the end token too.

Paper      "LocFT-BF", arXiv 2509.22072, ICLR 2026
Implements Adam on one down-projection, over all requests in each pass, in mini-batches of 100 in a new order each
           time; the loss is on the target and the token that ends a text; a mini-batch whose loss is below 0.01 is
           left out; at most 25 passes, rate 5e-4
Departs    The layer is found by a sweep in the paper (22 of 32 in Llama 3 8B, 6 of 28 in Qwen 2.5 7B); here it is a
           setting. The rate is in root mean squares of the weight, so that it carries over between models;
           ``scale: published`` takes it in plain numbers
Needs      Gradients of the weight
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from errata.edits.weight import WeightEdit
from errata.host.host import Host
from errata.methods._fine_tune import FineTuneConfig, fine_tune, prepare
from errata.methods._method import Layers, Method, Workspace
from errata.training.tune import Stop
from errata.types import Request


@dataclass(frozen=True)
class Config(FineTuneConfig):
    """Settings of LocFT-BF."""

    layers: Layers = None
    """Layers whose feed-forward output projection is trained. None: one, at five sixths of the depth."""
    learning_rate: float | None = None
    """Adam's rate. None: 0.03 in root mean squares, chosen on the lab; 5e-4 in plain numbers (paper)."""
    per_step: int | None = 100
    """Requests per Adam step; all of them are still one of ``steps`` (paper: 100). None: all at once."""
    shuffle: bool = True
    """Whether each pass takes the requests in a new order, drawn from the seed, and not in the order given."""
    end: bool = True
    """Whether the token that ends a text is trained behind each target, so that nothing follows it."""


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> WeightEdit:
    """Return the dense edit that lowers the loss of every mini-batch."""
    prepared = prepare("locft", host, requests, config, layers=lambda depth: (5 * depth // 6,), rate=0.03)
    bounds = None if config.epsilon is None else prepared.bounds(config.epsilon)
    return fine_tune(
        "locft", host, requests, prepared, work, bounds=bounds, stop=Stop(config.stop_loss, "mean")
    )


METHOD = Method(
    name="locft",
    title="LocFT-BF",
    paper="LocFT-BF, ICLR 2026, arXiv 2509.22072",
    config=Config,
    fit=fit,
    gives=WeightEdit,
    batch=True,
    sequential=True,
    needs=("gradients",),
)
