"""FT: fine-tune one feed-forward weight on the new facts, inside a box around the old weight.

Paper      Zhu et al., "Modifying Memories in Transformer Models", 2020, arXiv 2012.00363
Implements minimise the loss on the modified facts subject to ||W - W0|| <= epsilon, by a projected
           gradient step (Sec. 4.2; p = infinity is the paper's main choice, p = 2 its other one)
Departs    ``objective: target`` scores each target token after the ones before it. The baseline called
           FT or FT-L in the ROME and EasyEdit code reads every target token from the one
           distribution at the prompt's last token; ``objective: prompt_last`` gives that.
           epsilon is in units of the weight's root mean square, so that it carries over between
           models; the papers' absolute values (2e-3 to 5e-5 for GPT-2 medium to GPT-J) do not.
           ``anchors`` and ``mates`` train the model's own statements, with its present answers, beside the
           requests; 0, the default, is the paper's loss.
Needs      Gradients of the weight; for own statements, tables that the model writes once
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from errata.edits.weight import WeightEdit
from errata.host.host import Host
from errata.host.kinds import TEXT_HOSTS
from errata.methods._fine_tune import FineTuneConfig, fine_tune, prepare
from errata.methods._method import Baseline, Layers, Method, Workspace
from errata.methods._settings import StatementRows
from errata.methods._statements import statement_companions
from errata.training.tune import Stop, rms
from errata.types import Request


@dataclass(frozen=True)
class Config(FineTuneConfig, StatementRows):
    """Settings of FT."""

    layers: Layers = None
    """Layers whose feed-forward output projection is trained. None: one, at a fifth of the depth."""
    norm: Literal["inf", "2"] = "inf"
    """Norm p of the constraint: every entry, or the whole change."""
    epsilon: float | None = 1.0
    """Bound on the change, relative to the weight's root mean square (p = inf) or norm (p = 2); None: free."""
    learning_rate: float | None = None
    """Adam's rate. None: 0.06 in root mean squares, chosen on the lab; 5e-4 in plain numbers (ROME's baseline)."""
    scale: Literal["weight", "published"] = "weight"
    """Unit of the rate: the weight's root mean square, or plain numbers."""
    weight_decay: float = 0.0
    """Adam's L2 penalty, on the change (MEMIT's baseline FT-W: 5e-4 at 10,000 requests)."""
    stop: Literal["mean", "each"] = "mean"
    """Whose loss that is: the mean over requests (baseline code), or every request's own."""

    def problems(self) -> list[str]:
        """Check ranges."""
        complaints = [*super().problems(), *self.own_problems()]
        if self.objective == "prompt_last" and (self.anchors or self.mates):
            complaints.append(
                "anchors and mates: expected 0 with objective prompt_last, whose loss at the model's own answers "
                "is not low: it reads all their tokens from one position"
            )
        return complaints


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> WeightEdit:
    """Return the dense edit that lowers the targets' loss within the box."""
    prepared = prepare("ft", host, requests, config, layers=lambda depth: (depth // 5,), rate=0.06)
    bounds = None
    if config.epsilon is not None:  # in units of the weight, whatever the rate's are
        weights = [host.weight(site) for site in prepared.sites]
        entries = [1 if config.norm == "inf" else weight.numel() ** 0.5 for weight in weights]
        bounds = [config.epsilon * rms(w) * n for w, n in zip(weights, entries, strict=True)]
    return fine_tune(
        "ft", host, requests, prepared, work, bounds=bounds, stop=Stop(config.stop_loss, config.stop),
        norm=config.norm, weight_decay=config.weight_decay,
        companions=statement_companions(host, requests, config, work),
    )  # fmt: skip


METHOD = Method(
    name="ft",
    title="FT",
    paper="Modifying Memories in Transformer Models, 2020, arXiv 2012.00363",
    config=Config,
    fit=fit,
    gives=WeightEdit,
    batch=True,
    sequential=True,
    needs=("gradients",),
    baseline=Baseline(2, "fine-tuning"),
    hosts=TEXT_HOSTS,
)
