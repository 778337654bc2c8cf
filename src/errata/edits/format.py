"""One edit, one ``.safetensors`` file: tensors, and all the rest as JSON in the header. No pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from errata.errors import EditError
from errata.files import output

VERSION = 1
KEY = "errata"


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> Path:
    """Write a file whole or not at all. Raises EditError where the path cannot be written."""
    target = check_writable(path)
    data = save(
        {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()},
        metadata={KEY: json.dumps({"format": VERSION, **header}, sort_keys=True)},
    )
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        part.replace(target)
    except OSError as error:
        raise EditError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True) if part.parent.is_dir() else None
    return target


def check_writable(path: str | os.PathLike[str]) -> Path:
    """Return what is to be written: behind a link, what it points to.

    Raises EditError now where :func:`write` would fail after the work is done, or would take the place of what is
    no regular file, as a device.
    """
    return output(path, EditError)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and header. Raises EditError for anything that is not a whole edit file."""
    source = Path(path).expanduser()
    if not source.is_file():
        raise EditError(f"{source} does not exist" if not source.exists() else f"{source} is a folder")
    with source.open("rb") as stream:
        start = stream.read(9)
    # a safetensors file begins with eight bytes of length, which may look like anything, then a brace
    if start[8:] != b"{" and (start[:2] == b"PK" or start[:1] == b"\x80"):
        raise EditError(f"{source} is a pickle, which could run code when opened; refused, as always")
    try:
        with safe_open(source, "pt") as file:
            text = (file.metadata() or {}).get(KEY)
            if text is None:
                raise EditError(f"{source} is a safetensors file but not an edit: its header has no {KEY!r}")
            header = json.loads(text)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise EditError(f"{source} is truncated or not an edit file ({error})") from error
    found = header.get("format") if isinstance(header, dict) else None
    if not isinstance(found, int) or found > VERSION:
        raise EditError(f"{source} has format {found!r}, expected {VERSION} or older; update errata")
    return tensors, header
