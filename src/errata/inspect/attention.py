"""Attention attribution: which edges, from a token to one that it reads, an answer's probability is owed to.

Source     Hao et al., "Self-Attention Attribution: Interpreting Information Interactions Inside Transformer", AAAI
           2021, arXiv 2004.11207, Secs. 3 and 4
What       All weights A of one layer are scaled together from 0 to what they are, without a softmax after that. The
           attribution of an edge is A times the mean gradient of the answer's probability by A along the way, so that
           a layer's edges add up to the probability less that without the layer's attention. A head's importance is
           its largest edge, the mean over prompts.
Departs    A head's output is linear in A, so outputs are scaled and gradients taken by them; an edge's is the product
           with the value that it reads. Midpoints of the path are taken, whose error falls with the square of their
           number, in place of its left ends. The answer is given, or the model's own. Trees of edges and adversarial
           triggers are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from errata.errors import ConfigError, HostError
from errata.host import hooks
from errata.host.attention import Attended, attending
from errata.host.host import Host
from errata.host.prefix import PrefixRunner, plain_prefix
from errata.inspect.facts import Fact
from errata.inspect.knockout import SETS, answered, sets_of
from errata.linalg import resampling
from errata.locate.neurons import path_points
from errata.locate.patching import BATCH_TOKENS, require_plain
from errata.progress import OnCount, ignore

STEPS = 20
"""Points of the path."""
MOST = 20
"""Edges that are listed."""
AGREE = 1e-2
"""Largest difference of log probabilities between plain attention and the model's own, beside rounding."""
ROUNDING = 2
"""What rounding may add to that difference, in units in the last place of the largest logit: 16 bits have few."""


@dataclass(frozen=True, eq=False)
class Attribution:
    """What one prompt's answer owes to each edge."""

    fact: Fact
    clean: float
    """The answer's probability."""
    without: Tensor
    """The same without a layer's attention, float32 ``[layers]``."""
    weights: Tensor
    """``[layers, heads, queries, keys]``."""
    scores: Tensor
    """Attributions, float32 of the same shape."""

    @property
    def heads(self) -> Tensor:
        """Return each head's largest edge ``[layers, heads]``."""
        return self.scores.flatten(2).amax(2)

    @property
    def last(self) -> Tensor:
        """Return what the last token's edges give, heads together ``[layers, keys]``."""
        return self.scores[:, :, -1].sum(1)

    @property
    def sets(self) -> Tensor:
        """Return the same summed over the subject, the other tokens and the last itself ``[sets, layers]``."""
        return torch.stack([self.last[:, list(place)].sum(1) for place in sets_of(self.fact).values()])

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data: heads, the last token's reading, and the largest edges of all."""
        best = self.scores.flatten().abs().topk(min(MOST, self.scores.numel())).indices
        edges = []
        for layer, head, query, key in zip(*(at.tolist() for at in _unravel(best, self.scores)), strict=True):
            edges.append({
                "layer": layer, "head": head, "from": key, "to": query,
                "score": round(float(self.scores[layer, head, query, key]), 6),
                "weight": round(float(self.weights[layer, head, query, key]), 6),
            })  # fmt: skip
        return {
            **self.fact.to_dict(), "clean": round(self.clean, 6), "without": _plain(self.without),
            "heads": [_plain(row) for row in self.heads], "last": [_plain(row) for row in self.last], "edges": edges,
        }  # fmt: skip


def _unravel(flat: Tensor, like: Tensor) -> tuple[Tensor, ...]:
    return torch.unravel_index(flat, like.shape)


def _plain(row: Tensor) -> list[float]:
    return [round(value, 6) for value in row.tolist()]


