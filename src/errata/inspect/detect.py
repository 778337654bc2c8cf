"""Whether a model's weights have been edited: which of them, and about which subject.

With the model that it was made from, the differences of the weights are decomposed: an edit changes few directions of
few weights, and among names it moves the keys of its subjects most; fine-tuning changes many directions of all weights.
Without it, a strong rank-one term shows in the spectrum of a weight beside those of other layers, and in how far the
weight carries the key of one name beyond those of others. An edit that is weak beside the weight itself, as those along
gradients are, leaves neither trace.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from errata.errors import ConfigError, HostError
from errata.host import placed, placement
from errata.host.host import Host
from errata.host.kinds import CAUSAL
from errata.host.layout import Site, linear_modules, stored_transposed
from errata.linalg.routines import norm
from errata.linalg.spectra import Spectrum, robust_scores
from errata.locate.keys import Place, capture

MOST_SPREAD, MOST_FOCUSED = 3e-3, 4e-4
"""Largest share of a model's directions that an edit changes, without candidate names; and with them, over the square
of how far the name that is moved most is moved beside the median. More is training. Chosen with the edited
models of seed 0 of ``benchmarks/detection.py`` and controls in view, see ``docs/detect.md``."""
LEAST_GAP = 1.5
"""Smallest drop s_r / s_(r+1) between singular values up to which what lies above it is taken off without the base."""
LEAST_SCORE = 6.0
"""Smallest score of a weight that counts as a trace without the base. Chosen likewise."""
SHAPE_FLOOR, FALL_FLOOR, CARRY_FLOOR = 0.25, 0.07, 0.05
"""Least standard deviations, of logarithms: of the strongest singular value and of the largest gap between layers, and
of how far a weight carries keys between names."""
FEWEST = 8
"""Fewest candidate names among which one can stand out."""
SHOWN = 10
"""Candidate names in a result."""
ALIKE = 1.5
"""How far the first of them has to lie beyond the last to be named as a subject without a remark."""

UNCHANGED, EDITED, TRAINED = "unchanged", "edited", "trained"
SUSPECT, NOTHING = "suspicious", "no trace"


@dataclass(frozen=True)
class Change:
    """The difference of one weight from that of the base."""

    weight: str
    norm: float
    """Frobenius norm."""
    relative: float
    """That, over the norm of the base's weight."""
    rank: int
    """Singular values above what rounding amounts to; 1 for a vector."""
    directions: float
    """In how many directions the difference lies, were these equally strong."""
    strongest: float
    """Share of the squared norm in the strongest direction."""


@dataclass(frozen=True)
class Trace:
    """What one weight shows by itself."""

    weight: str
    layer: int
    part: str
    largest: float
    """Largest singular value."""
    shape: float
    """Score of log(largest / median singular value) among the same part of all layers."""
    carried: float | None
    """Score of the name whose key the weight carries farthest, |W k| / |k|, among all; None without candidates."""
    name: str | None
    """That name."""
    drop: int
    """Number of leading directions above the largest gap of its spectrum."""
    gap: float
    """Ratio of the singular values on both sides of it."""
    fall: float
    """Score of log(gap) among the same part of all layers."""

    @property
    def score(self) -> float:
        """The largest of the three scores."""
        return max(self.shape, self.fall, self.carried or 0.0)


@dataclass(frozen=True)
class Subject:
    """A name that the change, or the weight, acts on beyond others."""

    name: str
    ratio: float
    """How far its key is moved, beside the median of all names."""
    weight: str


NOBODY = Subject("", 0.0, "")


@dataclass(frozen=True)
class Detection:
    """What was found in a model's weights."""

    model: str
    against: str | None
    verdict: str
    """With the base: unchanged, edited or trained. Without: suspicious or no trace."""
    score: float
    """With the base the share over the square of the first subject's ratio, else the largest score of a weight."""
    threshold: float
    """Above it a change is training, or without the base a weight shows a trace."""
    layers: tuple[int, ...]
    """Blocks with changed weights, or with a trace."""
    changes: tuple[Change, ...] = ()
    traces: tuple[Trace, ...] = ()
    subjects: tuple[Subject, ...] = ()
    candidates: int = 0
    """How many names were tried."""
    share: float = 0.0
    """Share of the model's directions that changed."""
    notes: tuple[str, ...] = field(default=())
    """What could not be seen."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def detect(host: Host, base: Host | None = None, names: Sequence[str] = ()) -> Detection:
    """Examine a host's weights as they are now, weight edits in place included; nothing is changed.

    ``base``: what the host was made from, of the same architecture; None examines the host by itself. ``names``:
    candidate subjects. Raises HostError for weights that cannot be read or are not the base's by name and shape and for
    edits in place that act at run time, ConfigError for too few names.
    """
    if names and len(names) < FEWEST:
        raise ConfigError(
            f"{len(names)} candidate names given; one can stand out among {FEWEST} or more, so name others too"
        )
    if names and host.kind != CAUSAL:
        raise ConfigError(
            f"names are tried on causal language models, and {host.name} is none: leave them out"
        )
    for one in (host, base):
        if one is not None:
            if acting := placed.on(one.model).digests:
                raise HostError(
                    f"edit {min(acting)} acts on {one.name} while it runs, and weights alone are examined: take it off"
                )
            placement.refuse_away(one.model)
            if any(placement.is_packed(module) for module in one.model.modules()):
                raise HostError(f"{one.name} is quantised, and spectra need the weights themselves")
    return _alone(host, names) if base is None else _against(host, base, names)


# --- with the base --------------------------------------------------------------------------


def differences(host: Host, base: Host) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield the weights that differ by name, with the base's weight and the difference, both as stored, float64.

    Of two dtypes the narrower counts: what rounding to it does is no change. Raises HostError where the hosts have
    other weights, or weights of other shapes, and for numbers that are not finite.
    """
    own, other = dict(host.model.named_parameters()), dict(base.model.named_parameters())
    if own.keys() != other.keys():
        odd = sorted(own.keys() ^ other.keys())
        raise HostError(
            f"{host.name} and {base.name} are of different architectures: {odd[0]} is in one alone"
        )
    for name, weight in own.items():
        before = other[name].detach()
        if weight.shape != before.shape:
            raise HostError(
                f"{name} is {list(weight.shape)} in {host.name} and {list(before.shape)} in {base.name}"
            )
        narrow = max((weight.dtype, before.dtype), key=lambda dtype: torch.finfo(dtype).eps)
        after, before = (
            _finite(one, name, stored.detach().to("cpu").to(narrow).double())
            for one, stored in ((host, weight), (base, before))
        )
        if not torch.equal(after, before):
            yield name, before, after - before


