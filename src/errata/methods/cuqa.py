"""CUQA: a low-rank expert for every set of updates, and the questions whose likeness says which expert answers.

Paper      Lee et al., "Plug-and-Play Adaptation for Continuously-updated QA", Findings of ACL 2022, arXiv 2204.12785
Implements One LoRA expert for each set, y + (alpha / r) B A x at linear maps of the decoder, A normal with deviation
           0.02, B zero, dropout on x and on A x; only the newest expert is trained, by AdamW. The mean state of every
           question of a set, at unit length, is stored; a prompt takes the expert of the set with the most similar
           question if their cosine exceeds delta, else none
Departs    The paper's states are those of an encoder, which experts do not change. A decoder alone has the output of a
           low block instead, and experts in the blocks above it, so that the state does not depend on them. A set is
           what one fit gets. ``rank`` follows the model's width, a quarter of it: the paper's 256 for T5-large. The
           last epoch is taken, where the paper selects one by accuracy on old and new questions. ``paraphrases``: own
           wordings are trained on and stored too
Undo       An expert is dropped with all its requests (``errata retract``)
Needs      Gradients; for paraphrases, tables that the model writes once
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from errata.config import positive
from errata.edits.memory import MemoryEdit
from errata.edits.routers.similarity import Similarity
from errata.errors import ConfigError
from errata.host import hooks
from errata.host.host import Host
from errata.locate.gradients import linear_maps
from errata.locate.own import OwnCounts
from errata.methods._memory import block_interventions, block_maps, earlier_blocks
from errata.methods._method import Method, Workspace, check_requests, notes, provenance, without
from errata.methods._settings import at_least_zero
from errata.training.low_rank_block import BlockPlan, train_block
from errata.training.slots import outputs_of
from errata.training.tune import Losses, Stop, seeded
from errata.types import Request


@dataclass(frozen=True)
class Config:
    """Settings of CUQA."""

    query_layer: int | None = None
    """Block whose mean output is compared. None: the lowest; chosen on the lab, seed 1, where higher blocks find other
    names more alike than other wordings (paper: the encoder's last)."""
    layers: tuple[int, ...] | None = None
    """Layers with experts, above that block. None: all of these (paper: the whole decoder)."""
    maps: tuple[str, ...] | None = None
    """Linear maps with experts: mlp, mlp_in, mlp_out, or ends of names (authors' code: q, v, wi and wo of T5). None:
    all of a block."""
    rank: int | None = None
    """r, directions at each map. None: a quarter of the model's width (authors' code: 256 for a width of 1024)."""
    alpha: float | None = None
    """Factor of B A, divided by ``rank``. None: four times the rank (authors' code: 1024 for a rank of 256)."""
    start: float = 0.02
    """Standard deviation of A's initial entries (authors' code: 0.02)."""
    dropout: float = 0.1
    """Probability with which an entry of x, and of A x, is left out in training (authors' code: 0.1)."""
    steps: int = 80
    """Epochs (authors' code: 80)."""
    per_step: int = 64
    """Requests per step, in a new order in each epoch (authors' code: 64)."""
    learning_rate: float = 4e-4
    """AdamW's rate (authors' code: 0.0004)."""
    weight_decay: float = 0.01
    """AdamW's (authors' code: 0.01)."""
    stop_loss: float | None = None
    """Loss in nats per target token that every request has to be below for training to end. None: never (authors)."""
    threshold: float = 0.9
    """delta, the least cosine (authors' code: 0.9)."""
    paraphrases: int = 0
    """How many own paraphrases of each request are stored and trained on as well (paper: none)."""

    def problems(self) -> list[str]:
        """Check ranges."""
        names = ("rank", "alpha", "start", "steps", "per_step", "learning_rate", "stop_loss")
        complaints = [*positive(self, *names), *at_least_zero(self, "weight_decay", "paraphrases")]
        if not 0 <= self.dropout < 1:
            complaints.append(f"dropout: expected a share from 0 to below 1, found {self.dropout}")
        if not -1 < self.threshold < 1:
            complaints.append(f"threshold: expected a cosine between -1 and 1, found {self.threshold}")
        return complaints


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> MemoryEdit:
    """Return the experts of all sets so far; these requests are a set, and get a new one."""
    check_requests("cuqa", requests)
    config, query, maps = _resolve(host, config)
    assert config.rank is not None and config.alpha is not None and config.layers is not None
    experts = earlier_blocks(work.after, maps, query)
    first = len(work.after.provenance.requests) if work.after else 0
    plan = BlockPlan(
        config.rank, config.alpha / config.rank, config.steps, config.learning_rate, start=config.start,
        weight_decay=config.weight_decay, dropout=config.dropout, stop=Stop(config.stop_loss),
        per_step=config.per_step, shuffle=work.seed + first,
    )  # fmt: skip
    with without(work.after, host), hooks.frozen(host.model), seeded(host, work.seed + first):
        wordings = work.own_texts(host, requests, OwnCounts(paraphrases=config.paraphrases))
        rows = [row for own, one in zip(wordings, requests, strict=True) for row in (one, *own.paraphrases)]
        losses = Losses(host, rows, depth=min(config.layers))
        expert, outcome = train_block(
            host, maps, losses, plan, rows=work.batch_size,
            tick=lambda done, total: work.on_progress("epochs", done, total),
        )  # fmt: skip
        vectors = _vectors(host, query, [line.ids[: line.at[0] + 1] for line in losses.lines])
    before, number = work.after, len(experts)
    keys, blocks, owners = [vectors], [number] * len(rows), [number] * len(requests)
    log = [{"request": first + i, "block": number, "action": "add"} for i in range(len(requests))]
    if before is not None:
        keys, owners = [before.router.keys, vectors], [*before.state["owners"].tolist(), *owners]
        blocks, log = [*before.router.blocks.tolist(), *blocks], [*before.log, *log]
    router = Similarity(torch.cat(keys), config.threshold, blocks=torch.tensor(blocks))
    facts = {**outcome.facts(), "experts": number + 1, "vectors": len(blocks)}
    record = provenance("cuqa", host, requests, config, work, **notes(facts))
    interventions, state = block_interventions(maps, [*experts, expert]), {"owners": torch.tensor(owners)}
    return MemoryEdit(interventions, router, record, state, tuple(log), query)


def _resolve(host: Host, config: Config) -> tuple[Config, str, list[str]]:
    """Return the settings filled in, the block that is compared, and the maps with experts."""
    depth, width = len(host.layout.blocks), host.layout.width
    layer = config.query_layer or 0
    layer = layer + depth if layer < 0 else layer
    layers = range(layer + 1, depth) if config.layers is None else config.layers
    layers = tuple(sorted({one + depth if one < 0 else one for one in layers}))
    if not layers or not 0 <= layer < layers[0]:
        raise ConfigError(
            f"layers: expected layers above {layer}, whose output is compared, found {list(layers)}"
        )
    blocks = host.layout.blocks
    maps = (
        [f"{blocks[one]}.{path}" for one in layers for path in linear_maps(host, one)]
        if config.maps is None and layers[-1] < depth
        else block_maps(host, layers, config.maps or ())
    )
    rank = max(1, width // 4) if config.rank is None else config.rank
    alpha = 4.0 * rank if config.alpha is None else config.alpha
    return replace(config, query_layer=layer, layers=layers, rank=rank, alpha=alpha), blocks[layer], maps


def _vectors(host: Host, query: str, rows: Sequence[Sequence[int]]) -> Tensor:
    """Return the mean state of each row's tokens, of unit length ``[n, d]``."""
    means = torch.stack([states.mean(0) for states in outputs_of(host, query, rows)])
    return functional.normalize(means, dim=1)


METHOD = Method(
    name="cuqa",
    title="CuQA",
    paper="Plug-and-Play Adaptation for Continuously-updated QA, Findings of ACL 2022, arXiv 2204.12785",
    config=Config,
    fit=fit,
    gives=MemoryEdit,
    batch=True,
    sequential=True,
    cumulative=True,
    needs=("gradients",),
)
