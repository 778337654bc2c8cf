"""ROME and MEMIT as plainly as they can be written: the benchmark's baseline, and an oracle for tests.

One request at a time. Every row runs over its whole length, through every block, with logits at every
position, at every step; the m x m system of each layer is solved afresh in float64; statistics take one
pass of the whole model a layer. That is how the authors' code spends its time. Of errata only the host
is used (weights, tokenizer, layout): search, capture and solver here are separate code, so that
agreement between the two means something.

Sources: Meng et al., arXiv 2202.05262 (ROME) and arXiv 2210.07229 (MEMIT, Algorithm 1), with the terms
of the loss as in the authors' code; Gupta et al., arXiv 2403.07175 (one key in all places).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from errata.host.layout import Site
from errata.host.load import Host
from errata.types import Request

Prefixes = Sequence[tuple[str, float]]
"""Texts before a prompt with their weights; the first is the bare prompt, the weights sum to one."""

Where = Literal["mlp_out", "block_out"]


@dataclass(frozen=True)
class Search:
    """Settings of the search for a value."""

    steps: int
    """Evaluations of the loss at most; the last takes no step."""
    learning_rate: float
    """Adam's rate, in the unit."""
    clamp: float
    """Largest norm of the shift, in the unit."""
    decay: float
    """Weight of the shift's norm over the squared norm of the vector it is added to."""
    kl: float
    """Weight of the divergence at the subject of "{subject} is a"."""
    unit: Literal["stream", "site", "published"] = "published"
    """``published``: rate in plain numbers, clamp in norms of the shifted vector; ``site``: rate in its
    root mean square; ``stream``: both measured in the output of the layer's block."""
    stop_loss: float = 0.05
    """The search ends below this loss."""


@dataclass(frozen=True)
class Row:
    """One text to run, with the place of the shift and the tokens it is to predict."""

    ids: tuple[int, ...]
    place: int
    """Index of the subject's last token."""
    targets: tuple[int, ...]
    """The tokens that are to follow ``ids``, the last one's predecessors being its end; may be empty."""
    weight: float


@dataclass(frozen=True)
class Value:
    """What a search found."""

    start: Tensor
    """The vector at the subject of the bare prompt ``[d]``."""
    shift: Tensor
    """What to add to it ``[d]``."""

    @property
    def target(self) -> Tensor:
        """The value to write ``[d]``."""
        return self.start + self.shift


def lay_out(host: Host, request: Request, prefixes: Prefixes) -> list[Row]:
    """Return a request's rows with its target, one a prefix, and last the row "{subject} is a"."""
    rows = []
    weight = 1 / len(prefixes)  # the loss counts contexts alike; their weights are for keys
    for prefix, _ in prefixes:
        answer = host.encode_answer(prefix + request.text, request.target)
        place = subject_place(host, request, prefix)
        rows.append(Row(answer.ids[:-1], place, answer.target, weight))
    essence = Request("{} is a", request.subject, request.target)
    ids = host.encode(essence.text).ids
    return [*rows, Row(ids, subject_place(host, essence), (), 1.0)]


def subject_place(host: Host, request: Request, prefix: str = "") -> int:
    """Return the index of the subject's last token behind a prefix."""
    start, stop = (bound + len(prefix) for bound in request.span)
    return host.encode(prefix + request.text).last_of(start, stop)


def run(host: Host, rows: Sequence[Sequence[int]]) -> Tensor:
    """Run rows padded on the right through the whole model; logits ``[rows, length, vocab]``."""
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), host.pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    ids, mask = ids.to(host.device), mask.to(host.device)
    return host.model(input_ids=ids, attention_mask=mask, use_cache=False).logits


