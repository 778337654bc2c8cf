"""FT: fine-tune one feed-forward weight on the new facts, inside a box around the old weight.

Paper      Zhu et al., "Modifying Memories in Transformer Models", 2020, arXiv 2012.00363
Implements minimise the loss on the modified facts subject to ||W - W0|| <= epsilon, by a projected
           gradient step (Sec. 4.2; p = infinity is the paper's main choice, p = 2 its other one)
Departs    ``objective: target`` scores each target token after the ones before it. The baseline called
           FT or FT-L in the ROME and EasyEdit code reads every target token from the one
           distribution at the prompt's last token; ``objective: prompt_last`` gives that.
           epsilon is in units of the weight's root mean square, so that it carries over between
           models; the papers' absolute values (2e-3 to 5e-5 for GPT-2 medium to GPT-J) do not.
Needs      Nothing
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from errata.config import positive
from errata.edits.weight import WeightEdit
from errata.errors import ConfigError
from errata.host import hooks
from errata.host.layout import Site
from errata.host.load import Host
from errata.methods._method import Method, Workspace, notes, provenance, resolve_layers, resolved
from errata.types import Request


@dataclass(frozen=True)
class Config:
    """Settings of FT."""

    layers: tuple[int, ...] | None = None
    """Layers whose feed-forward output projection is trained. None: one, at a fifth of the depth."""
    objective: Literal["target", "prompt_last"] = "target"
    """Loss: autoregressive on the target tokens, or all of them from the prompt's last token."""
    norm: Literal["inf", "2"] = "inf"
    """Norm p of the constraint: every entry, or the whole change."""
    epsilon: float | None = 0.2
    """Bound on the change, relative to the weight's root mean square (p = inf) or norm (p = 2); None: free."""
    steps: int = 25
    """Adam steps at most (ROME's baseline: 25)."""
    learning_rate: float = 5e-4
    """Adam's rate (ROME's baseline: 5e-4)."""
    weight_decay: float = 0.0
    """Adam's L2 penalty, on the change (MEMIT's baseline FT-W: 5e-4 at 10,000 requests)."""
    stop_loss: float = 1e-2
    """Stop once the mean loss over requests is below this (baseline code: 1e-2)."""

    def problems(self) -> list[str]:
        """Check ranges."""
        return positive(self, "steps", "learning_rate", "epsilon")


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> WeightEdit:
    """Return the dense edit that lowers the targets' loss within the box."""
    if not requests:
        raise ConfigError("ft needs at least one request")
    layers = resolve_layers(host, config.layers, lambda depth: (depth // 5,))
    config = resolved(config, layers=layers)
    sites = [host.layout.site(layer) for layer in layers]
    weights = [host.model.get_parameter(site.parameter).detach() for site in sites]
    changes = [
        torch.zeros(s.d_out, s.d_in, device=w.device, requires_grad=True)
        for s, w in zip(sites, weights, strict=True)
    ]
    optimizer = torch.optim.Adam(changes, lr=config.learning_rate, weight_decay=config.weight_decay)
    data = _Data(host, requests, config.objective)
    loss, step = float("inf"), 0
    with hooks.frozen(host.model):
        for step in range(config.steps + 1):
            work.on_progress("ft", step, config.steps)
            current = data.loss(sites, changes)
            loss = current.item()
            if loss < config.stop_loss or step == config.steps:
                break
            optimizer.zero_grad()
            current.backward()
            optimizer.step()
            for change, weight in zip(changes, weights, strict=True):
                _project_(change, weight, config)
    return WeightEdit(
        {site.parameter: change.detach() for site, change in zip(sites, changes, strict=True)},
        frozenset(site.parameter for site in sites if site.transposed),
        provenance("ft", host, requests, config, work, **notes({"loss": loss, "steps": step})),
    )


@torch.no_grad()
def _project_(change: Tensor, weight: Tensor, config: Config) -> None:
    """Bring a change back into the allowed set."""
    if config.epsilon is None:
        return
    if config.norm == "inf":
        bound = config.epsilon * float(weight.float().square().mean().sqrt())
        change.clamp_(-bound, bound)
    else:
        bound = config.epsilon * float(weight.float().norm())
        change.mul_(min(1.0, bound / max(float(change.norm()), 1e-12)))


class _Data:
    """The requests as one batch, with the position and token of every target."""

    def __init__(self, host: Host, requests: Sequence[Request], objective: str) -> None:
        self.host = host
        answers = [host.encode_answer(r.text, r.target) for r in requests]
        cut = [a.start if objective == "prompt_last" else len(a.ids) - 1 for a in answers]
        self.batch = host.batch([a.ids[:n] for a, n in zip(answers, cut, strict=True)])
        row, at, token, weight = [], [], [], []
        for i, answer in enumerate(answers):
            for j, target in enumerate(answer.target):
                row.append(i)
                at.append(answer.start - 1 + (0 if objective == "prompt_last" else j))
                token.append(target)
                weight.append(1 / len(answer.target) / len(answers))
        self.row, self.at = torch.tensor(row), torch.tensor(at)
        self.token = torch.tensor(token, device=host.device)
        self.weight = torch.tensor(weight, device=host.device)

    def loss(self, sites: Sequence[Site], changes: Sequence[Tensor]) -> Tensor:
        """Mean over requests of the mean over target tokens, nats."""
        with ExitStack() as stack:
            for site, change in zip(sites, changes, strict=True):
                _beside(stack, self.host.model.get_submodule(site.name), change)
            logits = self.host.forward_at(self.batch, self.row, self.at)
        lost = functional.cross_entropy(logits.float(), self.token, reduction="none")
        return (lost * self.weight).sum()


def _beside(stack: ExitStack, module: Any, change: Tensor) -> None:
    """Add the change's product to what a linear map says, without touching its weight."""
    seen: list[Tensor] = []

    def add(output: Tensor) -> Tensor:
        return output + functional.linear(seen.pop().to(change.dtype), change).to(output.dtype)

    stack.enter_context(hooks.on_input(module, seen.append))
    stack.enter_context(hooks.on_output(module, add))


METHOD = Method(
    name="ft",
    title="FT",
    paper="Modifying Memories in Transformer Models, 2020, arXiv 2012.00363",
    config=Config,
    fit=fit,
    gives=WeightEdit,
    batch=True,
    sequential=True,
)
