"""Train changes of frozen weights until the model gives each request's target.

Shared by the fine-tuning methods: tokenised requests for a loss, the training loop, constraints on a change, and
dense changes whose product is added to the output of a linear map during training. Blocks below the lowest change
are run once, without gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from errata.errors import ConfigError, RequestError
from errata.host import hooks
from errata.host.host import Host
from errata.host.kinds import CAUSAL
from errata.host.layout import Site
from errata.host.memory import in_batches
from errata.host.prefix import ROWS, ComputedRows
from errata.host.tokens import Side
from errata.progress import OnCount, ignore
from errata.types import Request

Objective = Literal["target", "prompt_last"]
"""``target``: every target token is scored after the ones before it. ``prompt_last``: all of them are
scored by the one distribution at the prompt's last token."""
Norm = Literal["inf", "2"]
R = TypeVar("R")


# --- requests as a loss ---------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A request as the model reads it."""

    ids: tuple[int, ...]
    """Tokens up to the last one that predicts."""
    at: tuple[int, ...]
    """Index of the token that predicts each target token."""
    targets: tuple[int, ...]
    """Ids of the target."""


def lay_out(host: Host, request: Request, objective: Objective, *, end: bool = False) -> Line:
    """Tokenise a request for a loss, with ``end`` up to the token that ends a text.

    Raises RequestError where prompt and target share their only token, ConfigError where ``end`` cannot be scored.
    """
    answer = host.encode_answer(request.text, request.target)
    last = answer.start - 1
    if last < 0:
        raise RequestError(f"prompt {request.text!r} and target {request.target!r} share their first token")
    if objective == "prompt_last":
        return Line(answer.ids[: answer.start], (last,) * len(answer.target), answer.target)
    if end:
        targets = (*answer.target, end_token(host))
        return Line(answer.ids, tuple(range(last, len(answer.ids))), targets)
    return Line(answer.ids[:-1], tuple(range(last, len(answer.ids) - 1)), answer.target)


def end_token(host: Host) -> int:
    """Return the id of the tokenizer's end token. Raises ConfigError for a host without one."""
    token = getattr(host.tokenizer, "eos_token_id", None)
    if token is None or host.kind != CAUSAL:
        what = "has no end token" if token is None else "is no causal language model"
        raise ConfigError(f"{host.name} {what}: leave end=true out")
    return int(token)


@dataclass(frozen=True)
class Companions:
    """Further lines that some requests bring along: their loss is added to that of the requests."""

    lines: tuple[Line, ...] = ()
    owners: tuple[int, ...] = ()
    """Index of the request that each line belongs to."""
    sorts: tuple[int, ...] = ()
    """Number of each line's sort."""
    weights: tuple[float, ...] = ()
    """Weight of each sort's mean loss, that of the requests being 1."""

    def shares(self, requests: Sequence[int]) -> dict[int, float]:
        """Return the weight in the loss of each line that belongs to some requests, by its index."""
        chosen = set(requests)
        own = [i for i, owner in enumerate(self.owners) if owner in chosen]
        counts = {sort: sum(self.sorts[i] == sort for i in own) for sort in set(self.sorts)}
        return {i: self.weights[self.sorts[i]] / counts[self.sorts[i]] for i in own}


NO_COMPANIONS = Companions()


