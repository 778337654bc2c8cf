"""LoRA: train low-rank adapters of linear maps on the new facts, and keep them as low-rank deltas.

Paper      Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv 2106.09685;
           as an editing baseline in Wang et al., "EasyEdit", ACL 2024, arXiv 2308.07269. AdaLoRA: Zhang
           et al., ICLR 2023, arXiv 2303.10512
Implements W' = W + (alpha / r) B A (Hu et al., Eq. 3), B initialised to zero, Adam on the cross-entropy of the
           target tokens, with the adapters of the package peft. ``variant: adalora`` trains B diag(E) A, drops
           the least important directions by AdaLoRA's schedule and penalises factors that are not orthogonal
Departs    The delta is computed exactly from the factors, and peft's layers are removed again. EasyEdit trains
           AdaLoRA adapters without passing their schedule the number of steps, so that no direction is ever
           dropped; here LoRA is the default, and AdaLoRA's schedule gets its steps. EasyEdit never stops early;
           LoRA does here, see ``stop_loss``. The rate of B (of E in AdaLoRA), which starts at zero and so
           determines how far the weight moves, is multiplied by the weight's root mean square times sqrt(d_in),
           near one in Llama models; ``scale: published`` leaves it plain. ``anchors`` and ``mates`` train the model's
           own statements, with its present answers, beside the requests; at 0, the default, there are none.
Needs      Gradients; the package peft (pip install 'errata[lora]')
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from errata.edits.weight import WeightEdit
from errata.host.host import Host
from errata.host.kinds import TEXT_HOSTS
from errata.methods._adapters import AdapterConfig, train_adapters
from errata.methods._method import Method, Workspace, check_requests, provenance
from errata.methods._settings import StatementRows
from errata.methods._statements import statement_companions
from errata.training.tune import Losses
from errata.types import Request


@dataclass(frozen=True)
class Config(StatementRows, AdapterConfig):
    """Settings of LoRA."""

    def problems(self) -> list[str]:
        """Check ranges."""
        return [*super().problems(), *self.own_problems()]


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> WeightEdit:
    """Return the low-rank edit that lowers the targets' loss."""
    check_requests("lora", requests)
    beside = statement_companions(host, requests, config, work)

    def losses(config: Config) -> Losses:
        assert config.layers is not None
        return Losses(host, requests, "target", depth=min(config.layers), companions=beside)

    trained = train_adapters("lora", host, config, work, losses)
    record = provenance("lora", host, requests, trained.config, work, **trained.facts)
    return WeightEdit(trained.deltas, trained.across, record)


METHOD = Method(
    name="lora",
    title="LoRA",
    paper="LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022, arXiv 2106.09685",
    config=Config,
    fit=fit,
    gives=WeightEdit,
    batch=True,
    sequential=True,
    needs=("gradients", "peft"),
    hosts=TEXT_HOSTS,
    writes="linear",
)
