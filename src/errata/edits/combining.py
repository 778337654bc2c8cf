"""Arithmetic of weight edits: sums, analogies, interpolation, and merging by trimming, random drops or sign election.

Every weight edit is a task vector, the difference of an edited model from its base; :func:`errata.import_edit` takes
one from a fine-tuned checkpoint. A result is a new edit with the given ones as its parents; no model is needed.
Sums and multiples stay low-rank; what works on single entries (``ties``, ``dare``, ``breadcrumbs``) does not, and gives
whole matrices.

Edits by closed forms need not be added: :func:`errata.refit` solves for all their requests jointly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from errata.edits.deltas import Delta
from errata.edits.edit import Edit, Provenance, timestamp, versions
from errata.edits.weight import WeightEdit, add_deltas
from errata.errors import ConfigError, EditError
from errata.linalg import merging
from errata.linalg.lowrank import LowRank

METHOD = "combine"
"""What a combined edit has in the place of a method's name."""
HOWS = ("sum", "analogy", "paint", "ties", "dare", "breadcrumbs")
"""Ways of combining."""


@dataclass(frozen=True)
class Shares:
    """What entry-wise merging keeps of each edit."""

    density: float = 0.2
    """``ties``: share of entries kept of each edit, the largest over all its weights (paper: 0.2)."""
    drop: float = 0.9
    """``dare``: probability of an entry to be left out (paper: 0.9)."""
    smallest: float = 0.2
    """``breadcrumbs``: share of the smallest entries of each row left out (authors' example: 0.2)."""
    largest: float = 0.1
    """``breadcrumbs``: share of the largest entries of each row left out (authors' example: 0.1)."""

    def __post_init__(self) -> None:
        problems = [
            f"{name}: expected a share {text}, found {value}"
            for name, value, text, good in (
                ("density", self.density, "above 0 up to 1", 0 < self.density <= 1),
                ("drop", self.drop, "from 0 to below 1", 0 <= self.drop < 1),
                ("smallest", self.smallest, "from 0 to below 1", 0 <= self.smallest < 1),
                ("largest", self.largest, "from 0 to below 1", 0 <= self.largest < 1),
            )
            if not good
        ]
        if not problems and self.smallest + self.largest >= 1:
            problems = [
                f"smallest and largest: expected less than 1 together, found {self.smallest + self.largest}"
            ]
        if problems:
            raise ConfigError("\n".join(problems))


def combine(
    edits: Sequence[Edit], how: str = "sum", *, weights: Sequence[float] | None = None, scale: float = 1.0,
    shares: Shares | None = None, seed: int = 0,
) -> WeightEdit:  # fmt: skip
    """Return one edit made of some weight edits of one host.

    ``how``: ``sum`` adds them, each times its weight; ``analogy`` takes A, B and C and gives C + (B - A); ``paint`` is
    one edit times its weight, the weight alpha of the interpolation (1 - alpha) base + alpha edited; ``ties``, ``dare``
    and ``breadcrumbs`` merge entry by entry, see :mod:`errata.linalg.merging`, with each edit times its weight before.
    ``weights``: one each, default 1; negative ones subtract. ``scale``: a factor of the result. ``shares``: of
    ``ties``, ``dare`` and ``breadcrumbs``. ``seed``: of the drops of ``dare``.

    The result depends neither on the edits' order (but for an analogy) nor on how often a file is named: weights of the
    same edit are added first. It has the requests of edits with a weight above zero. Raises EditError for edits that
    change no weights or belong to different hosts, and where nothing is left.
    """
    parents = [_weight_edit(edit) for edit in edits]
    factors = _factors(how, len(parents), weights)
    if not math.isfinite(scale) or scale == 0:
        raise ConfigError(f"scale: expected a number other than 0, found {scale}")
    _check_hosts(parents)
    terms = _terms(parents, factors)
    if how in ("sum", "analogy", "paint"):
        deltas, transposed = _sum([(edit, scale * factor) for edit, factor in terms])
    else:
        deltas, transposed = _entrywise(how, terms, scale, shares or Shares(), seed)
    if not deltas:
        raise EditError("nothing is left: the weights cancel, or are 0")
    return WeightEdit(deltas, transposed, _provenance(parents, terms, how, scale, shares, seed))


def interpolate(edit: Edit, alpha: float) -> WeightEdit:
    """Return an edit for (1 - alpha) base + alpha edited; of alpha 0, one that changes nothing, of 1, the same deltas.

    Source: Ilharco et al., "Patching open-vocabulary models by interpolating weights", NeurIPS 2022, arXiv 2208.05592.
    """
    if alpha:
        return combine([edit], "paint", weights=[alpha])
    origin = _weight_edit(edit)
    return WeightEdit({}, frozenset(), _provenance([origin], [(origin, 0.0)], "paint", 1.0, None, 0))


