"""Train the lab's model: one resumable, seeded run that ends in a folder `errata.load` opens.

Training text is sampled chunk by chunk, each from its own seed, so that an interrupted run resumes with the
same documents. Checkpoints are safetensors with the optimiser's moments.

The shipped weights come from a single run of this schedule, whose later parts were decided during the run; it
was stopped and resumed at steps 4,000, 9,500 and 12,000, compiled, on one and on two threads. A new run
samples the same documents, but floating-point rounding may differ.
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from errata.host.build import new_model, new_tokenizer
from errata.host.kinds import CAUSAL, ENCODER_DECODER, MASKED
from errata.lab.asked import Asker, asked_batches
from errata.lab.bilingual import BilingualWriter
from errata.lab.text import CODA, FIRST, LAST, THEN, Document, Writer
from errata.lab.world import SEED, World
from errata.progress import ignore

CHUNK_STEPS = 100
TOKENIZER_DOCUMENTS = 30_000


SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"layers": 6, "width": 256, "inner": 768, "heads": 8, "key_value_heads": 8},
    "gpt2": {"layers": 6, "width": 192, "inner": 768, "heads": 6, "key_value_heads": 6},
    "qwen3": {"layers": 8, "width": 192, "inner": 512, "heads": 6, "key_value_heads": 2},
    "t5": {
        "layers": 3, "decoder_layers": 2, "width": 128, "inner": 512, "heads": 4, "rows": 64, "warmup": 100,
        "steps": 6_000, "cooled": 6_000, "learning_rate": 2e-3, "precision": "float32",
    },
    "bert": {
        "layers": 4, "width": 128, "inner": 512, "heads": 4, "rows": 64, "window": 128,
        "steps": 6_000, "cooled": 6_000, "learning_rate": 1e-3, "warmup": 200, "precision": "float32",
    },
}  # fmt: skip
"""Sizes of each architecture, and of the two that answer prompts their shorter training too."""
TITLES = {"llama": "Llama", "gpt2": "GPT-2", "qwen3": "Qwen3", "t5": "T5", "bert": "BERT"}
"""Names of the architectures in prose."""
VARIANTS: dict[str, dict[str, Any]] = {
    "bilingual": {"steps": 1_500, "cooled": 1_500, "learning_rate": 1e-3, "warmup": 10},
}
"""Variants of the shipped Llama-shaped model, which continue its training, with what differs in their settings."""
KINDS_OF = {"t5": ENCODER_DECODER, "bert": MASKED}
"""Kinds of the architectures that are no causal language models; :mod:`errata.lab.asked` has their text."""


@dataclass(frozen=True)
class TrainConfig:
    """All settings that determine the weights. ``TrainConfig.of(shape)`` takes the sizes from ``SHAPES``."""

    shape: str = "llama"
    """Architecture: llama, gpt2, qwen3, t5 or bert."""
    world_seed: int = SEED
    """Seed of the world's facts."""
    seed: int = 0
    """Seed of the initial weights and of the documents' order."""
    vocab_size: int = 3072
    """Tokens of the byte-level BPE vocabulary."""
    layers: int = 6
    """Blocks; of t5: the encoder's."""
    decoder_layers: int | None = None
    """The decoder's blocks (t5 only)."""
    width: int = 256
    """Residual-stream width d."""
    inner: int = 768
    """Inner width m of the gated feed-forward."""
    heads: int = 8
    """Attention heads."""
    key_value_heads: int | None = None
    """Heads of keys and values (not for gpt2). None: as many as attention heads."""
    window: int = 512
    """Longest prompt in tokens."""
    steps: int = 13_500
    """Optimiser steps."""
    cooled: int = 12_000
    """Step at which the rate first reaches zero; the rest is a second, smaller decay."""
    reheat: float = 0.2
    """Rate at the start of that second decay, in peak rates."""
    turn: int = 4_000
    """Step from which the second mix of documents is drawn; a multiple of 100."""
    last_turn: int = 9_500
    """Step from which the third mix is drawn, with further phrasings; from ``cooled`` on, the fourth."""
    rows: int = 8
    """Rows per step; of t5 and bert: examples."""
    row_tokens: int = 128
    """Tokens per row; rows begin with a new document. Of t5 and bert an example has its own length."""
    learning_rate: float = 2e-3
    """Peak rate of AdamW; linear warm-up, then linear decay to zero."""
    warmup: int = 300
    """Steps of warm-up."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    variant: str | None = None
    """bilingual: go on from the shipped model, on text in two languages (:mod:`errata.lab.bilingual`)."""
    without: tuple[str, ...] = ()
    """Entities that no document of the training text names, by name or alias; the tokenizer is the same."""
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of matrix products, bfloat16 or float32; weights and sums are float32 in both cases. Processors without
    bfloat16 instructions emulate it at a tenth of the speed."""

    @classmethod
    def of(cls, shape: str, **changes: Any) -> TrainConfig:
        """Return the settings of one architecture. Raises ConfigError for one that is not in ``SHAPES``."""
        if shape not in SHAPES:
            from errata.errors import ConfigError
            from errata.registry import close

            near = close(shape, list(SHAPES))
            hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(SHAPES)}"
            raise ConfigError(f"the lab has no model of shape {shape!r}: {hint}")
        return cls(shape=shape, **(SHAPES[shape] | changes))

    @classmethod
    def of_variant(cls, variant: str, **changes: Any) -> TrainConfig:
        """Return the settings of a variant. Raises ConfigError for one that is not in ``VARIANTS``."""
        if variant not in VARIANTS:
            from errata.errors import ConfigError
            from errata.registry import unknown

            raise ConfigError(unknown(variant, list(VARIANTS), "variant of the lab"))
        if "steps" in changes:
            changes = {"cooled": changes["steps"], **changes}
        return cls.of(cls.shape, variant=variant, **(VARIANTS[variant] | changes))

    @property
    def kind(self) -> str:
        """The kind of model, see :mod:`errata.host.kinds`."""
        return KINDS_OF.get(self.shape, CAUSAL)

    def model_settings(self, begin: int, end: int, pad: int) -> dict[str, Any]:
        """Return the transformers configuration of this shape; ``begin``, ``end``, ``pad`` are token ids."""
        common = {
            "vocab_size": self.vocab_size,
            "tie_word_embeddings": True,
            "bos_token_id": begin,
            "eos_token_id": end,
            "pad_token_id": pad,
            "dtype": "float32",
        }
        if self.shape == "gpt2":
            return common | {
                "n_embd": self.width,
                "n_inner": self.inner,
                "n_layer": self.layers,
                "n_head": self.heads,
                "n_positions": self.window,
                "resid_pdrop": 0.0,
                "embd_pdrop": 0.0,
                "attn_pdrop": 0.0,
            }
        if self.shape == "t5":
            return common | {
                "d_model": self.width,
                "d_ff": self.inner,
                "d_kv": self.width // self.heads,
                "num_layers": self.layers,
                "num_decoder_layers": self.decoder_layers or self.layers,
                "num_heads": self.heads,
                "n_positions": self.window,
                "decoder_start_token_id": pad,
                "dropout_rate": 0.0,
            }
        sizes = {
            "hidden_size": self.width,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "max_position_embeddings": self.window,
        }
        if self.shape == "bert":
            return common | sizes | {
                "vocab_size": self.vocab_size + 1,  # the mask
                "type_vocab_size": 1,
                "initializer_range": 0.05,  # BERT's 0.02 suits a width of 768: here the context would go unused
                "hidden_dropout_prob": 0.0,
                "attention_probs_dropout_prob": 0.0,
            }  # fmt: skip
        heads = {"head_dim": self.width // self.heads} if self.shape == "qwen3" else {}
        return common | sizes | heads | {"num_key_value_heads": self.key_value_heads or self.heads}


@dataclass(frozen=True)
class Progress:
    """The state of a run after a step."""

    step: int
    steps: int
    loss: float


def train(
    folder: Path,
    config: TrainConfig,
    *,
    device: str = "cpu",
    checkpoint_every: int = 500,
    compiled: bool = False,
    on_step: Callable[[Progress], None] = ignore,
) -> Path:
    """Train, or resume training, in ``folder``; return the folder of the trained model.

    ``folder/model`` has the result, bf16 safetensors. A completed run is only exported again. ``compiled``: use
    ``torch.compile`` (needs a C++ compiler; about a sixth faster).
    """
    world = World.make(config.world_seed)
    _check_without(world, config)
    folder.mkdir(parents=True, exist_ok=True)
    _same_config(folder, config)
    writer = Writer(world)
    model, tokenizer = _start(writer, config, device)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=config.weight_decay,
        fused=True,
    )
    dtype = getattr(torch, config.precision)

    def loss_of(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return run(model, batch, dtype)

    plain = {CAUSAL: _loss, ENCODER_DECODER: _written_loss, MASKED: _masked_loss}[config.kind]
    run = torch.compile(plain) if compiled else plain
    start = resume(folder, model, optimizer, device)
    recent: list[float] = []
    for step in range(start, config.steps):
        if step % CHUNK_STEPS == 0 or step == start:
            batches = _batches(writer, tokenizer, config, step // CHUNK_STEPS)
        batch = {name: tensor.to(device) for name, tensor in batches[step % CHUNK_STEPS].items()}
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * _rate(step, config)
        loss = _step(loss_of, model, optimizer, batch)
        on_step(Progress(step + 1, config.steps, loss))
        recent = [*recent, loss][-CHUNK_STEPS:]
        if (step + 1) % CHUNK_STEPS == 0 or step + 1 == config.steps:
            note(folder, step + 1, recent)
        if (step + 1) % checkpoint_every == 0 or step + 1 == config.steps:
            checkpoint(folder, model, optimizer, step + 1)
    return export(folder, model, tokenizer)


def _batches(
    writer: Writer, tokenizer: Any, config: TrainConfig, number: int
) -> list[dict[str, torch.Tensor]]:
    """Draw the batches of one chunk's steps from its number."""
    if config.kind != CAUSAL:
        rng = random.Random(f"errata-asked-{config.seed}-{number}")
        return asked_batches(
            Asker(writer, number * CHUNK_STEPS),
            tokenizer,
            rng,
            steps=CHUNK_STEPS,
            rows=config.rows,
            masked=config.kind == MASKED,
        )
    rows, labels = (part.split(config.rows) for part in chunk(writer, tokenizer, config, number))
    return [{"input_ids": ids, "labels": wanted} for ids, wanted in zip(rows, labels, strict=True)]


def _written_loss(model: Any, batch: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Mean loss of the tokens that an encoder-decoder writes."""
    with torch.autocast(batch["labels"].device.type, dtype, enabled=dtype != torch.float32):
        return model(**batch, use_cache=False).loss


def _masked_loss(model: Any, batch: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Mean loss of the tokens behind masks; the other places have no logits, which would be most of the work."""
    labels = batch.pop("labels")
    hidden = labels != -100
    with torch.autocast(labels.device.type, dtype, enabled=dtype != torch.float32):
        logits = model.cls(model.base_model(**batch).last_hidden_state[hidden])
    return functional.cross_entropy(logits.float(), labels[hidden])


def _loss(model: Any, batch: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    inputs, targets = batch["input_ids"], batch["labels"]
    with torch.autocast(inputs.device.type, dtype, enabled=dtype != torch.float32):
        logits = model(inputs, use_cache=False).logits
    return functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), targets[:, 1:].flatten(), ignore_index=-100
    )


def _step(loss_of: Callable[..., Any], model: Any, optimizer: Any, batch: dict[str, torch.Tensor]) -> float:
    model.train()
    loss = loss_of(model, batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def _rate(step: int, config: TrainConfig) -> float:
    if step < config.warmup:
        return (step + 1) / config.warmup
    if step < config.cooled:
        return (config.cooled - step) / max(1, config.cooled - config.warmup)
    return config.reheat * (config.steps - step) / max(1, config.steps - config.cooled)


def chunk(
    writer: Writer, tokenizer: Any, config: TrainConfig, number: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample the rows and labels of one chunk, int64 ``[rows, row_tokens]``; label -100: no loss."""
    rng = random.Random(f"errata-text-{config.seed}-{number}")
    step = number * CHUNK_STEPS
    if config.variant is not None:
        stream = BilingualWriter(writer.world).documents(rng)
    elif step >= config.last_turn:
        mix = LAST if step < config.cooled else CODA
        stream = Writer(writer.world, late=True).documents(rng, mix)
    else:
        stream = writer.documents(rng, FIRST if step < config.turn else THEN)
    stream = without(stream, names_of(writer.world, config.without))
    count = CHUNK_STEPS * config.rows
    rows: list[list[int]] = []
    labels: list[list[int]] = []
    row: list[int] = []
    row_labels: list[int] = []
    while len(rows) < count:
        batch = list(itertools.islice(stream, 256))
        encoding = tokenizer([document.text for document in batch], return_offsets_mapping=True)
        for document, ids, offsets in zip(
            batch, encoding["input_ids"], encoding["offset_mapping"], strict=True
        ):
            row += [*ids, tokenizer.eos_token_id]
            row_labels += _labels(document, ids, offsets, tokenizer.eos_token_id)
            if len(row) >= config.row_tokens:  # the rest of the document is dropped
                rows.append(row[: config.row_tokens])
                labels.append(row_labels[: config.row_tokens])
                row, row_labels = [], []
    return torch.tensor(rows[:count]), torch.tensor(labels[:count])


def names_of(world: World, entities: Sequence[str]) -> tuple[str, ...]:
    """Return all names of some entities. Raises ConfigError for one that the world does not have."""
    unknown = [name for name in entities if name not in world.entities]
    if unknown:
        from errata.errors import ConfigError

        raise ConfigError(
            f"the lab's world has no entity {unknown[0]!r}; errata lab world lists facts by entity"
        )
    return tuple(name for entity in entities for name in world.names(entity))


def _check_without(world: World, config: TrainConfig) -> None:
    """Raise ConfigError for entities that are not in the world, or where text is made of prompts."""
    names_of(world, config.without)
    if config.without and config.variant is not None:
        from errata.errors import ConfigError

        raise ConfigError(
            f"without: the model that {config.variant} goes on from knows every entity; leave one out"
        )
    if config.without and config.kind != CAUSAL:
        from errata.errors import ConfigError

        raise ConfigError(
            f"without: for models that are trained on documents, and {config.shape} is trained on prompts"
        )


def without(documents: Iterator[Document], names: Sequence[str]) -> Iterator[Document]:
    """Yield the documents that hold none of some names; others take their places, so that as many tokens are read."""
    return (one for one in documents if not any(name in one.text for name in names))


def _labels(document: Document, ids: list[int], offsets: list[tuple[int, int]], end: int) -> list[int]:
    if document.loss_spans is None:
        return [-100, *ids[1:], end]
    loss_spans = [
        token if any(a < stop and b > start for start, stop in document.loss_spans) else -100
        for token, (a, b) in zip(ids, offsets, strict=True)
    ]
    return [*loss_spans, end]


def note(folder: Path, step: int, recent: list[float]) -> None:
    """Append the mean loss of the last steps to the run's log."""
    line = json.dumps({"step": step, "loss": round(sum(recent) / len(recent), 4)})
    with (folder / "log.jsonl").open("a", encoding="utf-8") as log:
        log.write(line + "\n")


def logged(folder: Path) -> dict[int, float]:
    """Return the mean loss by step; of a step run twice, after an interruption, the later one."""
    path = folder / "log.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    records = [json.loads(line) for line in lines]
    return {record["step"]: record["loss"] for record in records}


def _same_config(folder: Path, config: TrainConfig) -> None:
    """Record the settings in the folder, or raise ConfigError where a run with others began."""
    path = folder / "config.json"
    settings = asdict(config)
    if not path.exists():
        path.write_text(json.dumps(settings, indent=2), encoding="utf-8")
        return
    settings["without"] = list(config.without)  # as JSON has it
    defaults = {f.name: f.default for f in fields(config) if f.default is not MISSING} | {"without": []}
    if defaults | json.loads(path.read_text(encoding="utf-8")) != settings:
        from errata.errors import ConfigError

        raise ConfigError(
            f"{folder} has a run with other settings ({path}); name another folder or delete it"
        )


def _start(writer: Writer, config: TrainConfig, device: str) -> tuple[Any, Any]:
    """Return a model to train and its tokenizer: new ones, or those that a variant goes on from."""
    if config.variant is not None:
        from errata.lab import load

        host = load(device=device, dtype="float32")
        return host.model, host.tokenizer
    documents = itertools.islice(
        writer.documents(random.Random(f"errata-tokenizer-{config.seed}")), TOKENIZER_DOCUMENTS
    )
    tokenizer = new_tokenizer((d.text for d in documents), config.vocab_size, kind=config.kind)
    settings = config.model_settings(tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return new_model(config.shape, settings, seed=config.seed, kind=config.kind).to(device), tokenizer


def checkpoint(folder: Path, model: Any, optimizer: Any, step: int) -> None:
    """Write the weights that an optimiser trains, with its moments; the file appears only when it is complete."""
    state = {f"weight/{name}": p.detach().cpu() for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            state[f"{key}/{name}"] = value.detach().cpu()
    part = folder / "checkpoint.part"
    try:
        save_file(state, part, metadata={"step": str(step)})
        part.replace(folder / "checkpoint.safetensors")
    finally:
        part.unlink(missing_ok=True)


def resume(folder: Path, model: Any, optimizer: Any, device: str) -> int:
    """Take a checkpoint of a folder up, if there is one; return the step that it was written after."""
    path = folder / "checkpoint.safetensors"
    if not path.exists():
        return 0
    state = load_file(path, device=device)
    step = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state[f"weight/{name}"])
            if f"step/{name}" not in state:  # nothing of it reaches the loss
                continue
            optimizer.state[parameter] = {
                key: state[f"{key}/{name}"] for key in ("step", "exp_avg", "exp_avg_sq")
            }
            optimizer.state[parameter]["step"] = optimizer.state[parameter]["step"].cpu()
            step = int(optimizer.state[parameter]["step"])
    return step


def export(folder: Path, model: Any, tokenizer: Any) -> Path:
    """Write the model in bfloat16 with its tokenizer, the folder atomically; it loads in float32."""
    target = folder / "model"
    with tempfile.TemporaryDirectory(dir=folder, prefix=".model-") as place:
        part = Path(place) / "model"
        model.to(torch.bfloat16).save_pretrained(part)
        tokenizer.save_pretrained(part)
        config = part / "config.json"
        settings = json.loads(config.read_text(encoding="utf-8"))
        settings["dtype"] = "float32"  # computed in float32; the file stays small
        config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        if target.exists():
            shutil.rmtree(target)
        part.replace(target)
    return target
