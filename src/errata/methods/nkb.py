"""NKB: a bank of neurons beside the last feed-forward, whose values are shifted from an old answer to a new one.

Paper      Dai et al., "Neural Knowledge Bank for Pretrained Transformers", NLPCC 2023, arXiv 2208.00399
Implements Bank y + act(x K^T) V beside the last layer's feed-forward, trained alone on statements. Editing: of the most
           active slot j at the prompt's last token the value becomes v_j + lambda (e_new - e_old), e rows of the output
           embeddings, without training; published with lambda = 0.09 for the first token of an answer. What a
           value says are the most probable tokens of softmax(E v_j); the log has them for every slot that is shifted
Departs    ``amount: least``: the smallest lambda that puts the new token ``margin`` nats above all others. The logits
           are a smooth function of lambda, which is searched on grids, see :mod:`errata.locate.shifts`.
           ``target_tokens: all``: a shift for each token of the target, where it is predicted, repeated while a later
           one has undone an earlier. The paper trains the bank on Wikipedia; here it is trained only if ``statements``
           says on what. Untrained, its values are zero and it changes nothing until one is shifted
Needs      Only the model; to train the bank, gradients, and texts of the model's own or a corpus
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from errata.config import positive
from errata.edits.memory import ACTIVATIONS, Intervention, MemoryEdit
from errata.edits.routers.always import Always
from errata.errors import ConfigError
from errata.host import hooks
from errata.host.host import Host
from errata.host.passes import output_head
from errata.locate.neurons import value_tokens
from errata.locate.shifts import OutputShifts, lead
from errata.methods._memory import editable_layer, slot_edit, slots_of
from errata.methods._method import Method, Workspace, check_requests, notes, provenance, without
from errata.methods._settings import at_least_zero
from errata.training.slots import Slots, beside_slots, inputs_of
from errata.training.tune import Line, Losses, Stop, descend, seeded
from errata.types import Request


@dataclass(frozen=True)
class Config:
    """Settings of NKB."""

    layer: int | None = None
    """Layer whose feed-forward gets the bank. None: the last one (authors' code)."""
    slots: int | None = None
    """Neurons of the bank. None: four times the model's width (authors' code: 3072 for a width of 768)."""
    activation: Literal["relu", "gelu", "silu"] = "relu"
    """What a neuron applies to its key's product (authors' code: ReLU)."""
    start: float = 0.02
    """Standard deviation of the initial keys, and of the values where the bank is trained."""
    statements: Literal["texts", "requests", "none"] = "none"
    """What the bank is trained on before any request is edited: texts of the corpus, or of the model's own; the
    requests of the first fit; or nothing."""
    texts: int = 32
    """Texts to train on."""
    text_tokens: int = 32
    """Their length in tokens (paper: 512)."""
    steps: int = 50
    """Adafactor steps (paper: 30,000)."""
    warmup: int = 5
    """Of these, steps in which the rate rises from zero (paper: 5,000)."""
    learning_rate: float = 0.001
    """Adafactor's rate (paper: 0.001; 0.01 for HEAD-QA)."""
    per_step: int = 256
    """Texts per step (paper: 256)."""
    stop_loss: float | None = None
    """Loss in nats per token below which training ends, for every text. None: never (paper)."""
    amount: float | Literal["least"] = "least"
    """lambda (authors' code: 0.09), or the least that makes the new token the most probable one."""
    margin: float = 0.5
    """By how many nats, with ``amount: least``."""
    target_tokens: Literal["first", "all"] = "all"
    """Tokens of a target that are edited (authors' code: the first)."""
    rounds: int = 8
    """Passes over a request's tokens at most, with ``amount: least``, until each is the most probable one."""

    def problems(self) -> list[str]:
        """Check ranges."""
        names = (
            "slots",
            "start",
            "texts",
            "text_tokens",
            "steps",
            "learning_rate",
            "per_step",
            "stop_loss",
            "rounds",
        )
        complaints = [*positive(self, *names), *at_least_zero(self, "warmup", "margin")]
        if self.amount != "least" and not 0 < float(self.amount) < float("inf"):
            complaints.append(f"amount: expected a positive number or least, found {self.amount}")
        return complaints


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> MemoryEdit:
    """Return the bank with the values of all requests so far shifted; the first fit trains it."""
    check_requests("nkb", requests)
    layer = editable_layer(host, config.layer, 1.0)
    size = 4 * host.layout.width if config.slots is None else config.slots
    config = replace(config, layer=layer, slots=size)
    module = host.layout.feed_forward(layer)
    first = len(work.after.provenance.requests) if work.after else 0
    facts: dict[str, Any] = {}
    log = [dict(entry) for entry in work.after.log] if work.after else []
    with without(work.after, host), hooks.frozen(host.model), seeded(host, work.seed):
        if work.after is None:
            of = tuple(requests) if config.statements == "requests" else ()
            state = ("nkb", host.fingerprint, host.placed, work.seed, repr(config), of)
            trained, facts = work.remember(state, lambda: _train_bank(host, module, requests, config, work))
        else:
            trained = slots_of(work.after, module)
        bank = trained.detached()
        editor = _Editor(host, module, bank, config)
        lines = Losses(host, requests, depth=layer).lines
        for i, line in enumerate(lines):
            log += [{"request": first + i, **entry} for entry in editor.edit(line)]
            work.on_progress("values", i + 1, len(requests))
    facts = {**facts, "missed": editor.missed, "shifts": len(log)}
    record = provenance("nkb", host, requests, config, work, **notes(facts))
    intervention = Intervention(module, "slots", slot_edit(bank.detached()), "all", config.activation)
    return MemoryEdit((intervention,), Always(), record, {}, tuple(log))


def _statements(
    host: Host, requests: Sequence[Request], config: Config, work: Workspace
) -> Sequence[Request | Line]:
    """Return what a new bank is trained on: texts, whose every token counts, or requests."""
    if config.statements == "none":
        return ()
    if config.statements == "requests":
        return requests
    texts = [ids for _, ids in work.texts(host, config.texts, config.text_tokens)]
    return [Line(ids[:-1], tuple(range(len(ids) - 1)), ids[1:]) for ids in texts]


def _train_bank(
    host: Host, module: str, requests: Sequence[Request], config: Config, work: Workspace
) -> tuple[Slots, dict[str, Any]]:
    """Return a new bank, trained on statements if there are any, and its losses."""
    rows = _statements(host, requests, config, work)
    width, device = host.layout.width, host.device_of(host.layout.site(config.layer or 0))
    assert config.slots is not None
    keys = nn.Parameter((config.start * torch.randn(config.slots, width)).to(device))
    none = torch.zeros(config.slots, width, device=device)
    if not rows:
        return Slots(keys, none[:, 0], none).detached(), {}
    # Adafactor's steps are relative to a tensor's size, so that it would not leave zero
    values = nn.Parameter(config.start * torch.randn_like(keys))
    bank = Slots(keys, none[:, 0], values)
    losses = Losses(host, rows, depth=config.layer or 0)
    optimizer = torch.optim.Adafactor([keys, values], lr=config.learning_rate)
    rising = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / (config.warmup + 1))
    )

    def loss(indices: Sequence[int]) -> Tensor:
        with beside_slots(host, module, lambda: [bank], config.activation):
            return losses(indices)

    outcome = descend(
        optimizer, loss, losses.count, steps=config.steps, stop=Stop(config.stop_loss), per_step=config.per_step,
        rows=work.batch_size, after_step=lambda _: rising.step(),
        tick=lambda done, total: work.on_progress("bank", done, total),
    )  # fmt: skip
    return bank.detached(), outcome.facts()


