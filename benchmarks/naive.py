"""Published methods as plainly as they can be written: the benchmark's baseline, and an oracle for tests.

One request at a time. Every row runs over its whole length, through every block, with logits at every
position, at every step; the m x m system of each layer is solved afresh in float64; statistics take one
pass of the whole model a layer. That is how the authors' code spends its time. Of errata only the host
is used (weights, tokenizer, layout): search, capture and solver here are separate code, so that
agreement between the two means something.

Sources: Meng et al., arXiv 2202.05262 (ROME) and arXiv 2210.07229 (MEMIT, Algorithm 1), with the terms
of the loss as in the authors' code; Gupta et al., arXiv 2403.07175 (one key in all places). The relatives
follow their authors' code where it differs from the paper: Gupta et al., 2403.14236 (EMMET), Li et al.,
2308.08742 (PMET), Fang et al., 2410.02355 (AlphaEdit), Gupta et al., 2502.01636 (ENCORE), Wang et al.,
2505.15702 (LyapLock), Jiang et al., 2410.04045 (NSE); so do Gu et al., 2505.14679 (UltraEdit), Deng et al.,
2405.15349 (UnKE) and fine-tuning (ROME's baselines).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from errata.host.host import Host
from errata.host.layout import Site
from errata.types import Request

Prefixes = Sequence[tuple[str, float]]
"""Texts before a prompt with their weights; the first is the bare prompt, the weights sum to one."""

Where = Literal["mlp_out", "block_out", "attn_and_mlp"]


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
    top_count: int | None = None
    """It also ends once the target was the first choice everywhere in so many evaluations (ENCORE)."""
    top_bare: bool = True
    """Whether everywhere includes the bare prompt."""
    relax: bool = False
    """PMET: after an evaluation at the top the targets' loss counts a tenth, until the top is lost; the search ends
    there if kl times the divergence is at most 0.01."""
    nll_factor: float = 1.0
    """Weight of the targets' loss."""


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
    steps: int
    """Steps taken."""

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
    """Descend on a shift of one vector at the subject's last token, in all rows alike.

    ``attn_and_mlp`` shifts what attention and what the feed-forward say, each for itself; the value is the
    feed-forward's.
    """
    return descend_on(host, lay_out(host, request, prefixes), layer=layer, where=where, search=search)


def descend_on(host: Host, rows: list[Row], *, layer: int, where: Where, search: Search) -> Value:
    """Descend on shifts at the places of some rows; the first is a bare prompt, the last may name the subject."""
    block = host.model.get_submodule(host.layout.blocks[layer])
    parts = {"block_out": [], "mlp_out": ["mlp_out"], "attn_and_mlp": ["attn_out", "mlp_out"]}[where]
    modules = [host.model.get_submodule(host.layout.site(layer, part).name) for part in parts] or [block]
    line = torch.arange(len(rows), device=host.device)
    place = torch.tensor([row.place for row in rows], device=host.device)
    width = host.layout.width
    dtype = torch.promote_types(host.dtype, torch.float32)
    shifts = [torch.zeros(width, device=host.device, dtype=dtype).requires_grad_(True) for _ in modules]
    first: dict[Any, Tensor] = {}

    def push(number: int) -> Callable[[Any, Tensor], Tensor]:
        def act(_: Any, output: Tensor) -> Tensor:
            shaped = output.reshape(len(rows), -1, width)
            first.setdefault(number, wide(shaped[0, rows[0].place].detach().clone()))
            shift = shifts[number].to(shaped.dtype).expand(len(rows), -1)
            return (shaped + torch.zeros_like(shaped).index_put((line, place), shift)).reshape(output.shape)

        return act

    def watch(_: Any, output: Tensor) -> None:
        first.setdefault("stream", wide(output[0, rows[0].place].detach().clone()))

    with frozen(host.model), contextlib.ExitStack() as stack:
        for number, module in enumerate(modules):
            stack.enter_context(seen(module, push(number)))
        stack.enter_context(seen(block, watch))
        taken = _descend(host, rows, shifts, first, search)
    return Value(first[len(modules) - 1], shifts[-1].detach(), taken)