def interference(edits: Sequence[Edit]) -> list[list[float]]:
    """Return the cosine of each pair of edits' changes, over all weights: how far they help or undo one another.

    0 for edits of different weights. Closed-form edits with cosines near 0 can be added; others should be refitted.
    Raises EditError as :func:`combine` does.
    """
    parents = [_weight_edit(edit) for edit in edits]
    _check_hosts(parents)
    products = [[_inner(a, b) for b in parents] for a in parents]
    norms = [math.sqrt(max(products[i][i], 0.0)) for i in range(len(parents))]
    return [
        [products[i][j] / (a * b) if a and b else 0.0 for j, b in enumerate(norms)]
        for i, a in enumerate(norms)
    ]


def _weight_edit(edit: Edit) -> WeightEdit:
    if not isinstance(edit, WeightEdit):
        raise EditError(
            f"edit {edit.digest} by {edit.provenance.method} acts at run time and changes no weights, so there is no "
            "vector to combine; several such edits can be in place together"
        )
    return edit


def _factors(how: str, count: int, weights: Sequence[float] | None) -> list[float]:
    """Return each edit's weight. Raises ConfigError for a number of edits or weights that does not fit."""
    if how not in HOWS:
        raise ConfigError(f"how: expected one of {', '.join(HOWS)}, found {how!r}")
    needed = {"analogy": 3, "paint": 1}.get(how)
    if count == 0 or (needed is not None and count != needed):
        raise ConfigError(f"{how} takes {needed or 'one or more'} edits, found {count}")
    if how == "analogy" and weights is not None:
        raise ConfigError("an analogy is C + (B - A) of three edits A, B, C: leave weights out")
    if weights is not None and len(weights) != count:
        raise ConfigError(f"weights: expected {count}, one for each edit, found {len(weights)}")
    if weights is not None and not all(math.isfinite(weight) for weight in weights):
        raise ConfigError(f"weights: expected numbers, found {list(weights)}")
    return [-1.0, 1.0, 1.0] if how == "analogy" else list(weights or [1.0] * count)


def _check_hosts(edits: Sequence[WeightEdit]) -> None:
    """Raise EditError for edits of different hosts, or that store one weight differently."""
    hosts = sorted({edit.provenance.host for edit in edits})
    if len(hosts) > 1:
        raise EditError(f"edits of different hosts cannot be combined: {', '.join(hosts)}")
    for name in sorted({name for edit in edits for name in edit.deltas}):
        if len({name in edit.transposed for edit in edits if name in edit.deltas}) > 1:
            raise EditError(f"the edits disagree on whether {name!r} is stored transposed")


def _terms(edits: Sequence[WeightEdit], factors: Sequence[float]) -> list[tuple[WeightEdit, float]]:
    """Return different edits with their weights added, in the order of their digests; none with a weight of 0."""
    total: dict[str, float] = {}
    by_digest = {edit.digest: edit for edit in edits}
    for edit, factor in zip(edits, factors, strict=True):
        total[edit.digest] = total.get(edit.digest, 0.0) + factor
    return [(by_digest[digest], total[digest]) for digest in sorted(total) if total[digest]]


def _sum(terms: Sequence[tuple[WeightEdit, float]]) -> tuple[dict[str, Delta], frozenset[str]]:
    """Return the weighted sum of edits' deltas, low-rank while the factors are smaller than the matrix."""
    deltas: dict[str, Delta] = {}
    for edit, factor in terms:
        for name, delta in edit.deltas.items():
            term = delta if factor == 1 else delta * factor
            deltas[name] = add_deltas(*_alike(deltas[name], term)) if name in deltas else term
    return deltas, frozenset(name for edit, _ in terms for name in edit.transposed)


def _alike(one: Delta, other: Delta) -> tuple[Delta, Delta]:
    """Return two deltas of one weight, both in the weight's own shape where one of them has more than two axes.

    Raises EditError where their sizes do not fit.
    """
    shapes = [tuple(one.shape), tuple(other.shape)]
    if shapes[0] == shapes[1]:
        return one, other
    if math.prod(shapes[0]) != math.prod(shapes[1]) or len(shapes[0]) == len(shapes[1]):
        raise EditError(
            f"changes of one weight have different shapes: {list(shapes[0])} and {list(shapes[1])}"
        )
    shape = max(shapes, key=len)
    parts = [d.dense() if isinstance(d, LowRank) else d for d in (one, other)]
    return parts[0].reshape(shape), parts[1].reshape(shape)