class _Editor:
    """Shifts values of a bank in place."""

    def __init__(self, host: Host, module: str, bank: Slots, config: Config) -> None:
        weight = getattr(output_head(host.model), "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2 or weight.shape[1] != host.layout.width:
            raise ConfigError(
                f"{host.name} has no output embeddings as wide as its states, which nkb shifts values by"
            )
        self.host, self.module, self.bank, self.config, self.embeddings = host, module, bank, config, weight
        self.missed = 0
        """Tokens of targets that are not the most probable ones in the end."""

    @torch.no_grad()
    def edit(self, line: Line) -> list[dict[str, Any]]:
        """Shift the values for a request's tokens; return what was done, as plain data."""
        places = list(zip(line.at, line.targets, strict=True))
        places = places[:1] if self.config.target_tokens == "first" else places
        outputs = OutputShifts(self.host, self.module, self.config.layer or 0, line, self._beside)
        queries = inputs_of(self.host, self.module, [line.ids])
        entries: list[dict[str, Any]] = []
        for number in range(self.config.rounds if self.config.amount == "least" else 1):
            # a margin that no lambda reaches is not tried for again
            margin = 0.0 if number else self.config.margin
            shifts = [
                s for at, target in places if (s := self._shift(outputs, at, target, queries[at], margin))
            ]
            entries += shifts
            if not shifts:
                break
        self.missed += sum(int(outputs.logits(at)[0].argmax()) != target for at, target in places)
        return entries

    def _shift(
        self, outputs: OutputShifts, at: int, target: int, query: Tensor, margin: float
    ) -> dict[str, Any] | None:
        """Shift the most active slot's value at one token; None where the target leads already."""
        bank, config = self.bank, self.config
        now = outputs.logits(at)
        if config.amount == "least" and float(lead(now, target)) >= margin:
            return None
        old = int(now[0].index_fill(0, torch.tensor([target], device=now.device), -torch.inf).argmax())
        active = ACTIVATIONS[config.activation](bank.keys @ query + bank.biases)
        slot = int(active.argmax())
        if float(active[slot]) <= 0:
            raise ConfigError("no slot of the bank fires where the target is predicted; give it more slots")
        direction = (self.embeddings[target] - self.embeddings[old]).float().cpu()
        amount = config.amount
        if amount == "least":
            amount = outputs.least(at, target, float(active[slot]) * direction, margin=config.margin)
        bank.values[slot] += float(amount) * direction
        (reads,) = value_tokens(self.host, bank.values[slot][None], count=5)
        return {
            "token": at, "slot": slot, "activation": round(float(active[slot]), 6), "old": old, "new": target,
            "amount": round(float(amount), 6), "reads": reads,
        }  # fmt: skip

    def _beside(self) -> AbstractContextManager[None]:
        device = self.embeddings.device
        own = Slots(*(t.to(device) for t in (self.bank.keys, self.bank.biases, self.bank.values)))
        return beside_slots(self.host, self.module, lambda: [own], self.config.activation)


METHOD = Method(
    name="nkb",
    title="NKB",
    paper="Neural Knowledge Bank for Pretrained Transformers, NLPCC 2023, arXiv 2208.00399",
    config=Config,
    fit=fit,
    gives=MemoryEdit,
    batch=True,
    sequential=True,
    cumulative=True,
    needs=("gradients",),
)