def _descend(
    host: Host, rows: list[Row], shifts: list[Tensor], first: dict[Any, Tensor], search: Search
) -> int:
    """Move the shifts in place until the loss is low or the steps are used up; return the steps taken."""
    optimiser = torch.optim.Adam([{"params": [shift]} for shift in shifts], lr=search.learning_rate)
    factor, at_top = search.nll_factor, 0
    for step in range(1, search.steps + 1):
        logits = wide(run(host, [row.ids for row in rows]))
        divergence = logits.new_zeros(())
        if not rows[-1].targets:
            essence = logits[-1, rows[-1].place].log_softmax(-1)
            before = first.setdefault("essence", essence.detach())  # the shift is zero at the first step
            # the divergence is read at the subject and goes from edited to original, as in the authors' code
            divergence = (essence.exp() * (essence - before)).sum()
        penalty = sum(shift.norm() / first[i].norm().square() for i, shift in enumerate(shifts))
        loss = factor * _likelihood(rows, logits) + search.kl * divergence + search.decay * penalty
        top = False
        if search.relax or search.top_count is not None:
            skip = 0 if search.top_bare else 1
            top = _first_choice(rows[skip:], logits[skip:])
        at_top += top
        if float(loss.detach()) < search.stop_loss or step == search.steps:
            return step - 1
        if search.top_count is not None and at_top >= search.top_count:
            return step - 1
        if search.relax:
            if top and search.kl * float(divergence.detach()) <= 0.01:
                return step - 1
            factor = search.nll_factor * (0.1 if top else 1.0)
        gradients = torch.autograd.grad(loss, shifts)
        for i, (shift, gradient) in enumerate(zip(shifts, gradients, strict=True)):
            shift.grad = gradient
            unit = first["stream"] if search.unit == "stream" else first[i]
            plain = search.unit == "published"
            rate = search.learning_rate * (1.0 if plain else float(unit.square().mean().sqrt()))
            optimiser.param_groups[i]["lr"] = rate
        optimiser.step()
        with torch.no_grad():
            for i, shift in enumerate(shifts):
                limit = search.clamp * (first["stream"] if search.unit == "stream" else first[i]).norm()
                if shift.norm() > limit:
                    shift.mul_(limit / shift.norm())
    return search.steps


def _first_choice(rows: Sequence[Row], logits: Tensor) -> bool:
    """Tell whether every target token of every row is the most likely one."""
    for i, row in enumerate(rows):
        if row.targets:
            best = logits[i, len(row.ids) - len(row.targets) : len(row.ids)].argmax(-1)
            if best.tolist() != list(row.targets):
                return False
    return True


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
    # of attention and feed-forward it is the feed-forward's that is written
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
            vectors = given.reshape(-1, given.shape[-1])[counted].double()
            total.add_(vectors.mT @ vectors)

        with seen(host.model.get_submodule(site.name), add):
            run(host, [ids])
        count += int(counted.sum())
    second = total / count
    return second + jitter * second.diagonal().mean() * torch.eye(site.d_in, dtype=second.dtype).to(second)


# --- the relatives of MEMIT -----------------------------------------------------------------

Solve = Callable[[int, Tensor, Tensor], Tensor]
"""From a layer, keys ``[m, n]`` and residuals ``[d, n]``, the change of its weight ``[d, m]``."""


@contextlib.contextmanager
def put_back(host: Host, names: Iterable[str]) -> Iterator[None]:
    """Put parameters back bit by bit at the end."""
    bits = {name: host.model.get_parameter(name).detach().clone() for name in names}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, kept in bits.items():
                host.model.get_parameter(name).copy_(kept)


@torch.no_grad()
def weight_of(host: Host, layer: int) -> Tensor:
    """Return a layer's weight as a map ``[d, m]``, float64."""
    site = host.layout.site(layer)
    weight = host.model.get_parameter(site.parameter).detach().double()
    return weight.mT if site.transposed else weight


@torch.no_grad()
def add_(host: Host, layer: int, delta: Tensor) -> None:
    """Add a change ``[d, m]`` to a layer's weight in place."""
    site = host.layout.site(layer)
    weight = host.model.get_parameter(site.parameter)
    weight.copy_((weight.double() + (delta.mT if site.transposed else delta)).to(weight.dtype))


def keys_of(host: Host, requests: Sequence[Request], prefixes: Prefixes, layer: int) -> Tensor:
    """Return the keys of some requests at a layer as the model is now ``[m, n]``."""
    site = host.layout.site(layer)
    return torch.stack([keys_at(host, request, prefixes, site)[0] for request in requests], 1)


