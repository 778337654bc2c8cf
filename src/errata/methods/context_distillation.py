"""Context distillation: the model learns to continue texts as it does with a passage before them, passage removed.

Paper      Padmanabhan et al., "Propagating Knowledge Updates to LMs Through Distillation", NeurIPS 2023,
           arXiv 2306.09306
Implements Texts are sampled from the model behind a definition, each beginning with the entity; then
           KL(model with the definition || model without it) at ``temperature``, times its square, is minimised over
           the tokens behind the entity
Departs    All texts are trained together by one Adam, until ``stop_loss``; the authors re-create AdamW for each text
           and take five steps. Trained are low-rank changes of linear maps, not all weights. The teacher's
           distribution is kept as its ``top`` entries and the rest. The statement itself is one of the texts
           (``statement``), so that a fact that is rarely continued is learned. Neutral texts are held to what the
           model gives for them, by the same loss (``retain``). A long passage is cut at sentence ends into parts, each
           a context of its own
Needs      Gradients; neutral texts, of the corpus or written by the model
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from errata.config import positive
from errata.edits.weight import WeightEdit
from errata.errors import RequestError
from errata.host import hooks
from errata.host.beside import Factors, low_rank_beside, start_factors
from errata.host.generate import sample_rows
from errata.host.host import Host
from errata.locate.gradients import linear_maps
from errata.methods._low_rank import deltas_of, groups, resolve_blocks
from errata.methods._method import Method, Workspace, check_requests, notes, provenance
from errata.methods._settings import at_least_zero, missing_slots
from errata.training.distil import Distillation, Lesson
from errata.training.tune import Companions, Outcome, Stop, descend, seeded
from errata.types import Request
from errata.writing import statement

_SENTENCES = re.compile(r"(?<=[.!?。])\s+")


@dataclass(frozen=True)
class Config:
    """Settings of context distillation."""

    layers: tuple[int, ...] | None = None
    """Blocks whose linear maps are changed. None: all."""
    rank: int = 8
    """Rank of each map's change (paper: all weights)."""
    texts: int = 5
    """Texts sampled for each passage, or part of one (paper: 5)."""
    text_tokens: int = 24
    """Their length in tokens at most, behind the entity."""
    sampling: float = 0.9
    """Temperature they are sampled at (paper: 0.9)."""
    fact: str = "New fact: {text}\n"
    """How a passage stands before a text; ``{text}`` is the passage."""
    part_tokens: int = 96
    """A passage of more tokens is cut into parts of at most so many."""
    statement: bool = True
    """Whether the passage itself is one of the texts (paper: no)."""
    temperature: float = 2.0
    """Temperature of the loss (paper: 2)."""
    top: int = 256
    """Entries of the teacher's distribution that are told apart; the others count together."""
    retain: float = 1.0
    """Weight of the loss on neutral texts (paper: none)."""
    retain_texts: int = 8
    """How many neutral texts."""
    retain_tokens: int = 24
    """Their length in tokens at most."""
    steps: int = 25
    """Passes over the texts at most (paper: 5 for each)."""
    learning_rate: float = 2e-3
    """Adam's rate of A; of B, which begins at zero, times the weight's root mean square and the root of d_in."""
    per_step: int | None = None
    """Texts in a step. None: all."""
    stop_loss: float = 0.02
    """Nats per token below which a text counts as learned; the fit ends when all are. 0: never (paper)."""

    def problems(self) -> list[str]:
        """Check ranges."""
        names = (
            "rank", "text_tokens", "sampling", "part_tokens", "temperature", "top", "retain_texts", "steps",
            "learning_rate", "per_step",
        )  # fmt: skip
        complaints = [*positive(self, *names), *at_least_zero(self, "texts", "retain", "stop_loss")]
        if self.retain_tokens < 2:
            complaints.append(f"retain_tokens: expected 2 or more, found {self.retain_tokens}")
        if not self.texts and not self.statement:
            complaints.append("texts: expected 1 or more where statement is false")
        return [*complaints, *missing_slots(self, {"fact": ("{text}",)})]


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> WeightEdit:
    """Return the low-rank edit with which the model continues texts as if it read the requests' statements."""
    check_requests("context_distillation", requests)
    layers = resolve_blocks(host, config.layers, range(len(host.layout.blocks)))
    config = replace(config, layers=layers)
    maps = [f"{host.layout.blocks[i]}.{name}" for i in layers for name in linear_maps(host, i)]
    lessons = [one for request in requests for one in lessons_of(host, request, config, work.seed)]
    neutral = _neutral(host, requests, config, work) if config.retain else []
    with hooks.frozen(host.model), seeded(host, work.seed):
        loss = Distillation(host, [*lessons, *neutral], temperature=config.temperature, top=config.top)
        factors = start_factors(host.model, maps, lambda: loss([0]), config.rank)
        outcome = _train(host, loss, factors, len(lessons), config, work)
    deltas, across = deltas_of(host, factors)
    facts = notes({**outcome.facts(), "texts": len(lessons)})
    return WeightEdit(
        deltas, across, provenance("context_distillation", host, requests, config, work, **facts)
    )


