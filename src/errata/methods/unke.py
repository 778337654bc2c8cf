"""UnKE: edit long, free-form answers by training one block to give a chosen output at the question's last token.

Paper      Deng et al., "Everything is Editable: Extend Knowledge Editing to Unstructured Data in Large
           Language Models", ICLR 2025, arXiv 2405.15349
Implements Stage 1: a shift of the block's output at the question's last token under which the whole
           answer is likely, z = h + shift. Stage 2: all parameters of that block by AdamW, so that it
           gives z there, and its old output at every other token of question and answer and at
           every token of some preserved texts: the sum of two mean squared errors
Departs    The block runs inside the model's own forward pass, with its inputs cached from one pass; the
           authors' code calls it with a mask of its own. Padding is excluded from the error; their code
           includes it, and preserves the question's tokens only (``keep_tokens: question``). Here the
           answer's tokens are preserved too, since stage 1 depends on their old states.
           Preserved texts come from the given corpus, or from the model itself, instead of Alpaca. Both
           rates and the clamp are in units of what they change, so that they transfer between models;
           plain numbers are a setting. The error is in units of the block's old output, which changes
           Adam's steps only through its 1e-8; with ``block_scale: published`` it is plain.
Needs      Gradients; texts to preserve
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

import torch
from torch import Tensor

from errata.config import positive
from errata.edits.weight import Delta, WeightEdit
from errata.errors import ConfigError, HostError
from errata.host import hooks
from errata.host.host import Host
from errata.locate.contexts import Context, sampled_corpus
from errata.locate.problems import edited_token, prompt_end
from errata.locate.values import ValueConfig, optimise
from errata.methods._method import Method, Workspace, check_requests, notes, provenance
from errata.methods._settings import SearchDefaults, fill_search_defaults
from errata.training.block import Block
from errata.training.tune import Outcome, Stop, descend, rms
from errata.types import Request


@dataclass(frozen=True)
class Config:
    """Settings of UnKE."""

    layer: int | None = None
    """The block to train. None: at 7/32 of the depth (published: 7 of 32)."""
    steps: int = 25
    """Stage 1: Adam steps at most (published: 25)."""
    learning_rate: float | None = None
    """Stage 1: Adam's rate, in the unit of ``scale``. None: 0.5 (published: 0.5, plain)."""
    clamp: float | None = None
    """Stage 1: largest shift, in the unit of ``scale``. None: 1.5 (published: 4)."""
    scale: Literal["stream", "published"] | None = None
    """Stage 1: unit. ``stream``: rate in root mean squares and clamp in norms of the block's output;
    ``published``: rate plain. None: stream."""
    decay: float = 1e-3
    """Stage 1: weight of the shift's norm (published: 1e-3)."""
    stop_loss: float = 1e-2
    """Stage 1: a request stops once its loss is below this."""
    block_steps: int = 50
    """Stage 2: AdamW steps (published: 50)."""
    block_rate: float | None = None
    """Stage 2: AdamW's rate, in the unit of ``block_scale``. None: 0.01 in root mean squares, 2e-4 plain
    (published: 2e-4)."""
    block_scale: Literal["weight", "published"] = "weight"
    """Stage 2: unit of the rate: the root mean square of the block's matrices, or plain numbers."""
    block_decay: float = 0.01
    """Stage 2: AdamW's decay of the block's matrices; norms and biases have none (published: 0.01)."""
    decay_all: bool = False
    """Stage 2: whether norms and biases decay too (code: all but Llama's and Qwen's norms, so in GPT-2 all)."""
    keep_tokens: Literal["all", "question"] = "all"
    """Stage 2: tokens of an edit's text at which the block's output is preserved: of question and answer, or of the
    question only (code)."""
    kept: int = 20
    """Number of texts on which the block's output is preserved (published: 20)."""
    tokens: int = 2_000
    """Largest number of tokens of these texts, all together."""

    def problems(self) -> list[str]:
        """Check ranges."""
        names = ("steps", "learning_rate", "clamp", "block_steps", "block_rate", "kept", "tokens")
        return positive(self, *names)


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> WeightEdit:
    """Return the edit of one block that makes the host answer every request with its target."""
    check_requests("unke", requests)
    config = _resolve(host, config)
    assert config.layer is not None
    assert config.learning_rate is not None and config.clamp is not None and config.scale is not None
    search = ValueConfig(
        steps=config.steps, learning_rate=config.learning_rate, clamp=config.clamp, decay=config.decay,
        kl=0.0, stop_loss=config.stop_loss, scale=config.scale,
    )  # fmt: skip
    values = optimise(
        host, requests, [Context("", 1.0)], layer=config.layer, where="block_out", config=search,
        span=prompt_end,
    )  # fmt: skip
    with hooks.frozen(host.model):
        rows = [host.encode_answer(request.text, request.target).ids for request in requests]
        places = [edited_token(host, request, span=prompt_end)[1] for request in requests]
        if config.keep_tokens == "question":
            rows = [host.encode(request.text).ids for request in requests]
        preserved_texts = _preserved_texts(host, config, work)
        plain = config.block_scale == "published"
        task = Block(host, config.layer, [*rows, *preserved_texts], places, values, plain=plain)
        outcome, new_weights = _train(task, config, work)
        remaining = task.remaining_errors(new_weights)
    base = {name: host.model.get_parameter(name).detach() for name in new_weights}
    changes = {name: new - base[name].to(new.dtype) for name, new in new_weights.items()}
    deltas: dict[str, Delta] = {name: delta for name, delta in changes.items() if bool(delta.any())}
    facts = {
        "loss": max(v.loss for v in values),
        "error": float(outcome.losses.mean()),
        "error_before": float(outcome.start.mean()),
        "missed": max(remaining),
    }
    return WeightEdit(deltas, frozenset(), provenance("unke", host, requests, config, work, **notes(facts)))