def missing(
    host: Host, requests: Sequence[Request], values: Sequence[Value], layer: int, where: Where
) -> Tensor:
    """Return what each request's state is off its value ``[d, n]``."""
    now = [current(host, request, layer, where) for request in requests]
    return torch.stack([v.target.double() - n for v, n in zip(values, now, strict=True)], 1)


def spread_over(
    host: Host, requests: Sequence[Request], prefixes: Prefixes, values: Sequence[Value],
    layers: Sequence[int], solve: Solve, *, where: Where = "block_out",
    share: Callable[[int], float] = float,
) -> None:  # fmt: skip
    """Write values into layers, upwards, in place: each takes its share of what is still missing."""
    for done, layer in enumerate(layers):
        K = keys_of(host, requests, prefixes, layer)
        R = missing(host, requests, values, layers[-1], where) / share(len(layers) - done)
        add_(host, layer, solve(layer, K, R))


def sequence(
    host: Host, batches: Sequence[Sequence[Request]], prefixes: Prefixes, layers: Sequence[int],
    search: Search, solve: Solve, *, where: Where = "block_out", share: Callable[[int], float] = float,
    after: Callable[[Sequence[Request]], None] = lambda batch: None,
) -> dict[int, Tensor]:  # fmt: skip
    """Edit batch after batch, values sought on the model as edited so far; returns the whole change by layer.

    ``after`` is called behind each batch, with its weights in place.
    """
    layers = sorted(layers)
    names = [host.layout.site(layer).parameter for layer in layers]
    start = {layer: weight_of(host, layer).clone() for layer in layers}
    with put_back(host, names):
        for batch in batches:
            values = [
                find_value(host, r, prefixes, layer=layers[-1], where=where, search=search) for r in batch
            ]
            spread_over(host, batch, prefixes, values, layers, solve, where=where, share=share)
            after(batch)
        return {layer: weight_of(host, layer) - start[layer] for layer in layers}


def emmet(
    host: Host, batches: Sequence[Sequence[Request]], prefixes: Prefixes, seconds: Mapping[int, Tensor], *,
    search: Search, cov_weight: float, damping: float,
) -> dict[int, Tensor]:  # fmt: skip
    """EMMET: R D^-1 K^T C^-1 with C the weighted second moment, D = K^T C^-1 K, damped for several requests."""

    def solve(layer: int, K: Tensor, R: Tensor) -> Tensor:
        inverse = torch.linalg.inv(cov_weight * seconds[layer].double())
        D = K.mT @ inverse @ K
        if D.shape[0] > 1:
            D = D + damping * torch.eye(D.shape[0], dtype=D.dtype)
        return R @ torch.linalg.inv(D) @ K.mT @ inverse

    return sequence(host, batches, prefixes, list(seconds), search, solve)


def pmet(
    host: Host, batches: Sequence[Sequence[Request]], prefixes: Prefixes, seconds: Mapping[int, Tensor], *,
    search: Search, cov_weight: float,
) -> dict[int, Tensor]:  # fmt: skip
    """PMET: values of attention and feed-forward sought together, the latter's written; square-root shares."""
    return sequence(
        host, batches, prefixes, list(seconds), search,
        lambda layer, K, R: ridge(K, R, seconds[layer], cov_weight),
        where="attn_and_mlp", share=lambda left: float(left) ** 0.5,
    )  # fmt: skip


def alphaedit(
    host: Host, batches: Sequence[Sequence[Request]], prefixes: Prefixes, projections: Mapping[int, Tensor], *,
    search: Search, ridge_plain: float,
) -> dict[int, Tensor]:  # fmt: skip
    """AlphaEdit: solve [P (K K^T + C_p) + L2 I] X = P K R^T, delta = X^T; C_p of keys on each batch's weights."""
    past = {layer: torch.zeros_like(P.double()) for layer, P in projections.items()}

    def solve(layer: int, K: Tensor, R: Tensor) -> Tensor:
        P = projections[layer].double()
        system = P @ (K @ K.mT + past[layer]) + ridge_plain * torch.eye(len(P), dtype=P.dtype)
        return torch.linalg.solve(system, P @ K @ R.mT).mT

    def remember(batch: Sequence[Request]) -> None:
        for layer in past:
            K = keys_of(host, batch, prefixes, layer)
            past[layer] += K @ K.mT

    return sequence(host, batches, prefixes, list(projections), search, solve, after=remember)


