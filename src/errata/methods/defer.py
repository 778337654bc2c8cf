"""DEFER: one linear gate decides whether a linear map of its own answers in place of a layer.

Paper      Hartvigsen et al., "Aging with GRACE: Lifelong Model Editing with Discrete Key-Value Adaptors",
           NeurIPS 2023, arXiv 2211.11031, baseline "Defer", after SERAC (Mitchell et al., ICML 2022, arXiv 2206.06520)
Implements A gate g = sigmoid(w q + b) on the layer's input q at the prompt's last token, and a map o(q) = W q + c.
           Both are trained by Adam on the likelihood of a request's target with g o + (1 - g) layer as the output;
           in use the layer's output is replaced by o where g is at least ``threshold``
Departs    The router decides once, at the prompt's last token, for the whole answer. ``positions: last`` is what the
           other memories of this package replace; the authors' code replaces all tokens. The gate starts open
           (``start``): at 0 it closes for good wherever the new map does worse than the layer at first
Needs      Gradients. No prompt outside the scope is ever seen, so the gate learns to accept all prompts: a baseline
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from errata.config import positive
from errata.edits.memory import Intervention, MemoryEdit
from errata.edits.routers.gate import Gate
from errata.errors import ConfigError
from errata.host import hooks
from errata.host.host import Host
from errata.host.layout import Site
from errata.methods._memory import editable_layer
from errata.methods._method import Method, Workspace, check_requests, notes, provenance, without
from errata.training.tune import Losses, Stop, descend, seeded
from errata.types import Request


@dataclass(frozen=True)
class Config:
    """Settings of DEFER."""

    layer: int | None = None
    """Layer whose feed-forward output is replaced. None: at three quarters of the depth, as for GRACE."""
    steps: int = 100
    """Adam steps for a request (authors' code: 100)."""
    learning_rate: float = 0.1
    """Adam's rate (authors' code: 0.1, for BERT and T5; WISE's authors use 7e-5 for models of 7 billion parameters)."""
    threshold: float = 0.5
    """Least value of the gate (paper: 0.5)."""
    start: float = 2.0
    """Bias of the gate before training (authors' code: a random number near 0)."""
    positions: Literal["last", "prompt", "all"] = "all"
    """Tokens whose output is replaced (authors' code: all)."""

    def problems(self) -> list[str]:
        """Check ranges."""
        complaints = positive(self, "steps", "learning_rate")
        if not 0 < self.threshold < 1:
            complaints.append(f"threshold: expected a value between 0 and 1, found {self.threshold}")
        return complaints


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> MemoryEdit:
    """Return gate and map after training on the requests one after another."""
    check_requests("defer", requests)
    site = host.layout.site(editable_layer(host, config.layer, 0.75))
    config = replace(config, layer=site.layer)
    first = len(work.after.provenance.requests) if work.after else 0
    facts = {"loss": 0.0}
    with without(work.after, host), hooks.frozen(host.model), seeded(host, work.seed + first):
        gate, answer = _load(work.after, host, site, config.start)
        losses = Losses(host, requests, "target", depth=site.layer)
        for i in range(len(requests)):
            loss = _train(host, site, losses, i, gate, answer, config)
            facts["loss"] = max(facts["loss"], loss)
            work.on_progress("requests", i + 1, len(requests))
    record = provenance("defer", host, requests, config, work, **notes(facts))
    weight, bias, gate_weight, gate_bias = (
        p.detach().float().cpu() for p in (answer.weight, answer.bias, gate.weight, gate.bias)
    )
    intervention = Intervention(
        site.name, "affine", {"weights": weight[None], "biases": bias[None]}, config.positions
    )
    return MemoryEdit((intervention,), Gate(gate_weight, gate_bias, config.threshold), record)


def _load(after: MemoryEdit | None, host: Host, site: Site, start: float) -> tuple[nn.Linear, nn.Linear]:
    """Return gate and map of an earlier edit, or new ones. Raises ConfigError for an edit at another layer."""
    device = host.device_of(site)
    gate, answer = nn.Linear(site.d_in, 1), nn.Linear(site.d_in, site.d_out)
    nn.init.constant_(gate.bias, start)
    if after is not None:
        (intervention,), router = after.interventions, after.router
        if intervention.module != site.name or not isinstance(router, Gate):
            raise ConfigError(
                f"the earlier gate is at {intervention.module}, not at {site.name}; use the same layer"
            )
        with torch.no_grad():
            gate.weight.copy_(router.weights)
            gate.bias.copy_(router.biases)
            answer.weight.copy_(intervention.payload["weights"][0])
            answer.bias.copy_(intervention.payload["biases"][0])
    return gate.to(device), answer.to(device)


def _train(
    host: Host, site: Site, losses: Losses, number: int, gate: nn.Linear, answer: nn.Linear, config: Config
) -> float:
    """Train on one request; return its loss, nats per token."""
    module, last = host.model.get_submodule(site.name), losses.lines[number].at[0]
    inputs: list[Tensor] = []

    def mixed(output: Tensor) -> Tensor:
        shape = output.shape  # of one row, whose tokens some modules get without an axis for rows
        x, output = (part.reshape(1, -1, part.shape[-1]) for part in (inputs.pop().float(), output))
        share = torch.sigmoid(functional.linear(x[:, last], gate.weight, gate.bias))[:, None]  # [rows, 1, 1]
        own = functional.linear(x, answer.weight, answer.bias)
        column = torch.arange(output.shape[1], device=output.device)
        mask = {"last": column == last, "prompt": column <= last, "all": column >= 0}[config.positions]
        changed = (share * own + (1 - share) * output.float()).to(output)
        return torch.where(mask[None, :, None], changed, output).reshape(shape)

    def loss(_: Sequence[int]) -> Tensor:
        inputs.clear()
        with hooks.on_input(module, inputs.append), hooks.on_output(module, mixed):
            return losses([number])

    optimizer = torch.optim.Adam([*gate.parameters(), *answer.parameters()], lr=config.learning_rate)
    outcome = descend(optimizer, loss, 1, steps=config.steps, stop=Stop(None))
    return float(outcome.losses[0])


METHOD = Method(
    name="defer",
    title="DEFER",
    paper="Baseline of Aging with GRACE: Lifelong Model Editing with Discrete Key-Value Adaptors, NeurIPS 2023, "
    "arXiv 2211.11031",
    config=Config,
    fit=fit,
    gives=MemoryEdit,
    batch=True,
    sequential=True,
    cumulative=True,
    needs=("gradients",),
)