@contextlib.contextmanager
def seen(module: nn.Module, act: Callable[[Any, Tensor], Tensor | None]) -> Iterator[None]:
    """Show a module's input (None if by keyword) and output to ``act``.

    What ``act`` returns, unless None, takes the output's place.
    """

    def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        first = output if isinstance(output, Tensor) else output[0]
        changed = act(args[0] if args else None, first)
        if changed is None:
            return None
        return changed if isinstance(output, Tensor) else type(output)((changed, *output[1:]))

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Have no weight ask for a gradient, so that a backward pass goes no deeper than the shift."""
    asked = [p for p in model.parameters() if p.requires_grad]
    for parameter in asked:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in float32, or in float64 where it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def find_value(
    host: Host, request: Request, prefixes: Prefixes, *, layer: int, where: Where, search: Search
) -> Value:
    """Descend on a shift of one vector at the subject's last token, in all rows alike."""
    rows = lay_out(host, request, prefixes)
    block = host.model.get_submodule(host.layout.blocks[layer])
    module = block if where == "block_out" else host.model.get_submodule(host.layout.site(layer).name)
    line = torch.arange(len(rows), device=host.device)
    place = torch.tensor([row.place for row in rows], device=host.device)
    width = host.layout.width
    shift = torch.zeros(width, device=host.device, dtype=torch.promote_types(host.dtype, torch.float32))
    shift.requires_grad_(True)
    first: dict[str, Tensor] = {}

    def push(_: Any, output: Tensor) -> Tensor:
        shaped = output.reshape(len(rows), -1, width)
        first.setdefault("start", wide(shaped[0, rows[0].place].detach().clone()))
        full = torch.zeros_like(shaped).index_put((line, place), shift.to(shaped.dtype).expand(len(rows), -1))
        return (shaped + full).reshape(output.shape)

    def watch(_: Any, output: Tensor) -> None:
        first.setdefault("stream", wide(output[0, rows[0].place].detach().clone()))

    with frozen(host.model), seen(module, push), seen(block, watch):
        _descend(host, rows, shift, first, search)
    return Value(first["start"], shift.detach())


def _descend(host: Host, rows: list[Row], shift: Tensor, first: dict[str, Tensor], search: Search) -> None:
    """Move the shift in place until the loss is low or the steps are used up."""
    optimiser = torch.optim.Adam([shift], lr=search.learning_rate)
    for step in range(1, search.steps + 1):
        logits = wide(run(host, [row.ids for row in rows]))
        essence = logits[-1, rows[-1].place].log_softmax(-1)
        before = first.setdefault("essence", essence.detach())  # the shift is zero at the first step
        start = first["start"]
        # the divergence is read at the subject and goes from edited to original, as in the authors' code
        divergence = (essence.exp() * (essence - before)).sum()
        penalty = search.decay * shift.norm() / start.norm().square()
        loss = _likelihood(rows, logits) + search.kl * divergence + penalty
        if float(loss.detach()) < search.stop_loss or step == search.steps:
            return
        (shift.grad,) = torch.autograd.grad(loss, shift)
        unit = first["stream"] if search.unit == "stream" else start
        plain = search.unit == "published"
        rate = search.learning_rate * (1.0 if plain else float(unit.square().mean().sqrt()))
        optimiser.param_groups[0]["lr"] = rate
        optimiser.step()
        with torch.no_grad():
            limit = search.clamp * unit.norm()
            if shift.norm() > limit:
                shift.mul_(limit / shift.norm())


def _likelihood(rows: list[Row], logits: Tensor) -> Tensor:
    """Return the negative log-likelihood: mean over target tokens, weighted over rows."""
    total = logits.new_zeros(())
    for i, row in enumerate(rows):
        if row.targets:
            said = logits[i, len(row.ids) - len(row.targets) : len(row.ids)]
            lost = functional.cross_entropy(said, torch.tensor(row.targets, device=said.device))
            total = total + row.weight * lost
    return total


@torch.no_grad()
def keys_at(host: Host, request: Request, prefixes: Prefixes, site: Site) -> tuple[Tensor, Tensor]:
    """Return a site's input ``[m]`` and output ``[d]`` at the subject, weighted over prefixes, float64."""
    texts = [host.encode(prefix + request.text).ids for prefix, _ in prefixes]
    places = [subject_place(host, request, prefix) for prefix, _ in prefixes]
    key = torch.zeros(site.d_in, dtype=torch.float64, device=host.device)
    value = torch.zeros(site.d_out, dtype=torch.float64, device=host.device)

    def add(given: Tensor, said: Tensor) -> None:
        given, said = (t.reshape(len(texts), -1, t.shape[-1]) for t in (given, said))
        for i, (_, weight) in enumerate(prefixes):
            key.add_(given[i, places[i]].double(), alpha=weight)
            value.add_(said[i, places[i]].double(), alpha=weight)

    with seen(host.model.get_submodule(site.name), add):
        run(host, texts)
    return key, value


@torch.no_grad()
def current(host: Host, request: Request, layer: int, where: Where) -> Tensor:
    """Return what stands now where the value is to stand, at the subject of the bare prompt ``[d]``."""
    name = host.layout.blocks[layer] if where == "block_out" else host.layout.site(layer).name
    place, found = subject_place(host, request), []
    with seen(host.model.get_submodule(name), lambda _, said: found.append(said.reshape(-1, said.shape[-1]))):
        run(host, [host.encode(request.text).ids])
    return found[0][place].double()


