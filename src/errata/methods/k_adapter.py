"""K-Adapter: a network of adapter blocks beside the model reads its hidden states and adds to the last one.

Paper      Wang et al., "K-Adapter: Infusing Knowledge into Pre-Trained Models with Adapters", Findings of ACL 2021,
           arXiv 2002.01808; by sets of updates with a router in Lee et al., "Plug-and-Play Adaptation for
           Continuously-updated QA", Findings of ACL 2022, arXiv 2204.12785
Implements Sec. 3: the block at layer l reads H_l + A, A being the output of the block before it, and computes
           A = x + up(transformer layers(down(x))); the final feature is W [H_last ; A_last]. The host is frozen. The
           adapters of several sets are trained independently, and act together (``scope: always``, the paper), or
           that of the set with the most similar question acts (``scope: similar``, as CuQA)
Departs    The paper's model is an encoder, pretrained by relation classification on 5.5 million sentences. Here a set
           of requests is trained on by their targets. Blocks attend to earlier tokens alone, and not to padding (the
           authors' code: to all), with keys and values kept beside the model's own cache. H_last is the output of the
           last block, before the norm of the head. W starts as [I, 0], so that the untrained host is the host. Sizes
           follow the model's width, in the paper's proportions
Undo       An adapter is dropped with all its requests (``errata retract``)
Needs      Gradients; for paraphrases, tables that the model writes once
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from errata.config import positive
from errata.edits.memory import Intervention, MemoryEdit
from errata.edits.routers._router import Router
from errata.edits.routers.every import Every
from errata.edits.routers.similarity import Similarity
from errata.errors import ConfigError
from errata.host import hooks
from errata.host.host import Host
from errata.locate.own import OwnCounts
from errata.methods._method import Method, Workspace, check_requests, notes, provenance, without
from errata.methods._settings import at_least_zero
from errata.training.side import SidePlan, random_side, train_side
from errata.training.slots import outputs_of
from errata.training.tune import Losses, Stop, seeded
from errata.types import Request


@dataclass(frozen=True)
class Config:
    """Settings of K-Adapter."""

    layers: tuple[int, ...] | None = None
    """Layers whose input a block reads. None: the first, the one before the middle and the last but one (paper: 0, 11
    and 22 of RoBERTa-large's 24)."""
    width: int | None = None
    """Width of the blocks' transformer layers. None: three quarters of the model's (authors' code: 768 for 1024)."""
    transformer_layers: int = 2
    """In each block (authors' code: 2)."""
    heads: int | None = None
    """Attention heads in a layer. None: one for every 64 of ``width`` (authors' code: 12)."""
    inner: int | None = None
    """Width of a layer's feed-forward. None: four times ``width`` (authors' code: 3072)."""
    start: float = 0.0002
    """Standard deviation of the maps down and up (authors' code: 0.0002)."""
    layer_start: float = 0.02
    """Standard deviation of the layers' own weights (authors' configuration: 0.02)."""
    dropout: float = 0.1
    """Of attention's weights and of a layer's outputs, in training (authors' code: 0.1)."""
    steps: int = 80
    """Epochs (authors' code: 5 on T-REx; CuQA's: 80)."""
    per_step: int = 64
    """Requests per step, in a new order in each epoch (authors' code: 64 on each of 4 GPUs)."""
    learning_rate: float = 5e-5
    """AdamW's rate (authors' code: 0.00005)."""
    warmup: int = 0
    """Steps in which the rate rises from zero, before it falls to zero at the last one (authors' code: 1200)."""
    weight_decay: float = 0.0
    """AdamW's (authors' code: 0)."""
    clip: float = 1.0
    """Largest norm of the gradients together (authors' code: 1)."""
    stop_loss: float | None = 0.05
    """Loss in nats per target token that every request has to be below for training to end. None: never (authors)."""
    scope: Literal["always", "similar"] = "always"
    """Prompts that an adapter acts on: all, together with the adapters of other sets; or those whose mean state is
    like a stored question's, one adapter each."""
    query_layer: int = 0
    """Scope similar: block whose mean output is compared (CuQA's paper: an encoder's last)."""
    threshold: float = 0.9
    """Scope similar: least cosine (CuQA's code: 0.9)."""
    paraphrases: int = 0
    """How many own paraphrases of each request are trained on, and stored, as well (paper: none)."""

    def problems(self) -> list[str]:
        """Check ranges."""
        names = (
            "width", "transformer_layers", "heads", "inner", "start", "layer_start", "per_step", "learning_rate",
            "clip", "stop_loss",
        )  # fmt: skip
        complaints = [*positive(self, *names)]
        complaints += at_least_zero(self, "steps", "warmup", "weight_decay", "paraphrases")
        if not 0 <= self.dropout < 1:
            complaints.append(f"dropout: expected a share from 0 to below 1, found {self.dropout}")
        if not -1 < self.threshold < 1:
            complaints.append(f"threshold: expected a cosine between -1 and 1, found {self.threshold}")
        return complaints


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> MemoryEdit:
    """Return the adapters of all sets so far; these requests are a set, and get a new one."""
    check_requests("k_adapter", requests)
    config = _resolve(host, config)
    assert config.layers and config.width and config.heads and config.inner
    blocks, earlier = host.layout.blocks, work.after
    module, states = blocks[-1], tuple(blocks[layer] for layer in config.layers)
    first = len(earlier.provenance.requests) if earlier else 0
    plan = SidePlan(
        config.heads, config.dropout, config.steps, config.per_step, config.learning_rate, config.warmup,
        config.weight_decay, config.clip, Stop(config.stop_loss), shuffle=work.seed + first,
    )  # fmt: skip
    with without(earlier, host), hooks.frozen(host.model), seeded(host, work.seed + first):
        wordings = work.own_texts(host, requests, OwnCounts(paraphrases=config.paraphrases))
        rows = [row for own, one in zip(wordings, requests, strict=True) for row in (one, *own.paraphrases)]
        losses = Losses(host, rows, depth=len(blocks) - 1)
        part = random_side(
            len(states), config.transformer_layers, host.layout.width, config.width, config.inner,
            start=config.start, layer_start=config.layer_start,
        )  # fmt: skip
        part, outcome = train_side(
            host, module, states, losses, part, plan, rows=work.batch_size,
            tick=lambda done, total: work.on_progress("epochs", done, total),
        )  # fmt: skip
        prompts = [line.ids[: line.at[0] + 1] for line in losses.lines]
        vectors = _vectors(host, blocks[config.query_layer], prompts) if config.scope == "similar" else None
    payload = {name: tensor[None] for name, tensor in part.items()}
    intervention = Intervention(module, "side", payload, "all", states=states, heads=config.heads)
    if earlier is not None:
        intervention = _joined(earlier.interventions[0], intervention)
    number = intervention.entries - 1
    owners = [number] * len(requests)
    log = [{"request": first + i, "block": number, "action": "add"} for i in range(len(requests))]
    if earlier is not None:
        owners, log = [*earlier.state["owners"].tolist(), *owners], [*earlier.log, *log]
    router = _router(earlier, vectors, number, config.threshold)
    facts = {**outcome.facts(), "adapters": number + 1}
    record = provenance("k_adapter", host, requests, config, work, **notes(facts))
    reads = "" if vectors is None else blocks[config.query_layer]
    return MemoryEdit((intervention,), router, record, {"owners": torch.tensor(owners)}, tuple(log), reads)


def _resolve(host: Host, config: Config) -> Config:
    """Return the settings filled in. Raises ConfigError for layers and heads that do not fit."""
    depth = len(host.layout.blocks)
    default = sorted({max(0, layer) for layer in (0, depth // 2 - 1, depth - 2)})
    layers = tuple(
        layer + depth if layer < 0 else layer
        for layer in (default if config.layers is None else config.layers)
    )
    if not layers or any(not 0 <= layer < depth for layer in (*layers, config.query_layer)):
        raise ConfigError(
            f"layers {list(layers)} and query_layer {config.query_layer}: expected some of 0 to {depth - 1}"
        )
    width = config.width or max(1, 3 * host.layout.width // 4)
    heads = config.heads or max(n for n in range(1, max(1, width // 64) + 1) if width % n == 0)
    if width % heads:
        raise ConfigError(f"heads: {heads} do not divide the width of {width}")
    return replace(config, layers=layers, width=width, heads=heads, inner=config.inner or 4 * width)


def _joined(earlier: Intervention, new: Intervention) -> Intervention:
    """Return the adapters of two interventions as entries of one. Raises ConfigError where their shapes differ."""
    shapes = [{n: tensor.shape[1:] for n, tensor in one.payload.items()} for one in (earlier, new)]
    if shapes[0] != shapes[1] or earlier.description() != new.description():
        raise ConfigError("the earlier adapter has other layers, widths or heads; use the same settings")
    payload = {name: torch.cat([earlier.payload[name], new.payload[name]]) for name in new.payload}
    return replace(new, payload=payload)


def _router(earlier: MemoryEdit | None, vectors: Tensor | None, number: int, threshold: float) -> Router:
    """Return the router with the questions of a new set ``[n, d]``. Raises ConfigError for an edit of another scope."""
    before = None if earlier is None else earlier.router
    if before is not None and isinstance(before, Every) is not (vectors is None):
        raise ConfigError(f"scope: the earlier edit has a {before.name} router; go on with the same one")
    if vectors is None:
        return Every(number + 1)
    keys, blocks = [vectors], [torch.full((len(vectors),), number)]
    if isinstance(before, Similarity) and before.blocks is not None:
        keys, blocks = [before.keys, *keys], [before.blocks, *blocks]
    return Similarity(torch.cat(keys), threshold, blocks=torch.cat(blocks))


def _vectors(host: Host, query: str, rows: Sequence[Sequence[int]]) -> Tensor:
    """Return the mean state of each row's tokens, of unit length ``[n, d]``."""
    means = torch.stack([states.mean(0) for states in outputs_of(host, query, rows)])
    return functional.normalize(means, dim=1)


METHOD = Method(
    name="k_adapter",
    title="K-Adapter",
    paper="K-Adapter: Infusing Knowledge into Pre-Trained Models with Adapters, Findings of ACL 2021, arXiv 2002.01808",
    config=Config,
    fit=fit,
    gives=MemoryEdit,
    batch=True,
    sequential=True,
    cumulative=True,
    needs=("gradients",),
)