def attribution(host: Host, fact: Fact, *, steps: int = STEPS) -> Attribution:
    """Attribute an answer's probability to the attention edges of every layer; the host is left as it was.

    Raises HostError for a host that is no causal language model, or does not show its attention weights.
    """
    require_plain(host, "attention attribution")
    if steps < 1:
        raise ConfigError(f"steps: expected 1 or more, found {steps}")
    runner = PrefixRunner(host)
    batch = host.batch([fact.ids])
    last = torch.zeros(1, dtype=torch.long), torch.tensor([len(fact.ids) - 1])
    seen: dict[int, Attended] = {}

    def keep(layer: int, attended: Attended) -> None:
        seen[layer] = attended

    with torch.no_grad(), hooks.frozen(host.model):
        own = runner.run(batch, plain_prefix(), at=last).logits
        with attending(host, keep):
            ran = runner.run(batch, plain_prefix(), at=last, keep=range(len(host.layout.blocks)))
    clean = _logs(ran.logits, fact.answer)
    if len(seen) != len(host.layout.blocks) or not _agree(own, ran.logits, fact.answer):
        raise HostError(
            f"attention of {host.name} computed plainly differs from the model's own ({host.family}, "
            f"{str(host.dtype).removeprefix('torch.')}): its weights cannot be read; use errata trace --edges"
        )
    scores, without = [], []
    for layer in range(len(seen)):
        below = None if layer == 0 else ran.states[layer - 1]
        slope, bare = _slopes(host, runner, fact, layer, seen[layer].output, below, steps)
        products = torch.einsum("qhd,hkd->hqk", slope, seen[layer].values[0].float().cpu())
        scores.append(seen[layer].weights[0].float().cpu() * products)
        without.append(bare)
    weights = torch.stack([seen[layer].weights[0].float().cpu() for layer in range(len(seen))])
    return Attribution(fact, float(clean.exp()), torch.tensor(without), weights, torch.stack(scores))


def _agree(own: Tensor | None, plain: Tensor | None, answer: int) -> bool:
    """Whether two runs give an answer one log probability, up to the rounding of their logits ``[1, vocab]``."""
    assert own is not None and plain is not None
    step = torch.finfo(own.dtype).eps * float(own.abs().max())
    return abs(float(_logs(own, answer) - _logs(plain, answer))) < AGREE + ROUNDING * step


def _logs(logits: Tensor | None, answer: int) -> Tensor:
    assert logits is not None
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)[:, answer]


def _slopes(
    host: Host, runner: PrefixRunner, fact: Fact, layer: int, output: Tensor, below: Tensor | None, steps: int
) -> tuple[Tensor, float]:
    """Return the mean gradient by a layer's output along the path ``[queries, heads, d]``, and p at its beginning."""
    points = torch.cat([torch.zeros(1, dtype=torch.float64), path_points(steps, "midpoint")])
    per = max(1, BATCH_TOKENS.get(host.device.type, BATCH_TOKENS["cpu"]) // len(fact.ids))
    total = torch.zeros(output.shape[1:])
    bare = 0.0
    for begin in range(0, len(points), per):
        share = points[begin : begin + per].to(output)
        rows = len(share)
        leaf = (output * share[:, None, None, None]).detach().requires_grad_(True)

        def act(number: int, attended: Attended, leaf: Tensor = leaf) -> Tensor | None:
            return leaf if number == layer else None

        batch = host.batch([fact.ids] * rows)
        at = torch.arange(rows), torch.full((rows,), len(fact.ids) - 1)
        states = None if below is None else below.expand(rows, -1, -1)
        with torch.enable_grad(), hooks.frozen(host.model), attending(host, act):
            logs = _logs(runner.run(batch, plain_prefix().at_depth(layer, states), at=at).logits, fact.answer)
            (slopes,) = torch.autograd.grad(logs.sum(), leaf)
        slopes = (
            logs.detach().exp()[:, None, None, None].cpu() * slopes.float().cpu()
        )  # of p, not of its logarithm
        bare = float(logs[0].detach().exp()) if begin == 0 else bare
        total += slopes[1 if begin == 0 else 0 :].sum(0)
    return total / steps, bare


def attributions(
    host: Host, facts: Sequence[Fact], *, steps: int = STEPS, on_fact: OnCount = ignore
) -> dict[str, Any]:
    """Return, over the facts that the host knows, mean importance of heads, and where the last token reads from.

    Sums over the subject, the other tokens and the last one, with 95 % intervals over facts. Raises ConfigError where
    the host knows none.
    """
    found = []
    chosen = answered(host, facts)
    for number, one in enumerate(chosen, 1):
        found.append(attribution(host, one, steps=steps))
        on_fact(number, len(chosen))
    sets = torch.stack([one.sets for one in found])
    low, high = resampling.mean_interval(sets)
    rows = {"score": sets.mean(0), "low": low, "high": high}
    return {
        "facts": len(found), "skipped": len(facts) - len(found), "steps": steps,
        "heads": [_plain(row) for row in torch.stack([one.heads for one in found]).mean(0)],
        "reads": {name: {key: _plain(values[i]) for key, values in rows.items()} for i, name in enumerate(SETS)},
    }  # fmt: skip
