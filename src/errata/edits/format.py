"""The file format of edits: one ``.safetensors`` file with the tensors, and everything else as JSON in its header."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from errata import files
from errata.checksum import FIELD, checksum
from errata.edits.header import is_object
from errata.errors import EditError

VERSION = 3
KEY = "errata"
PROTECTION = "sha256"
"""How the header describes the file's protection; version 1 had no such field, and no hash."""
FIRST_FIELDS = frozenset({"format", "kind", "provenance", "transposed", "digest", "records"})
"""All fields of a header of version 1."""
LONGEST_HEADER = 100_000_000
"""Maximum bytes of a header, the limit of safetensors."""


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> Path:
    """Write a file atomically, with one hash over header and tensors.

    Tensors ``[...]`` of any shape are stored contiguously. Raises EditError if the path cannot be written.
    """
    whole = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    content = {**header, "format": VERSION, "protection": PROTECTION}
    content = json.loads(json.dumps(content))  # as it will be read: tuples are lists by then
    text = json.dumps({**content, FIELD: checksum(content, whole)}, sort_keys=True)
    return files.write(path, save(whole, metadata={KEY: text}), EditError)


def check_writable(path: str | os.PathLike[str]) -> Path:
    """Return the path to write; for a link, its target.

    Raises EditError early if :func:`write` would fail later, or if the path is no regular file.
    """
    return files.output(path, EditError)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors ``[...]`` and header. Raises EditError for anything that is not an undamaged edit file.

    Files of version 1 have no hash. Their header may have no field of later versions, so that removing the hash from a
    later file is detected.
    """
    source = Path(path).expanduser()
    try:
        return _read(source)
    except EditError:
        raise
    except Exception as error:  # readers may raise anything on damaged bytes
        raise EditError(f"{source} is truncated or not an edit file ({reason(error)})") from error


def _open(source: Path) -> Any:
    """Open a safetensors file; the package does not type the result."""
    return safe_open(source, "pt")


def _read(source: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not source.is_file():
        raise EditError(f"{source} does not exist" if not source.exists() else f"{source} is no regular file")
    with source.open("rb") as stream:
        start = stream.read(9)
    # a safetensors file begins with eight bytes of length, which may have any value, then a brace
    if start[8:] != b"{" and (start[:2] == b"PK" or start[:1] == b"\x80"):
        raise EditError(f"{source} is a pickle, which could run code when opened; refused, as always")
    size, length = source.stat().st_size, int.from_bytes(start[:8], "little")
    if len(start) < 9 or length > min(size - 8, LONGEST_HEADER):
        raise EditError(
            f"{source} is truncated or not an edit file: a header of {length:,} bytes in {size:,} bytes"
        )
    with _open(source) as file:
        metadata: Mapping[str, str] = file.metadata() or {}
        text = metadata.get(KEY)
        if text is None:
            raise EditError(f"{source} is a safetensors file but not an edit: its header has no {KEY!r}")
        header: object = json.loads(text)
        version = header.get("format") if is_object(header) else None
        if not is_object(header) or type(version) is not int or not 1 <= version <= VERSION:
            raise EditError(
                f"{source} has format {_cut(version)}, expected 1 to {VERSION}; it is damaged, or of a newer errata"
            )
        tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    _check(source, header, tensors)
    return tensors, header


def _check(source: Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raise EditError unless the file matches its hash, or, in version 1, has only known fields."""
    if header["format"] == 1:
        strange = sorted(set(header) - FIRST_FIELDS)
        if strange:
            raise EditError(
                f"{source} is damaged: its format is 1, which has no field {_cut(strange[0])}; its header was changed "
                "after it was written"
            )
    elif FIELD not in header or header.get("protection") != PROTECTION:
        raise EditError(f"{source} is damaged: its hash was removed; restore it from a copy, or fit it again")
    elif header[FIELD] != checksum(header, tensors):
        raise EditError(
            f"{source} is damaged: its content does not match the recorded hash; restore it from a copy, or fit "
            "it again"
        )


def check_digest(header: Mapping[str, Any], digest: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless an edit has the digest in its header, up to version 2 that of its tensors ``[...]``."""
    recorded = header.get("digest")
    if not isinstance(recorded, str):
        raise ValueError("the header has no digest")
    digest = digest if header["format"] > 2 else tensor_digest(tensors)
    if recorded != digest:
        raise ValueError(f"its content {digest} does not match the recorded {_cut(recorded)}")


def tensor_digest(tensors: Mapping[str, Tensor]) -> str:
    """Hash tensors ``[...]`` by their names, shapes, dtypes and bytes, 16 hex digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def reason(error: BaseException) -> str:
    """Format an exception for a message: one line, bounded, no control characters."""
    return f"{type(error).__name__}: {_cut(str(error)[:200])}"


def _cut(value: Any) -> str:
    """Format at most 200 characters of a plain value."""
    text = repr(value) if isinstance(value, (str, int, float, type(None))) else f"a {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:200]}..."
