"""How well a method edits at each layer, as its success against what tracing says of the layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from errata.errors import ConfigError
from errata.host.host import Host
from errata.inspect import facts, localisation, tracing
from errata.inspect.localisation import Localisation
from errata.job import prepare, workspace
from errata.progress import OnProgress, ignore
from errata.types import Case, Request


@torch.no_grad()
def probability(host: Host, prompt: str, answer: str) -> float:
    """Return the geometric mean of an answer's token probabilities after a prompt."""
    row = host.encode_answer(prompt, answer)
    batch = host.batch([row.ids[:-1]])
    at = torch.arange(row.start - 1, len(row.ids) - 1)
    logits = host.forward_at(batch, torch.zeros_like(at), at).float()
    logs = logits.log_softmax(-1).gather(1, torch.tensor(row.target, device=logits.device)[:, None])
    return math.exp(float(logs.mean()))


def _rewriting(before: float, after: float) -> float:
    """Return the share of the missing probability that an edit gives its target (2301.04213), 0 at least."""
    return max(0.0, 1 - (1 - after) / max(1 - before, 1e-9))


def against_editing(
    host: Host, cases: Sequence[Case], *, method: str, settings: Mapping[str, Any] | None = None,
    trace: tracing.Settings = tracing.BLOCKS, layers: Sequence[int] | None = None, seed: int = 0,
    on_progress: OnProgress = ignore,
) -> Localisation:  # fmt: skip
    """Trace the old answers of cases and edit each fact at every layer; the host is left as it was.

    ``method`` edits at one layer at a time, by its setting ``layers`` or ``layer``; ``settings`` are its others.
    ``layers``: default all. Success is that of the rewritten prompt. Raises ConfigError for a method without such a
    setting, RequestError for cases without an old answer.
    """
    from errata.methods import REGISTRY

    names = [name for name in ("layers", "layer") if name in _fields(REGISTRY.get(method).config)]
    if not names:
        raise ConfigError(
            f"{method} has no setting layers or layer, so it cannot be asked to edit at one layer"
        )
    requests: list[Request] = [case.request for case in cases]
    if any(request.target_old is None for request in requests):
        raise ConfigError("cases need the answers that the model gives now (target_old) to be traced")
    known = facts.facts(host, requests, answers=[request.target_old for request in requests])
    chosen = [i for i, fact in enumerate(known) if fact.known]
    average = tracing.average(
        host, known, trace, on_fact=lambda done, total: on_progress("tracing", done, total)
    )
    every = tuple(range(len(host.layout.blocks))) if layers is None else tuple(layers)
    before = [probability(host, requests[i].text, requests[i].target) for i in chosen]
    work = workspace(host, seed=seed)  # one, so that contexts are written once for all layers
    jobs = {
        layer: prepare(
            host, [requests[i] for i in chosen], method=method, work=work,
            options={**(settings or {}), names[0]: [layer] if names[0] == "layers" else layer},
        )
        for layer in every
    }  # fmt: skip
    done = 0

    def success(number: int, layer: int) -> float:
        nonlocal done
        request = requests[chosen[number]]
        with jobs[layer].fit([request]).on(host):
            after = probability(host, request.text, request.target)
        done += 1
        on_progress("editing", done, len(chosen) * len(every))
        return _rewriting(before[number], after)

    return localisation.compare(average.traces, every, success, kind=trace.kinds[0])


def _fields(config: Any) -> tuple[str, ...]:
    return tuple(getattr(config, "__dataclass_fields__", ()))
