"""T_PATCHER: a few neurons are added to the last feed-forward for every request, which fire on its mistake alone.

Paper      Huang et al., "Transformer-Patcher: One Mistake worth One Neuron", ICLR 2023, arXiv 2301.09785
Implements Sec. 3: patches y + act(q K^T + b) V of the feed-forward's output; edit loss, activation loss l_a and
           memory losses l_m1, l_m2 (Eqs. 7-10), with S(z; k) the mean of the k largest exp(z); a patch starts at
           K = q / |q|^2, b = 0, as the authors' code does. One patch for each token of the target, five at most
Departs    A patch is a neuron without a gate, whatever the feed-forward's own (the paper's models have none). The
           memory is of texts that the model writes, or of the given corpus, where the authors take questions of the
           training set. No batch of copies of the request: there is no dropout to average
Needs      Texts of the model's own, or a corpus
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from errata.config import positive
from errata.edits.memory import Intervention, MemoryEdit
from errata.edits.routers.always import Always
from errata.host import hooks
from errata.host.host import Host
from errata.methods._memory import earlier_slots, editable_layer, slot_edit
from errata.methods._method import Method, Workspace, check_requests, notes, provenance, without
from errata.methods._settings import at_least_zero
from errata.training.slots import Slots, beside_slots, inputs_of
from errata.training.tune import Losses, seeded
from errata.types import Request


@dataclass(frozen=True)
class Config:
    """Settings of T_PATCHER."""

    layer: int | None = None
    """Layer whose feed-forward gets the patches. None: the last one (paper)."""
    most: int = 5
    """Patches per request at most, one for each token of the target (authors' code: 5)."""
    activation: Literal["relu", "gelu", "gelu_tanh", "silu"] = "relu"
    """What a patch applies to its key's product (paper: the feed-forward's own, GELU)."""
    steps: int = 2000
    """Adam steps at most (authors' code: 2000)."""
    least_steps: int = 100
    """Steps before it is checked whether training may end (authors' code: 100)."""
    check_every: int = 25
    """Steps between checks (authors' code: 25)."""
    learning_rate: float = 0.01
    """Adam's rate (authors' code: 0.01), halved while the loss does not fall."""
    weight_decay: float = 0.01
    """Adam's L2 penalty (authors' code: 0.01)."""
    amplify: float = 10.0
    """Initial scale of a patch's random value (authors' code: 10)."""
    activation_weight: float = 1.0
    """Weight of the activation loss (paper: 1)."""
    memory_weight: float = 10.0
    """Weight of the memory losses (authors' code: 5 for FEVER, 10 for zsRE)."""
    beta: float = -3.0
    """Pre-activation that memories are to be below (authors' code: -3)."""
    gamma: float = 3.0
    """How far memories are to be below the request's own pre-activation (authors' code: 3)."""
    memory: int = 40_000
    """Inputs of the feed-forward that are remembered (authors' code: 40,000)."""
    text_tokens: int = 64
    """Tokens of each text that the memory is read from."""
    top: tuple[int, int] = (5, 1000)
    """How many of the largest terms count in the activation loss and the memory losses (authors' code: 5 and 1000)."""

    def problems(self) -> list[str]:
        """Check ranges."""
        names = ("most", "steps", "check_every", "learning_rate", "memory", "text_tokens", "amplify")
        weights = ("least_steps", "weight_decay", "activation_weight", "memory_weight")
        complaints = [*positive(self, *names), *at_least_zero(self, *weights)]
        return complaints + ([] if min(self.top) > 0 else ["top: expected two positive numbers"])


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> MemoryEdit:
    """Return the patches of all requests so far; each request's are trained beside those of the ones before it."""
    check_requests("t_patcher", requests)
    layer = editable_layer(host, config.layer, 1.0)
    config = replace(config, layer=layer)
    module = host.layout.feed_forward(layer)
    slots, owners = earlier_slots(work.after, module, host.layout.width)
    queries = work.after.state["queries"] if work.after else torch.zeros(0, host.layout.width)
    first = len(work.after.provenance.requests) if work.after else 0
    facts = {"loss": 0.0, "steps": 0}
    texts = min(-(-config.memory // config.text_tokens), 640)
    rows = [ids for _, ids in work.texts(host, texts, config.text_tokens)]
    with without(work.after, host), hooks.frozen(host.model), seeded(host, work.seed + first):
        memory = inputs_of(host, module, rows)[: config.memory]
        losses = Losses(host, requests, "target", depth=layer)
        for i in range(len(requests)):
            trainer = _Patches(host, module, losses, i, slots, torch.cat([memory, queries]), config)
            added, own = trainer.run()
            slots, queries = slots.joined(added), torch.cat([queries, own])
            owners = [*owners, *[first + i] * len(added.keys)]
            facts = {name: max(value, trainer.facts[name]) for name, value in facts.items()}
            work.on_progress("patches", i + 1, len(requests))
    record = provenance("t_patcher", host, requests, config, work, **notes({**facts, "patches": len(owners)}))
    intervention = Intervention(module, "slots", slot_edit(slots), "all", config.activation)
    state = {"owners": torch.tensor(owners), "queries": queries}
    return MemoryEdit((intervention,), Always(), record, state)


class _Patches:
    """The patches of one request while they are trained."""

    def __init__(
        self, host: Host, module: str, losses: Losses, number: int, earlier: Slots, memory: Tensor, config: Config
    ) -> None:  # fmt: skip
        self.host, self.module, self.losses, self.number, self.config = host, module, losses, number, config
        line = losses.lines[number]
        self.targets, at = torch.tensor(line.targets), line.at[: config.most]
        device = host.device
        with self._beside([earlier]):
            own = inputs_of(host, module, [line.ids])
        self.queries = own[list(at)]
        """q, what the feed-forward reads where a token of the target is predicted ``[s, d]``."""
        q = self.queries.to(device)
        self.memory = memory.to(device)
        keys = nn.Parameter(q / q.square().sum(1, keepdim=True))
        values = nn.Parameter(torch.randn(len(q), host.layout.width).to(device))
        self.scale = nn.Parameter(torch.full((len(q), 1), config.amplify, device=device))
        self.slots = Slots(keys, nn.Parameter(torch.zeros(len(q), device=device)), values)
        self.earlier = Slots(*(t.to(device) for t in (earlier.keys, earlier.biases, earlier.values)))
        self.facts: dict[str, Any] = {}

    def run(self) -> tuple[Slots, Tensor]:
        """Train; return the patches and their queries ``[s, d]``, on the CPU."""
        config, slots = self.config, self.slots
        parameters = [slots.keys, slots.biases, slots.values, self.scale]
        optimizer = torch.optim.Adam(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=0.5, patience=1, threshold=0.05
        )
        best_memory, step, edit = float("inf"), 0, torch.tensor(0.0)
        for step in range(1, config.steps + 1):
            edit, memory, activation = self._losses()
            total = edit + config.activation_weight * activation + config.memory_weight * memory
            gradients = torch.autograd.grad(total, parameters)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            nn.utils.clip_grad_norm_(parameters, 5.0)
            optimizer.step()
            if step >= config.least_steps and step % config.check_every == 0:
                plateau.step(float(total.detach()))
                if self._correct():
                    if float(memory.detach()) > best_memory - 1e-3:
                        break
                    best_memory = float(memory.detach())
        self.facts = {"loss": float(edit.detach()), "steps": step}
        with torch.no_grad():
            return Slots(slots.keys, slots.biases, slots.values * self.scale).detached(), self.queries

    def _scaled(self) -> Slots:
        return Slots(self.slots.keys, self.slots.biases, self.slots.values * self.scale)

    def _beside(self, groups: list[Slots]) -> Any:
        return beside_slots(self.host, self.module, lambda: groups, self.config.activation)

    def _losses(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the losses of edit, memory and activation."""
        slots, config = self.slots, self.config
        with self._beside([self.earlier, self._scaled()]):
            edit = self.losses([self.number])[0]
        own = (self.queries.to(slots.keys) * slots.keys).sum(1) + slots.biases  # [s]
        other = self.memory @ slots.keys.mT + slots.biases  # [m, s]
        memory = _largest(other - config.beta, config.top[1])
        memory = memory + _largest(other - own + config.gamma, config.top[1])
        return edit, memory, _largest(-own, config.top[0])

    @torch.no_grad()
    def _correct(self) -> bool:
        """Whether each token of the target is the most probable one."""
        line = self.losses.lines[self.number]
        with self._beside([self.earlier, self._scaled()]):
            logits = self.host.forward(self.host.batch([line.ids]))[0]
        return logits[list(line.at)].argmax(-1).tolist() == list(line.targets)


def _largest(values: Tensor, count: int) -> Tensor:
    """Return S(z; k): the mean of the k largest exp(z) of all entries ``[...]``."""
    flat = values.flatten()
    return flat.topk(min(count, len(flat))).values.exp().mean()


METHOD = Method(
    name="t_patcher",
    title="T-Patcher",
    paper="Transformer-Patcher: One Mistake worth One Neuron, ICLR 2023, arXiv 2301.09785",
    config=Config,
    fit=fit,
    undo="latest",
    gives=MemoryEdit,
    batch=True,
    sequential=True,
    cumulative=True,
)
