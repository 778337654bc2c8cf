"""KEEL's fit: a low-rank change of several down-projections, Y A^T in the metric of keys, by Polyak's steps.

See :mod:`errata.methods.keel` for the mathematics; its forms as a change of weights and as a memory share this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from errata.config import positive
from errata.host import hooks
from errata.host.host import Host
from errata.host.layout import Site
from errata.linalg.lowrank import LowRank
from errata.linalg.shape import condense
from errata.linalg.solve import CostMatrix, key_basis, solve_with_history
from errata.locate.contexts import in_form
from errata.locate.own import OwnText, line_of, training_rows
from errata.locate.problems import PromptRow, value_problems
from errata.methods._method import Layers, Workspace
from errata.methods._settings import Inputs, TargetEnd, at_least_zero
from errata.training.low_rank import LowRankDescent
from errata.types import Request


@dataclass(frozen=True)
class KernelSettings(Inputs, TargetEnd):
    """Settings of one fit."""

    layers: Layers = None
    """Layers whose down-projections are written. None and wide: from a twelfth to five sixths of the depth."""
    rho: float = 0.1
    """Shrinkage: multiple of the mean diagonal entry of C that is added to its diagonal."""
    steps: int = 40
    """Steps at most; about five are taken."""
    stop_loss: float = 0.04
    """Loss in nats per target token that every request has to be below."""
    step_limit: float | None = None
    """Longest step, in norms of Y over all layers. None: no limit."""
    contexts: int = 0
    """How many sampled prefixes each request is also fitted behind; each counts as much as the bare prompt."""
    context_tokens: int = 10
    """Their length in tokens."""
    energy: float = 0.999
    """Share of each layer's squared norm of Y that is kept when its rank is cut; 1 keeps all of it."""
    tokens: int = 1_000_000
    """Token budget of the second moments."""

    def kernel_problems(self) -> list[str]:
        """Check ranges."""
        names = ("rho", "steps", "step_limit", "context_tokens", "energy", "tokens")
        complaints = [*positive(self, *names), *at_least_zero(self, "stop_loss", "contexts")]
        complaints += self.input_problems()
        if self.energy > 1:
            complaints.append(f"energy: expected a share of at most 1, found {self.energy}")
        return complaints


Row = tuple[PromptRow, int]
"""A text and the index of its request."""


@dataclass(frozen=True)
class Kernel:
    """The result of a fit."""

    keys: Mapping[Site, Tensor]
    """U of each site ``[d_in, n]``, the keys of all rows from the subject's last token on."""
    changes: Mapping[Site, LowRank]
    facts: Mapping[str, float]
    """Mean loss, worst loss, steps, cost."""


def text_rows(
    host: Host, requests: Sequence[Request], own: Sequence[OwnText], config: KernelSettings, work: Workspace
) -> list[Row]:
    """Return each request's prompt, bare and behind prefixes, and its own statements, with the request's index."""
    groups = [(config.contexts, config.context_tokens)] if config.contexts else []
    contexts = in_form(host, work.contexts(host, groups, "flat", config.prefixes), config.context_form)
    problems = value_problems(host, requests, contexts, merge=False, end=config.end)
    pairs = zip(problems, own, strict=True)
    texts = [training_rows(host, one.rows, text, end=config.end) for one, text in pairs]
    return [(row, i) for i, group in enumerate(texts) for row in group]


def find_changes(
    host: Host, rows: Sequence[Row], sites: Sequence[Site], costs: Mapping[Site, CostMatrix],
    terms: Mapping[Site, Tensor], config: KernelSettings, work: Workspace,
) -> Kernel:  # fmt: skip
    """Descend the rows' loss; ``terms``: P ``[d_in, p]`` of a site, whose P P^T is added to its cost."""
    with hooks.frozen(host.model):
        descent = LowRankDescent(
            host, [line_of(row) for row, _ in rows], [row.loss_weight for row, _ in rows], [i for _, i in rows],
            sites, batch_size=work.batch_size,
        )  # fmt: skip
        first = descent.first_pass()
        keys = {
            site: torch.cat(
                [of_row[row.position :] for of_row, (row, _) in zip(read, rows, strict=True)]
            ).mT.cpu()
            for site, read in first.inputs.items()
        }
        bases = {site: _basis(keys[site], costs[site], terms.get(site)) for site in sites}
        fitted = descent.run(
            first, bases, steps=config.steps, stop_loss=config.stop_loss, step_limit=config.step_limit,
            tick=lambda done, total: work.on_progress("keel", done, total),
        )  # fmt: skip
    parts = {site: LowRank(fitted.outer[site].cpu(), basis.mT) for site, basis in bases.items()}
    return Kernel(keys, {site: part.cut(config.energy) for site, part in parts.items()}, fitted.facts())


def _basis(keys: Tensor, cost: CostMatrix, terms: Tensor | None) -> Tensor:
    """Return A ``[d_in, r]``, orthonormal under the cost with its further terms ``[d_in, p]``."""
    solved = cost.solve(keys)
    if terms is not None:
        more = condense(terms.to(keys.dtype)).to(keys.dtype)  # M is the shrunken C and P P^T
        solved = solve_with_history(solved, more, cost.solve(more))
    return key_basis(keys, solved).to(keys.dtype)
