"""REMEDI: a direction, computed from an attribute put in words, is added to an entity's hidden state.

Paper      Hernandez, Li and Andreas, "Inspecting and Editing Knowledge Representations in Language Models", COLM 2024,
           arXiv 2304.00740
Implements Sec. 3: the attribute is the mean hidden state of its tokens in a sentence about the entity; an affine map
           F(h) = W h + b gives the direction, added to the output of one block at the entity's last token. F is trained
           once on other facts, by AdamW, on -log p(target) - log(1 - p(old answer)) + 10 KL(edited, unedited) at the
           tokens between the entity and the prompt's last one
Departs    Targets of several tokens are scored in full (paper: single tokens). KL is summed over all examples of a
           step; the authors' code keeps that of the last one alone. An entry acts on prompts that name its subject, at
           its first mention: the paper edits one prompt at a time
Needs      Examples: other facts, on which the map is trained; gradients
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from errata.config import positive
from errata.edits.memory import Intervention, MemoryEdit
from errata.edits.routers.lexical import Lexical
from errata.errors import ConfigError
from errata.host import hooks
from errata.host.host import Host
from errata.locate.problems import edited_token
from errata.methods._memory import editable_layer
from errata.methods._method import Method, Workspace, check_requests, notes, provenance, without
from errata.methods._scope import check_named
from errata.methods._settings import at_least_zero
from errata.training.tune import Line, lay_out, seeded
from errata.types import Request
from errata.writing import joint


@dataclass(frozen=True)
class Config:
    """Settings of REMEDI."""

    layer: int | None = None
    """Block whose output is changed. None: at a twelfth of the depth (paper: 1 of 28 for GPT-J on CounterFact)."""
    epochs: int = 20
    """Passes over the examples at most (authors' code: 20)."""
    patience: int = 2
    """Passes without a lower loss on held-out examples, where there are any, that end training (authors' code: 2)."""
    held_out: float = 0.1
    """Share of the examples that are held out (authors' code: 0.1)."""
    per_step: int = 16
    """Examples per step (authors' code: 16)."""
    learning_rate: float = 1e-3
    """AdamW's rate (authors' code: 1e-3)."""
    old_weight: float = 1.0
    """Weight of -log(1 - p(old answer)), for examples that have one (paper: 1)."""
    kl_weight: float = 10.0
    """Weight of the divergence between entity and answer (paper: 10)."""
    scale: float = 1.0
    """How much of the direction is added (paper: 1)."""
    most: int = 1000
    """Examples that are trained on at most."""

    def problems(self) -> list[str]:
        """Check ranges."""
        names = ("epochs", "patience", "per_step", "learning_rate", "scale", "most")
        complaints = [*positive(self, *names), *at_least_zero(self, "old_weight", "kl_weight")]
        if not 0 <= self.held_out < 1:
            complaints.append(f"held_out: expected a share below 1, found {self.held_out}")
        return complaints


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> MemoryEdit:
    """Return the directions of all requests so far, with the map that gave them."""
    check_requests("remedi", requests)
    check_named("remedi", requests)
    layer = editable_layer(host, config.layer, 1 / 12)
    config = replace(config, layer=layer)
    block = host.layout.blocks[layer]
    earlier: MemoryEdit | None = work.after
    if earlier is not None and earlier.interventions[0].module != block:
        raise ConfigError(f"the earlier directions are at {earlier.interventions[0].module}, not at {block}")
    with without(earlier, host), hooks.frozen(host.model), seeded(host, work.seed):
        if earlier is not None:
            weight, bias, facts = earlier.state["weight"], earlier.state["bias"], {}
        else:
            weight, bias, facts = work.remember(
                ("remedi", host.fingerprint, *host.placed, repr(config)),
                lambda: _train_map(host, config, work),
            )
        states = _attributes(host, requests, layer)
    directions = config.scale * (states @ weight.mT + bias)
    phrases = tuple(request.subject for request in requests)
    if earlier is not None:
        directions = torch.cat([earlier.interventions[0].payload["values"], directions])
        phrases = (*(earlier.router.phrases if isinstance(earlier.router, Lexical) else ()), *phrases)
    record = provenance("remedi", host, requests, config, work, **notes(facts))
    return MemoryEdit(
        (Intervention(block, "add", {"values": directions}, "subject"),),
        Lexical(phrases), record, {"weight": weight, "bias": bias},
    )  # fmt: skip


@torch.no_grad()
def _attributes(host: Host, requests: Sequence[Request], layer: int) -> Tensor:
    """Return the mean state of each target's tokens in the request's statement ``[n, d]``, on the CPU."""
    module, means = host.model.get_submodule(host.layout.blocks[layer]), []
    for request in requests:
        text, start = joint(request.text, request.target, host.prompt_format.join)
        encoding, states = host.encode(text), list[Tensor]()
        with hooks.on_output(module, states.append):
            host.forward(host.batch([encoding.ids]), keep=1)
        own = [i for i, (a, b) in enumerate(encoding.spans) if a < b and b > start]
        means.append(states[0][0, own].float().mean(0).cpu())
    return torch.stack(means)


@dataclass(frozen=True)
class _Example:
    """A fact that the map is trained on."""

    line: Line
    entity: int
    """Index of the subject's last token."""
    attribute: Tensor
    """``[d]``."""
    old: int | None
    """First token of the old answer."""


def _train_map(host: Host, config: Config, work: Workspace) -> tuple[Tensor, Tensor, Mapping[str, float]]:
    """Train F on other facts; return W ``[d, d]``, b ``[d]`` and losses."""
    facts = [case.request for case in work.examples][: config.most]
    if len(facts) < 2:
        raise ConfigError(
            "remedi needs at least two examples to train its map on: give a dataset or a file of cases (examples=, "
            "--examples)"
        )
    attributes = _attributes(host, facts, config.layer or 0)
    examples = [_example(host, fact, state) for fact, state in zip(facts, attributes, strict=True)]
    order = random.Random(f"remedi {work.seed}")
    order.shuffle(examples)
    # at least one is trained on, whatever the share
    count = min(max(1, round(config.held_out * len(examples))), len(examples) - 1) if config.held_out else 0
    held, trained = examples[:count], examples[count:]
    width = host.layout.width
    affine = nn.Linear(width, width).to(host.device)
    optimizer = torch.optim.AdamW(affine.parameters(), lr=config.learning_rate)
    best, kept, waited, loss = float("inf"), affine.state_dict(), 0, 0.0
    for epoch in range(config.epochs):
        order.shuffle(trained)
        for first in range(0, len(trained), config.per_step):
            value = _loss(host, affine, trained[first : first + config.per_step], config)
            gradients = torch.autograd.grad(value, list(affine.parameters()))
            for parameter, gradient in zip(affine.parameters(), gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            loss = float(value.detach())
        work.on_progress("map", epoch + 1, config.epochs)
        if not held:  # nothing tells when to end
            best, kept = loss, affine.state_dict()
            continue
        with torch.no_grad():
            now = float(_loss(host, affine, held, config))
        waited = 0 if now < best else waited + 1
        if now < best:
            best, kept = now, {name: tensor.clone() for name, tensor in affine.state_dict().items()}
        if waited >= config.patience:
            break
    return kept["weight"].cpu(), kept["bias"].cpu(), {"loss": loss, "held_out_loss": best}


def _example(host: Host, request: Request, attribute: Tensor) -> _Example:
    _, entity = edited_token(host, request)
    old = None
    if request.target_old is not None:
        old = host.encode_answer(request.text, request.target_old).target[0]
    return _Example(lay_out(host, request, "target"), entity, attribute, old)


@contextmanager
def _directed(host: Host, module: nn.Module, at: tuple[Tensor, Tensor], directions: Tensor) -> Iterator[None]:
    """Add directions ``[n, d]`` to a block's output at rows and columns while inside."""

    def add(output: Tensor) -> Tensor:
        full = torch.zeros_like(output).index_put(at, directions.to(output))
        return output + full

    with hooks.on_output(module, add):
        yield


def _loss(host: Host, affine: nn.Linear, examples: Sequence[_Example], config: Config) -> Tensor:
    """Return the mean loss of some examples."""
    module = host.model.get_submodule(host.layout.blocks[config.layer or 0])
    batch = host.batch([example.line.ids for example in examples])
    row = torch.arange(len(examples), device=host.device)
    entity = torch.tensor([example.entity for example in examples], device=host.device)
    directions = config.scale * affine(torch.stack([e.attribute for e in examples]).to(host.device))
    with torch.no_grad():
        before = host.forward(batch).float().log_softmax(-1)  # [rows, length, vocab]
    with _directed(host, module, (row, entity), directions):
        after = host.forward(batch).float().log_softmax(-1)
    total = after.new_zeros(())
    for i, example in enumerate(examples):
        at, targets = list(example.line.at), torch.tensor(example.line.targets, device=after.device)
        total = total + functional.nll_loss(after[i, at], targets)
        if example.old is not None and example.old != int(targets[0]):
            share = after[i, at[0], example.old].exp().clamp(max=1 - 1e-6)
            total = total - config.old_weight * torch.log1p(-share)
        between = slice(example.entity, at[0])
        total = total + config.kl_weight * functional.kl_div(
            before[i, between], after[i, between], reduction="sum", log_target=True
        )
    return total / len(examples)


METHOD = Method(
    name="remedi",
    title="REMEDI",
    paper="Inspecting and Editing Knowledge Representations in Language Models, COLM 2024, arXiv 2304.00740",
    config=Config,
    fit=fit,
    undo="any",
    gives=MemoryEdit,
    batch=True,
    sequential=True,
    cumulative=True,
    needs=("examples", "gradients"),
)