def rounding(host: Host, base: Host, weight: str) -> float:
    """Return the relative rounding of the narrower of the two dtypes that a weight has."""
    return max(torch.finfo(one.model.get_parameter(weight).dtype).eps for one in (host, base))


def change_of(name: str, before: Tensor, delta: Tensor, eps: float) -> tuple[Change, Spectrum | None]:
    """Describe a difference ``[...]`` of a weight; ``eps``: relative rounding of its dtype. No spectrum of vectors."""
    size, whole = float(norm(delta)), float(norm(before))
    relative = size / whole if whole else float("inf")
    if delta.ndim < 2:
        return Change(name, size, relative, 1, 1.0, 1.0), None
    spectrum = Spectrum.of(delta.flatten(1))
    rows, columns = delta.flatten(1).shape
    # what rounding each number to its neighbour can amount to in one direction
    step = eps * whole / (rows * columns) ** 0.5 * (rows**0.5 + columns**0.5)
    floor = max(step, 1e-7 * float(spectrum.values[0]))
    rank = max(1, int((spectrum.values > floor).sum()))
    strongest = float(spectrum.values[0].square()) / spectrum.energy
    return Change(name, size, relative, rank, spectrum.participation, strongest), spectrum


def _against(host: Host, base: Host, names: Sequence[str]) -> Detection:
    changes: list[Change] = []
    deltas: dict[str, Tensor] = {}
    for name, before, delta in differences(host, base):
        changes.append(change_of(name, before, delta, rounding(host, base, name))[0])
        if delta.ndim == 2:
            deltas[name] = delta
    share = sum(one.directions for one in changes) / _all_directions(base)
    maps = _maps(base, deltas)
    subjects = _subjects(base, maps, deltas, names) if names and maps else ()
    score = share / max(1.0, subjects[0].ratio) ** 2 if subjects else share
    bound = MOST_FOCUSED if subjects else MOST_SPREAD
    verdict = UNCHANGED if not changes else EDITED if score <= bound else TRAINED
    notes = []
    if changes and not maps:
        notes.append("no linear map of a block changed, so no names were tried")
    elif changes and not names:
        notes.append("no candidate names, so no subjects")
    if len(subjects) == SHOWN and subjects[0].ratio < ALIKE * subjects[-1].ratio:
        notes.append(
            "no name stands out: the change reads another place than a subject's last token, as those of fine-tuning "
            "and of trained editors do, or its subject is not among the names"
        )
    return Detection(
        host.name, base.name, verdict, score, bound, _layers(base, [one.weight for one in changes]),
        tuple(sorted(changes, key=lambda one: -one.norm)), (), subjects, len(names), share, tuple(notes),
    )  # fmt: skip


def _finite(host: Host, name: str, weight: Tensor) -> Tensor:
    """Return a weight. Raises HostError for one with NaN or infinite numbers, of which nothing can be told."""
    if not bool(torch.isfinite(weight).all()):
        raise HostError(f"{name} of {host.name} holds NaN or infinite numbers: the model is damaged")
    return weight


def _all_directions(host: Host) -> int:
    """Count the directions in which a model's weights can change: the smaller side of each matrix, 1 a vector."""
    return sum(min(weight.flatten(1).shape) if weight.ndim > 1 else 1 for weight in host.model.parameters())


def _layers(host: Host, weights: Sequence[str]) -> tuple[int, ...]:
    return tuple(
        layer
        for layer, block in enumerate(host.layout.blocks)
        if any(weight.startswith(f"{block}.") for weight in weights)
    )


