"""ELM: unlearn by training on what the model would predict if it were less of an expert.

Paper      Gandikota et al., "Erasing Conceptual Knowledge from Language Models", arXiv 2410.02760
Implements three cross-entropies (Sec. 4): with log p(.|x) - eta (log p(.|expert, x) - log p(.|novice, x)) at the
           answers to forget, of which ``top`` tokens keep a share; with the unedited model at retained texts; and with
           continuations that the unedited model writes under the same guidance, so that it goes on fluently. Low-rank
           changes of all linear maps of some layers, from an eighth to a quarter of the depth
Departs    What is forgotten is an answer in its prompt, not texts of a field, and guidance is at the answer's tokens,
           not at all of the text. So the expert's context states the fact, and the novice has none; the paper's are
           sentences that say who wrote the text: ``expert`` and ``novice``. The expert and the novice choose among the
           model's own ``top`` tokens: of sums over the vocabulary, as in the paper, the largest are at tokens that
           never follow. eta is one number, and smaller. Retained texts are held to the model's distribution, the
           paper's to its first choice; a fit may end early. What is retained: see ``errata unlearn``.
Needs      Gradients
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from errata.config import positive
from errata.edits.weight import WeightEdit
from errata.host import hooks
from errata.host.beside import Factors, low_rank_beside, start_factors
from errata.host.host import Host
from errata.locate.gradients import linear_maps
from errata.methods._low_rank import deltas_of, groups, resolve_blocks
from errata.methods._method import Method, Workspace, check_requests, notes, provenance
from errata.methods._settings import at_least_zero
from errata.methods._unlearn import retained_ids, to_forget
from errata.training.guidance import Guidance, SoftLosses, continuations, own_predictions, targets
from errata.training.tune import Companions, Outcome, Stop, descend, seeded
from errata.types import Request

PUBLISHED_RATE = 5e-5
RETAINED_TOKENS = 256
"""Most probable tokens of a retained distribution that keep their share."""


@dataclass(frozen=True)
class Config:
    """Settings of ELM."""

    layers: tuple[int, ...] | None = None
    """Blocks whose linear maps change. None: from an eighth to a quarter of the depth (paper: 4 to 8 of 32)."""
    rank: int = 16
    """Rank of each map's change (paper: 256)."""
    alpha: float = 16.0
    """Weight of a change, divided by its rank (paper: 16)."""
    dropout: float = 0.05
    """Share of a change's inputs that is left out in a step (paper: 0.05)."""
    expert: str = "{text} {answer}.\n"
    """The expert's context, placed before the prompt; {text}: the prompt, {subject}, {answer} (paper: a sentence that
    says that the text is by an expert in a field)."""
    novice: str = ""
    """The novice's context (paper: a sentence that says that it is by a novice)."""
    eta: float = 10.0
    """Strength of the guidance at an answer's last token (paper: 1,000)."""
    eta_first: float | None = None
    """At its first token, and linear between (paper: 1). None: ``eta``."""
    top: int = 50
    """How many tokens keep a share (paper: 50)."""
    among: Literal["plain", "guided"] = "plain"
    """Which: the model's most probable ones, or the largest under guidance (paper)."""
    temperature: float = 1.2
    """Of the three predictions (paper: 1.2)."""
    positions: Literal["answer", "all"] = "answer"
    """Where: at the answer's tokens, or at all tokens of prompt and answer (paper)."""
    erase: float = 1.0
    """Weight of the answers' loss (paper: 1)."""
    retain: float = 1.0
    """Weight of the retained texts' loss (paper: 1)."""
    retain_target: Literal["distribution", "first"] = "distribution"
    """What is retained: the model's distribution, or its first choice (paper)."""
    retain_texts: int = 16
    """How many texts are retained, of the corpus, or without one written by the model (paper: a retain set)."""
    retain_tokens: int = 32
    """Their length in tokens at most."""
    consistency: float = 1.0
    """Weight of the continuations' loss (paper: 1)."""
    continuations: int = 16
    """For how many requests, the first ones, there is one (paper: for all)."""
    continuation_tokens: int = 12
    """Their length (paper: 100 to 300)."""
    continuation_eta: float = 3.0
    """Strength of the guidance they are written under (paper: 3)."""
    bridge: str = ""
    """What stands between prompt and continuation, and is trained too (paper: a sentence that changes the subject)."""
    steps: int = 30
    """Passes over the requests at most (paper: 3,000 samples)."""
    learning_rate: float | None = None
    """Adam's rate of A, and of B times the weight's root mean square and the root of d_in. None: 2e-3, or 5e-5 in plain
    numbers (paper)."""
    scale: Literal["weight", "published"] = "weight"
    """Unit of B's rate: as above, or plain numbers."""
    per_step: int | None = None
    """Requests per step (paper: 4). None: all."""
    stop_loss: float = 0.05
    """Divergence in nats per token from what an answer is trained on, below which it counts as forgotten; the fit ends
    when all are. 0: never (paper)."""
    answer_tokens: int = 16
    """Longest present answer, in tokens, that is asked of the model where a request has no old target."""

    def problems(self) -> list[str]:
        """Check ranges."""
        names = (
            "rank", "alpha", "top", "temperature", "retain_texts", "continuation_tokens", "steps", "learning_rate",
            "per_step", "answer_tokens",
        )  # fmt: skip
        zero = ("eta", "eta_first", "erase", "retain", "consistency", "continuations", "stop_loss")
        complaints = [*positive(self, *names), *at_least_zero(self, *zero, "continuation_eta")]
        if self.retain_tokens < 2:
            complaints.append(f"retain_tokens: expected 2 or more, found {self.retain_tokens}")
        if not 0 <= self.dropout < 1:
            complaints.append(f"dropout: expected a share from 0 to below 1, found {self.dropout}")
        return complaints


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> WeightEdit:
    """Return the low-rank edit with which the model answers the requests as if it knew less."""
    check_requests("elm", requests)
    config = replace(config, layers=resolve_blocks(host, config.layers, early(len(host.layout.blocks))))
    assert config.layers is not None
    maps = [f"{host.layout.blocks[i]}.{name}" for i in config.layers for name in linear_maps(host, i)]
    answers = to_forget(host, requests, config.answer_tokens, work)
    texts = retained_ids(host, requests, config, work) if config.retain else []
    with hooks.frozen(host.model), seeded(host, work.seed):
        erased = targets(host, answers, guidance_of(config), every_token=config.positions == "all")
        chosen = answers[: config.continuations if config.consistency else 0]
        written = continuations(
            host, chosen, guidance_of(config, written=True), config.continuation_tokens, config.bridge
        )
        kept = own_predictions(host, texts, 1 if config.retain_target == "first" else RETAINED_TOKENS)
        loss = SoftLosses(host, [*erased, *written, *kept])
        factors = start_factors(host.model, maps, lambda: loss([0]), config.rank)
        owners = (*range(len(written)), *(i % len(answers) for i in range(len(kept))))
        sorts = (*(0 for _ in written), *(1 for _ in kept))
        beside = Companions((), owners, sorts, (config.consistency, config.retain))
        outcome = _train(host, loss, factors, len(answers), beside, config, work)
    deltas, across = deltas_of(host, factors, config.alpha / config.rank)
    facts = notes({**outcome.facts(), "loss_before": float(outcome.start.mean())})
    return WeightEdit(deltas, across, provenance("elm", host, requests, config, work, **facts))


