"""Causal tracing: which states, restored in a run whose subject is unreadable, bring the answer back.

Source     Meng et al., "Locating and Editing Factual Associations in GPT", NeurIPS 2022, arXiv 2202.05262, Sec. 2
What       Three runs of a prompt: clean; corrupted, with noise on the word embeddings of the subject's tokens; and
           corrupted with some clean states restored. The indirect effect of a state is the answer's probability in
           the third less that in the second; the total effect that in the first less that in the second. States are
           block outputs at one layer, and feed-forward or attention outputs over a window of layers. Every cell sees
           the same draws of noise. ``severed`` holds the later feed-forward (attention) outputs of the restored
           token at their corrupted values (the paper's Sec. 2.3).
Departs    A cell of all subject tokens at once stands beside the single tokens: names of several tokens share what
           is known of them. Scores are kept for every draw, as probability, as its logarithm, which does not
           saturate, and as whether the answer is the first choice. The window is a fifth of the depth unless set,
           and only the answer's first token is read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from errata.errors import ConfigError
from errata.host import hooks
from errata.host.host import Host
from errata.inspect.facts import ROLES, SUBJECT, Fact
from errata.linalg import resampling
from errata.locate.patching import KINDS, Cell, Kind, Patch, Patcher, Read, require_plain, window
from errata.progress import OnCount, ignore

PROBABILITY, LOG, TOP = range(3)
"""What is read of every run: the answer's probability, its logarithm, and whether it is the first choice."""


@dataclass(frozen=True)
class Settings:
    """How facts are traced. Raises ConfigError for settings out of range."""

    noise: str = "s3"
    """Deviation of the noise: ``s3``, three times that of all entries of the subjects' word embeddings; or a number."""
    draws: int = 10
    """How often noise is drawn."""
    width: int | None = None
    """Layers restored at once of feed-forward and attention outputs; None: a fifth of the depth."""
    kinds: tuple[Kind, ...] = KINDS
    """States that are restored."""
    severed: tuple[Literal["mlp", "attn"], ...] = ()
    """Outputs above a restored block output that are held at their corrupted values."""
    seed: int = 0
    """Seed of the noise."""

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise ConfigError(f"draws: expected 1 or more, found {self.draws}")
        if self.width is not None and self.width < 0:
            raise ConfigError(f"window: expected no fewer than 0 layers, found {self.width}")
        if not self.kinds and not self.severed:
            raise ConfigError(f"kinds: expected one or more of {', '.join(KINDS)}, found none")
        self.factor  # noqa: B018 - raises

    @property
    def factor(self) -> tuple[float, bool]:
        """Return the number in ``noise``, and whether it counts in measured deviations."""
        text = self.noise.removeprefix("s")
        try:
            number = float(text)
        except ValueError:
            number = -1.0
        if not 0 <= number < float("inf"):
            raise ConfigError(f"noise: expected a number, or s and a number as in s3, found {self.noise!r}")
        return number, text != self.noise


DEFAULT = Settings()
BLOCKS = Settings(kinds=("hidden",))
"""Of block outputs alone."""


