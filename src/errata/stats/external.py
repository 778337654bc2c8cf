"""Read statistics written by other code: second moments of ROME and MEMIT, projections of AlphaEdit, safetensors.

Nothing is unpickled. From a ``torch.save`` file only the bytes of the tensor are read; its shape follows from the
model. Every matrix is checked for shape, finite numbers and symmetry.
"""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from errata.errors import DataError
from errata.host.layout import Site

SYMMETRIC = 1e-3
"""Largest difference between a matrix and its transpose, relative to its largest entry."""
T = TypeVar("T")


@dataclass(frozen=True)
class ExternalMatrix:
    """A matrix from a file, and its name for records."""

    matrix: Tensor
    """Symmetric, float64 ``[m, m]``."""
    name: str
    """File and digest of the numbers."""


def file_of(source: str, layer: int) -> Path:
    """Return the file of a layer; ``{}`` is replaced by the layer's number. Raises DataError where it is missing."""
    place = Path(source.replace("{}", str(layer))).expanduser()
    if not place.is_file():
        hint = "" if "{}" in source else "; {} in the name is replaced by the layer's number"
        raise DataError(f"no file {place} of second moments or projections for layer {layer}{hint}")
    return place


def second_moment(source: str, site: Site) -> ExternalMatrix:
    """Read a site's second moment of keys: the mean of k k^T, ``[m, m]``.

    ``.npz`` as written by ROME's and MEMIT's code (sums ``mom2.mom2`` with ``mom2.count``) or with a single matrix;
    ``.safetensors`` with the matrix under the site's parameter name, its module's path or the layer's number, or as
    its only tensor. Raises DataError for a file that cannot be read or has other content.
    """
    place = file_of(source, site.layer)
    readers: dict[str, Callable[[Path, Site], Tensor]] = {".npz": _npz, ".safetensors": _safetensors}
    matrix = _check(place, site, _read(place, readers, site))
    if bool((matrix.diagonal() < 0).any()):
        raise DataError(f"{place}: the mean of squared keys is negative; expected a second moment")
    return ExternalMatrix(matrix, f"C of {place.name}@{_digest(matrix)}")


def projection(source: str, site: Site, layers: Sequence[int]) -> ExternalMatrix:
    """Read AlphaEdit's projection P onto a site's null space, ``[m, m]``.

    ``.pt`` as written by AlphaEdit's code, one tensor ``[layers, m, m]`` in the order of ``layers``, float32 or
    float64; ``.npz`` and ``.safetensors`` as for :func:`second_moment`, or with such a stack. Raises DataError for
    an unreadable file, or a matrix that is not an orthogonal projection.
    """
    place = file_of(source, site.layer)
    index = list(layers).index(site.layer)

    def select(read: Callable[[Path, Site], Tensor]) -> Callable[[Path, Site], Tensor]:
        def one(place: Path, site: Site) -> Tensor:
            matrices = read(place, site)
            if matrices.ndim == 3 and len(matrices) == len(layers):
                return matrices[index]
            return matrices

        return one

    readers = {
        ".npz": select(_npz),
        ".safetensors": select(_safetensors),
        ".pt": lambda place, site: _torch_file(place, site, len(layers))[index],
    }
    matrix = _check(place, site, _read(place, readers, site))
    error = float((matrix @ matrix - matrix).norm() / matrix.norm().clamp_min(1e-12))
    if error > SYMMETRIC:
        raise DataError(
            f"{place}: P P differs from P by {error:.1e}; expected a projection onto a null space"
        )
    return ExternalMatrix(matrix, f"P of {place.name}@{_digest(matrix)}")


def _read(place: Path, readers: dict[str, Callable[[Path, Site], Tensor]], site: Site) -> Tensor:
    """Read a file by its suffix; any exception of a reader becomes a DataError."""
    read = readers.get(place.suffix.lower())
    if read is None:
        raise DataError(f"{place}: expected a file {', '.join(readers)}, found {place.suffix or 'no suffix'}")
    try:
        return read(place, site)
    except DataError:
        raise
    except Exception as error:  # zip, npy and safetensors readers raise a dozen kinds
        raise DataError(f"{place} cannot be read: {type(error).__name__}: {str(error)[:200]}") from error


