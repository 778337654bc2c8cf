"""MELO: a low-rank block for every few requests, and clusters of prompts that say which block acts.

Paper      Yu et al., "MELO: Enhancing Model Editing with Neuron-Indexed Dynamic LoRA", AAAI 2024, arXiv 2312.11795
Implements Blocks B_j A_j of LoRA at some layers, y + (alpha / R) (R / r) B_j A_j x with r of R directions; the authors'
           code has the factor sqrt(R / r) on each of A_j and B_j, and alpha = R. A vector database at a lower layer:
           its output at the prompt's last token is the query. A query far from all clusters begins one; one near a
           cluster with its target joins it, whose centre becomes the mean of its points and whose radius reaches all of
           them; one near a cluster with another target splits the distance, and points that the older cluster no longer
           reaches are forgotten. A prompt in the radius of the nearest cluster takes the block of the nearest
           point in it. Adam with a rate that is halved in steps
Departs    Targets are compared token by token (authors' code: by the sum of their ids). ``radius`` is measured, for it
           depends on the layer (authors: 0.1 to 75): half the distance from a query to the states of the model's own
           texts, by the rule that splits clusters. A query that an earlier request with another target already has
           takes its place; split radii of zero would answer neither. There is no largest number of blocks, and a
           block holds requests of one fit. ``paraphrases``: the model's own wordings are trained on and become points
           too, which finds more wordings than any radius. The router decides once, at the prompt's last token
Undo       A block is dropped with all its requests (``errata retract``), never one request of several; radii that a
           split made smaller stay so
Needs      Gradients; texts of the model's own, or a corpus; for paraphrases, tables that the model writes once
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from errata.config import positive
from errata.edits.memory import MemoryEdit
from errata.errors import ConfigError
from errata.host import hooks
from errata.host.host import Host
from errata.locate.own import OwnCounts
from errata.methods._clusters import ClusterDatabase
from errata.methods._memory import block_interventions, block_maps, earlier_blocks, editable_layer
from errata.methods._method import Method, Workspace, check_requests, notes, provenance, without
from errata.methods._settings import at_least_zero
from errata.training.low_rank_block import BlockPlan, train_block
from errata.training.slots import outputs_of
from errata.training.tune import Losses, Stop, seeded
from errata.types import Request


@dataclass(frozen=True)
class Config:
    """Settings of MELO."""

    query_layer: int | None = None
    """Layer of the vector database. None: the nearest to three quarters of the depth with a layer above it (authors: 35
    of 48 for GPT-2 XL, 4 of 12 for BERT)."""
    query: str = "mlp_out"
    """Linear map of that layer whose output is the query: mlp_in, mlp_out or the end of its name; of several the first
    (authors: c_fc for GPT-2 XL, which is mlp_in, the output of the feed-forward for T5 and BERT)."""
    layers: tuple[int, ...] | None = None
    """Layers with blocks, above the vector database. None: the next two (authors: 36 and 37 for GPT-2 XL)."""
    maps: tuple[str, ...] = ("mlp",)
    """Linear maps with blocks: mlp, mlp_in, mlp_out, or ends of names (authors: c_fc for GPT-2 XL, both for T5)."""
    rank: int = 2
    """r, directions of a block at each map (authors' code: 2, 4 for BERT)."""
    alpha: float = 16.0
    """Factor of B A, divided by ``rank``. The authors' alpha is R, r times the number of blocks: 700 for GPT-2 XL, 400
    for BERT, 40 for T5."""
    per_block: int = 4
    """Requests that share a block (authors' code: 4 for GPT-2 XL, 50 for BERT, 100 for T5)."""
    steps: int = 50
    """Adam steps for a block (authors' code: 50)."""
    learning_rate: float = 0.01
    """Adam's rate (authors' code: 0.01; 0.001 for GPT-2 XL)."""
    decay: float = 0.5
    """Factor on the rate every ``decay_every`` steps (authors' code: 0.5)."""
    decay_every: int = 20
    """Steps between them (authors' code: 20 for T5, 30 for BERT and GPT-2 XL)."""
    stop_loss: float | None = None
    """Loss in nats per target token that every request has to be below for training to end. None: never (authors)."""
    radius: float | None = None
    """Radius of a new cluster, in the unit of the query (authors' code: 0.5 for GPT-2 XL, 0.1 for BERT, 75 for T5).
    None: half the distance to the model's own texts, for each query."""
    near: float = 0.01
    """Share of the texts' tokens that may be nearer than that, as some state what is asked."""
    texts: int = 64
    """Texts of the model's own that a radius is measured on."""
    text_tokens: int = 32
    """Their length in tokens."""
    paraphrases: int = 0
    """How many own paraphrases of each request become points too, and are trained on (authors: none)."""

    def problems(self) -> list[str]:
        """Check ranges."""
        names = (
            "rank",
            "alpha",
            "per_block",
            "steps",
            "learning_rate",
            "decay",
            "decay_every",
            "stop_loss",
            "radius",
        )
        complaints = [*positive(self, *names, "texts", "text_tokens"), *at_least_zero(self, "paraphrases")]
        if not 0 <= self.near < 1:
            complaints.append(f"near: expected a share below 1, found {self.near}")
        return complaints


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> MemoryEdit:
    """Return the blocks and clusters of all requests so far; ``per_block`` requests at a time get a new block."""
    check_requests("melo", requests)
    config, query, maps = _resolve(host, config)
    blocks, database = earlier_blocks(work.after, maps, query), ClusterDatabase.of(work.after)
    first = len(work.after.provenance.requests) if work.after else 0
    plan = BlockPlan(
        config.rank, config.alpha / config.rank, config.steps, config.learning_rate, decay=config.decay,
        decay_every=config.decay_every, stop=Stop(config.stop_loss),
    )  # fmt: skip
    worst, owners = 0.0, work.after.state["owners"].tolist() if work.after else []
    texts = [] if config.radius else [ids for _, ids in work.texts(host, config.texts, config.text_tokens)]
    with without(work.after, host), hooks.frozen(host.model), seeded(host, work.seed + first):
        wordings = work.own_texts(host, requests, OwnCounts(paraphrases=config.paraphrases))
        around = torch.cat(outputs_of(host, query, texts)) if texts else None
        for start in range(0, len(requests), config.per_block):
            part = range(start, min(start + config.per_block, len(requests)))
            rows = [(i, row) for i in part for row in (requests[i], *wordings[i].paraphrases)]
            losses = Losses(host, [row for _, row in rows], depth=min(config.layers or (0,)))
            block, outcome = train_block(host, maps, losses, plan, rows=work.batch_size)
            for (i, _), line in zip(rows, losses.lines, strict=True):
                own = outputs_of(host, query, [line.ids[: line.at[0] + 1]])[0][-1]
                database.enter(first + i, own, line.targets, len(blocks), _radius(own, around, config))
            owners += [len(blocks)] * len(part)
            blocks.append(block)
            worst = max(worst, float(outcome.losses.max()))
            work.on_progress("blocks", part.stop, len(requests))
    facts = {"worst": worst, "blocks": len(blocks), "clusters": len(database.clusters)}
    record = provenance("melo", host, requests, config, work, **notes(facts))
    state, log = {"owners": torch.tensor(owners)}, tuple(database.log)
    return MemoryEdit(block_interventions(maps, blocks), database.router(), record, state, log, query)


def _resolve(host: Host, config: Config) -> tuple[Config, str, list[str]]:
    """Return the settings with layers filled in, the module of the query, and the maps with blocks."""
    depth = len(host.layout.blocks)
    if depth < 2:
        raise ConfigError("melo needs a layer above that of its vector database, and the model has one layer")
    layer = editable_layer(host, config.query_layer, min(0.75, (depth - 2) / depth))
    layers = range(layer + 1, min(layer + 3, depth)) if config.layers is None else config.layers
    layers = tuple(sorted({one + depth if one < 0 else one for one in layers}))
    maps, queries = block_maps(host, layers, config.maps), block_maps(host, [layer], [config.query])
    if layers[0] <= layer:
        raise ConfigError(
            f"layers: expected layers above {layer}, whose output is the query, found {list(layers)}"
        )
    return replace(config, query_layer=layer, layers=layers), queries[0], maps


def _radius(query: Tensor, around: Tensor | None, config: Config) -> float:
    """Return the radius of a new cluster: as set, or half the distance to the states ``[n, d]`` of own texts."""
    if around is None:
        assert config.radius is not None
        return config.radius
    return float((around - query).norm(dim=1).quantile(config.near)) / 2


METHOD = Method(
    name="melo",
    title="MELO",
    paper="MELO: Enhancing Model Editing with Neuron-Indexed Dynamic LoRA, AAAI 2024, arXiv 2312.11795",
    config=Config,
    fit=fit,
    gives=MemoryEdit,
    batch=True,
    sequential=True,
    cumulative=True,
    needs=("gradients",),
)
