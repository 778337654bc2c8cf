"""UNSIR: unlearn by impairing a model on noise or wrong answers, then repairing it on what is retained.

Paper      Tarun et al., "Fast Yet Effective Machine Unlearning", IEEE TNNLS 2023, arXiv 2111.08947
Implements noise that maximises the loss of what is to be forgotten is learned, -NLL + 0.1 |noise|^2 (Eq. 1); the
           model is trained to give just that for the noise, beside retained data (impair), and then on retained data
           alone (repair): ``impair: noise``
Departs    The paper forgets classes of images, and its noise is an image of a class. Here noise is in place of the
           embeddings of a request's subject, and the old answer in place of the class. The default, ``impair: labels``,
           trains wrong answers to the prompts instead, those of other requests with the same prompt or random tokens,
           until the old answers cost ``forgotten`` nats per token. Of the weights, feed-forward output projections of
           the middle third of the layers change. What is forgotten and retained: see ``errata unlearn``.
Needs      Gradients
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from errata.config import positive
from errata.edits.weight import WeightEdit
from errata.host import hooks
from errata.host.host import Host
from errata.host.layout import Site
from errata.host.memory import in_batches
from errata.host.prefix import ROWS
from errata.locate.problems import edited_token
from errata.methods._method import Method, Workspace, check_requests, notes, provenance, resolve_layers
from errata.methods._settings import at_least_zero
from errata.methods._unlearn import ForgetConfig, middle, rates, retained_ids, to_forget
from errata.training.forget import text_line
from errata.training.noise import NoisePlan, NoisyLine, learn_noise, noisy_losses
from errata.training.tune import Companions, Line, Losses, Stop, beside, descend, lay_out
from errata.types import Request

PUBLISHED_RATE = 0.02


@dataclass(frozen=True)
class Config(ForgetConfig):
    """Settings of UNSIR."""

    impair: Literal["labels", "noise"] = "labels"
    """What the model is impaired by: wrong answers to the prompts, or noise that it is to answer as before (paper)."""
    steps: int = 40
    """Passes over the requests that impair, at most (paper: 20 batches of noise)."""
    learning_rate: float | None = None
    """Adam's rate while impairing. None: 0.04 in root mean squares; 0.02 in plain numbers (paper)."""
    forgotten: float | None = 4.0
    """Nats per token that the old answers cost in the mean when impairing ends. None: after ``steps`` (paper)."""
    retain: float = 1.0
    """Weight of the retained texts' loss while impairing (paper: as many images as of noise, or more)."""
    repair_steps: int = 10
    """Passes over the retained texts that repair (paper: 1, of 1,000 images a class)."""
    repair_rate: float = 0.5
    """Adam's rate while repairing, in that of impairing (paper: 0.5)."""
    noises: int = 1
    """``impair: noise``: how many for each request (paper: 256 a class)."""
    noise_steps: int = 40
    """``impair: noise``: Adam's steps on them (paper: 40)."""
    noise_rate: float = 0.1
    """``impair: noise``: Adam's rate, in root mean squares of the embeddings (paper: 0.1)."""
    noise_penalty: float = 0.1
    """``impair: noise``: weight of the noise's mean square, in those of the embeddings (paper: 0.1)."""

    def problems(self) -> list[str]:
        """Check ranges."""
        own = positive(self, "forgotten", "repair_rate", "noises", "noise_rate")
        zero = at_least_zero(self, "retain", "repair_steps", "noise_steps", "noise_penalty")
        return [*super().problems(), *own, *zero]


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> WeightEdit:
    """Return the dense edit that impairs the requests' present answers and repairs what that did to texts."""
    check_requests("unsir", requests)
    layers = resolve_layers(host, config.layers, middle)
    sites = tuple(host.layout.site(layer) for layer in layers)
    answers = to_forget(host, requests, config.answer_tokens, work)
    texts = retained_ids(host, requests, config, work)
    if config.scale == "published" and config.learning_rate is None:
        config = replace(config, learning_rate=PUBLISHED_RATE)
    generator = torch.Generator().manual_seed(work.seed)
    dtype = torch.promote_types(host.dtype, torch.float32)
    changes = {
        s: torch.zeros(s.d_out, s.d_in, device=host.device_of(s), dtype=dtype, requires_grad=True)
        for s in sites
    }
    with hooks.frozen(host.model):
        wrong = impairing(host, answers, texts, config, generator)
        facts = _impair_and_repair(
            host, answers, wrong, [text_line(ids) for ids in texts], changes, config, work
        )
    resolved = replace(config, layers=layers)
    return WeightEdit(
        {site.parameter: change.detach() for site, change in changes.items()},
        frozenset(site.parameter for site in sites if site.transposed),
        provenance("unsir", host, requests, resolved, work, **notes(facts)),
    )