class Losses:
    """The loss of each request on a host in its current state, with the lowest blocks run only once."""

    def __init__(
        self,
        host: Host,
        requests: Sequence[Request | Line],
        objective: Objective = "target",
        *,
        depth: int = 0,
        side: Side = "right",
        end: bool = False,
        companions: Companions = NO_COMPANIONS,
    ) -> None:
        """Tokenise requests, or take tokenised ones; ``depth`` blocks from the bottom never change.

        ``end``: whether requests are scored up to the token that ends a text. ``companions``: lines whose losses are
        those of the indices after the requests'. Requires a frozen model.
        """
        depth = depth if host.kind == CAUSAL else 0  # elsewhere lower blocks see more than a row's own tokens
        self.host = host
        self.lines = [
            request if isinstance(request, Line) else lay_out(host, request, objective, end=end)
            for request in requests
        ]
        self.count = len(self.lines)
        """How many of the lines are requests."""
        self.companions = companions
        self.lines += companions.lines
        ends = [line.at[0] for line in self.lines]
        self.rows = ComputedRows(host, [line.ids for line in self.lines], depth, side=side, ends=ends)

    def __call__(self, indices: Sequence[int]) -> Tensor:
        """Return the mean negative log-likelihood per target token, nats ``[n]``."""
        lines = [self.lines[i] for i in indices]
        row = torch.tensor([i for i, line in enumerate(lines) for _ in line.at])
        at = torch.tensor([at for line in lines for at in line.at])
        token = torch.tensor([t for line in lines for t in line.targets], device=self.host.device)
        batch, prefix = self.rows.select(indices)
        offset = batch.offset.cpu()
        ends = torch.tensor([line.at[0] for line in lines]) + offset  # routers decide where prompts end
        logits = self.rows.runner.run(batch, prefix, at=(row, at + offset[row]), ends=ends).logits
        assert logits is not None  # [t, vocab]
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = functional.cross_entropy(wide, token.to(wide.device), reduction="none")
        share = torch.tensor(
            [1 / len(line.targets) for line in lines], device=losses.device, dtype=losses.dtype
        )
        row = row.to(losses.device)
        return losses.new_zeros(len(lines)).index_add(0, row, losses * share[row])


# --- the descent ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Stop:
    """When training ends before all its passes."""

    loss: float | None
    """Loss to be below; None: never."""
    on: Literal["each", "mean"] = "each"
    """Whether every request must be below, or their mean. A mean can hide a request that is not there yet."""

    def reached(self, losses: Tensor) -> bool:
        """Tell whether the losses ``[n]`` are low enough."""
        return (
            self.loss is not None and float(losses.max() if self.on == "each" else losses.mean()) < self.loss
        )


@dataclass(frozen=True)
class Outcome:
    """Losses and passes of a training run."""

    start: Tensor
    """Loss of each item in the first pass, before its step ``[n]``."""
    losses: Tensor
    """Loss of each item at the end ``[n]``."""
    steps: int
    """Passes over the items in which something changed."""

    def facts(self) -> dict[str, float | int]:
        """Return what is recorded in the provenance: mean loss, worst loss, passes."""
        return {"loss": float(self.losses.mean()), "worst": float(self.losses.max()), "steps": self.steps}


def descend(
    optimizer: torch.optim.Optimizer,
    losses: Callable[[Sequence[int]], Tensor],
    count: int,
    *,
    steps: int,
    stop: Stop,
    per_step: int | None = None,
    shuffle: int | None = None,
    rows: int | None = None,
    companions: Companions = NO_COMPANIONS,
    after_step: Callable[[int], None] = ignore,
    tick: OnCount = ignore,
) -> Outcome:
    """Lower the mean of ``losses`` over ``count`` items in at most ``steps`` passes over them.

    ``losses`` gives the loss of some items ``[n]``. ``per_step``: items per optimiser step; None: all.
    ``shuffle``: seed of a new order in each pass; None: always the order given. A step whose items have all
    stopped is left out; a pass without any step is the last. ``rows``: items run at once, which changes nothing
    but memory; gradients are summed. ``companions``: lines whose loss joins that of the items they belong to;
    ``losses`` takes them by their index after the items', and ``stop`` does not look at them. ``after_step`` gets the
    number of optimiser steps so far, before gradients are zeroed. Raises ConfigError when the loss is not finite.
    """
    size = min(per_step or count, count)
    generator = None if shuffle is None else torch.Generator().manual_seed(shuffle)
    latest = torch.full((count,), float("nan"), dtype=torch.float64)
    start, updates = latest, 0
    for step in range(steps):
        tick(step, steps)
        before = updates
        order = torch.arange(count) if generator is None else torch.randperm(count, generator=generator)
        for batch in order.split(size):
            latest[batch] = _differentiate_(optimizer, losses, batch.tolist(), rows or ROWS, updates)
            if not stop.reached(latest[batch]):
                shares = companions.shares(batch.tolist())
                _add_gradients_(optimizer, losses, {count + i: w for i, w in shares.items()}, rows or ROWS)
                optimizer.step()
                updates += 1
                after_step(updates)
            optimizer.zero_grad()
        start = latest.clone() if step == 0 else start
        if updates == before:
            return Outcome(start, latest, step)
    with torch.no_grad():
        final = in_batches(range(count), rows or ROWS, lambda indices: losses(indices).tolist())
    tick(steps, steps)
    return Outcome(start, torch.tensor(final, dtype=torch.float64), steps)


