"""How long the values of a memory take to train: all requests of a fit at once, and one by one in the whole model.

Both take the same number of steps. The plain way keeps nothing: in every step the model reads the whole request. What
T-Patcher remembers of other texts is read before the clock starts, for both. Half-way, a fit of one request: the blocks
above the module alone, but no batch. CPU seconds an edit, medians of several fits that are measured in turn.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from benchmarks import scene
from torch import Tensor, nn
from torch.nn import functional

from errata.errors import HostError
from errata.host import hooks
from errata.methods import grace, t_patcher
from errata.methods._memory import editable_layer
from errata.methods._method import Workspace
from errata.training.slots import Slots, beside_slots, inputs_of
from errata.training.tune import Line, lay_out
from errata.types import Corpus

STEPS = {"grace": 100, "t_patcher": 125}
TEXTS = 10_000
"""Inputs of the feed-forward that T-Patcher remembers; its authors: 40,000, which is most of its work."""


def nats(host: Any, line: Line) -> tuple[Tensor, bool]:
    """Return a target's loss per token in the whole model, and whether its tokens are the most probable."""
    logits = host.forward(host.batch([line.ids]))[0, list(line.at)]
    targets = torch.tensor(line.targets)
    correct = bool((logits.argmax(-1) == targets).all())
    return functional.cross_entropy(logits, targets), correct


def plain_value(host: Any, line: Line, start: Tensor, layer: int, steps: int, rate: float) -> Tensor:
    """Train GRACE's value ``[d_out]`` of one request, in place of the output at the prompt's last token."""
    value = nn.Parameter(start.clone())
    optimizer = torch.optim.Adam([value], lr=rate)
    column = (torch.arange(len(line.ids)) == line.at[0])[None, :, None]
    module = host.model.get_submodule(host.layout.site(layer).name)
    with hooks.frozen(host.model):
        for _ in range(steps):
            with hooks.on_output(module, lambda output: torch.where(column, value.to(output), output)):
                loss, _ = nats(host, line)
            (value.grad,) = torch.autograd.grad(loss, [value])
            optimizer.step()
    return value.detach()


def plain_patches(host: Any, line: Line, memory: Tensor, config: t_patcher.Config, seed: int) -> Slots:
    """Train T-Patcher's neurons of one request as the paper has it, the losses of all memories in every step."""

    def largest(values: Tensor, count: int) -> Tensor:
        return values.flatten().topk(min(count, values.numel())).values.exp().mean()

    module = host.layout.feed_forward(editable_layer(host, config.layer, 1.0))
    with hooks.frozen(host.model):
        q = inputs_of(host, module, [line.ids])[list(line.at[: config.most])]
        keys = nn.Parameter(q / q.square().sum(1, keepdim=True))
        values = nn.Parameter(torch.randn(q.shape, generator=torch.Generator().manual_seed(seed)))
        biases, scale = (
            nn.Parameter(torch.zeros(len(q))),
            nn.Parameter(torch.full((len(q), 1), config.amplify)),
        )
        parameters = [keys, biases, values, scale]
        optimizer = torch.optim.Adam(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
        for _ in range(config.steps):
            added = Slots(keys, biases, values * scale)
            with beside_slots(host, module, lambda added=added: [added], config.activation):
                edit, _ = nats(host, line)
            own, other = (q * keys).sum(1) + biases, memory @ keys.mT + biases
            remembered = largest(other - config.beta, config.top[1])
            remembered = remembered + largest(other - own + config.gamma, config.top[1])
            total = edit + config.activation_weight * largest(-own, config.top[0])
            gradients = torch.autograd.grad(total + config.memory_weight * remembered, parameters)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            nn.utils.clip_grad_norm_(parameters, 5.0)
            optimizer.step()
    return Slots(keys, biases, values * scale).detached()


def seconds(run: Callable[[], Any]) -> float:
    """Return the CPU seconds of a call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def compare_writing(
    host: Any, requests: list[Any], method: str, *, alone: int, repeats: int
) -> dict[str, Any]:
    """Measure a method's fit of all requests, of one request, and the plain way for ``alone`` of them."""
    steps = STEPS[method]
    # texts that are given: what T-Patcher remembers is read before the clock starts, and need not be written first
    work = Workspace(corpus=Corpus(f"words of {host.name}", lambda: scene.texts(host, 10 * TEXTS)))
    if method == "grace":
        config: Any = grace.Config(steps=steps)
        layer = editable_layer(host, None, 0.75)

        def fit(chosen: list[Any]) -> None:
            grace.fit(host, chosen, config, work)

        def plain(request: Any) -> None:
            start = torch.rand(host.layout.site(layer).d_out, generator=torch.Generator().manual_seed(0))
            plain_value(host, lay_out(host, request, "target"), start, layer, steps, config.learning_rate)
    else:
        config = t_patcher.Config(
            steps=steps, least_steps=steps, check_every=steps, together=True, memory=TEXTS
        )
        module = host.layout.feed_forward(editable_layer(host, None, 1.0))
        memory = work.text_inputs(host, module, -(-TEXTS // config.text_tokens), config.text_tokens)[:TEXTS]

        def fit(chosen: list[Any]) -> None:
            t_patcher.fit(host, chosen, config, work)

        def plain(request: Any) -> None:
            plain_patches(host, lay_out(host, request, "target"), memory, config, 0)

    fit(requests[:1])  # what every fit shares is computed once
    found: dict[str, list[float]] = {"plainly": [], "upper blocks": [], "batched": []}
    for _ in range(repeats):
        found["batched"].append(seconds(lambda: fit(requests)) / len(requests))
        found["upper blocks"].append(seconds(lambda: [fit([one]) for one in requests[:alone]]) / alone)
        found["plainly"].append(seconds(lambda: [plain(one) for one in requests[:alone]]) / alone)
    medians = {name: statistics.median(values) for name, values in found.items()}
    return {
        "edits": len(requests), "steps": steps,
        **{f"{name} s": value for name, value in medians.items()},
        "times fewer": medians["plainly"] / medians["batched"],
    }  # fmt: skip


def writing(shape: str, count: int, *, alone: int = 3, repeats: int = 3) -> dict[str, dict[str, Any]]:
    """Measure both methods on the lab's model or a random one of a shape (:mod:`benchmarks.scene`)."""
    host = scene.host(shape)
    requests = scene.requests(host, count)
    results = {}
    for method in ("grace", "t_patcher"):
        try:
            results[f"writing, {method}, {shape}"] = compare_writing(
                host, requests, method, alone=alone, repeats=repeats
            )
        except HostError as error:
            results[f"writing, {method}, {shape}"] = {"refused": str(error)}
    return results
