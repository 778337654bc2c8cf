"""Steer hidden states of texts to a fixed vector and hold those of other texts where they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from errata.host import hooks
from errata.host.host import Host
from errata.host.layout import Site
from errata.host.prefix import ROWS, ComputedRows
from errata.progress import OnCount, ignore
from errata.training.tune import Companions, Line, Stop, beside, descend


@dataclass(frozen=True)
class Texts:
    """Token rows, and from which token on their states count."""

    rows: tuple[tuple[int, ...], ...]
    first: tuple[int, ...]

    def __add__(self, other: Texts) -> Texts:
        return Texts(self.rows + other.rows, self.first + other.first)


@dataclass(frozen=True)
class Steering:
    """Where states are steered, and how."""

    block: int
    """Block whose output is steered."""
    vector: Tensor
    """What states of the texts to forget become ``[d]``."""
    rates: tuple[float, ...]
    """Adam's rate for each site, in plain numbers."""
    steps: int
    retain: float
    """Weight of the retained texts' loss."""
    per_step: int | None = None
    """Texts to forget per Adam step; None: all."""


class States:
    """Outputs of a block on rows, in the host's present state, with the lowest blocks run only once."""

    def __init__(self, host: Host, texts: Texts, block: int, depth: int) -> None:
        """Prepare rows; ``depth`` blocks from the bottom never change. Requires a frozen model."""
        self.host, self.texts, self.block = host, texts, block
        self.rows = ComputedRows(host, texts.rows, depth)

    def __call__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return states of some rows ``[n, length, d]``, float32 or wider, and which count ``[n, length]``."""
        batch, prefix = self.rows.select(indices)
        module, found = self.rows.runner.blocks[self.block], list[Tensor]()
        with hooks.on_output(module, found.append):
            self.rows.runner.run(batch, prefix, stop=module)
        states = found[0].reshape(*batch.ids.shape, -1)
        first = torch.tensor([self.texts.first[i] for i in indices], device=states.device)
        column = torch.arange(batch.ids.shape[1], device=states.device)
        own = column[None] >= (batch.offset.to(states.device) + first)[:, None]
        wide = torch.promote_types(states.dtype, torch.float32)
        return states.to(wide), own & batch.mask.to(states.device).bool()


def mean_norm(host: Host, texts: Texts, block: int) -> float:
    """Return the mean Euclidean norm of a block's outputs at the tokens of texts that count."""
    with hooks.frozen(host.model), torch.no_grad():
        read = States(host, texts, block, 0)
        total, count = 0.0, 0
        for part in torch.arange(len(texts.rows)).split(ROWS):
            states, own = read(part.tolist())
            total += float(states.norm(dim=-1)[own].sum())
            count += int(own.sum())
    return total / count


def steer(
    host: Host, forget: Texts, retain: Texts, sites: Sequence[Site], plan: Steering, *, rows: int | None = None,
    tick: OnCount = ignore,
) -> tuple[dict[str, Tensor], dict[str, float | int]]:  # fmt: skip
    """Return the change of each weight ``[d_out, d_in]`` by its path, and the losses.

    Loss of a text to forget: mean squared difference of its states from ``plan.vector``; of a retained one: from what
    they are in the unedited model; both over entries and tokens. Losses are reported over the mean square of the
    vector. float32, or float64 for a float64 host; no weight is written.
    """
    dtype = torch.promote_types(host.dtype, torch.float32)
    changes = {
        s: torch.zeros(s.d_out, s.d_in, device=host.device_of(s), dtype=dtype, requires_grad=True)
        for s in sites
    }
    groups = [{"params": [changes[s]], "lr": rate} for s, rate in zip(sites, plan.rates, strict=True)]
    count = len(forget.rows)
    with hooks.frozen(host.model):
        read = States(host, forget + retain, plan.block, min(site.layer for site in sites))
        with torch.no_grad():
            fixed = [read([count + i])[0][0].clone() for i in range(len(retain.rows))]

        def run(indices: Sequence[int]) -> Tensor:
            with beside(host, changes):
                states, own = read(indices)
            goal = plan.vector.to(states).expand_as(states)
            if indices[0] >= count:
                goal = torch.nn.utils.rnn.pad_sequence([fixed[i - count] for i in indices], batch_first=True)
            error = (states - goal).square().mean(-1) * own
            return error.sum(1) / own.sum(1)

        lines = tuple(
            Line(row, (0,), (row[0],)) for row in retain.rows
        )  # the descent reads owners and weights only
        owners = tuple(i % count for i in range(len(lines)))
        beside_them = Companions(lines, owners, (0,) * len(lines), (plan.retain,))
        outcome = descend(
            torch.optim.Adam(groups), run, count, steps=plan.steps, stop=Stop(None), per_step=plan.per_step,
            rows=rows, companions=beside_them, tick=tick,
        )  # fmt: skip
        with torch.no_grad():
            kept = (
                torch.stack([run([count + i]).mean() for i in range(len(lines))]) if lines else torch.zeros(1)
            )
    unit = float(plan.vector.square().mean())
    facts: dict[str, float | int] = {
        "loss_before": float(outcome.start.mean()) / unit, "loss": float(outcome.losses.mean()) / unit,
        "retained_loss": float(kept.mean()) / unit, "steps": outcome.steps,
    }  # fmt: skip
    return {site.parameter: change.detach() for site, change in changes.items()}, facts