@dataclass(frozen=True, eq=False)
class Trace:
    """The map of one fact."""

    fact: Fact
    settings: Settings
    width: int
    sigma: float
    """Standard deviation of the noise."""
    clean: Tensor
    """Readings of the clean run, float32 ``[3]``, see :data:`PROBABILITY`."""
    corrupted: Tensor
    """Of the corrupted runs ``[draws, 3]``."""
    positions: tuple[int, ...]
    """The tokens that were restored; tokens left of the subject have no effect."""
    maps: dict[str, Tensor]
    """By kind, and by kind without one of its parts: readings ``[layers, positions + 1, draws, 3]``, all subject tokens
    together last."""

    @property
    def total(self) -> float:
        """The total effect, in probability."""
        return float(self.clean[PROBABILITY] - self.corrupted[:, PROBABILITY].mean())

    def effects(self, name: str, reading: int = PROBABILITY) -> Tensor:
        """Return indirect effects, mean over draws ``[layers, positions + 1]``."""
        return (self.maps[name] - self.corrupted).mean(2)[..., reading]

    def by_role(self, name: str, reading: int = PROBABILITY, *, restored: bool = False) -> Tensor:
        """Return effects by role ``[roles + 1, layers]``, all subject tokens last; NaN for roles without a token.

        ``restored``: the reading itself in place of its difference to the corrupted run.
        """
        values = self.maps[name].mean(2)[..., reading] if restored else self.effects(name, reading)
        roles = self.fact.roles
        rows = []
        for role in ROLES:
            columns = [i for i, at in enumerate(self.positions) if roles[at] == role]
            empty = torch.full((len(values),), float("nan"))
            rows.append(values[:, columns].mean(1) if columns else empty)
        return torch.stack([*rows, values[:, -1]])

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data: effects by layer and token, and what restored runs gave."""
        maps = {
            name: {
                "effect": _plain(self.effects(name)), "effect_log": _plain(self.effects(name, LOG)),
                "restored": _plain(scores.mean(2)[..., PROBABILITY]), "first": _plain(scores.mean(2)[..., TOP]),
            }
            for name, scores in self.maps.items()
        }  # fmt: skip
        return {
            **self.fact.to_dict(), "noise": self.settings.noise, "deviation": round(self.sigma, 6),
            "draws": self.settings.draws, "seed": self.settings.seed, "window": self.width,
            "clean": round(float(self.clean[PROBABILITY]), 6),
            "corrupted": round(float(self.corrupted[:, PROBABILITY].mean()), 6),
            "corrupted_first": round(float(self.corrupted[:, TOP].mean()), 6),
            "total_effect": round(self.total, 6), "positions": list(self.positions), "layers": self.depth,
            "maps": maps,
        }  # fmt: skip

    @property
    def depth(self) -> int:
        """Layers of the model."""
        return len(next(iter(self.maps.values())))


def _plain(tensor: Tensor) -> list[Any]:
    """Return numbers as lists, rounded; None for those that are not there."""
    if tensor.ndim == 1:
        return [None if value != value else round(value, 6) for value in tensor.tolist()]
    return [_plain(row) for row in tensor]


# --- one fact -------------------------------------------------------------------------------


@torch.no_grad()
def subject_deviation(host: Host, subjects: Sequence[str]) -> float:
    """Return the standard deviation of all entries of the word embeddings of subjects, each read alone."""
    embedding = host.model.get_input_embeddings()
    entries: list[Tensor] = []
    for subject in subjects:
        batch = host.batch([host.encode(subject, special=False).ids])
        with (
            hooks.on_output(embedding, lambda tensor: entries.append(tensor.float().cpu().flatten())),
            hooks.stop_after(embedding),
            contextlib.suppress(hooks.Stopped),
        ):
            host.forward(batch, keep=1)
    return float(torch.cat(entries).std(correction=0))


def reading(answer: int) -> Read:
    """Return what maps logits ``[rows, vocab]`` to the readings of an answer ``[rows, 3]``."""

    def read(logits: Tensor) -> Tensor:
        logs = logits.log_softmax(-1)
        own = logs[:, answer]
        return torch.stack([own.exp(), own, (logs.argmax(-1) == answer).to(own)], 1).float()

    return read


def trace(
    host: Host, fact: Fact, settings: Settings = DEFAULT, *, sigma: float | None = None,
    patcher: Patcher | None = None,
) -> Trace:  # fmt: skip
    """Trace one fact; the host is left as it was.

    ``sigma``: deviation of the noise, None: by the settings, measured on this subject alone. ``patcher``: one that
    serves several facts. Raises HostError for a host that is no causal language model.
    """
    require_plain(host, "causal tracing")
    patcher = Patcher(host, longest=len(fact.ids)) if patcher is None else patcher
    if sigma is None:
        sigma = noise_deviation(host, [fact.subject], settings)
    width = max(1, patcher.depth // 5) if settings.width is None else settings.width
    read = reading(fact.answer)
    kinds = {kind for kind in settings.kinds if kind != "hidden"} | set(settings.severed)
    clean = patcher.record([fact.ids], kinds=kinds)
    shift = _noise(clean.embeddings[0], fact, settings, sigma)
    corrupted = patcher.record([fact.ids] * settings.draws, shift=shift, kinds=settings.severed)
    positions = tuple(range(fact.place[0], len(fact.ids)))
    places = [*((at,) for at in positions), fact.place]
    cells = cells_of(settings, places, width, patcher.depth)
    scores = patcher.run(corrupted, clean, [cell for part in cells.values() for cell in part], read)
    maps = {}
    for name, part in zip(cells, scores.split([len(part) for part in cells.values()]), strict=True):
        maps[name] = part.reshape(patcher.depth, len(places), settings.draws, 3)
    return Trace(
        fact,
        settings,
        width,
        sigma,
        read(clean.logits).cpu()[0],
        read(corrupted.logits).cpu(),
        positions,
        maps,
    )


def noise_deviation(host: Host, subjects: Sequence[str], settings: Settings) -> float:
    """Return the deviation of the noise, measured on subjects where the settings say so."""
    number, measured = settings.factor
    return number * subject_deviation(host, subjects) if measured and number else number


def _noise(like: Tensor, fact: Fact, settings: Settings, sigma: float) -> Tensor:
    """Return what is added to embeddings ``[length, d]``, zero off the subject ``[draws, length, d]``."""
    generator = torch.Generator().manual_seed(settings.seed)
    drawn = torch.randn(settings.draws, len(fact.place), like.shape[-1], generator=generator) * sigma
    shift = torch.zeros(settings.draws, *like.shape, device=like.device, dtype=like.dtype)
    shift[:, list(fact.place)] = drawn.to(shift)
    return shift


def cells_of(
    settings: Settings, places: Sequence[tuple[int, ...]], width: int, depth: int
) -> dict[str, list[Cell]]:
    """Return, by map, its cells: layers, and at each all places."""
    cells: dict[str, list[Cell]] = {}
    for kind in settings.kinds:
        wide = [
            range(layer, layer + 1) if kind == "hidden" else window(layer, width, depth)
            for layer in range(depth)
        ]
        cells[kind] = [tuple(Patch(kind, one, place) for one in part) for part in wide for place in places]
    for part in settings.severed:
        cells[f"hidden, {part} severed"] = [
            (Patch("hidden", layer, place), *(Patch(part, above, place, "base") for above in range(layer + 1, depth)))
            for layer in range(depth) for place in places
        ]  # fmt: skip
    return cells


# --- many facts -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Average:
    """The mean map of several facts."""

    traces: tuple[Trace, ...]
    skipped: int
    """Facts that the host does not answer with the expected token."""

    def stacked(self, name: str, reading: int = PROBABILITY, *, restored: bool = False) -> Tensor:
        """Return each fact's effects by role ``[n, roles + 1, layers]``, see :meth:`Trace.by_role`."""
        return torch.stack([one.by_role(name, reading, restored=restored) for one in self.traces])

    def to_dict(self, *, each: bool = False) -> dict[str, Any]:
        """Return it as plain data: means by role and layer with 95 % intervals; ``each``: every fact's map too."""
        first = self.traces[0]
        totals = torch.tensor([one.total for one in self.traces])
        low, high = resampling.mean_interval(totals)
        tops = torch.stack([one.corrupted[:, TOP].mean() for one in self.traces])
        return {
            "facts": len(self.traces), "skipped": self.skipped, "noise": first.settings.noise,
            "deviation": round(first.sigma, 6), "draws": first.settings.draws, "seed": first.settings.seed,
            "window": first.width, "layers": first.depth, "roles": [*ROLES, SUBJECT],
            "total_effect": round(float(totals.mean()), 6),
            "total_effect_interval": [round(float(low), 6), round(float(high), 6)],
            "corrupted_first": round(float(tops.mean()), 6),
            "maps": {name: self._map(name) for name in first.maps},
            **({"each": [one.to_dict() for one in self.traces]} if each else {}),
        }  # fmt: skip

    def _map(self, name: str) -> dict[str, Any]:
        effects = self.stacked(name)
        bounds = [_interval(effects[:, role]) for role in range(effects.shape[1])]
        return {
            "effect": _plain(effects.nanmean(0)),
            "low": _plain(torch.stack([low for low, _ in bounds])),
            "high": _plain(torch.stack([high for _, high in bounds])),
            "effect_log": _plain(self.stacked(name, LOG).nanmean(0)),
            "first": _plain(self.stacked(name, TOP, restored=True).nanmean(0)),
        }


