"""The cache of statistics: safetensors files named by a hash of everything they depend on.

There are four kinds: moments of a site, their eigendecomposition, the sums of an unfinished pass, and documents of
plain data. Files are written atomically, with one hash over their whole content; a file that is unreadable or does
not match its hash gives a warning and is recomputed.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from errata.checksum import FIELD, checksum
from errata.errors import DataError
from errata.linalg import moments as maths
from errata.linalg.block_moments import AnyMoments, BlockMoments
from errata.linalg.moments import Eigen, Moments

FORMAT = "errata-moments-3"
T = TypeVar("T")


@dataclass(frozen=True)
class Partial:
    """An unfinished pass: the sums so far and how much of the corpus they cover."""

    moments: Mapping[str, AnyMoments]
    """By the site's parameter path."""
    batches: int
    """How many batches are in the sums."""
    digest: str
    """SHA-256 over the token ids of those batches."""


def cache_dir() -> Path:
    """Return the cache folder, whose content can be recomputed; the variable ``ERRATA_CACHE`` overrides it."""
    override = os.environ.get("ERRATA_CACHE")
    if override:
        return Path(override)
    from platformdirs import user_cache_path

    return user_cache_path("errata")


def key(facts: Mapping[str, Any]) -> str:
    """Return the cache key: 24 hex digits of a hash over the facts and the file format."""
    text = json.dumps({"format": FORMAT, **facts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def path(folder: Path, facts: Mapping[str, Any], kind: str = "moments") -> Path:
    """Return the file for these facts; ``kind``: moments, eigen, partial, or a document's own."""
    return folder / f"{kind}-{key(facts)}.safetensors"


def read(folder: Path, facts: Mapping[str, Any]) -> AnyMoments | None:
    """Return the moments stored under these facts, or None; also for a damaged file, with a warning."""
    return _load(path(folder, facts), facts, lambda header, tensors: _moments(header["sums"], tensors))


def write(folder: Path, facts: Mapping[str, Any], moments: AnyMoments) -> Path:
    """Store moments. Raises DataError where the folder cannot be written."""
    header, tensors = _parts(moments)
    return _save(path(folder, facts), facts, {"sums": header}, tensors)


def eigen(folder: Path, facts: Mapping[str, Any], moments: AnyMoments) -> Eigen:
    """Return the eigendecomposition of moments: read if it is of exactly these moments, else computed and stored.

    Vectors are stored in float64, ``8 m^2`` bytes: rounded to float32 they would be orthonormal to 1e-6 only.
    """
    place = path(folder, facts, "eigen")
    source = _digest(moments)

    def decode(header: dict[str, Any], tensors: dict[str, Tensor]) -> Eigen:
        if header["source"] != source:
            raise ValueError("it was computed from other moments")
        device = moments.total.device
        # copied: products may differ in the last bit between differently aligned memory
        return Eigen(*(tensors[name].to(device, copy=True) for name in ("values", "vectors")))

    eigen_pairs = _load(place, facts, decode)
    if eigen_pairs is None:
        eigen_pairs = maths.eigen(moments.second)
        _save(
            place, facts, {"source": source}, {"values": eigen_pairs.values, "vectors": eigen_pairs.vectors}
        )
    return eigen_pairs


def read_partial(folder: Path, facts: Mapping[str, Any]) -> Partial | None:
    """Return the unfinished pass stored under these facts, or None. A damaged file counts as absent."""

    def decode(header: dict[str, Any], tensors: dict[str, Tensor]) -> Partial:
        sums = {name: _moments(part, tensors, f"{name}:") for name, part in header["sums"].items()}
        return Partial(sums, header["batches"], header["digest"])

    return _load(path(folder, facts, "partial"), facts, decode)


def write_partial(folder: Path, facts: Mapping[str, Any], partial: Partial) -> Path:
    """Store an unfinished pass in place of an earlier one. Raises DataError as :func:`write` does."""
    headers: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for name, moments in partial.moments.items():
        headers[name], parts = _parts(moments, f"{name}:")
        tensors.update(parts)
    header = {"sums": headers, "batches": partial.batches, "digest": partial.digest}
    return _save(path(folder, facts, "partial"), facts, header, tensors)


def drop_partial(folder: Path, facts: Mapping[str, Any]) -> None:
    """Remove the file of an unfinished pass, if there is one."""
    path(folder, facts, "partial").unlink(missing_ok=True)


def read_document(folder: Path, facts: Mapping[str, Any], kind: str) -> dict[str, Any] | None:
    """Return the plain data stored under these facts, or None; also for a damaged file, with a warning."""
    return _load(path(folder, facts, kind), facts, lambda header, tensors: dict(header["document"]))


def write_document(folder: Path, facts: Mapping[str, Any], kind: str, document: Mapping[str, Any]) -> Path:
    """Store plain data. Raises DataError where the folder cannot be written."""
    return _save(path(folder, facts, kind), facts, {"document": dict(document)}, {})


def _parts(moments: AnyMoments, prefix: str = "") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Split moments into plain numbers and tensors."""
    if isinstance(moments, BlockMoments):
        each = [_parts(block, f"{prefix}block.{i}.") for i, block in enumerate(moments.blocks)]
        joint = {name: tensor for _, tensors in each for name, tensor in tensors.items()}
        return {"count": moments.count, "blocks": [numbers for numbers, _ in each]}, joint
    numbers = {name: getattr(moments, name) for name in ("count", "parts", "squares")}
    tensors = {f"{prefix}column.{i}": column for i, column in enumerate(moments.columns)}
    return {**numbers, "columns": len(moments.columns)}, {f"{prefix}total": moments.total, **tensors}


def _moments(header: Mapping[str, Any], tensors: Mapping[str, Tensor], prefix: str = "") -> AnyMoments:
    if "blocks" in header:
        blocks = (_plain(one, tensors, f"{prefix}block.{i}.") for i, one in enumerate(header["blocks"]))
        return BlockMoments(header["count"], tuple(blocks))
    return _plain(header, tensors, prefix)


def _plain(header: Mapping[str, Any], tensors: Mapping[str, Tensor], prefix: str) -> Moments:
    numbers = dict(header)
    columns = tuple(tensors[f"{prefix}column.{i}"] for i in range(numbers.pop("columns")))
    return Moments(total=tensors[f"{prefix}total"], columns=columns, **numbers)


def _digest(moments: AnyMoments) -> str:
    """Return a SHA-256 of the numbers."""
    digest = hashlib.sha256(str(moments.count).encode())
    blocks = moments.blocks if isinstance(moments, BlockMoments) else (moments,)
    for tensor in (tensor for block in blocks for tensor in (block.total, *block.columns)):
        digest.update(tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _load(
    place: Path, facts: Mapping[str, Any], decode: Callable[[dict[str, Any], dict[str, Tensor]], T]
) -> T | None:
    if not place.exists():
        return None
    try:
        header, tensors = _read_verified(place)
        if header["facts"] != dict(facts):
            raise ValueError("its content does not belong to its name")
        return decode(header, tensors)
    except Exception as error:  # readers may raise anything on damaged bytes; a cache can be recomputed
        reason = f"{type(error).__name__}: {str(error)[:200]!r}"
        warnings.warn(f"{place} is not usable and is recomputed: {reason}", RuntimeWarning, stacklevel=3)
        return None


def _read_verified(place: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read header and tensors. Raises ValueError unless they match their hash."""
    from safetensors import safe_open

    with safe_open(place, "pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    header = json.loads(metadata["errata"])
    if header[FIELD] != checksum(header, tensors):
        raise ValueError("its content does not match its hash")
    return header, tensors


def _save(
    place: Path, facts: Mapping[str, Any], header: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Path:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    part = place.with_suffix(f".{os.getpid()}.part")
    full_header = json.loads(json.dumps({"format": FORMAT, "facts": dict(facts), **header}))
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(place, error) from error
    try:
        contiguous = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
        text = json.dumps({**full_header, FIELD: checksum(full_header, contiguous)})
        save_file(contiguous, part, metadata={"errata": text})
        part.replace(place)
    except (OSError, SafetensorError) as error:
        raise _unwritable(place, error) from error
    finally:
        part.unlink(missing_ok=True)
    return place


def _unwritable(place: Path, error: Exception) -> DataError:
    return DataError(
        f"cannot store statistics in {place.parent}: {error}; free some space there, or set ERRATA_CACHE to another "
        "folder"
    )