def _maps(host: Host, weights: Mapping[str, Tensor]) -> dict[str, Site]:
    """Return the linear maps of blocks whose weights are named, as sites that keys can be read at, by weight."""
    maps = {}
    for layer, block in enumerate(host.layout.blocks):
        for path, module in linear_modules(host.model.get_submodule(block)):
            name = f"{block}.{path}"
            transposed = stored_transposed(module)
            if f"{name}.weight" in weights and transposed is not None:
                d_out, d_in = module.weight.shape[::-1] if transposed else module.weight.shape
                maps[f"{name}.weight"] = Site(layer, "mlp_out", name, d_in, d_out, transposed)
    return maps


def name_keys(host: Host, names: Sequence[str], sites: Sequence[Site]) -> dict[Site, Tensor]:
    """Return what each site reads at the last token of each name, the name alone being the text ``[n, d_in]``."""
    places = [Place(tuple(host.encode_prompt(name))) for name in names]
    return capture(host, places, sites).keys


def _subjects(
    base: Host, maps: Mapping[str, Site], deltas: Mapping[str, Tensor], names: Sequence[str]
) -> tuple[Subject, ...]:
    """Rank names by how far the changes move their keys, |D k| / |k|, each beside the median of all names."""
    keys = name_keys(base, names, list(maps.values()))
    best: dict[str, Subject] = {}
    for weight, site in maps.items():
        delta = deltas[weight].mT if site.transposed else deltas[weight]
        key = keys[site].double()
        moved = norm(key @ delta.mT, 1) / norm(key, 1).clamp_min(1e-12)
        middle = float(moved.median()) or 1e-12
        for name, value in zip(names, (moved / middle).tolist(), strict=True):
            if name not in best or value > best[name].ratio:
                best[name] = Subject(name, value, weight)
    return tuple(sorted(best.values(), key=lambda one: -one.ratio)[:SHOWN])


# --- without the base -----------------------------------------------------------------------


def _alone(host: Host, names: Sequence[str]) -> Detection:
    if not host.layout.sites:
        raise HostError(f"{host.name} has no weight that edits are written to: {host.layout.refused}")
    keys = name_keys(host, names, host.layout.sites) if names else {}
    traces: list[Trace] = []
    subjects: dict[str, Subject] = {}
    for part in ("mlp_out", "attn_out"):
        group = [site for site in host.layout.sites if site.part == part]
        if not group:
            continue
        spectra = [Spectrum.of(_finite(host, site.parameter, host.weight(site).cpu())) for site in group]
        heights = torch.tensor([spectrum.height for spectrum in spectra])
        gaps = [spectrum.gap() for spectrum in spectra]
        shapes = robust_scores(heights, SHAPE_FLOOR).tolist()
        falls = robust_scores(torch.tensor([gap for _, gap in gaps]).log(), FALL_FLOOR).tolist()
        for i, site in enumerate(group):
            outstanding = _outstanding(host, site, keys[site], names) if names else []
            score, first = outstanding[0] if outstanding else (None, None)
            for value, subject in outstanding:
                if value >= LEAST_SCORE and subject.ratio > subjects.get(subject.name, NOBODY).ratio:
                    subjects[subject.name] = subject
            traces.append(
                Trace(
                    site.parameter, site.layer, part, float(spectra[i].values[0]), shapes[i], score,
                    first.name if first else None, *gaps[i], falls[i],
                )
            )  # fmt: skip
    return _verdict_alone(host, traces, list(subjects.values()), len(names))


def _outstanding(host: Host, site: Site, keys: Tensor, names: Sequence[str]) -> list[tuple[float, Subject]]:
    """Return the names whose keys ``[n, d_in]`` a weight carries farthest, with their scores, the highest first."""
    key = keys.double()
    carried = norm(key @ host.weight(site).cpu().double().mT, 1) / norm(key, 1).clamp_min(1e-12)
    scores, order = robust_scores(carried.clamp_min(1e-12).log(), CARRY_FLOOR).topk(min(SHOWN, len(names)))
    ratios = (carried / carried.median().clamp_min(1e-12))[order].tolist()
    places: list[int] = order.tolist()
    return [
        (score, Subject(names[i], ratio, site.parameter))
        for score, ratio, i in zip(scores.tolist(), ratios, places, strict=True)
    ]


def _verdict_alone(host: Host, traces: list[Trace], subjects: list[Subject], count: int) -> Detection:
    score = max(one.score for one in traces)
    found = tuple(sorted({one.layer for one in traces if one.score >= LEAST_SCORE}))
    notes = ["without the base, edits that are weak beside the weight itself and fine-tuning leave no trace"]
    notes += [] if count else ["no candidate names: spectra alone were examined"]
    if len({one.layer for one in traces}) < 2:
        notes.append("spectra are compared between layers, and there is only one: they tell nothing here")
    return Detection(
        host.name, None, SUSPECT if found else NOTHING, score, LEAST_SCORE, found, (),
        tuple(sorted(traces, key=lambda one: -one.score)),
        tuple(sorted(subjects, key=lambda one: -one.ratio)[:SHOWN]), count, 0.0, tuple(notes),
    )  # fmt: skip
