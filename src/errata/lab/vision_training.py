"""Train the image tower of the lab's vision-language model: one resumable, seeded run.

It has two parts: first, the tokens of a picture learn to be the embeddings of its entity's name, end tokens before
them, as if the name began a text; then they are trained through the frozen decoder on questions about what the picture
shows. What measures is left out: held-out phrasings, the first pictures of every entity, and questions about a fifth of
the subjects.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from errata import lab
from errata.lab import pictures
from errata.lab.shown import asked, deixis, in_place
from errata.lab.text import Split
from errata.lab.train import Progress, checkpoint, note, resume
from errata.lab.vision import TOKENS, VisionConfig, eyes, new_model
from errata.lab.world import Fact, World, default_world
from errata.progress import ignore
from errata.types import IMAGE

BANK = 24
"""Pictures of each entity that are drawn for training; each is shifted by up to two pixels whenever it is used."""


def train(
    folder: Path, config: VisionConfig, *, device: str = "cpu", checkpoint_every: int = 100,
    on_step: Callable[[Progress], None] = ignore,
) -> Path:  # fmt: skip
    """Train, or resume training, in ``folder``; return the folder of the trained model.

    ``folder/model`` has the settings and the image tower in bfloat16. Raises ConfigError where a run with other
    settings began in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _same_settings(folder, config)
    world = default_world()
    model, processor = new_model(config, lab.load(device="cpu", dtype="float32"))
    model.requires_grad_(False).to(device)
    parts = eyes(model).requires_grad_(True)
    optimizer = torch.optim.AdamW(
        parts.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=config.weight_decay
    )
    start = resume(folder, parts, optimizer, device)
    lessons = _Lessons(world, model, processor, config)
    recent: list[float] = []
    for step in range(start, config.steps):
        for group in optimizer.param_groups:
            group["lr"] = _rate(step, config)
        loss = lessons.align(step) if step < config.aligned else lessons.ask(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parts.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recent = [*recent, loss.item()][-100:]
        on_step(Progress(step + 1, config.steps, recent[-1]))
        if (step + 1) % 100 == 0 or step + 1 == config.steps:
            note(folder, step + 1, recent)
        if (step + 1) % checkpoint_every == 0 or step + 1 == config.steps:
            checkpoint(folder, parts, optimizer, step + 1)
    return export(folder, parts, config)


def export(folder: Path, parts: nn.Module, config: VisionConfig) -> Path:
    """Write the settings and the image tower in bfloat16 to ``folder/model``."""
    target = folder / "model"
    target.mkdir(exist_ok=True)
    weights = {name: value.detach().cpu().to(torch.bfloat16) for name, value in parts.state_dict().items()
               if value.is_floating_point()}  # fmt: skip
    part = target / "vision.safetensors.part"
    try:
        save_file(weights, part)
        part.replace(target / "vision.safetensors")
    finally:
        part.unlink(missing_ok=True)
    (target / "vision.json").write_text(json.dumps(asdict(config), indent=2) + "\n", encoding="utf-8")
    return target


def _same_settings(folder: Path, config: VisionConfig) -> None:
    from errata.errors import ConfigError

    path = folder / "config.json"
    if not path.exists():
        path.write_text(json.dumps(asdict(config), indent=2), encoding="utf-8")
    elif json.loads(path.read_text(encoding="utf-8")) != asdict(config):
        raise ConfigError(
            f"{folder} has a run with other settings ({path}); name another folder or delete it"
        )


def _rate(step: int, config: VisionConfig) -> float:
    if step >= config.cooled:
        return (
            config.second_rate * config.reheat * (config.steps - step) / max(1, config.steps - config.cooled)
        )
    first = step < config.aligned
    start, stop = (0, config.aligned) if first else (config.aligned, config.cooled)
    peak = config.learning_rate if first else config.second_rate
    at = step - start
    if at < config.warmup:
        return peak * (at + 1) / config.warmup
    left = (stop - step) / max(1, stop - start - config.warmup)
    return peak * (0.1 + 0.9 * left if first else left)


@lru_cache(maxsize=2)
def _bank(world_seed: int) -> tuple[Tensor, dict[str, int]]:
    """Draw the pictures for training: bytes ``[entities, BANK, 3, side, side]``, and each entity's row."""
    import numpy

    world = default_world(world_seed)
    names = pictures.pictured(world)
    bank = numpy.stack([
        numpy.stack([
            numpy.asarray(pictures.picture(world, name, pictures.TRAINING + i)) for i in range(BANK)
        ])
        for name in names
    ])  # fmt: skip
    return torch.from_numpy(bank).permute(0, 1, 4, 2, 3).contiguous(), {n: i for i, n in enumerate(names)}


class _Lessons:
    """Draws the examples of each step from its number and computes their loss."""

    def __init__(self, world: World, model: Any, processor: Any, config: VisionConfig) -> None:
        self.world, self.model, self.config = world, model, config
        self.tokenizer = processor.tokenizer
        self.bank, self.row = _bank(world.seed)
        self.names = list(self.row)
        self.facts = [fact for name in self.names for fact in world.by_subject[name]]
        self.embeddings = model.get_input_embeddings().weight.detach()
        end = self.tokenizer.eos_token_id
        ids = []
        for name in self.names:
            own = self.tokenizer(f" {name}", add_special_tokens=False)["input_ids"]
            ids.append([*[end] * (TOKENS - len(own)), *own])
        self.aims = torch.tensor(ids, device=self.embeddings.device)
        """The tokens that each entity's picture is to be read as ``[entities, TOKENS]``."""
        aims = self.embeddings[self.aims]
        self.spread = (aims - aims.mean(0)).square().mean()
        """Mean squared error of the best guess without looking at the picture."""

    def _pixels(self, rows: list[int], rng: random.Random) -> Tensor:
        """Return a training picture of each entity, shifted, as the model takes them."""
        images = [self.bank[row, rng.randrange(BANK)] for row in rows]
        shifted = [torch.roll(image, (rng.randint(-2, 2), rng.randint(-2, 2)), (1, 2)) for image in images]
        return (torch.stack(shifted).to(self.embeddings) / 255 - 0.5) / 0.5

    def _see(self, pixels: Tensor) -> Tensor:
        seen = self.model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
        return self.model.model.multi_modal_projector(seen)

    def align(self, step: int) -> Tensor:
        """Return how far the tokens of pictures are from the embeddings of names, 1 for a guess without looking."""
        rng = random.Random(f"errata-vision-{self.config.seed}-{step}")
        rows = [rng.randrange(len(self.names)) for _ in range(self.config.pictures)]
        aim = self.embeddings[self.aims[torch.tensor(rows)]]
        return functional.mse_loss(self._see(self._pixels(rows, rng)), aim) / self.spread

    def ask(self, step: int) -> Tensor:
        """Return the loss of answers to questions about pictures, through the decoder."""
        rng = random.Random(f"errata-vision-{self.config.seed}-{step}")
        facts = [rng.choice(self.facts) for _ in range(self.config.rows)]
        texts = [self._text(fact, rng) for fact in facts]
        device, pad = self.embeddings.device, self.tokenizer.pad_token_id
        prompts = [self._ids(prompt) for prompt, _ in texts]
        answers = [self.tokenizer(answer, add_special_tokens=False)["input_ids"] for _, answer in texts]
        longest = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
        ids = torch.full((len(facts), longest), pad)
        labels = torch.full((len(facts), longest), -100)
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            ids[i, : len(prompt) + len(answer)] = torch.tensor([*prompt, *answer])
            labels[i, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
        pixels = self._pixels([self.row[fact.subject] for fact in facts], rng)
        inputs = {"input_ids": ids.to(device), "attention_mask": (ids != pad).long().to(device)}
        hidden = self.model.model(**inputs, pixel_values=pixels, use_cache=False).last_hidden_state
        aims = labels[:, 1:].to(device)
        logits = self.model.lm_head(hidden[:, :-1][aims != -100])
        return functional.cross_entropy(logits, aims[aims != -100])

    def _ids(self, prompt: str) -> list[int]:
        return self.tokenizer(prompt.replace(IMAGE, IMAGE * TOKENS))["input_ids"]

    def _text(self, fact: Fact, rng: random.Random) -> tuple[str, str]:
        """Ask for a fact of what a picture shows: the picture in the subject's place, or before "this person"."""
        relation, kind = self.world.relations[fact.relation], self.world.entities[fact.subject].type
        draw = rng.random()
        if draw < 0.08:
            return (
                f"{IMAGE}{rng.choice(('This is', deixis('The name of {s} is', kind)))}",
                f" {fact.subject}.",
            )
        if draw < 0.25:
            return in_place(rng.choice(relation.phrasings)), f" {fact.object}."
        if draw < 0.6 or not Split.has_questions(fact):
            return IMAGE + deixis(rng.choice(relation.phrasings), kind), f" {fact.object}."
        return asked(rng.choice(relation.questions), kind), f" {fact.object}."
