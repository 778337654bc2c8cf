"""CALINET: a few dozen neurons beside the last feed-forward are trained on a batch of facts in several wordings.

Paper      Dong et al., "Calibrating Factual Knowledge in Pretrained Language Models", Findings of EMNLP 2022,
           arXiv 2210.03329
Implements Sec. 4: FFN'(H) = FFN(H) + act(H K^T) V with new K, V ``[slots, d]`` in the decoder's last layer, trained
           on all facts together by Adafactor; the model itself is frozen
Departs    The paper puts each fact in the paraphrases of ParaRel; here they come from the model's own tables
           (``paraphrases``), none by default. The paper has one batch; a later fit trains neurons of its own beside the
           earlier ones. Nothing in the method keeps other answers, so they suffer
Needs      Gradients; for paraphrases, tables that the model writes once
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from errata.config import positive
from errata.edits.memory import Intervention, MemoryEdit
from errata.edits.routers.always import Always
from errata.host import hooks
from errata.host.host import Host
from errata.locate.own import OwnCounts
from errata.methods._memory import earlier_slots, editable_layer, slot_edit
from errata.methods._method import Method, Workspace, check_requests, notes, provenance, without
from errata.methods._settings import at_least_zero
from errata.training.slots import Slots, beside_slots
from errata.training.tune import Losses, Stop, descend, seeded
from errata.types import Request


@dataclass(frozen=True)
class Config:
    """Settings of CALINET."""

    layer: int | None = None
    """Layer whose feed-forward gets the neurons. None: the last one (authors' code)."""
    slots: int = 64
    """Neurons for a batch (authors' code: 64 for 100 facts, 256 for more)."""
    activation: Literal["relu", "gelu", "gelu_tanh", "silu"] = "relu"
    """What a neuron applies to its key's product (authors' code: ReLU, that of T5)."""
    steps: int = 5000
    """Adafactor steps at most (authors' code: 5000)."""
    learning_rate: float = 0.01
    """Adafactor's rate (authors' code: 0.01, constant)."""
    stop_loss: float | None = 0.05
    """Loss in nats per target token that every request has to be below for training to end. None: never (authors)."""
    per_step: int = 512
    """Texts per step (authors' code: 512)."""
    start: float = 0.02
    """Standard deviation of the neurons' initial keys and values (T5's and GPT-2's own: 0.02)."""
    paraphrases: int = 0
    """How many own paraphrases of each request are trained on as well (paper: ParaRel's)."""

    def problems(self) -> list[str]:
        """Check ranges."""
        names = ("slots", "steps", "learning_rate", "stop_loss", "per_step", "start")
        return [*positive(self, *names), *at_least_zero(self, "paraphrases")]


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> MemoryEdit:
    """Return the neurons of all batches so far, the new ones trained beside the earlier."""
    check_requests("calinet", requests)
    layer = editable_layer(host, config.layer, 1.0)
    config = replace(config, layer=layer)
    module, width = host.layout.feed_forward(layer), host.layout.width
    earlier, owners = earlier_slots(work.after, module, width)
    first = len(work.after.provenance.requests) if work.after else 0
    device = host.device_of(host.layout.site(layer))
    with without(work.after, host), hooks.frozen(host.model), seeded(host, work.seed + first):
        wordings = work.own_texts(host, requests, OwnCounts(paraphrases=config.paraphrases))
        rows = [text for own in wordings for text in own.paraphrases]
        keys, values = (
            nn.Parameter((config.start * torch.randn(config.slots, width)).to(device)) for _ in range(2)
        )
        new = Slots(keys, torch.zeros(config.slots, device=device), values)
        losses = Losses(host, [*requests, *rows], "target", depth=layer)
        before = Slots(*(t.to(device) for t in (earlier.keys, earlier.biases, earlier.values)))

        def loss(indices: Sequence[int]) -> Tensor:
            with beside_slots(host, module, lambda: [before, new], config.activation):
                return losses(indices)

        optimizer = torch.optim.Adafactor([keys, values], lr=config.learning_rate)
        outcome = descend(
            optimizer, loss, losses.count, steps=config.steps, stop=Stop(config.stop_loss),
            per_step=config.per_step, tick=lambda done, total: work.on_progress("steps", done, total),
        )  # fmt: skip
    slots = earlier.joined(new.detached())
    record = provenance("calinet", host, requests, config, work, **notes(outcome.facts()))
    intervention = Intervention(module, "slots", slot_edit(slots), "all", config.activation)
    state = {"owners": torch.tensor([*owners, *[first] * config.slots])}
    return MemoryEdit((intervention,), Always(), record, state)


METHOD = Method(
    name="calinet",
    title="CaliNet",
    paper="Calibrating Factual Knowledge in Pretrained Language Models, Findings of EMNLP 2022, arXiv 2210.03329",
    config=Config,
    fit=fit,
    gives=MemoryEdit,
    batch=True,
    sequential=True,
    cumulative=True,
    needs=("gradients",),
)