def rome(
    host: Host, request: Request, prefixes: Prefixes, second: Tensor, *, layer: int, search: Search,
    keys: Literal["mean", "mixed"] = "mean",
) -> tuple[Tensor, Value]:  # fmt: skip
    """Write one fact into one layer; returns the delta ``[d, m]`` in float64 and the value.

    ``second``: the keys' second moment C ``[m, m]``. ``mean`` takes the averaged key in all three places
    of (v - W k) (C^-1 k)^T / (k^T C^-1 k); ``mixed`` keeps it on the left alone, as first published.
    """
    site = host.layout.site(layer)
    value = find_value(host, request, prefixes, layer=layer, where="mlp_out", search=search)
    key, output = keys_at(host, request, prefixes, site)
    left = whitened(second, key)
    if keys == "mixed":
        key, output = keys_at(host, request, [("", 1.0)], site)
    return torch.outer(value.target.double() - output, left) / (left @ key), value


def memit(
    host: Host, requests: Sequence[Request], prefixes: Prefixes, seconds: Mapping[int, Tensor], *,
    search: Search, cov_weight: float, where: Where = "block_out",
) -> tuple[dict[int, Tensor], list[Value]]:  # fmt: skip
    """Write facts into the layers of ``seconds``, upwards; returns deltas ``[d, m]`` by layer, and values.

    Per layer: delta = R K^T (cov_weight C + K K^T)^-1, with K and R measured on the model as edited so
    far and R shared between the layers left. The weights are put back bit by bit at the end.
    """
    layers = sorted(seconds)
    found = [
        find_value(host, request, prefixes, layer=layers[-1], where=where, search=search)
        for request in requests
    ]
    kept: dict[str, Tensor] = {}
    deltas: dict[int, Tensor] = {}
    try:
        for done, layer in enumerate(layers):
            site = host.layout.site(layer)
            columns = [keys_at(host, request, prefixes, site)[0] for request in requests]
            now = [current(host, request, layers[-1], where) for request in requests]
            left = [v.target.double() - n for v, n in zip(found, now, strict=True)]
            K = torch.stack(columns, 1)  # [m, n]
            R = torch.stack(left, 1) / (len(layers) - done)  # [d, n]
            deltas[layer] = ridge(K, R, seconds[layer], cov_weight)
            weight = host.model.get_parameter(site.parameter)
            kept[site.parameter] = weight.detach().clone()
            with torch.no_grad():
                change = deltas[layer].mT if site.transposed else deltas[layer]
                weight.copy_((weight.double() + change).to(weight.dtype))
    finally:
        for name, bits in kept.items():
            with torch.no_grad():
                host.model.get_parameter(name).copy_(bits)
    return deltas, found


def whitened(second: Tensor, key: Tensor) -> Tensor:
    """Return C^-1 k ``[m]``."""
    return torch.linalg.solve(second.double(), key)


def ridge(K: Tensor, R: Tensor, second: Tensor, cov_weight: float) -> Tensor:
    """Return R K^T (cov_weight C + K K^T)^-1 for keys ``[m, n]`` and residuals ``[d, n]``, ``[d, m]``."""
    system = cov_weight * second.double() + K @ K.mT  # [m, m]
    return R @ torch.linalg.solve(system, K).mT


@torch.no_grad()
def second_moment(host: Host, texts: Iterable[Sequence[int]], site: Site, *, jitter: float = 0.0) -> Tensor:
    """Return the mean of k k^T over all tokens of some texts but begin tokens, ``[m, m]`` float64.

    One pass of the whole model, a text (token ids) at a time. ``jitter``: this times the mean diagonal is added.
    """
    total = torch.zeros(site.d_in, site.d_in, dtype=torch.float64, device=host.device)
    begin = getattr(host.tokenizer, "bos_token_id", None)
    count = 0
    for ids in texts:
        counted = torch.tensor([token != begin for token in ids], device=host.device)

        def add(given: Tensor, _: Tensor, counted: Tensor = counted) -> None:
            vectors = wide(given.reshape(-1, given.shape[-1])[counted])
            total.add_((vectors.mT @ vectors).double())

        with seen(host.model.get_submodule(site.name), add):
            run(host, [ids])
        count += int(counted.sum())
    second = total / count
    return second + jitter * second.diagonal().mean() * torch.eye(site.d_in, dtype=second.dtype).to(second)