def encore(
    host: Host, batches: Sequence[Sequence[Request]], prefixes: Prefixes, seconds: Mapping[int, Tensor], *,
    search: Search, cov_weight: float, mu: float,
) -> dict[int, Tensor]:  # fmt: skip
    """ENCORE: R K^T (lambda C + mu I + K_p K_p^T + K K^T)^-1, with all earlier keys."""
    past = {layer: torch.zeros_like(C.double()) for layer, C in seconds.items()}

    def solve(layer: int, K: Tensor, R: Tensor) -> Tensor:
        system = cov_weight * seconds[layer].double() + mu * torch.eye(K.shape[0], dtype=K.dtype)
        system = system + past[layer] + K @ K.mT
        past[layer] += K @ K.mT
        return R @ torch.linalg.solve(system, K).mT

    return sequence(host, batches, prefixes, list(seconds), search, solve)


def lyaplock(
    host: Host, batches: Sequence[Sequence[Request]], prefixes: Prefixes, seconds: Mapping[int, Tensor], *,
    search: Search, cov_weight: float, alpha: float, achieved: bool,
) -> dict[int, Tensor]:  # fmt: skip
    """LyapLock as in its code: a step on the present weights, with the pull back to the first ones written out.

    Per layer a queue Z with a = 1 / sqrt(D), b = 0, Z_max = sqrt(D); ``achieved``: remember W_new K of earlier
    requests, else the values that were wanted of this layer.
    """
    first = {layer: weight_of(host, layer).clone() for layer in seconds}
    V_K = {layer: torch.zeros_like(W) for layer, W in first.items()}
    K_K = {layer: torch.zeros_like(C.double()) for layer, C in seconds.items()}
    budget: dict[int, float] = {}
    Z: dict[int, float] = {}

    def solve(layer: int, K: Tensor, R: Tensor) -> Tensor:
        C, W = seconds[layer].double(), weight_of(host, layer)
        price = Z[layer] / budget[layer] ** 0.5 if layer in Z else 1.0
        left = R @ K.mT + price * cov_weight * (first[layer] - W) @ C + V_K[layer] - W @ K_K[layer]
        delta = left @ torch.linalg.inv(K @ K.mT + price * cov_weight * C + K_K[layer])
        new = W + delta
        loss = float(((new - first[layer]) @ C @ (new - first[layer]).mT).trace())
        budget.setdefault(layer, alpha * loss)
        root = budget[layer] ** 0.5
        Z[layer] = max(Z.get(layer, root) + (loss - budget[layer]) / root, root)
        V_K[layer] += (new @ K if achieved else W @ K + R) @ K.mT
        K_K[layer] += K @ K.mT
        return delta

    return sequence(host, batches, prefixes, list(seconds), search, solve)


def nse(
    host: Host, batches: Sequence[Sequence[Request]], prefixes: Prefixes, seconds: Mapping[int, Tensor], *,
    search: Search, cov_weight: float, share: float, passes: int, off: float, lost: float,
) -> dict[int, Tensor]:  # fmt: skip
    """NSE: values from the first weights; passes over requests whose distance is in bounds; chosen neurons only."""
    layers = sorted(seconds)
    past = {layer: torch.zeros_like(seconds[layer].double()) for layer in layers}
    start = {layer: weight_of(host, layer).clone() for layer in layers}
    top = layers[-1]
    sought = [
        [find_value(host, r, prefixes, layer=top, where="block_out", search=search) for r in batch]
        for batch in batches
    ]

    def solve(layer: int, K: Tensor, R: Tensor) -> Tensor:
        size = K.abs().sum(1)
        order, total, chosen = size.argsort(descending=True).tolist(), float(size.sum()), []
        held = 0.0
        for neuron in order:
            held += float(size[neuron])
            if held > share * total * (1 + 1e-12):
                break
            chosen.append(neuron)
        part = (cov_weight * seconds[layer].double() + past[layer])[chosen][:, chosen]
        some = K[chosen]
        delta = torch.zeros(R.shape[0], K.shape[0], dtype=K.dtype)
        delta[:, chosen] = R @ torch.linalg.solve(part + some @ some.mT, some).mT
        return delta

    with put_back(host, [host.layout.site(layer).parameter for layer in layers]):
        for batch, values in zip(batches, sought, strict=True):
            for _ in range(passes):
                distance = missing(host, batch, values, top, "block_out").norm(dim=0)
                live = [i for i, d in enumerate(distance.tolist()) if off < d < lost]
                if not live:
                    break
                some, theirs = [batch[i] for i in live], [values[i] for i in live]
                spread_over(host, some, prefixes, theirs, layers, solve)
            for layer in layers:
                K = keys_of(host, batch, prefixes, layer)
                past[layer] += K @ K.mT
        return {layer: weight_of(host, layer) - start[layer] for layer in layers}


