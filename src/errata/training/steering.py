"""Train changes of states: answers' log-likelihoods while functions act on the outputs of modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from errata.edits.steer import Where, acts_at
from errata.errors import RequestError
from errata.host import hooks
from errata.host.host import Host
from errata.host.tokens import Answer

Change = Callable[[Tensor, Tensor], Tensor]
"""Gives other states ``[n, d]`` of tokens for states ``[n, d]`` and the row in the batch that each is of ``[n]``."""


def log_likelihoods(
    host: Host, answers: Sequence[Answer], changes: Mapping[str, Change], where: Where = "all", count: int = 1
) -> Tensor:  # fmt: skip
    """Return the summed log-probability of each answer's tokens behind its prompt, nats ``[n]``, with gradients.

    ``changes``: by path of a module, what acts on its output meanwhile at the tokens that ``where`` and ``count``
    select, as :func:`errata.edits.steer.acts_at` does; computed in float32 at least. Requires a frozen model. Raises
    RequestError for an answer that begins its text.
    """
    if any(answer.start < 1 for answer in answers):
        raise RequestError(
            "an answer without a prompt has nothing to be predicted from: give every pair a prompt"
        )
    batch = host.batch([answer.ids[:-1] for answer in answers])
    starts = torch.tensor([answer.start for answer in answers])
    index = torch.arange(batch.ids.shape[1]).expand(len(answers), -1)  # rows are padded behind their tokens
    acting = acts_at(where, count, index, starts - 1) & batch.mask.bool().cpu()
    owner = acting.nonzero()[:, 0]
    places = [
        (i, at) for i, answer in enumerate(answers) for at in range(answer.start - 1, len(answer.ids) - 1)
    ]
    row, at = torch.tensor(places).unbind(1)
    targets = torch.tensor([answers[i].ids[j + 1] for i, j in places])
    with ExitStack() as stack:
        for path, change in changes.items():
            act = _acting(change, acting, owner)
            stack.enter_context(hooks.on_output(host.model.get_submodule(path), act))
        logits = host.forward_at(batch, row, at, ends=starts - 1)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    picked = wide.gather(1, targets.to(wide.device)[:, None])[:, 0]
    return picked.new_zeros(len(answers)).index_add(0, row.to(picked.device), picked)


def lengths(answers: Sequence[Answer]) -> Tensor:
    """Return how many tokens each answer has ``[n]``."""
    return torch.tensor([float(len(answer.target)) for answer in answers])


def _acting(change: Change, acting: Tensor, owner: Tensor) -> Callable[[Tensor], Tensor]:
    def act(output: Tensor) -> Tensor:
        here = acting.to(output.device)
        if not bool(here.any()):
            return output
        states = output[here].to(torch.promote_types(output.dtype, torch.float32))
        changed = change(states, owner.to(output.device)).to(output.dtype)
        return output.masked_scatter(here[..., None], changed)

    return act