def guidance_of(config: Config, *, written: bool = False) -> Guidance:
    """Return the guidance that answers are trained on, or that continuations are ``written`` under."""
    eta = config.continuation_eta if written else config.eta
    first = eta if written or config.eta_first is None else config.eta_first
    plain = config.among == "plain"
    return Guidance(config.expert, config.novice, (first, eta), config.top, plain, config.temperature)


def early(depth: int) -> tuple[int, ...]:
    """Return the paper's blocks at another depth."""
    return tuple(range(depth // 8, depth // 4 + 1))


def _train(
    host: Host, loss: SoftLosses, factors: Factors, count: int, beside: Companions, config: Config,
    work: Workspace,
) -> Outcome:  # fmt: skip
    """Optimise the factors on the first ``count`` lines, the others beside them."""
    published = config.scale == "published"
    rate = config.learning_rate or (PUBLISHED_RATE if published else 2e-3)

    def drop(tensor: Tensor) -> Tensor:
        return functional.dropout(tensor, config.dropout, training=torch.is_grad_enabled())

    def run(indices: Sequence[int]) -> Tensor:
        with low_rank_beside(host.model, factors, scale=config.alpha / config.rank, drop=drop):
            return loss(indices) * (config.erase if indices[0] < count else 1.0)

    optimizer = torch.optim.AdamW(groups(host, factors, rate, plain=published))
    return descend(
        optimizer, run, count, steps=config.steps, stop=Stop(config.erase * config.stop_loss),
        per_step=config.per_step, rows=work.batch_size, companions=beside,
        tick=lambda *at: work.on_progress("elm", *at),
    )  # fmt: skip


METHOD = Method(
    name="elm",
    title="ELM",
    paper="Erasing Conceptual Knowledge from Language Models, arXiv 2410.02760",
    config=Config,
    fit=fit,
    gives=WeightEdit,
    batch=True,
    sequential=True,
    needs=("gradients",),
    writes="linear",
    forgets=True,
)