def check_finite(losses: Tensor, steps: int) -> Tensor:
    """Return losses ``[n]``. Raises ConfigError where one is not finite."""
    if not torch.isfinite(losses).all():
        raise ConfigError(
            f"the loss is {float(losses.sum())} after {steps} steps; lower the learning rate, "
            "or load the model in float32"
        )
    return losses


def _differentiate_(
    optimizer: torch.optim.Optimizer,
    losses: Callable[[Sequence[int]], Tensor],
    batch: Sequence[int],
    rows: int,
    updates: int,
) -> Tensor:
    """Set gradients of the mean loss over a batch; return its items' losses."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def run(indices: Sequence[int]) -> list[float]:
        values = losses(indices)
        # all or nothing, so that a batch that did not fit leaves no part of its gradient behind
        gradients = torch.autograd.grad(values.sum() / len(batch), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return values.detach().tolist()

    return check_finite(torch.tensor(in_batches(batch, rows, run), dtype=torch.float64), updates)


def _add_gradients_(
    optimizer: torch.optim.Optimizer,
    losses: Callable[[Sequence[int]], Tensor],
    shares: Mapping[int, float],
    rows: int,
) -> None:
    """Add the gradients of the losses of some lines, each times its share."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def run(indices: Sequence[int]) -> list[None]:
        values = losses(indices)
        share = values.new_tensor([shares[i] for i in indices])
        gradients = torch.autograd.grad((values * share).sum(), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return [None] * len(indices)

    in_batches(list(shares), rows, run)


class _Call(nn.Module):
    """A function that runs a model, as a module around it."""

    def __init__(self, model: nn.Module, run: Callable[[], Any]) -> None:
        super().__init__()
        self.model, self.run = model, run

    def forward(self) -> Any:
        return self.run()


def with_weights(host: Host, weights: Mapping[str, Tensor], run: Callable[[], R]) -> R:
    """Return the result of ``run`` with other tensors in place of some of the host's weights.

    ``weights``: by parameter, of its shape ``[...]``. Gradients reach those tensors; the weights themselves are not
    written.
    """
    by_path = {f"model.{name}": weight for name, weight in weights.items()}
    return torch.func.functional_call(_Call(host.model, run), by_path, ())


@contextmanager
def seeded(host: Host, seed: int) -> Iterator[None]:
    """Draw from a seed inside the block, on the host's devices; the global random state is as before after it."""
    used = {p.device.index for p in host.model.parameters() if p.device.type == "cuda"}
    devices = sorted(index for index in used if index is not None)
    with torch.random.fork_rng(devices=devices):
        # not torch.manual_seed: it would reach devices whose state is not kept
        torch.default_generator.manual_seed(seed)
        for device in devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


# --- where a change may be ------------------------------------------------------------------


def rms(tensor: Tensor) -> float:
    """Return the root mean square of the entries of ``[...]``, summed in float64."""
    return float(tensor.detach().double().square().mean().sqrt())


@torch.no_grad()
def clip_(change: Tensor, bound: float, norm: Norm) -> None:
    """Bring a change ``[...]`` back into the box (every entry) or the ball (Frobenius norm) around zero.

    For ``inf`` no entry exceeds ``bound``, not even by rounding.
    """
    if norm == "2":
        change.mul_(min(1.0, bound / max(float(change.norm()), 1e-12)))
        return
    edge = torch.tensor(bound, dtype=change.dtype)
    if float(edge) > bound:
        edge = torch.nextafter(edge, torch.zeros_like(edge))
    change.clamp_(-float(edge), float(edge))


# --- dense changes beside linear maps -------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """How to fine-tune some sites."""

    objective: Objective
    """What is lowered."""
    steps: int
    """Passes over the requests at most."""
    rates: tuple[float, ...]
    """Adam's rate for each site, in plain numbers."""
    stop: Stop
    bounds: tuple[float, ...] | None = None
    """How far each site's change may go, in plain numbers; None: anywhere."""
    norm: Norm = "inf"
    """How that is measured."""
    weight_decay: float = 0.0
    """Adam's L2 penalty on the change."""
    per_step: int | None = None
    """Requests per Adam step; None: all."""
    bias: bool = False
    """Whether each site's bias is changed too, at the site's rate and within its bounds."""
    shuffle: int | None = None
    """Seed of a new order of the requests in each pass; None: always the order given."""
    end: bool = False
    """Whether the token that ends a text is scored after each target."""


@contextmanager
def beside(
    host: Host, changes: Mapping[Site, Tensor], biases: Mapping[Site, Tensor] | None = None
) -> Iterator[None]:
    """Add each change's product to its site's output; no weight is written, gradients reach the change.

    Changes are ``[d_out, d_in]``, those of biases ``[d_out]``.
    """
    with ExitStack() as stack:
        for site, change in changes.items():
            module, inputs = host.model.get_submodule(site.name), []
            stack.enter_context(hooks.on_input(module, inputs.append))
            stack.enter_context(hooks.on_output(module, _adder(inputs, change, (biases or {}).get(site))))
        yield


@contextmanager
def beside_low_rank(host: Host, factors: Mapping[Site, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Add ``Y (A^T x)`` to each site's output while inside; no weight is written, gradients reach the factors.

    ``factors``: Y ``[d_out, r]`` and A ``[d_in, r]`` by site.
    """
    with ExitStack() as stack:
        for site, (outer, inner) in factors.items():
            module, inputs = host.model.get_submodule(site.name), []
            stack.enter_context(hooks.on_input(module, inputs.append))
            stack.enter_context(hooks.on_output(module, _low_rank_adder(inputs, outer, inner)))
        yield


def _low_rank_adder(inputs: list[Tensor], outer: Tensor, inner: Tensor) -> Callable[[Tensor], Tensor]:
    def add(output: Tensor) -> Tensor:
        return output + ((inputs.pop().to(inner.dtype) @ inner) @ outer.mT).to(output.dtype)

    return add


def _adder(inputs: list[Tensor], change: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    def add(output: Tensor) -> Tensor:
        return output + functional.linear(inputs.pop().to(change.dtype), change, bias).to(output.dtype)

    return add


def bias_of(host: Host, site: Site) -> str:
    """Return the path of a site's bias. Raises ConfigError where it has none."""
    name = f"{site.name}.bias"
    if name not in dict(host.model.named_parameters()):
        raise ConfigError(f"{site.name} has no bias; leave bias=true out")
    return name


def tune(
    host: Host,
    requests: Sequence[Request],
    sites: Sequence[Site],
    plan: Plan,
    *,
    rows: int | None = None,
    companions: Companions = NO_COMPANIONS,
    tick: OnCount = ignore,
) -> tuple[dict[str, Tensor], Outcome]:
    """Return the change of each parameter that lowers the requests' loss, and the losses and passes.

    By path: each site's weight ``[d_out, d_in]``, and with ``plan.bias`` its bias ``[d_out]``. Adam on the
    change alone, projected back into its bounds after every step. float32, or float64 for a float64 host.
    """
    dtype = torch.promote_types(host.dtype, torch.float32)
    changes = {
        s: torch.zeros(s.d_out, s.d_in, device=host.device_of(s), dtype=dtype, requires_grad=True)
        for s in sites
    }
    names = {site: bias_of(host, site) for site in sites} if plan.bias else {}
    biases = {
        s: torch.zeros(s.d_out, device=host.device_of(s), dtype=dtype, requires_grad=True) for s in names
    }
    parameters = {site: [changes[site], *([biases[site]] if plan.bias else [])] for site in sites}
    groups = [{"params": parameters[s], "lr": r} for s, r in zip(sites, plan.rates, strict=True)]
    optimizer = torch.optim.Adam(groups, weight_decay=plan.weight_decay)

    def constrain(_: int) -> None:
        if plan.bounds is not None:
            for site, bound in zip(sites, plan.bounds, strict=True):
                for change in parameters[site]:
                    clip_(change, bound, plan.norm)

    with hooks.frozen(host.model):
        losses = Losses(
            host, requests, plan.objective, depth=min(site.layer for site in sites), end=plan.end,
            companions=companions,
        )  # fmt: skip

        def run(indices: Sequence[int]) -> Tensor:
            with beside(host, changes, biases):
                return losses(indices)

        outcome = descend(
            optimizer, run, len(requests), steps=plan.steps, stop=plan.stop, per_step=plan.per_step,
            shuffle=plan.shuffle, rows=rows, companions=companions, after_step=constrain, tick=tick,
        )  # fmt: skip
    weights = {site.parameter: change.detach() for site, change in changes.items()}
    return {**weights, **{names[site]: change.detach() for site, change in biases.items()}}, outcome
