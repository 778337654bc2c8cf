"""Does tracing say where to edit? Effects by layer against the success of edits at that layer, over cases.

Source     Hase et al., "Does Localization Inform Editing?", NeurIPS 2023, arXiv 2301.04213, Sec. 5
What       A layer's tracing score on a fact is the largest share of the lost probability that restoring states at
           that layer brings back, over tokens. Three linear models explain the success of an edit by the layer alone,
           by the tracing score alone, and by both; what counts is how much the score adds to the layer.
Departs    Intervals: facts are resampled, each with all its layers. An F-test of the nested models treats the rows of
           one fact as independent, so it is not reported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from errata.errors import ConfigError
from errata.host.host import Host
from errata.inspect import tracing
from errata.inspect.facts import facts
from errata.inspect.tracing import PROBABILITY, Settings, Trace
from errata.linalg import resampling
from errata.types import Request

Success = Callable[[int, int], float]
"""Given the number of a fact and a layer, how well an edit of that fact at that layer succeeds, 0 to 1."""
FORWARD = Settings(draws=5, width=1, kinds=("mlp",))
"""How requests are traced to choose a layer: feed-forward outputs, one layer at a time."""
RESAMPLES = 300
FEWEST = 3
"""Facts without which nothing is fitted."""


def scores(trace: Trace, name: str = "hidden") -> Tensor:
    """Return the tracing score of each layer: the largest share of the total effect over single tokens ``[layers]``.

    Not below 0; 0 throughout for a fact that the noise does not touch.
    """
    if trace.total <= 0:
        return torch.zeros(trace.depth)
    return (trace.effects(name, PROBABILITY)[:, :-1] / trace.total).clamp_min(0).amax(1)


def traced_layer(host: Host, requests: Sequence[Request], settings: Settings = FORWARD) -> int:
    """Return the layer whose feed-forward output, restored at all subject tokens, brings most of the answers back.

    The mean over the requests that the host answers with their old target, or, where they have none, over all with its
    own answers. Raises ConfigError where it answers none so, HostError for a host that cannot be traced. Whether a
    layer chosen so is one that edits well is another question: see :func:`compare`.
    """
    known = facts(host, requests, answers=[request.target_old for request in requests])
    found = tracing.average(host, known, settings)
    return int(torch.stack([one.effects("mlp")[:, -1] for one in found.traces]).mean(0).argmax())


@dataclass(frozen=True, eq=False)
class Localisation:
    """Tracing scores and successes of edits, over facts and layers."""

    kind: str
    scores: Tensor
    """Of tracing ``[facts, layers]``."""
    success: Tensor
    """Of edits ``[facts, layers]``."""
    layers: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the table as plain data: by layer, correlations, R2 of the three models, the increment, intervals.

        ``points``: scores and successes by fact and layer.
        """
        facts = len(self.scores)
        whole = _fits(self.scores, self.success)
        low, high = resampling.interval(
            resampling.resampled(
                facts, lambda picked: torch.tensor(list(_fits(self.scores[picked], self.success[picked]).values())),
                resamples=RESAMPLES,
            ).nan_to_num(0.0)
        )  # fmt: skip
        return {
            "kind": self.kind, "facts": facts, "layers": list(self.layers),
            **{
                name: {"value": _round(value), "low": _round(float(low[i])), "high": _round(float(high[i]))}
                for i, (name, value) in enumerate(whole.items())
            },
            "by_layer": self._by_layer(),
            "points": {
                "score": [[_round(value) for value in row] for row in self.scores.tolist()],
                "success": [[_round(value) for value in row] for row in self.success.tolist()],
            },
        }  # fmt: skip

    def _by_layer(self) -> list[dict[str, Any]]:
        """Return the means of each layer with their intervals over facts, and the correlation over the facts."""
        means = torch.stack([self.scores, self.success])  # [2, facts, layers]
        low, high = resampling.mean_interval(means.transpose(0, 1), resamples=RESAMPLES)
        return [
            {
                "layer": layer,
                **{
                    key: value
                    for j, name in enumerate(("score", "success"))
                    for key, value in (
                        (name, _round(float(means[j, :, i].mean()))), (f"{name}_low", _round(float(low[j, i]))),
                        (f"{name}_high", _round(float(high[j, i]))),
                    )
                },
                "correlation": _round(resampling.correlation(self.scores[:, i], self.success[:, i])),
            }
            for i, layer in enumerate(self.layers)
        ]  # fmt: skip


def _round(value: float) -> float | None:
    return None if value != value else round(value, 4)


def _fits(score: Tensor, success: Tensor) -> dict[str, float]:
    """Return what is estimated from rows of facts and layers; NaN where nothing varies."""
    facts, layers = score.shape
    flat, target = score.flatten(), success.flatten()
    one_hot = torch.eye(layers).repeat(facts, 1)
    layer = resampling.explained(one_hot, target)
    both = resampling.explained(torch.cat([one_hot, flat[:, None]], 1), target)
    alone = resampling.explained(torch.stack([torch.ones_like(flat), flat], 1), target)
    within = [resampling.correlation(score[:, i], success[:, i]) for i in range(layers)]
    defined = [value for value in within if value == value]
    return {
        "increment": both - layer, "r2_layer": layer, "r2_score": alone, "r2_both": both,
        "correlation": resampling.correlation(flat, target),
        "correlation_within": sum(defined) / len(defined) if defined else float("nan"),
    }  # fmt: skip


def compare(
    traces: Sequence[Trace], layers: Sequence[int], success: Success, *, kind: str = "hidden"
) -> Localisation:
    """Join the maps of some facts with the success of edits of them at some layers.

    ``success`` is called for every fact and layer. Raises ConfigError for fewer than three facts or two layers.
    """
    if len(traces) < FEWEST or len(layers) < 2:
        raise ConfigError(
            f"a comparison needs {FEWEST} facts that the host knows and 2 layers, found {len(traces)} and {len(layers)}"
        )
    rows = [[success(number, layer) for layer in layers] for number in range(len(traces))]
    own = torch.stack([scores(trace, kind)[list(layers)] for trace in traces])
    return Localisation(kind, own.double(), torch.tensor(rows, dtype=torch.float64), tuple(layers))