def impairing(
    host: Host, answers: Sequence[Request], texts: Sequence[Sequence[int]], config: Config,
    generator: torch.Generator,
) -> list[NoisyLine]:  # fmt: skip
    """Return the lines that a model is impaired on. Requires a frozen model."""
    if config.impair == "labels":
        return [NoisyLine(line) for line in _wrong(host, answers, texts, generator)]
    lines = [(lay_out(host, one, "target"), *_subject(host, one)) for one in answers]
    plan = NoisePlan(config.noise_steps, config.noise_rate, config.noise_penalty)
    return learn_noise(host, [line for line in lines for _ in range(config.noises)], plan, generator)


def _subject(host: Host, request: Request) -> tuple[int, int]:
    """Return the index of a subject's first token and how many tokens it has."""
    first, last = (edited_token(host, request, token=token)[1] for token in ("first", "last"))
    return first, last - first + 1


def _wrong(
    host: Host, answers: Sequence[Request], texts: Sequence[Sequence[int]], generator: torch.Generator
) -> list[Line]:
    """Return each prompt with the answer to another of the same wording, or random tokens where there is none."""
    tokens = [token for ids in texts for token in ids[1:]]

    def draw(count: int) -> int:
        return int(torch.randint(count, (1,), generator=generator))

    lines: list[Line] = []
    for one in answers:
        others = sorted({o.target for o in answers if o.template == one.template} - {one.target})
        if others:
            lines.append(lay_out(host, replace(one, target=others[draw(len(others))]), "target"))
            continue
        line = lay_out(host, one, "target")
        targets = tuple(tokens[draw(len(tokens))] for _ in line.targets)
        lines.append(Line((*line.ids[: line.at[0] + 1], *targets[:-1]), line.at, targets))
    return lines


def _impair_and_repair(
    host: Host, answers: Sequence[Request], wrong: Sequence[NoisyLine], texts: Sequence[Line],
    changes: dict[Site, Tensor], config: Config, work: Workspace,
) -> dict[str, float | int]:  # fmt: skip
    """Train the changes in place; return mean NLL per token of the answers and the texts after each phase."""
    kept = [NoisyLine(line) for line in texts]
    lines, count = [*wrong, *kept], len(wrong)
    old = Losses(host, answers, depth=min(site.layer for site in changes))

    def run(own: Sequence[NoisyLine]) -> Callable[[Sequence[int]], Tensor]:
        def losses(indices: Sequence[int]) -> Tensor:
            with beside(host, changes):
                return noisy_losses(host, [own[i] for i in indices])

        return losses

    def mean(losses: Callable[[Sequence[int]], Tensor], length: int) -> float:
        with torch.no_grad():
            own = in_batches(range(length), work.batch_size or ROWS, lambda part: losses(part).tolist())
        return sum(own) / length

    def level() -> float:
        with beside(host, changes):
            return mean(old, len(answers))

    def retained() -> float:
        return mean(run(kept), len(kept))

    owners = tuple(i % count for i in range(len(kept)))
    companions = Companions((), owners, (0,) * len(kept), (config.retain,))
    speed = rates(host, tuple(changes), config)
    facts: dict[str, float | int] = {"nll_before": level(), "retained_nll_before": retained()}
    optimizer, passes, now = _adam(changes, speed), 0, facts["nll_before"]
    while passes < config.steps and (config.forgotten is None or now < config.forgotten):
        work.on_progress("impairing", passes, config.steps)
        descend(
            optimizer, run(lines), count, steps=1, stop=Stop(None), per_step=config.per_step,
            rows=work.batch_size, companions=companions,
        )  # fmt: skip
        passes, now = passes + 1, level()
    facts |= {"impaired_nll": now, "impaired_retained_nll": retained(), "steps": passes}
    descend(
        _adam(changes, [config.repair_rate * rate for rate in speed]), run(kept), len(kept),
        steps=config.repair_steps, stop=Stop(None), rows=work.batch_size,
        tick=lambda *at: work.on_progress("repairing", *at),
    )  # fmt: skip
    return {**facts, "nll": level(), "retained_nll": retained()}


def _adam(changes: dict[Site, Tensor], speed: Sequence[float]) -> torch.optim.Adam:
    groups = [{"params": [change], "lr": rate} for change, rate in zip(changes.values(), speed, strict=True)]
    return torch.optim.Adam(groups)


METHOD = Method(
    name="unsir",
    title="UNSIR",
    paper="Fast Yet Effective Machine Unlearning, IEEE TNNLS 2023, arXiv 2111.08947",
    config=Config,
    fit=fit,
    gives=WeightEdit,
    batch=True,
    sequential=True,
    needs=("gradients",),
    forgets=True,
)
