"""Gradients of linear maps as factors: what a map read, and the gradient at its output, one row per token.

The sum over a text's tokens of g h^T is the gradient of its loss with respect to the weight, so editors that read
gradients and write changes of weights never form a tensor of a weight's size: they read the factors, and what they
write acts beside the maps, as outer products of which gradients reach both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from errata.host import hooks
from errata.host.host import Host
from errata.host.tokens import Answer
from errata.locate.gradients import Tokens, collect


@dataclass(frozen=True)
class Factors:
    """What one linear map read in some texts, and the gradients of their losses at its output."""

    keys: Tensor
    """Inputs ``[n, d_in]``, float32 at least."""
    gradients: Tensor
    """Of each text's summed negative log-likelihood, in nats per unit of output ``[n, d_out]``."""
    owner: Tensor
    """Which text each row belongs to, int64 ``[n]``, in ascending order."""
    transposed: bool = False
    """Whether the weight is stored ``[d_in, d_out]``."""

    @property
    def shape(self) -> tuple[int, int]:
        """Widths of the map's output and input."""
        return self.gradients.shape[1], self.keys.shape[1]

    def to(self, device: torch.device) -> Factors:
        """Return the same on a device."""
        return Factors(
            self.keys.to(device), self.gradients.to(device), self.owner.to(device), self.transposed
        )


def capture(
    host: Host, answers: Sequence[Answer], modules: Sequence[str], *, tokens: Tokens, rows: int
) -> dict[str, Factors]:
    """Return, by module path, the factors of prompts with answers; one forward and one backward pass a batch.

    ``tokens``: those that predict the answer, or all but the last. ``rows``: texts run at once, which changes nothing
    but rounding. Rows that are zero on either side are left out, for they add nothing. Raises HostError for a module
    that does not run once per token.
    """
    pairs = collect(host, answers, modules, tokens=tokens, batch_size=rows)
    found = {}
    for name, pair in pairs.items():
        counts = pair.inputs.any(1) & pair.gradients.any(1)
        found[name] = Factors(
            pair.inputs[counts], pair.gradients[counts], pair.owner[counts], pair.transposed
        )
    return found


# --- changes beside the maps ----------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """The change of one weight by some edits, each a sum of outer products."""

    outer: Tensor
    """``[n, d_out]``."""
    inner: Tensor
    """``[n, d_in]``."""
    owner: Tensor
    """Which edit each product belongs to, int64 ``[n]``."""


def joined(change: Change) -> Change:
    """Return a change as that of a single edit: the sum of all ``[n, ...]``."""
    return replace(change, owner=torch.zeros_like(change.owner))


@contextmanager
def beside(host: Host, changes: Mapping[str, Change], edits: Sequence[int]) -> Iterator[None]:
    """Have each row of a batch see the change of its own edit while inside; ``edits``: which, for each row of a pass.

    A model that fills places is given a row for every token of an answer: :func:`errata.training.editing.by_row`.

    A map with the change D of the row's edit gives W x + D x, D x computed through the products: no weight is
    written, no tensor of a weight's size is made, and gradients reach both sides of the products.
    """
    with ExitStack() as stack:
        for name, change in changes.items():
            module, inputs = host.model.get_submodule(name), list[Tensor]()
            stack.enter_context(hooks.on_input(module, inputs.append))
            stack.enter_context(hooks.on_output(module, _adder(inputs, change, tuple(edits))))
        yield


def _adder(inputs: list[Tensor], change: Change, edits: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    single = len(set(edits)) == 1 and bool((change.owner == edits[0]).all())
    if single:
        outer, inner = change.outer, change.inner
    else:
        chosen, count = (
            torch.tensor(edits, device=change.owner.device),
            1 + max(*edits, *change.owner.tolist()),
        )
        outer, inner = (by_owner(side, change.owner, count)[chosen] for side in (change.outer, change.inner))

    def add(output: Tensor) -> Tensor:
        rows = inputs.pop().reshape(len(edits), -1, inner.shape[-1]).to(inner)  # [rows, length, d_in]
        added = rows @ inner.mT @ outer
        return output + added.reshape(output.shape).to(output)

    return add


def by_owner(rows: Tensor, owner: Tensor, count: int) -> Tensor:
    """Return rows ``[n, d]`` by their owner, filled up with zeros ``[count, most of one owner, d]``."""
    sizes = torch.bincount(owner, minlength=count)
    place = torch.arange(len(owner), device=owner.device) - (sizes.cumsum(0) - sizes)[owner]
    empty = rows.new_zeros(count, int(sizes.max()), rows.shape[1])
    return empty.index_put((owner, place), rows)
