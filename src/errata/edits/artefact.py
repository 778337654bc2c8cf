"""Artefacts: what a method learns once on a host and many edits use, as a file of its own."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from errata.checksum import checksum
from errata.edits import format as file_format
from errata.edits import header as fields
from errata.edits.edit import TRAINED
from errata.edits.records import contiguous_copy
from errata.errors import EditError


@dataclass(frozen=True, eq=False)
class Artefact:
    """A trained editor, or a part of one; frozen, bound to the host that it was trained on."""

    method: str
    """Registered name of the method that trained it."""
    host: str
    """Fingerprint of the unedited host."""
    tensors: Mapping[str, Tensor]
    """Its weights ``[...]`` by name."""
    body: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Everything else that an edit needs of it, as plain data."""
    card: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """How it was trained: settings, data, seed, steps, losses, versions."""
    created: str = ""
    """When, UTC, ISO 8601; not part of the digest."""

    def __post_init__(self) -> None:
        copies = {name: contiguous_copy(tensor) for name, tensor in self.tensors.items()}
        object.__setattr__(self, "tensors", copies)

    @cached_property
    def digest(self) -> str:
        """Identity of the artefact, 16 hex digits: everything but its time."""
        plain = {
            "kind": TRAINED,
            "method": self.method,
            "host": self.host,
            "body": self.body,
            "card": self.card,
        }
        return checksum(json.loads(json.dumps(plain)), self.tensors)[:16]

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the artefact to one ``.safetensors`` file and return its path."""
        header = {
            "kind": TRAINED, "digest": self.digest, "method": self.method, "host": self.host,
            "body": dict(self.body), "card": dict(self.card), "created": self.created,
        }  # fmt: skip
        return file_format.write(path, self.tensors, header)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Artefact:
        """Read an artefact from a file. Raises EditError for another or a damaged one."""
        tensors, header = file_format.read(path)
        if header.get("kind") != TRAINED:
            raise EditError(f"{path} is no trained editor: it holds an edit; errata show describes it")
        try:
            texts = {
                name: fields.get_field(header, name, str, "the header")
                for name in ("method", "host", "created")
            }
            plain = {name: fields.get_field(header, name, dict, "the header") for name in ("body", "card")}
            artefact = Artefact(tensors=tensors, **texts, **plain)
            file_format.check_digest(header, artefact.digest, tensors)
        except Exception as error:  # wrong fields may raise anything
            raise EditError(
                f"{path} is damaged: {file_format.reason(error)}, read from its header"
            ) from error
        return artefact

    def summary(self) -> dict[str, Any]:
        """Describe the artefact as plain data."""
        return {
            "kind": TRAINED, "digest": self.digest, "method": self.method, "host": self.host, "bytes": self.size,
            "created": self.created, "card": dict(self.card),
        }  # fmt: skip

    def check(self, method: str, host: str) -> None:
        """Raise EditError unless it was trained by a method on the host with a fingerprint."""
        if self.method != method:
            raise EditError(f"the editor was trained by {self.method}, and {method} is asked to use it")
        if self.host != host:
            raise EditError(
                f"the editor was trained on host {self.host}, and this is host {host}: train one for it with errata "
                "train"
            )


def holds_artefact(path: str | os.PathLike[str]) -> bool:
    """Whether an undamaged file holds an artefact. Raises EditError for one that holds no edit either."""
    return file_format.read(path)[1].get("kind") == TRAINED
