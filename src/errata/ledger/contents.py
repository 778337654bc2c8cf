"""The edits that a ledger's files hold, and what its events say about them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from errata.edits.edit import Edit
from errata.errors import EditError, LedgerError
from errata.ledger.store import Ledger


def load_edit(ledger: Ledger, digest: str) -> Edit:
    """Read an edit of a ledger; its file's bytes and its digest are checked."""
    edit = Edit.load(ledger.file(digest))
    if edit.digest != digest:
        raise LedgerError(
            f"{ledger.folder}: the file of edit {digest} holds edit {edit.digest}; restore it from a copy"
        )
    return edit


def keep(ledger: Ledger, edit: Edit) -> str:
    """Keep an edit's file in a ledger and return its SHA-256. Raises LedgerError where it cannot be written."""
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