def _resolve(host: Host, config: Config) -> Config:
    """Return the settings with unset layer, rates and clamp filled in."""
    depth = len(host.layout.blocks)
    layer = round(7 / 32 * depth) if config.layer is None else config.layer
    layer = layer + depth if layer < 0 else layer
    if not 0 <= layer < depth:
        raise ConfigError(f"layer {config.layer}: expected one of 0 to {depth - 1}")
    packed = [
        name for name, p in host.model.get_submodule(host.layout.blocks[layer]).named_parameters()
        if not p.is_floating_point()
    ]  # fmt: skip
    if packed:
        raise HostError(f"layer {layer} has packed weights, {packed[0]} first; load the model unquantised")
    rate = config.block_rate or (2e-4 if config.block_scale == "published" else 0.01)
    plain = config.scale == "published"
    defaults = SearchDefaults(clamp=4.0, scale="published") if plain else SearchDefaults()
    return fill_search_defaults(replace(config, layer=layer, block_rate=rate), defaults)


def _preserved_texts(host: Host, config: Config, work: Workspace) -> list[tuple[int, ...]]:
    """Return the token ids of the texts on which the block's output is preserved."""
    length = max(2, (work.tokens or config.tokens) // config.kept)
    if host.window is not None:
        length = min(length, host.window)
    corpus = work.corpus or sampled_corpus(host, seed=work.seed, texts=config.kept, length=length)
    rows = (host.encode(text).ids[:length] for text in corpus.texts())
    texts = list(islice((row for row in rows if row), config.kept))
    if not texts:
        raise ConfigError(f"corpus {corpus.name!r} contains no text to preserve; use another one")
    return texts


def _train(task: Block, config: Config, work: Workspace) -> tuple[Outcome, dict[str, Tensor]]:
    """Train the block's parameters; return losses and new parameters."""
    assert config.block_rate is not None
    named_parameters = task.host.model.get_submodule(task.path).named_parameters()
    old = {f"{task.path}.{name}": parameter.detach() for name, parameter in named_parameters}
    new = {
        name: weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True).requires_grad_(True)
        for name, weight in old.items()
    }
    matrices = [weight for weight in new.values() if weight.ndim > 1]
    vectors = [weight for weight in new.values() if weight.ndim <= 1]
    unit = 1.0
    if config.block_scale == "weight":
        unit = rms(torch.cat([weight.detach().flatten() for weight in matrices]))
    groups = [
        {"params": matrices, "weight_decay": config.block_decay},
        {"params": vectors, "weight_decay": config.block_decay if config.decay_all else 0.0},
    ]

    def loss(rows: Sequence[int]) -> Tensor:
        return task.errors(rows, {name: weight.to(old[name].dtype) for name, weight in new.items()})

    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=config.block_rate * unit)
    outcome = descend(
        optimizer, loss, len(task.rows), steps=config.block_steps, stop=Stop(None), rows=work.batch_size,
        tick=lambda *at: work.on_progress("unke", *at),
    )  # fmt: skip
    return outcome, {name: weight.detach() for name, weight in new.items()}


METHOD = Method(
    name="unke",
    title="UnKE",
    paper="Everything is Editable: Extend Knowledge Editing to Unstructured Data in Large Language Models, "
    "ICLR 2025, arXiv 2405.15349",
    config=Config,
    fit=fit,
    gives=WeightEdit,
    batch=True,
    sequential=True,
    needs=("gradients",),
    writes="block",
)
