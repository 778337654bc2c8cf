"""What steering does at each strength: how much of the behaviour shows, what it costs, and which strength to take."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from errata.edits.steer import SteerEdit
from errata.errors import ConfigError, DataError
from errata.evaluation import likelihood
from errata.evaluation.metrics import perplexity
from errata.evaluation.metrics.ngrams import repetition
from errata.evaluation.observe import encode_behind
from errata.host.host import Host
from errata.progress import OnProgress, ignore
from errata.types import Contrasts

STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
"""Strengths that are tried, in those of the edit."""
HALVINGS = 3
"""How many more are tried between the weakest that is too strong and the next below it."""
REPETITION = 0.2
"""Share of repeated 4-grams in what is written above which no strength is chosen."""


@dataclass(frozen=True)
class Scores:
    """One text's scores, 0, 1 or 2 each, in the form of AxBench (arXiv 2501.17148)."""

    concept: float
    instruction: float
    fluency: float

    @property
    def overall(self) -> float:
        """The harmonic mean; 0 where one is 0."""
        parts = (self.concept, self.instruction, self.fluency)
        return 3 / sum(1 / part for part in parts) if all(part > 0 for part in parts) else 0.0


Scorer = Callable[[str, str], Scores]
"""Scores a text that was written behind a prompt about a subject: (subject, text)."""


@dataclass(frozen=True)
class Point:
    """What was measured at one strength; 0 is the model without the edit."""

    strength: float
    margin: float
    """Mean over pairs of how much likelier a token of the positive answer is than one of the negative, nats."""
    preferred: float
    """Share of the pairs whose positive answer is likelier per token."""
    perplexity: float
    """Per token, of the second half of neutral texts behind the first."""
    divergence: float
    """KL(steered, unsteered) of the next token there, nats a token."""
    repetition: float
    """Mean share of repeated 4-grams in the texts written."""
    concept: float | None = None
    """Mean score, 0 to 2; None without a scorer, as the other two and their harmonic mean."""
    instruction: float | None = None
    fluency: float | None = None
    overall: float | None = None
    """Mean over texts of each one's harmonic mean of the three, 0 to 2."""

    @property
    def value(self) -> float:
        """What is maximised: ``overall``, without a scorer ``margin``."""
        return self.margin if self.overall is None else self.overall


