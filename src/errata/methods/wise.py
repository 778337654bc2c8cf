"""WISE: a copy of one feed-forward matrix is trained on shards of the requests and answers where it answers otherwise.

Paper      Wang et al., "WISE: Rethinking the Knowledge Memory for Lifelong Model Editing of Large Language Models",
           NeurIPS 2024, arXiv 2405.14768
Implements Side memory W', a copy of a down-projection W. Routing (Eq. 2): D(a) = |(W' - W) a| at the prompt's last
           token against epsilon, the least D of all requests. Training (Eqs. 3-5): target loss and margin loss
           max(0, D(x_i) - alpha) + max(0, beta - D(x_e)) + max(0, gamma - (D(x_e) - D(x_i))), by SGD, the gradient
           inside the shard's random mask of density rho; shards merged by TIES (Yadav et al., 2023, arXiv 2306.01708)
Departs    The authors' code measures the distance after an activation function and as a mean over tokens, decides for
           a whole batch, and again at every new token; here the router decides once for each row, at its prompt's
           last token. x_i is a text that the model writes, where the authors take a question that comes with each
           request; of requests beside pictures every other one is a prompt beside a picture that the host brings.
           ``memories: retrieve`` keeps the memory of each fit, the largest D first; ``merge`` has one
Needs      Gradients; texts of the model's own, or a corpus
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from errata.config import positive
from errata.edits.memory import Intervention, MemoryEdit
from errata.edits.routers.margin import Margin
from errata.errors import ConfigError
from errata.host import hooks
from errata.host.host import Host
from errata.host.layout import Site
from errata.linalg.merging import ties
from errata.methods._memory import editable_layer
from errata.methods._method import Method, Workspace, check_requests, notes, provenance, without
from errata.methods._settings import at_least_zero
from errata.training.slots import inputs_of
from errata.training.tune import Losses, beside, seeded
from errata.types import Request, placed_in


@dataclass(frozen=True)
class Config:
    """Settings of WISE."""

    layer: int | None = None
    """Layer whose down-projection has a side memory. None: at five sixths of the depth (authors: 27 of 32)."""
    steps: int = 70
    """SGD steps for a request (authors' code: 70; 40 for GPT-2, 30 for Llama 3)."""
    learning_rate: float = 1.0
    """SGD's rate (authors' code: 1.0)."""
    weight_decay: float = 1e-5
    """SGD's L2 penalty (authors' code: 1e-5)."""
    shards: int = 2
    """Parts that the requests of a fit are dealt to, one random mask each (paper: k = 2)."""
    density: float = 0.2
    """rho, share of the entries in a mask (paper: 0.2)."""
    alpha: float = 5.0
    """Most that the memory may change the output of texts out of scope, as a norm (authors' code: 5)."""
    beta: float = 20.0
    """Least that it is to change a request's (authors' code: 20)."""
    gamma: float = 10.0
    """Least difference of the two (authors' code: 10)."""
    clamp: float = 1.0
    """Most that an entry may change (authors' code: 1.0)."""
    ties_density: float = 0.53
    """Share of a shard's entries that the merge keeps, the largest (authors' code: 0.53)."""
    stop_loss: float = 0.02
    """Loss below which the training of a request ends (authors' code: 0.02)."""
    ratio: float = 0.88
    """Share of epsilon that a prompt has to reach (authors' code: 0.88; 0.8 for GPT-2, 0.5 for Llama 3)."""
    memories: Literal["merge", "retrieve"] = "merge"
    """One memory that later fits go on with, or one for each fit (paper: WISE-Merge, WISE-Retrieve)."""
    texts: int = 32
    """Texts of the model's own that stand for prompts out of scope."""
    text_tokens: int = 16
    """Their length in tokens."""

    def problems(self) -> list[str]:
        """Check ranges."""
        names = ("steps", "learning_rate", "shards", "clamp", "texts", "text_tokens", "ratio")
        margins = ("weight_decay", "alpha", "beta", "gamma", "stop_loss")
        complaints = [*positive(self, *names), *at_least_zero(self, *margins)]
        for name in ("density", "ties_density"):
            if not 0 < getattr(self, name) <= 1:
                complaints.append(
                    f"{name}: expected a share above 0 and at most 1, found {getattr(self, name)}"
                )
        return complaints


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> MemoryEdit:
    """Return the side memories of all fits so far."""
    check_requests("wise", requests)
    site = host.layout.site(editable_layer(host, config.layer, 5 / 6))
    config = replace(config, layer=site.layer)
    changes, bounds = _load(work.after, site, config)
    first = len(work.after.provenance.requests) if work.after else 0
    device = host.device_of(site)
    rows = [ids for _, ids in work.texts(host, config.texts, config.text_tokens)]
    with without(work.after, host), hooks.frozen(host.model), seeded(host, work.seed + first):
        outside = _outside(host, site, requests, rows)
        side = _Side(host, site, outside, Losses(host, requests, "target", depth=site.layer))
        going_on = bool(changes) and config.memories == "merge"
        start = changes[-1] if going_on else torch.zeros(site.d_out, site.d_in)
        merged, worst = _train_shards(side, start.to(device), config, work)
        bound = float((side.own @ merged.mT).norm(dim=1).min())
    kept = ([], []) if config.memories == "merge" else (changes, bounds)
    if going_on:
        bound = min(bound, bounds[-1])  # as in the paper: the least of all requests so far
    changes, bounds = [*kept[0], merged.cpu()], [*kept[1], bound]
    facts = {"loss": worst, "epsilon": min(bounds)}
    record = provenance("wise", host, requests, config, work, **notes(facts))
    stacked = torch.stack(changes)
    router = Margin(stacked, 0.0, config.ratio * torch.tensor(bounds))
    return MemoryEdit(
        (Intervention(site.name, "dense", {"changes": stacked}, "all"),), router, record,
        {"bounds": torch.tensor(bounds)},
    )  # fmt: skip


class _Side:
    """What the training of a side memory looks at."""

    def __init__(self, host: Host, site: Site, outside: Tensor, losses: Losses) -> None:
        self.host, self.site, self.losses = host, site, losses
        self.outside = outside
        """The site's input at the last token of texts out of scope ``[n, d_in]``."""
        self.own = _ends(host, site, [line.ids[: line.at[0] + 1] for line in losses.lines])
        """The site's input at the last token of each request's prompt ``[n, d_in]``."""

    def loss(self, change: Tensor, number: int, config: Config) -> Tensor:
        """Return the target's and the margins' loss of a request under a change ``[d_out, d_in]``."""
        with beside(self.host, {self.site: change}):
            edit = self.losses([number])[0]
        inside = (change @ self.own[number]).norm()
        outside = (change @ self.outside[number % len(self.outside)]).norm()
        margin = (outside - config.alpha).relu() + (config.beta - inside).relu()
        return edit + margin + (config.gamma - (inside - outside)).relu()


def _ends(host: Host, site: Site, rows: Sequence[Sequence[int]]) -> Tensor:
    """Return the site's input at the last token of rows ``[n, d_in]``, on the site's device."""
    last = torch.tensor([len(row) for row in rows]).cumsum(0) - 1
    return inputs_of(host, site.name, rows)[last].to(host.device_of(site))


def _outside(host: Host, site: Site, requests: Sequence[Request], rows: Sequence[Sequence[int]]) -> Tensor:
    """Return the site's input at the last token of texts out of scope ``[n, d_in]``; ``rows``: the model's own texts.

    Where a request is beside a picture and the host brings pictures along, every other one is a prompt beside one.
    """
    texts, gallery = _ends(host, site, rows), host.resources.gallery
    if gallery is None or all(request.image is None for request in requests):
        return texts
    shown = list(itertools.islice(gallery.shown(), len(texts)))
    with host.codec.seeing([picture for _, picture in shown]):
        beside_pictures = _ends(host, site, [host.encode(placed_in(*one)).ids for one in shown])
    return torch.stack([beside_pictures, texts[: len(shown)]], 1).flatten(0, 1)


def _load(after: MemoryEdit | None, site: Site, config: Config) -> tuple[list[Tensor], list[float]]:
    """Return the changes ``[d_out, d_in]`` and least norms of an earlier edit's memories."""
    if after is None:
        return [], []
    (intervention,) = after.interventions
    if intervention.module != site.name:
        raise ConfigError(
            f"the earlier memory is at {intervention.module}, not at {site.name}; use the same layer"
        )
    if after.provenance.config.get("memories") != config.memories:
        raise ConfigError("memories: expected what the earlier edit was made with")
    return list(intervention.payload["changes"]), after.state["bounds"].tolist()


def _train_shards(side: _Side, start: Tensor, config: Config, work: Workspace) -> tuple[Tensor, float]:
    """Train each shard inside its own mask and merge them; the change ``[d_out, d_in]`` and the worst loss."""
    count = len(side.losses.lines)
    shards = [list(range(first, count, config.shards)) for first in range(min(config.shards, count))]
    trained, worst, done = [], 0.0, 0
    for shard in shards:
        mask = (torch.rand(start.shape) < config.density).to(start.device)
        change = nn.Parameter(start.clone())
        optimizer = torch.optim.SGD([change], lr=config.learning_rate, weight_decay=config.weight_decay)
        for number in shard:
            worst = max(worst, _train(side, change, start, mask, number, optimizer, config))
            done += 1
            work.on_progress("requests", done, count)
        trained.append(change.detach() - start)
    if len(trained) == 1:
        return start + trained[0], worst
    return start + ties(torch.stack(trained), density=config.ties_density), worst


def _train(
    side: _Side, change: nn.Parameter, start: Tensor, mask: Tensor, number: int,
    optimizer: torch.optim.Optimizer, config: Config,
) -> float:  # fmt: skip
    """Train on one request in place, inside a mask and within ``clamp`` of zero; return the loss."""
    loss = previous = float("inf")
    for _ in range(config.steps):
        value = side.loss(change, number, config)
        loss = float(value.detach())
        if loss <= config.stop_loss or abs(previous - loss) <= 1e-4:
            break
        previous = loss
        (gradient,) = torch.autograd.grad(value, [change])
        change.grad = gradient * mask
        optimizer.step()
        with torch.no_grad():
            change.copy_(torch.where(mask, change.clamp(-config.clamp, config.clamp), start))
    return loss


METHOD = Method(
    name="wise",
    title="WISE",
    paper="WISE: Rethinking the Knowledge Memory for Lifelong Model Editing of Large Language Models, NeurIPS 2024, "
    "arXiv 2405.14768",
    config=Config,
    fit=fit,
    gives=MemoryEdit,
    batch=True,
    sequential=True,
    cumulative=True,
    needs=("gradients",),
)