# --- methods that train or regress on gradients ---------------------------------------------


def fine_tune(
    host: Host, requests: Sequence[Request], layer: int, *, prompt_last: bool, steps: int, rate: float,
    stop_loss: float, bias: bool = False, bound: float | None = None, weight_decay: float = 0.0,
) -> dict[str, Tensor]:  # fmt: skip
    """FT and FT-L: Adam on a layer's weight itself, entries clipped to a bound; returns changes by parameter."""
    site = host.layout.site(layer)
    names = [site.parameter, *([f"{site.name}.bias"] if bias else [])]
    params = [host.model.get_parameter(name) for name in names]
    before = [parameter.detach().clone() for parameter in params]
    asked = [p for p in host.model.parameters() if p.requires_grad]
    with put_back(host, names):
        try:
            for parameter in host.model.parameters():
                parameter.requires_grad_(any(parameter is p for p in params))
            optimiser = torch.optim.Adam(params, lr=rate, weight_decay=weight_decay)
            for _ in range(steps):
                lost = torch.stack([_answer_loss(host, r, prompt_last=prompt_last) for r in requests]).mean()
                if float(lost.detach()) < stop_loss:
                    break
                optimiser.zero_grad()
                lost.backward()
                optimiser.step()
                if bound is not None:
                    with torch.no_grad():
                        for parameter, old in zip(params, before, strict=True):
                            parameter.copy_(torch.minimum(torch.maximum(parameter, old - bound), old + bound))
            changes = [(p.detach() - old).double() for p, old in zip(params, before, strict=True)]
        finally:
            for parameter in host.model.parameters():
                parameter.grad = None
            for parameter in asked:
                parameter.requires_grad_(True)
    found = dict(zip(names, changes, strict=True))
    if site.transposed:
        found[site.parameter] = found[site.parameter].mT
    return found


def _answer_loss(host: Host, request: Request, *, prompt_last: bool) -> Tensor:
    """Return the mean negative log-likelihood of a target's tokens, or of all at the prompt's last token."""
    answer = host.encode_answer(request.text, request.target)
    logits = wide(run(host, [answer.ids[: answer.start] if prompt_last else answer.ids[:-1]]))[0]
    log = logits.log_softmax(-1)
    total = logits.new_zeros(())
    for i, token in enumerate(answer.target):
        total = total - log[answer.start - 1 + (0 if prompt_last else i), token]
    return total / len(answer.target)


def ultraedit(
    host: Host, turns: Sequence[Sequence[Request]], modules: Sequence[str], *, eta: float, micro_batch: int,
    eps: float = torch.finfo(torch.float32).eps,
) -> dict[str, Tensor]:  # fmt: skip
    """UltraEdit as in its code: mean loss of a micro-batch, variance weighed by B, one normaliser a weight shape.

    Returns the change of each linear map ``[b, a]`` over all turns.
    """
    state: dict[tuple[int, int], list[Any]] = {}
    names = [f"{name}.weight" for name in modules]
    total: dict[str, Tensor] = {}
    with put_back(host, names):
        for turn in turns:
            rows: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in modules}
            for first in range(0, len(turn), micro_batch):
                found = _gradients(host, turn[first : first + micro_batch], modules)
                for name, (h, g) in found.items():
                    rows[name].append((h, g))
                    _normaliser(state, (h.shape[1], g.shape[1]), torch.cat([h, g], 1))
            for name in modules:
                h, g = (torch.cat([pair[i] for pair in rows[name]]) for i in (0, 1))
                n, mean, spread = state[h.shape[1], g.shape[1]]
                scaled = (torch.cat([h, g], 1) - mean) / ((spread / (n - 1)).sqrt() + eps)
                size = scaled[:, : h.shape[1]].square().sum(1, keepdim=True)
                V = -eta * size * scaled[:, h.shape[1] :]
                eye = torch.eye(h.shape[1], dtype=h.dtype)
                delta = torch.linalg.solve(h.mT @ h + eye, h.mT @ V).mT  # [b, a]
                weight = host.model.get_submodule(name).weight
                stored = isinstance(host.model.get_submodule(name), nn.Linear)
                with torch.no_grad():
                    weight.copy_((weight.double() + (delta if stored else delta.mT)).to(weight.dtype))
                total[name] = total[name] + delta if name in total else delta
    return total