def _npz(place: Path, site: Site) -> Tensor:
    with np.load(place, allow_pickle=False) as file:
        matrices = [name for name in file.files if name.rpartition(".")[2] == "mom2"]
        if not matrices and len(file.files) == 1:
            matrices = list(file.files)
        if len(matrices) != 1:
            raise DataError(
                f"{place}: expected one second moment, mom2.mom2, or a single matrix, found {file.files[:8]}"
            )
        size = file.zip.getinfo(f"{matrices[0]}.npy").file_size
        _fits(place, site, size)
        total = torch.from_numpy(np.asarray(file[matrices[0]], dtype=np.float64))
        head = matrices[0].rpartition(".")[0]
        count = f"{head}.count" if head else "count"
        if count not in file.files:
            return total
        keys = float(file[count])
        if not keys > 0:
            raise DataError(f"{place}: {count} is {keys}; expected the number of keys in the sum")
        return total / keys


def _safetensors(place: Path, site: Site) -> Tensor:
    from safetensors import safe_open

    with safe_open(place, "pt") as file:
        names = list(file.keys())
        matches = [name for name in (site.parameter, site.name, str(site.layer)) if name in names]
        name = matches[0] if matches else names[0] if len(names) == 1 else None
        if name is None:
            raise DataError(
                f"{place}: expected a tensor {site.parameter!r}, {site.name!r} or {str(site.layer)!r}, "
                f"found {names[:8]}"
            )
        shape = file.get_slice(name).get_shape()  # before loading the tensor
        if len(shape) not in (2, 3) or list(shape[-2:]) != [site.d_in, site.d_in]:
            raise DataError(f"{place}: expected {[site.d_in, site.d_in]} for {site.name}, found {shape}")
        return file.get_tensor(name).double()


def _torch_file(place: Path, site: Site, count: int) -> Tensor:
    """Read the bytes of the only tensor in a ``torch.save`` file; its pickle is ignored."""
    with zipfile.ZipFile(place) as file:
        entries = [entry for entry in file.infolist() if re.search(r"(^|/)data/\d+$", entry.filename)]
        order = [
            file.read(e) for e in file.infolist() if e.filename.endswith("byteorder") and e.file_size < 16
        ]
        types = {
            count * site.d_in**2 * size: dtype for size, dtype in ((4, torch.float32), (8, torch.float64))
        }
        dtype = types.get(entries[0].file_size) if len(entries) == 1 else None
        if dtype is None or any(text.strip() != b"little" for text in order):
            raise DataError(
                f"{place}: expected one float32 or float64 tensor [{count}, {site.d_in}, {site.d_in}], found "
                f"{[entry.file_size for entry in entries][:8]} bytes; save it as .safetensors instead"
            )
        numbers = torch.frombuffer(bytearray(file.read(entries[0])), dtype=dtype)
    return numbers.reshape(count, site.d_in, site.d_in).double()


def _fits(place: Path, site: Site, size: int) -> None:
    """Refuse an array too large for a stack of m x m matrices before it is decompressed."""
    if size > 256 * site.d_in**2 * 8 + 4096:
        raise DataError(f"{place}: {size:,} bytes for matrices {site.d_in} x {site.d_in}; another model's?")


def _check(place: Path, site: Site, matrix: Tensor) -> Tensor:
    shape = (site.d_in, site.d_in)
    if tuple(matrix.shape) != shape:
        raise DataError(f"{place}: expected {list(shape)} for {site.name}, found {list(matrix.shape)}")
    if not bool(torch.isfinite(matrix).all()):
        raise DataError(f"{place} has numbers that are not finite")
    if float((matrix - matrix.mT).abs().max()) > SYMMETRIC * float(matrix.abs().max()):
        raise DataError(f"{place}: the matrix is not symmetric; expected second moments or a projection")
    return (matrix + matrix.mT) / 2


def _digest(matrix: Tensor) -> str:
    return hashlib.sha256(matrix.contiguous().numpy().tobytes()).hexdigest()[:12]