def _train(
    host: Host, loss: Distillation, factors: Factors, count: int, config: Config, work: Workspace
) -> Outcome:
    """Optimise the factors on the first ``count`` lessons, the others beside them."""
    others = range(len(loss.lessons) - count)
    beside = Companions((), tuple(i % count for i in others), tuple(0 for _ in others), (config.retain,))

    def run(indices: Sequence[int]) -> torch.Tensor:
        with low_rank_beside(host.model, factors):
            return loss(indices)

    optimizer = torch.optim.Adam(groups(host, factors, config.learning_rate))
    return descend(
        optimizer, run, count, steps=config.steps, stop=Stop(config.stop_loss),
        per_step=config.per_step, rows=work.batch_size, companions=beside,
        tick=lambda *at: work.on_progress("context_distillation", *at),
    )  # fmt: skip


# --- texts ----------------------------------------------------------------------------------


def lessons_of(host: Host, request: Request, config: Config, seed: int) -> list[Lesson]:
    """Return the texts that a request's statement is learned from, each behind its context for the teacher.

    Raises RequestError where no text is left: its tokens change behind the context, or there is no room.
    """
    whole = statement(request.text, request.target, host.prompt_format.join)
    start = request.text[: request.span[1]]
    lessons: list[Lesson] = []
    for number, part in enumerate(parts(host, whole, config.part_tokens)):
        context = config.fact.replace("{text}", part)
        texts = _sampled(host, context, start, config, seed * 1009 + number) if config.texts else []
        found = [(start, text) for text in texts]
        if config.statement:
            found.append((start, part) if part.startswith(start) else ("", part))
        lessons += [one for known, text in found if (one := lesson(host, context, known, text)) is not None]
    if not lessons:
        raise RequestError(
            f"no text to learn {request.text!r:.80} from: the model continues it by nothing, the window has no room, "
            "or the tokens of a text are others behind its context; try another setting of fact, or part_tokens"
        )
    return lessons


def parts(host: Host, text: str, most: int) -> Iterator[str]:
    """Cut a text at sentence ends into parts of at most ``most`` tokens; a longer sentence is a part of its own."""
    held = ""
    for sentence in _SENTENCES.split(text):
        joined = f"{held} {sentence}" if held else sentence
        if held and len(host.encode(joined, special=False).ids) > most:
            yield held
            joined = sentence
        held = joined
    yield held


def _sampled(host: Host, context: str, start: str, config: Config, seed: int) -> list[str]:
    """Return continuations of a context and a start, each with the start, up to a line's end; none twice."""
    row = host.encode(context + start).ids
    room = config.text_tokens if host.window is None else min(config.text_tokens, host.window - len(row))
    if room < 1:
        return []
    rows = [row] * config.texts
    new = sample_rows(host, rows, room, top_k=None, seed=seed, temperature=config.sampling)
    texts = [start + text.replace("\N{REPLACEMENT CHARACTER}", "").split("\n")[0] for text in new]
    return list(dict.fromkeys(text for text in texts if text != start))


def lesson(host: Host, context: str, known: str, text: str) -> Lesson | None:
    """Return a text as the student and the teacher read it, compared behind ``known``, what it begins with.

    None where nothing is left to compare: no token behind it, no room, or other tokens behind the context.
    """
    student, teacher = host.encode(text), host.encode(context + text)
    first = next((i for i, (_, stop) in enumerate(student.spans) if stop > len(known)), len(student.ids))
    first = max(first, 1)
    count = len(student.ids) - first
    too_long = host.window is not None and len(teacher.ids) > host.window
    if count < 1 or too_long or teacher.ids[-count:] != student.ids[-count:]:
        return None
    at = tuple(range(first - 1, len(student.ids) - 1))
    shift = len(teacher.ids) - len(student.ids)
    return Lesson(student.ids[:-1], at, teacher.ids[:-1], tuple(place + shift for place in at))


def _neutral(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> list[Lesson]:
    """Return neutral texts that name no subject, taught by the model without a context."""
    subjects = {request.subject for request in requests}
    texts = work.texts(host, config.retain_texts, config.retain_tokens)
    kept = [ids[:-1] for text, ids in texts if not any(name in text for name in subjects)]
    return [Lesson(ids, tuple(range(len(ids))), ids, tuple(range(len(ids)))) for ids in kept if ids]


METHOD = Method(
    name="context_distillation",
    title="Context distillation",
    paper="Propagating Knowledge Updates to LMs Through Distillation, NeurIPS 2023, arXiv 2306.09306",
    config=Config,
    fit=fit,
    gives=WeightEdit,
    batch=True,
    sequential=True,
    needs=("gradients",),
    writes="linear",
)