def _gradients(
    host: Host, requests: Sequence[Request], modules: Sequence[str]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return each map's inputs and the gradients at its outputs, at the tokens that predict the answers'."""
    answers = [host.encode_answer(r.text, r.target) for r in requests]
    at = [(i, a.start - 1 + j, token) for i, a in enumerate(answers) for j, token in enumerate(a.target)]
    given: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[Any, Tensor], None]:
        def act(inputs: Tensor, output: Tensor) -> None:
            given[name], outputs[name] = inputs.detach(), output

        return act

    with contextlib.ExitStack() as stack, torch.enable_grad():
        for name in modules:
            stack.enter_context(seen(host.model.get_submodule(name), watch(name)))
        log = wide(run(host, [a.ids[:-1] for a in answers])).log_softmax(-1)
        loss = -sum(log[i, place, token] for i, place, token in at) / len(at)
        gradients = torch.autograd.grad(loss, [outputs[name] for name in modules])

    def rows(tensor: Tensor) -> Tensor:
        shaped = tensor.reshape(len(answers), -1, tensor.shape[-1])
        return torch.stack([shaped[i, place] for i, place, _ in at]).double()

    return {
        name: (rows(given[name]), rows(gradient)) for name, gradient in zip(modules, gradients, strict=True)
    }


def _normaliser(state: dict[tuple[int, int], list[Any]], shape: tuple[int, int], x: Tensor) -> None:
    """Add rows to running mean and spread, a portion's unbiased variance times its size."""
    n, mean, spread = state.get(shape, [0, torch.zeros(x.shape[1], dtype=x.dtype), torch.zeros(x.shape[1])])
    B = len(x)
    delta = x.mean(0) - mean
    spread = spread + B * x.var(0) + n * B * delta.square() / (n + B)
    state[shape] = [n + B, mean + B * delta / (n + B), spread]


def unke(
    host: Host, requests: Sequence[Request], kept: Sequence[Sequence[int]], layer: int, *, search: Search,
    steps: int, rate: float, decay: float,
) -> dict[str, Tensor]:  # fmt: skip
    """UnKE: a value at the question's last token, then the block's own weights by AdamW; changes by parameter.

    The block is to say the value there and what it said at the question's other tokens and in ``kept`` texts.
    """
    path = host.layout.blocks[layer]
    block = host.model.get_submodule(path)
    rows, goals = [], []

    def says(ids: Sequence[int]) -> Tensor:
        found: list[Tensor] = []
        with seen(block, lambda _, output: found.append(output)):
            run(host, [ids])
        return found[0].reshape(-1, found[0].shape[-1])

    for request in requests:
        answer = host.encode_answer(request.text, request.target)
        ids = host.encode(request.text).ids
        row = Row(answer.ids[:-1], len(ids) - 1, answer.target, 1.0)
        value = descend_on(host, [row], layer=layer, where="block_out", search=search)
        with torch.no_grad():
            goal = says(ids).clone()
        goal[-1] = value.target
        rows.append(ids)
        goals.append(goal)
    with torch.no_grad():
        others = [says(ids).clone() for ids in kept]
    names = [name for name, p in host.model.named_parameters() if any(p is q for q in block.parameters())]
    params = [host.model.get_parameter(name) for name in names]
    before = [p.detach().clone() for p in params]
    with put_back(host, names):
        optimiser = torch.optim.AdamW(params, lr=rate, weight_decay=decay)
        for _ in range(steps):
            loss = _mean_square(says, rows, goals) + _mean_square(says, kept, others)
            for parameter, gradient in zip(params, torch.autograd.grad(loss, params), strict=True):
                parameter.grad = gradient
            optimiser.step()
        changes = [(p.detach() - old).double() for p, old in zip(params, before, strict=True)]
    for parameter in params:
        parameter.grad = None
    return dict(zip(names, changes, strict=True))


def _mean_square(
    says: Callable[[Sequence[int]], Tensor], rows: Sequence[Sequence[int]], goals: Sequence[Tensor]
) -> Tensor:
    """Return the mean over all entries of all tokens of the squared error."""
    gaps = [(says(ids) - goal).flatten() for ids, goal in zip(rows, goals, strict=True)]
    return torch.cat(gaps).square().mean()
