"""The edits that a ledger's files hold, and what its events say about them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from errata import files
from errata.edits.edit import Edit
from errata.errors import EditError, LedgerError
from errata.ledger.store import Ledger
from errata.types import Picture, Request

PICTURES = "pictures"
"""Folder of the pictures that requests are about, files named by the SHA-256 of their bytes: an edit's own file keeps
hashes alone, and a ledger asks the requests of edits in place again."""


def load_edit(ledger: Ledger, digest: str) -> Edit:
    """Read an edit of a ledger; its file's bytes and its digest are checked."""
    edit = Edit.load(ledger.file(digest))
    if edit.digest != digest:
        raise LedgerError(
            f"{ledger.folder}: the file of edit {digest} holds edit {edit.digest}; restore it from a copy"
        )
    if not any(True for _ in _pictures(edit)):
        return edit
    requests = tuple(
        _with_pictures(ledger, one) if isinstance(one, Request) else one for one in edit.provenance.requests
    )
    record: Any = edit
    return replace(record, provenance=replace(edit.provenance, requests=requests))


def _pictures(edit: Edit) -> Iterator[Picture]:
    for request in edit.provenance.requests:
        yield from request.pictures if isinstance(request, Request) else ()


def _with_pictures(ledger: Ledger, request: Request) -> Request:
    """Return a request with the bytes of its pictures, as far as the ledger has them."""
    first, *more = (_read(ledger, picture) for picture in request.pictures) if request.pictures else (None,)
    return replace(request, image=first, more_images=tuple(more))


def _read(ledger: Ledger, picture: Picture) -> Picture:
    """Return a picture with its bytes; without where the ledger has none. Raises LedgerError for other bytes."""
    source = ledger.folder / PICTURES / picture.sha256
    try:
        data = source.read_bytes()
    except FileNotFoundError:
        return picture
    except OSError as error:
        raise LedgerError(f"cannot read {source}: {error.strerror or error}") from error
    if hashlib.sha256(data).hexdigest() != picture.sha256:
        raise LedgerError(f"{source} was changed after it was recorded; restore it from a copy of the ledger")
    return replace(picture, data=data)


def _keep_pictures(ledger: Ledger, edit: Edit) -> None:
    """Write the pictures of an edit's requests that are at hand and not in the ledger yet."""
    folder = ledger.folder / PICTURES
    for picture in _pictures(edit):
        target = folder / picture.sha256
        if picture.data is None or target.is_file():
            continue
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise LedgerError(f"cannot write {folder}: {error.strerror or error}") from error
        files.write(target, picture.data, LedgerError)


def keep(ledger: Ledger, edit: Edit) -> str:
    """Keep an edit's file in a ledger and return its SHA-256; the pictures of its requests are kept beside it.

    Raises LedgerError where they cannot be written.
    """
    _keep_pictures(ledger, edit)
    with TemporaryDirectory(prefix="errata-") as folder:
        try:
            return ledger.add_file(edit.save(Path(folder) / "edit.safetensors"))
        except EditError as error:
            raise LedgerError(f"cannot keep the edit: {error}") from error


def facts_of(edit: Edit, blob: str, beneath: Sequence[str], **more: Any) -> dict[str, Any]:
    """Return what a ``proposed`` event says about an edit; ``beneath``: edits that were in place when it was fitted."""
    provenance = edit.provenance
    return {
        "kind": edit.kind, "method": provenance.method, "config": dict(provenance.config),
        "seed": provenance.seed, "requests": [request.to_dict() for request in provenance.requests],
        "blob": blob, "bytes": edit.size, "versions": dict(provenance.versions), "created": provenance.created,
        "parents": list(provenance.parents), "beneath": list(beneath), **more,
    }  # fmt: skip