def _interval(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the interval of the mean of ``[n, layers]`` over the facts that have the role."""
    own = values[~values.isnan().any(1)]
    if not len(own):
        nothing = torch.full((values.shape[1],), float("nan"))
        return nothing, nothing
    return resampling.mean_interval(own)


def average(
    host: Host, facts: Sequence[Fact], settings: Settings = DEFAULT, *, on_fact: OnCount = ignore,
    keep: Callable[[Trace], None] = ignore,
) -> Average:  # fmt: skip
    """Trace the facts that the host knows with one deviation of the noise, measured on all their subjects.

    ``keep`` is called with each trace as it is made. Raises ConfigError where the host knows none of the facts.
    """
    require_plain(host, "causal tracing")
    known = [one for one in facts if one.known]
    if not known:
        raise ConfigError(
            f"{host.name} answers none of the {len(facts)} prompts with the first token of the expected answer, so "
            "there is nothing to trace"
        )
    sigma = noise_deviation(host, [one.subject for one in known], settings)
    patcher = Patcher(host, longest=max(len(one.ids) for one in known))
    traces = []
    for number, one in enumerate(known, 1):
        traces.append(trace(host, one, settings, sigma=sigma, patcher=patcher))
        keep(traces[-1])
        on_fact(number, len(known))
    return Average(tuple(traces), len(facts) - len(known))