def _entrywise(
    how: str, terms: Sequence[tuple[WeightEdit, float]], scale: float, shares: Shares, seed: int
) -> tuple[dict[str, Delta], frozenset[str]]:
    """Merge edits entry by entry, each whole matrix in float32."""
    if not terms:
        return {}, frozenset()
    shapes = _shapes(terms)
    if how == "ties":  # ranks the entries of all weights
        flat = torch.stack(
            [
                torch.cat([_dense(edit, factor, name, shape).flatten() for name, shape in shapes.items()])
                for edit, factor in terms
            ]
        )
        merged = merging.ties(flat, density=shares.density, majority=True)
        parts = torch.split(merged, [math.prod(shape) for shape in shapes.values()])
        result = {name: part.reshape(shapes[name]) for name, part in zip(shapes, parts, strict=True)}
    else:
        keep = _dropper(shares.drop, seed) if how == "dare" else _trimmer(shares)
        result = {
            name: torch.stack([keep(_dense(edit, factor, name, shape)) for edit, factor in terms]).sum(0)
            for name, shape in shapes.items()
        }
    deltas: dict[str, Delta] = {name: tensor * scale for name, tensor in result.items() if tensor.any()}
    return deltas, frozenset(name for edit, _ in terms for name in edit.transposed) & deltas.keys()


def _dropper(drop: float, seed: int) -> Callable[[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda change: merging.dare(change, drop=drop, generator=generator)


def _trimmer(shares: Shares) -> Callable[[Tensor], Tensor]:
    return lambda change: merging.breadcrumbs(change, smallest=shares.smallest, largest=shares.largest)


def _shapes(terms: Sequence[tuple[WeightEdit, float]]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each changed weight, in the order of names: its own where it has more than two axes."""
    shapes: dict[str, tuple[int, ...]] = {}
    for edit, _ in terms:
        for name, delta in edit.deltas.items():
            shapes[name] = max(shapes.get(name, ()), tuple(delta.shape), key=len)
    return dict(sorted(shapes.items()))


def _dense(edit: WeightEdit, factor: float, name: str, shape: tuple[int, ...]) -> Tensor:
    """Return an edit's change of a weight times a factor, whole in float32; zeros where it does not change it."""
    zeros = torch.zeros(shape)
    delta, _ = _alike(edit.deltas.get(name, zeros), zeros)
    return (delta.dense() if isinstance(delta, LowRank) else delta).float() * factor


def _inner(one: WeightEdit, other: WeightEdit) -> float:
    """Return the inner product of two edits' changes, without multiplying out where both are thin."""
    total = 0.0
    for name in one.deltas.keys() & other.deltas.keys():
        a, b = _alike(one.deltas[name], other.deltas[name])
        if isinstance(a, LowRank) and isinstance(b, LowRank):
            left, right = a.B.double().mT @ b.B.double(), a.A.double() @ b.A.double().mT
            total += float((left * right).sum())
        else:
            parts = [d.dense() if isinstance(d, LowRank) else d for d in (a, b)]
            total += float((parts[0].double() * parts[1].double()).sum())
    return total


def _provenance(
    parents: Sequence[WeightEdit], terms: Sequence[tuple[WeightEdit, float]], how: str, scale: float,
    shares: Shares | None, seed: int,
) -> Provenance:  # fmt: skip
    """Return where a combined edit comes from. Raises EditError where requests were made in different formats."""
    named = sorted(parents, key=lambda edit: edit.digest) if how != "analogy" else list(parents)
    requests = {r: None for edit, factor in terms if factor * scale > 0 for r in edit.provenance.requests}
    formats = {
        tuple(sorted(edit.provenance.prompt_format.items()))
        for edit, factor in terms
        if factor * scale > 0 and edit.provenance.requests
    }
    if len(formats) > 1:
        raise EditError(
            "the edits were made with different prompt formats, so one edit cannot have the requests of all"
        )
    own: dict[str, Any] = {
        "how": how,
        "weights": {edit.digest: factor for edit, factor in terms},
        "scale": scale,
    }
    chosen = shares or Shares()
    if how == "ties":
        own["density"] = chosen.density
    elif how == "dare":
        own["drop"] = chosen.drop
    elif how == "breadcrumbs":
        own |= {"smallest": chosen.smallest, "largest": chosen.largest}
    first = parents[0].provenance
    dtype = first.notes.get("dtype")
    return Provenance(
        METHOD, tuple(requests), own, first.host, first.host_name, seed=seed if how == "dare" else 0,
        versions=versions(), notes={} if dtype is None else {"dtype": dtype},
        prompt_format=dict(next(iter(formats), ())), parents=tuple(dict.fromkeys(e.digest for e in named)),
        created=timestamp(),
    )  # fmt: skip
