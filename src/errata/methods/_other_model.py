"""What methods share whose edits let another model answer: its training on rows behind a context, and its file."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from errata import config as settings
from errata.config import positive
from errata.edits.artefact import Artefact
from errata.edits.edit import timestamp, versions
from errata.edits.model import behind_context, model_parts, split_parts
from errata.errors import ConfigError
from errata.host.beside import Factors, start_factors
from errata.host.host import Host
from errata.host.open import load
from errata.host.replica import configuration, model_beside, weights_of
from errata.locate.gradients import linear_maps
from errata.methods._editor import trained_editor
from errata.methods._method import Workspace
from errata.training.tune import Line
from errata.training.whole import WholeTraining, train_model
from errata.types import Request
from errata.writing import statement

STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class OtherModel:
    """Settings of the other model and of its training."""

    editor: str | None = None
    """File of a trained editor, see errata train. None: one is trained on the examples."""
    context: str = "New fact: {fact}\n"
    """What the other model reads before a prompt; ``{fact}`` is the statement."""
    counterfactual: str | None = None
    """Name or folder of the model, of the same vocabulary, that training starts from. None: the edited model itself."""
    rank: int = 0
    """Rank of the changes of the model's linear maps that are trained and kept; 0: all weights of a copy."""
    most: int = 1000
    """Examples that are trained on at most."""
    held_out: float = 0.1
    """Share of the examples that are held out."""
    steps: int = 300
    """Steps of the other model's training at most; 0 leaves it as it is."""
    per_step: int = 16
    """Rows in a step."""
    learning_rate: float = 1e-4
    """AdamW's for the other model."""
    every: int = 50
    """Steps between evaluations on held-out examples."""
    patience: int = 2
    """Evaluations without a lower loss that end training."""
    stored: Literal["float32", "bfloat16"] = "float32"
    """Precision in which the other model is kept; bfloat16 halves the file."""

    def other_problems(self) -> list[str]:
        """Check ranges."""
        complaints = positive(self, "most", "per_step", "learning_rate", "every", "patience")
        if self.steps < 0:
            complaints.append(f"steps: expected 0 or more, found {self.steps}")
        if not 0 <= self.held_out < 1:
            complaints.append(f"held_out: expected a share below 1, found {self.held_out}")
        if self.rank < 0:
            complaints.append(f"rank: expected 0 or more, found {self.rank}")
        if self.rank and self.counterfactual is not None:
            complaints.append(
                "rank: a low-rank change is one of the edited model; leave counterfactual out, or rank"
            )
        if "{fact}" not in self.context:
            complaints.append("context: expected a text with {fact}")
        return complaints

    def before(self, fact: str) -> str:
        """Return what stands before a prompt for a fact, given as its statement."""
        return self.context.replace("{fact}", fact)


def fact_of(host: Host, request: Request) -> str:
    """Return a request's statement with its target."""
    return statement(request.text, request.target, host.prompt_format.join)


def start_model(host: Host, config: OtherModel) -> Host:
    """Return the model that training starts from, in float32: a copy of the host's, or another of its vocabulary.

    With a rank it is the host itself. Raises ConfigError for another vocabulary.
    """
    if config.rank:
        return host
    source = host if config.counterfactual is None else load(config.counterfactual, device="cpu")
    if source is not host and source.tokenizer.get_vocab() != host.tokenizer.get_vocab():
        raise ConfigError(f"counterfactual: {config.counterfactual} has another vocabulary than {host.name}")
    other = model_beside(host, configuration(source), weights_of(source), name="the other model")
    other.model.float()
    return other


def own_answers(host: Host, prompts: Iterable[str], tokens: int) -> dict[str, str]:
    """Return what the host itself answers to prompts, in at most so many tokens, without dots and space around it."""
    asked = sorted(set(prompts))
    answers = host.generate(asked, max_new_tokens=tokens) if asked else []
    return {
        prompt: answer.strip(f"{string.whitespace}.") for prompt, answer in zip(asked, answers, strict=True)
    }


def line_behind(host: Host, other: Host, context: str, prompt: str, answer: str) -> Line | None:
    """Return a prompt with its answer behind a context, as the other model reads it; None where no window holds it."""
    row = host.encode_answer(prompt, answer)
    ids, inserted = behind_context(other, context, row.ids)
    first = row.start - 1 + inserted
    return None if first < 0 else Line(ids[:-1], tuple(range(first, len(ids) - 1)), row.target)


def train_other(
    other: Host, lines: Sequence[Line], held: Sequence[Line], config: OtherModel, work: Workspace
) -> tuple[Factors, dict[str, float]]:
    """Train the other model; return its changes of the host, with a rank, and steps and losses.

    Without a rank its weights are trained in place.
    """
    plan = WholeTraining(config.steps, config.per_step, config.learning_rate, config.every, config.patience)
    factors: Factors = {}
    if config.rank:
        maps = [
            f"{block}.{path}"
            for layer, block in enumerate(other.layout.blocks)
            for path in linear_maps(other, layer)
        ]
        row = other.batch([lines[0].ids])
        factors = start_factors(other.model, maps, lambda: other.forward(row, keep=1), config.rank)
    facts = train_model(
        other, lines, held, plan, seed=work.seed, on_progress=work.on_progress, factors=factors or None
    )
    return factors, facts


def editor_with(
    method: str, host: Host, other: Host, factors: Factors, config: OtherModel, work: Workspace, *,
    tensors: Mapping[str, Tensor] | None = None, body: Mapping[str, Any] | None = None, card: Mapping[str, Any],
) -> Artefact:  # fmt: skip
    """Return the trained editor: the other model, and tensors ``[...]`` and plain data that a method also needs."""
    kind = STORED[config.stored]
    parts = model_parts({} if factors else weights_of(other), factors)
    weights = {n: t.detach().cpu().to(kind) if t.is_floating_point() else t for n, t in parts.items()}
    plain = {name: value for name, value in settings.plain(config).items() if name != "editor"}
    return Artefact(
        method, host.fingerprint, {**(tensors or {}), **weights},
        {"config": {} if factors else configuration(other), "context": config.context, **(body or {})},
        {"settings": plain, "seed": work.seed, "versions": versions(), **card}, timestamp(),
    )  # fmt: skip


def editor_of(
    method: str, host: Host, config: OtherModel, work: Workspace, train: Callable[[], Artefact]
) -> Artefact:
    """Return the editor that a file holds, or one that is trained on the examples, once in a workspace.

    Raises EditError for an editor of another method or host, ConfigError for one of another context or than the edit
    that is gone on from.
    """
    editor = trained_editor(method, host, config.editor, config, work, train)
    if editor.body["context"] != config.context:
        raise ConfigError(
            f"context: the editor was trained with {editor.body['context']!r}, found {config.context!r}"
        )
    return editor


def other_of(editor: Artefact) -> dict[str, Any]:
    """Return the other model as the fields of a :class:`ModelEdit`."""
    weights, factors = split_parts(editor.tensors)
    return {"config": editor.body["config"], "weights": weights, "factors": factors}
