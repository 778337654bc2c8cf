"""A low-rank change of a model that is trained so that a few steps of gradient descent edit it.

The steps are differentiated, which takes gradients of gradients: what each step changes acts beside the maps as outer
products of what they read and of the gradients at their outputs, both with their graphs.

Source     Sinitsin et al., "Editable Neural Networks", ICLR 2020, arXiv 2004.00345
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from errata.host import hooks
from errata.host.host import Host
from errata.host.tokens import Answer
from errata.locate.gradients import Tokens
from errata.training.editing import loss_scale
from errata.training.factors import Change, beside


@dataclass(frozen=True)
class Descent:
    """How an edit descends."""

    steps: int
    """At most."""
    margin: float
    """By how many nats the target's log probability leads all others at each of its tokens where the descent ends."""
    normalise: bool
    """Whether a gradient is divided by its root mean square."""
    token: Tokens
    """Tokens whose part of the gradient is taken."""


class Editable(nn.Module):
    """The change of some maps, B A of each, and the logarithms of the sizes of their steps."""

    def __init__(self, maps: Mapping[str, tuple[int, int]], rank: int, seed: int) -> None:
        """Take the widths of each map's output and input; at the start the change is zero."""
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.names = list(maps)
        sizes = [(min(rank, *size), *size) for size in maps.values()]
        self.inner = nn.ParameterList(torch.randn(r, n, generator=generator) / n**0.5 for r, _, n in sizes)
        self.outer = nn.ParameterList(torch.zeros(r, m) for r, m, _ in sizes)
        self.steps = nn.Parameter(torch.zeros(len(maps)))

    def change(self) -> dict[str, Change]:
        """Return the change of each map, one edit's, as products ``[rank, ...]``."""
        owner = torch.zeros(1, dtype=torch.long, device=self.steps.device)
        return {
            name: Change(outer, inner, owner.expand(len(outer)))
            for name, outer, inner in zip(self.names, self.outer, self.inner, strict=True)
        }

    @contextmanager
    def beneath(self, host: Host) -> Iterator[None]:
        """Have all rows of all passes see the change while inside."""
        with beside(host, self.change(), (0,)):
            yield


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Compute attention so that gradients of gradients exist: the fused kernels have none."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def descend(
    host: Host, answers: Sequence[Answer], editor: Editable, descent: Descent, *, graph: bool
) -> dict[str, Change]:
    """Return what steps of descent on each answer's own loss change, on the host as it is ``[n, ...]``.

    A step changes a map by -a G, or -a G / rms(G), G the gradient of the answer's negative log-likelihood, with the
    steps before it in place. It ends for an answer that leads by the margin. ``graph``: whether the changes can be
    differentiated, see :func:`twice_differentiable`.
    """
    owners = list(range(len(answers)))
    rows: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in editor.names}
    changes: dict[str, Change] = {}
    for _ in range(descent.steps):
        with beside(host, changes, owners):
            found, open_ = _gradients(host, answers, editor.names, descent, graph=graph)
        if not open_.any():
            break
        for (name, (keys, gradients)), log in zip(found.items(), editor.steps, strict=True):
            size = log.exp() * open_.to(gradients)[:, None, None]
            if descent.normalise:
                size = size / _rms(keys, gradients)[:, None, None]
            rows[name].append((-size * gradients, keys))
        changes = {name: _change(parts) for name, parts in rows.items()}
    return changes or _nothing(editor, host)


def _rms(keys: Tensor, gradients: Tensor) -> Tensor:
    """Return the root mean square of each G = sum g h^T ``[rows]``, without forming it."""
    squares = ((gradients @ gradients.mT) * (keys @ keys.mT)).sum((1, 2))
    return (squares / (keys.shape[2] * gradients.shape[2])).clamp_min(1e-24).sqrt()


def _change(parts: Sequence[tuple[Tensor, Tensor]]) -> Change:
    """Return steps ``[rows, length, ...]`` as products that each row owns."""
    outer, inner = (torch.cat(list(sides), 1) for sides in zip(*parts, strict=True))
    count, length = outer.shape[:2]
    owner = torch.arange(count, device=outer.device).repeat_interleave(length)
    return Change(outer.flatten(0, 1), inner.flatten(0, 1), owner)


def _nothing(editor: Editable, host: Host) -> dict[str, Change]:
    """Return changes by no products."""
    none = torch.zeros(0, dtype=torch.long, device=host.device)
    return {
        name: Change(one.outer.detach()[:0], one.inner.detach()[:0], none)
        for name, one in editor.change().items()
    }


def _gradients(
    host: Host, answers: Sequence[Answer], names: Sequence[str], descent: Descent, *, graph: bool
) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
    """Return each map's inputs and output gradients ``[rows, length, ...]``, and which rows lack the margin ``[rows]``.

    Gradients are zero at tokens that do not count.
    """
    batch = host.batch([answer.ids[:-1] for answer in answers])
    row = torch.tensor([i for i, answer in enumerate(answers) for _ in answer.target])
    at = torch.tensor([answer.start - 1 + j for answer in answers for j in range(len(answer.target))])
    targets = torch.tensor([t for answer in answers for t in answer.target], device=host.device)
    counts = torch.zeros(batch.ids.shape, device=host.device)
    if descent.token == "answer":
        counts[row, at] = 1
    else:
        for i, answer in enumerate(answers):
            counts[i, : len(answer.ids) - 1] = 1
    keys, zeros, scale = dict[str, Tensor](), dict[str, Tensor](), loss_scale(host)
    with torch.enable_grad(), ExitStack() as stack:
        for name in names:
            module = host.model.get_submodule(name)
            stack.enter_context(hooks.on_input(module, _keeping(keys, name, counts.shape)))
            stack.enter_context(hooks.on_output(module, _adding_zeros(zeros, name, counts.shape)))
        logits = host.forward_at(batch, row, at)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        own = wide.gather(1, targets[:, None])[:, 0]
        found = torch.autograd.grad(-scale * own.sum(), [zeros[name] for name in names], create_graph=graph)
    others = wide.detach().scatter(1, targets[:, None], float("-inf")).max(1).values
    short = (own.detach() - others < descent.margin).to(counts)
    open_ = torch.zeros(len(answers), device=host.device).index_add(0, row.to(host.device), short) > 0
    gradients = {name: counts[..., None] * one / scale for name, one in zip(names, found, strict=True)}
    if not graph:
        keys = {name: one.detach() for name, one in keys.items()}
        gradients = {name: one.detach() for name, one in gradients.items()}
    return {name: (keys[name], gradients[name]) for name in names}, open_


def _keeping(keys: dict[str, Tensor], name: str, shape: torch.Size) -> Callable[[Tensor], None]:
    def keep(inputs: Tensor) -> None:
        wide = torch.promote_types(inputs.dtype, torch.float32)
        keys[name] = inputs.reshape(*shape, inputs.shape[-1]).to(wide)

    return keep


def _adding_zeros(zeros: dict[str, Tensor], name: str, shape: torch.Size) -> Callable[[Tensor], Tensor]:
    def add(output: Tensor) -> Tensor:
        wide = torch.promote_types(output.dtype, torch.float32)
        zeros[name] = torch.zeros(*shape, output.shape[-1], dtype=wide, device=output.device).requires_grad_()
        return output + zeros[name].reshape(output.shape).to(output.dtype)

    return add
