"""RMU: unlearn by steering hidden states of what is to be forgotten to a random vector.

Paper      Li et al., "The WMDP Benchmark: Measuring and Reducing Malicious Use with Unlearning", ICML 2024,
           arXiv 2403.03218
Implements minimise |h(x_forget) - c u|^2 + alpha |h(x_retain) - h_0(x_retain)|^2 per entry at the output of one block
           (Sec. 4), u a unit vector of uniform entries, drawn once; only down-projections of that block and the two
           below it are trained
Departs    Texts to forget are prompts with their old answers. Their states are steered from the subject's last token
           on: a prompt's first words are those of many others; ``positions: all`` has every token, as the paper. c is
           in mean norms of the states, which differ between models by orders of magnitude; ``scale: published`` has
           plain numbers. Padding does not count, as it does in the authors' code. What is retained: see ``errata
           unlearn``.
Needs      Gradients
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from errata.config import positive
from errata.edits.weight import WeightEdit
from errata.host.host import Host
from errata.locate.problems import edited_token
from errata.methods._method import (
    Layers,
    Method,
    Workspace,
    check_requests,
    notes,
    provenance,
    resolve_layers,
)
from errata.methods._settings import at_least_zero
from errata.methods._unlearn import ForgetConfig, rates, retained_ids, to_forget
from errata.training.steer import Steering, Texts, mean_norm, steer
from errata.types import Request

PUBLISHED_STEERING = 6.5
"""c in the paper, for Zephyr 7B."""


@dataclass(frozen=True)
class Config(ForgetConfig):
    """Settings of RMU."""

    layers: Layers = None
    """Layers whose feed-forward output projection is trained; states are steered at the output of the last. None:
    three, the last at 7/32 of the depth (paper: 5, 6 and 7 of 32)."""
    learning_rate: float | None = None
    """Adam's rate. None: 0.04 in root mean squares; 1e-5 in plain numbers (paper: 5e-5)."""
    steering: float | None = None
    """c. None: 2 mean norms of the states; 6.5 in plain numbers (paper)."""
    alpha: float = 10.0
    """Weight of the retained texts' loss (paper: 1,200 for Zephyr 7B, whose states are short)."""
    positions: Literal["subject", "all"] = "subject"
    """Tokens that are steered: from the subject's last on, or all (paper)."""

    def problems(self) -> list[str]:
        """Check ranges."""
        return [*super().problems(), *positive(self, "steering"), *at_least_zero(self, "alpha")]


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> WeightEdit:
    """Return the dense edit that steers the states of the requests and their old answers to one vector."""
    check_requests("rmu", requests)
    layers = resolve_layers(host, config.layers, _early)
    sites = tuple(host.layout.site(layer) for layer in layers)
    answers = to_forget(host, requests, config.answer_tokens, work)
    forget = _texts(host, answers, config.positions)
    ids = tuple(retained_ids(host, requests, config, work))
    retain = Texts(ids, (0,) * len(ids))
    block = layers[-1]
    unit = 1.0 if config.scale == "published" else mean_norm(host, forget, block)
    length = config.steering or (PUBLISHED_STEERING if config.scale == "published" else 2.0)
    plan = Steering(
        block, direction(host.layout.width, work.seed) * (length * unit), rates(host, sites, config),
        config.steps, config.alpha, config.per_step,
    )  # fmt: skip
    changes, facts = steer(
        host, forget, retain, sites, plan, rows=work.batch_size,
        tick=lambda *at: work.on_progress("rmu", *at),
    )  # fmt: skip
    resolved = replace(config, layers=layers, steering=length)
    return WeightEdit(
        dict(changes),
        frozenset(site.parameter for site in sites if site.transposed),
        provenance("rmu", host, requests, resolved, work, **notes(facts)),
    )


def direction(width: int, seed: int) -> Tensor:
    """Return u ``[d]``: uniform entries, all positive, of length 1."""
    vector = torch.rand(width, generator=torch.Generator().manual_seed(seed))
    return vector / vector.norm()


def _early(depth: int) -> tuple[int, ...]:
    """Return the paper's layers at another depth."""
    last = min(depth - 1, max(1, round(7 * depth / 32)))
    return tuple(range(max(0, last - 2), last + 1))


def _texts(host: Host, answers: Sequence[Request], positions: str) -> Texts:
    """Return the requests with their answers as token rows, and the first token of each that counts."""
    rows, first = list[tuple[int, ...]](), list[int]()
    for request in answers:
        rows.append(host.encode_answer(request.text, request.target).ids)
        first.append(0 if positions == "all" else edited_token(host, request)[1])
    return Texts(tuple(rows), tuple(first))


METHOD = Method(
    name="rmu",
    title="RMU",
    paper="The WMDP Benchmark: Measuring and Reducing Malicious Use with Unlearning, ICML 2024, arXiv 2403.03218",
    config=Config,
    fit=fit,
    gives=WeightEdit,
    batch=True,
    sequential=True,
    needs=("gradients",),
    forgets=True,
)
