"""Signs of collapse of an edited host, norms of edits, and their cost in time and memory."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from errata.bench import machine
from errata.edits.deltas import dense
from errata.edits.edit import Edit
from errata.edits.weight import WeightEdit, as_stored
from errata.evaluation.metrics import collapse, cost
from errata.host.host import Host

PROMPTS = 20
"""Number of open prompts continued at a checkpoint."""
WORDS = 6
"""Number of words of an open prompt, taken from the start of a neutral text."""
REPEATS = 5
"""Number of timed runs for each latency."""
DECODED = 16
"""Number of tokens generated to time decoding."""


def open_prompts(texts: Sequence[str]) -> list[str]:
    """Return the first words of the first neutral texts that are long enough."""
    long = [text.split() for text in texts if len(text.split()) > WORDS]
    return list(dict.fromkeys(" ".join(words[:WORDS]) for words in long))[:PROMPTS]


def weights(edit: Edit, host: Host, *, ratios: bool = True) -> dict[str, Any]:
    """Measure a weight edit relative to the unedited weights, which must be in place.

    ``norm``: Frobenius norm of all changes; ``norm_ratio``: ||D|| / ||W|| by weight; ``spectral_ratio``: largest
    singular value of W + D over that of W, by weight. For other edits all are None. ``ratios``: False computes only
    the norm.
    """
    if not isinstance(edit, WeightEdit):
        return {"norm": None, "norm_ratio": None, "spectral_ratio": None}
    norms, spectra = {}, {}
    for name, delta in edit.deltas.items() if ratios else ():
        weight = stored_weight(host, name)
        if weight is None:
            continue
        change = dense(as_stored(delta, name in edit.transposed), weight)
        norms[name] = collapse.norm_ratio(change, weight)
        if weight.ndim == 2:
            spectra[name] = collapse.spectral_ratio(weight.double() + change.double(), weight)
    return {"norm": edit.norm(), "norm_ratio": norms or None, "spectral_ratio": spectra or None}


def condition(
    texts: Sequence[str], unedited: Sequence[str], perplexities: tuple[float, float], norms: Sequence[float]
) -> dict[str, Any]:
    """Describe the condition of a host: fluency of its open texts before and after, and its signs of collapse.

    ``perplexities``: of neutral text, before and after. Returns ``{"before", "after", "alarm"}``: the averages
    of :class:`errata.evaluation.metrics.collapse.Fluency`, and the signs of collapse, an empty list if there are none.
    """
    before, after = perplexities
    plain = collapse.fluency(unedited)
    return {
        "before": asdict(plain),
        "after": asdict(collapse.fluency(texts)),
        "alarm": collapse.alarm(
            texts, perplexity_ratio=after / before, norm_ratios=norms, finite=math.isfinite(after),
            limits=limits(plain.repetition, plain.evenness),
        ),
    }  # fmt: skip


def limits(repetition: float | None, evenness: float | None) -> collapse.Limits:
    """Return the limits of the signs of collapse, given their values on the unedited host.

    With greedy decoding, many intact base models exceed the usual limits of repetition and entropy. For such a model
    the limit is half way between its own value and the worst possible one.
    """
    usual = collapse.Limits()
    most = collapse.legacy_fluency(" ".join(f"w{i}" for i in range(collapse.LEGACY_WORDS)))
    share = 1.0 if evenness is None else evenness
    return replace(
        usual,
        repetition=usual.repetition
        if (repetition or 0.0) <= usual.repetition
        else (1 + (repetition or 0)) / 2,
        entropy=usual.entropy if share * most >= usual.entropy else share * most / 2,
    )


def stored_weight(host: Host, name: str) -> Tensor | None:
    """Return a weight as it is stored ``[...]``; None for a quantised one."""
    try:
        weight = host.model.get_parameter(name).detach()
    except AttributeError:  # quantised weights are not parameters
        return None
    return weight if weight.is_floating_point() else None


def latency_overhead(host: Host, edit: Edit, prompt: str) -> dict[str, float | None]:
    """Return the relative slow-down of a host by an edit in place, 0 for none.

    From alternating runs of one prompt: ``prefill``, one forward pass; ``decode``, generating a few tokens.
    """
    plain, edited = [], []
    for _ in range(REPEATS):
        plain.append(_timed(host, prompt))
        with edit.on(host):
            edited.append(_timed(host, prompt))
    return {
        name: cost.overhead([one[name] for one in plain], [one[name] for one in edited])
        for name in ("prefill", "decode")
    }


def _timed(host: Host, prompt: str) -> dict[str, float]:
    batch = host.batch([host.encode_prompt(prompt)])
    with torch.no_grad():
        host.forward(batch)  # an untimed run first, so that weights just written are in the caches
        begin = _now(host)
        host.forward(batch)
    middle = _now(host)
    host.generate(prompt, max_new_tokens=DECODED, natural_stop=False)
    return {"prefill": middle - begin, "decode": _now(host) - middle}


def _now(host: Host) -> float:
    if host.device.type == "cuda":
        torch.cuda.synchronize(host.device)
    return time.perf_counter()


def reset_peak(host: Host) -> None:
    """Reset peak memory: that of an accelerator, or on Linux that of the process."""
    if host.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(host.device)
        return
    machine.reset_peak_memory()


def peak_mb(host: Host) -> float:
    """Return the peak memory reserved on the accelerator since the reset, else the process's peak, in MB."""
    if host.device.type == "cuda":
        return torch.cuda.max_memory_reserved(host.device) / 2**20
    return machine.peak_memory_mb()


def times(seconds: Sequence[float]) -> dict[str, float | None]:
    """Return median, 95th percentile and sum of some times; median and percentile None if there are none."""
    spread = cost.spread(seconds)
    if spread is None:
        return {"median": None, "p95": None, "total": 0.0}
    return {"median": spread.median, "p95": spread.p95, "total": spread.total}