@dataclass(frozen=True)
class Calibration:
    """A sweep over strengths and the one that was chosen."""

    points: tuple[Point, ...]
    """From strength 0 upwards."""
    chosen: float
    limit: float
    """Largest perplexity allowed, as a multiple of the unsteered model's."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {"chosen": self.chosen, "limit": self.limit, "points": [asdict(one) for one in self.points]}


@dataclass(frozen=True)
class Material:
    """What steering is measured on; none of it may have been fitted on."""

    pairs: Contrasts
    """Their answers are scored, and their prompts continued."""
    texts: Sequence[str]
    """Neutral texts."""
    scorer: Scorer | None = None
    tokens: int = 24
    """Of a text that is written, at most."""


class Gauge:
    """Measures edits on one host; what the unsteered model gives is computed once."""

    def __init__(self, host: Host, material: Material) -> None:
        self.host, self.material = host, material
        pairs = material.pairs.pairs
        self.answers = [
            encode_behind(host, pair.prompt, answer)
            for pair in pairs for answer in (pair.positive, pair.negative)
        ]  # fmt: skip
        rows = [host.encode(text).ids[: host.window] for text in material.texts]
        self.rows = [ids for ids in rows if len(ids) > 3]
        if not self.rows:
            raise DataError("perplexity needs neutral texts of more than three tokens (--texts), found none")
        self.plain = self._logprobs()
        self.base = self._point(0.0, self.plain)

    def at(self, edit: SteerEdit, strength: float) -> Point:
        """Measure an edit at a strength; the host is left as it was."""
        if strength == 0:
            return self.base
        with edit.with_strength(strength).on(self.host):
            return self._point(strength, self._logprobs())

    def _point(self, strength: float, logprobs: Sequence[Tensor]) -> Point:
        means = [sum(one) / len(one) for one, _ in likelihood.score(self.host, self.answers)]
        margins = [one - other for one, other in zip(means[::2], means[1::2], strict=True)]
        prompts = [pair.prompt for pair in self.material.pairs.pairs]
        texts = self.host.generate(prompts, max_new_tokens=self.material.tokens, natural_stop=False)
        return Point(
            strength, _mean(margins), _mean([float(margin > 0) for margin in margins]),
            *self._price(logprobs), _mean([repetition(text) for text in texts]), *self._scores(texts),
        )  # fmt: skip

    def _scores(self, texts: Sequence[str]) -> tuple[float | None, ...]:
        scorer = self.material.scorer
        if scorer is None:
            return (None,) * 4
        pairs = self.material.pairs.pairs
        scores = [scorer(p.subject or p.prompt, text) for p, text in zip(pairs, texts, strict=True)]
        return tuple(
            _mean([getattr(one, name) for one in scores])
            for name in ("concept", "instruction", "fluency", "overall")
        )

    def _price(self, logprobs: Sequence[Tensor]) -> tuple[float, float]:
        """Return perplexity and divergence by the log-probabilities of neutral texts ``[length, vocab]``."""
        own = [
            row[:-1].gather(1, torch.tensor(ids[-len(row) + 1 :])[:, None])[:, 0]
            for row, ids in zip(logprobs, self.rows, strict=True)
        ]
        apart = [(new.exp() * (new - old)).sum(-1) for new, old in zip(logprobs, self.plain, strict=True)]
        return perplexity.of_texts(own), float(torch.cat(apart).mean())

    @torch.no_grad()
    def _logprobs(self) -> list[Tensor]:
        """Return log-probabilities ``[length, vocab]`` behind tokens of the neutral texts, on the CPU.

        The first half of each text is its prompt, from the last token of which on they are returned; so whatever tokens
        an edit acts at, it acts where its price is measured.
        """
        found: list[Tensor] = []
        for first in range(0, len(self.rows), 16):
            rows = self.rows[first : first + 16]
            ends = [len(ids) // 2 - 1 for ids in rows]
            places = [(i, at) for i, ids in enumerate(rows) for at in range(ends[i], len(ids))]
            row, at = torch.tensor(places).unbind(1)
            logits = self.host.forward_at(self.host.batch(rows), row, at, ends=torch.tensor(ends))
            counts = [len(ids) - end for ids, end in zip(rows, ends, strict=True)]
            found += logits.float().log_softmax(-1).cpu().split(counts)
        return found


def calibrate(
    gauge: Gauge, edit: SteerEdit, *, strengths: Sequence[float] | None = None, limit: float = 1.2,
    refine: int | None = None, on_progress: OnProgress = ignore,
) -> tuple[SteerEdit, Calibration]:  # fmt: skip
    """Measure an edit at several strengths; return it at the best one, with the sweep in its record, and the sweep.

    The best has the highest :attr:`Point.value` of those whose perplexity is at most ``limit`` times the unsteered
    model's and whose texts repeat no more than the unsteered ones, or than a fifth; of equal ones the weakest.
    ``strengths``: None for :data:`STRENGTHS`, up to 1 for forms that do all they do there; times the edit's own
    strength. The sweep ends where perplexity is four times the limit. ``refine``: how many strengths are tried then
    between the weakest that is too strong and the next below it, halving what is between; None: 3, or 0 where
    ``strengths`` are given. 0 is among them: then nothing is better than not to steer.
    """
    if not limit >= 1:
        raise ConfigError(f"a perplexity limit of {limit:g} times the unsteered model's: expected 1 or more")
    refine = (HALVINGS if strengths is None else 0) if refine is None else refine
    if strengths is None:
        strengths = [s * edit.strength for s in STRENGTHS if s <= 1 or not edit.bounded]
    if edit.bounded and any(abs(s) > 1 for s in strengths):
        raise ConfigError(f"the edit does all it does at strength 1, found {max(strengths, key=abs):g}")
    points = [gauge.base]
    for number, strength in enumerate(sorted(set(strengths) - {0.0}, key=abs)):
        on_progress("strengths", number, len(strengths))
        points.append(gauge.at(edit, strength))
        if not points[-1].perplexity < 4 * limit * gauge.base.perplexity:
            break
    for _ in range(refine):
        strength = _between(points, limit)
        if strength is None:
            break
        points.append(gauge.at(edit, strength))
    points.sort(key=lambda one: abs(one.strength))
    outcome = Calibration(tuple(points), choose(points, limit).strength, limit)
    return edit.with_strength(outcome.chosen, calibration=outcome.to_dict()), outcome


def choose(points: Sequence[Point], limit: float) -> Point:
    """Return the best point within a perplexity limit; the first is the unsteered model's, and always within."""
    return max(_allowed(points, limit), key=lambda one: (one.value, -abs(one.strength)))


def _allowed(points: Sequence[Point], limit: float) -> list[Point]:
    """Return the points within a perplexity limit; the first is the unsteered model's, and always within."""
    base = points[0]
    return [
        one for one in points
        if one is base or (
            math.isfinite(one.value) and one.perplexity <= limit * base.perplexity
            and one.repetition <= max(REPETITION, base.repetition)
        )
    ]  # fmt: skip


def _between(points: Sequence[Point], limit: float) -> float | None:
    """Return the strength halfway between the weakest that is beyond a limit and the next below; None if none is."""
    within = _allowed(points, limit)
    beyond = [one.strength for one in points if one not in within]
    if not beyond:
        return None
    high = min(beyond, key=abs)
    below = [s for s in (one.strength for one in within) if s * high >= 0 and abs(s) < abs(high)]
    return (max(below, key=abs) + high) / 2


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
