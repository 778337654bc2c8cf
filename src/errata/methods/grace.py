"""GRACE: a codebook at one layer, whose entries replace the layer's output for inputs near their keys.

Paper      Hartvigsen et al., "Aging with GRACE: Lifelong Model Editing with Discrete Key-Value Adaptors",
           NeurIPS 2023, arXiv 2211.11031
Implements Sec. 3.2 and Algorithm 1: a key is the layer's input at the prompt's last token, a value its output;
           an edit adds an entry, widens one that has its target already, or splits one that has another; the
           value of the entry in charge is trained by Adam on the likelihood of the target
Departs    Targets are compared token by token (authors' code: by the mean of their ids, which may agree for
           different ones). Routers decide once, at the prompt's last token, and the decision holds while the
           answer is generated; the authors' code takes each new token for a key where generation has a cache.
           ``positions: last`` is what later work uses for decoders (EasyEdit); the authors' code also has all
           tokens up to the last one, ``prompt``, and all, ``all``. Only the value in charge is optimised.
Needs      Nothing but the model
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from errata.config import positive
from errata.edits.memory import Intervention, MemoryEdit
from errata.edits.routers.radius import Radius
from errata.errors import ConfigError
from errata.host import hooks
from errata.host.layout import Site
from errata.host.load import Host
from errata.methods._method import Method, Workspace, notes, provenance, without
from errata.training.tune import Losses, Stop, descend, seeded
from errata.types import Request

BORDER = 1e-5
"""How much less than half the distance the older of two split entries reaches (authors' code)."""


@dataclass(frozen=True)
class Config:
    """Settings of GRACE."""

    layer: int | None = None
    """Layer whose feed-forward output is replaced. None: at three quarters of the depth (authors: 35 of 48 for
    GPT-2 XL; EasyEdit: 27 of 32 for Llama 2 7B)."""
    radius: float = 1.0
    """Radius of a new entry, in plain numbers of the layer's input (authors' code: 1.0)."""
    steps: int = 100
    """Adam steps for a value (authors' code: 100)."""
    learning_rate: float = 1.0
    """Adam's rate (authors' code: 1.0)."""
    stop_loss: float | None = None
    """Loss in nats per target token below which training a value ends. None: never (authors' code)."""
    start: Literal["cold", "warm"] = "cold"
    """Where a value starts: uniform between 0 and 1 (authors' code), or the layer's own output."""
    positions: Literal["last", "prompt", "all"] = "last"
    """Tokens whose output is replaced: the prompt's last one, all of the prompt, all."""
    moving_average: bool = False
    """Whether an entry that is widened moves its key half way to the new one (authors' code: an option, off)."""

    def problems(self) -> list[str]:
        """Check ranges."""
        return positive(self, "radius", "steps", "learning_rate", "stop_loss")


@dataclass
class _Codebook:
    """Keys, values, radii and targets of the entries so far."""

    keys: list[Tensor]
    values: list[Tensor]
    radii: list[float]
    targets: list[tuple[int, ...]]
    log: list[dict[str, Any]]

    def take(self, number: int, key: Tensor, target: tuple[int, ...], radius: float, average: bool) -> int:
        """Enter a request's key ``[d_in]``; return the entry in charge of it, which may be one to come."""
        near, distance = self._nearest(key)
        new = len(self.keys)
        entry: dict[str, Any] = {"request": number, "entry": new, "distance": distance}
        if near is None or distance > radius + self.radii[near]:
            self._add(key, target, radius)
            self.log.append({**entry, "action": "add"})
            return new
        if self.targets[near] == target:
            self.log.append({**entry, "entry": near, "action": "expand", "radius": self.radii[near]})
            self.radii[near] = max(self.radii[near], distance)
            if average:
                self.keys[near] = (self.keys[near] + key) / 2
            return near
        self.log.append({**entry, "action": "split", "other": near, "radius": self.radii[near]})
        self.radii[near] = distance / 2 - BORDER
        self._add(key, target, distance / 2)
        return new

    def _nearest(self, key: Tensor) -> tuple[int | None, float]:
        if not self.keys:
            return None, float("inf")
        distances = (torch.stack(self.keys) - key).norm(dim=1)
        near = int(distances.argmin())
        return near, float(distances[near])

    def _add(self, key: Tensor, target: tuple[int, ...], radius: float) -> None:
        self.keys.append(key)
        self.targets.append(target)
        self.radii.append(radius)


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> MemoryEdit:
    """Return the codebook of all requests so far, each entered in order and its entry's value trained."""
    site = _site(host, config)
    config = replace(config, layer=site.layer)
    book = _opened(work.after, site)
    first = len(work.after.provenance.requests) if work.after else 0
    with without(work.after, host), hooks.frozen(host.model), seeded(host, work.seed + first):
        losses = Losses(host, requests, "target", depth=site.layer)
        keys, outputs = _at_prompts(host, site, losses)
        worst = 0.0
        for i, line in enumerate(losses.lines):
            entry = book.take(first + i, keys[i], line.targets, config.radius, config.moving_average)
            known = book.values[entry] if entry < len(book.values) else None
            start = _start(outputs[i], config) if known is None else known
            value, loss = _train(host, site, losses, i, start, config)
            book.values[entry:] = [value, *book.values[entry + 1 :]]
            worst = max(worst, loss)
            work.on_progress("values", i + 1, len(requests))
    record = provenance(
        "grace", host, requests, config, work, **notes({"loss": worst, "entries": len(book.keys)})
    )
    return _edit(book, site, config, record)


def _site(host: Host, config: Config) -> Site:
    depth = len(host.layout.blocks)
    editable = [i for i, site in enumerate(host.layout.mlp_out) if site is not None]
    if config.layer is not None:
        return host.layout.site(config.layer + depth if config.layer < 0 else config.layer)
    if not editable:
        return host.layout.site(0)  # raises, with the reason
    return host.layout.site(min(editable, key=lambda i: (abs(i - round(0.75 * depth)), i)))


def _opened(after: MemoryEdit | None, site: Site) -> _Codebook:
    """Open the codebook that an earlier edit holds, or an empty one."""
    if after is None:
        return _Codebook([], [], [], [], [])
    (one,), router = after.interventions, after.router
    if one.module != site.name or not isinstance(router, Radius):
        raise ConfigError(
            f"the earlier codebook is at {one.module}, asked is {site.name}; use the same layer"
        )
    targets = [tuple(t for t in row if t >= 0) for row in after.state["targets"].tolist()]
    return _Codebook(
        list(router.keys),
        list(one.payload["values"]),
        router.radii.tolist(),
        targets,
        [dict(e) for e in after.log],
    )


@torch.no_grad()
def _at_prompts(host: Host, site: Site, losses: Losses) -> tuple[Tensor, Tensor]:
    """Return the site's input ``[n, d_in]`` and output ``[n, d_out]`` at each prompt's last token, on the CPU."""
    module = host.model.get_submodule(site.name)
    keys, outputs = [], []
    for i, line in enumerate(losses.lines):
        inputs: list[Tensor] = []
        given: list[Tensor] = []
        with hooks.on_input(module, inputs.append), hooks.on_output(module, given.append):
            losses([i])
        place = line.at[0]
        keys.append(inputs[0][0, place].float().cpu())
        outputs.append(given[0][0, place].float().cpu())
    return torch.stack(keys), torch.stack(outputs)


def _start(output: Tensor, config: Config) -> Tensor:
    return output.clone() if config.start == "warm" else torch.rand(output.shape)


def _train(
    host: Host, site: Site, losses: Losses, number: int, start: Tensor, config: Config
) -> tuple[Tensor, float]:
    """Train a value ``[d_out]`` on one request's target; return it with the loss, nats per token."""
    value = nn.Parameter(start.to(host.device_of(site)))
    last = losses.lines[number].at[0]

    def replaced(output: Tensor) -> Tensor:
        column = torch.arange(output.shape[1], device=output.device)
        acting = {"last": column == last, "prompt": column <= last, "all": column >= 0}[config.positions]
        return torch.where(acting[None, :, None], value.to(output), output)

    def run(_: Sequence[int]) -> Tensor:
        with hooks.on_output(host.model.get_submodule(site.name), replaced):
            return losses([number])

    optimizer = torch.optim.Adam([value], lr=config.learning_rate)
    outcome = descend(optimizer, run, 1, steps=config.steps, stop=Stop(config.stop_loss))
    return value.detach().cpu(), float(outcome.losses[0])


def _edit(book: _Codebook, site: Site, config: Config, record: Any) -> MemoryEdit:
    longest = max(len(target) for target in book.targets)
    targets = torch.tensor([[*target, *[-1] * (longest - len(target))] for target in book.targets])
    values = {"values": torch.stack(book.values)}
    return MemoryEdit(
        (Intervention(site.name, "replace", values, config.positions),),
        Radius(torch.stack(book.keys), torch.tensor(book.radii, dtype=torch.float32)),
        record,
        {"targets": targets},
        tuple(book.log),
    )


METHOD = Method(
    name="grace",
    title="GRACE",
    paper="Aging with GRACE: Lifelong Model Editing with Discrete Key-Value Adaptors, NeurIPS 2023, arXiv 2211.11031",
    config=Config,
    fit=fit,
    gives=MemoryEdit,
    batch=True,
    sequential=True,
    cumulative=True,
)
