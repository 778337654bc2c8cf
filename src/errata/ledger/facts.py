"""What the requests of a ledger's edits are about, to find those that contradict or repeat one another."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Keys:
    """Hashes to find a request by, 64 hex digits each."""

    subject: str
    """Of its subject, whatever its case and spacing."""
    fact: str
    """Of its subject and prompt together."""


@dataclass(frozen=True)
class Match:
    """A recorded request about the same subject as another."""

    edit: str
    """Digest of its edit."""
    request: int
    """Its number in that edit, from 0."""
    same_prompt: bool


def keys(request: Mapping[str, Any]) -> Keys:
    """Return a request's keys; a pair of images is known by its two concepts."""
    if "prompt" not in request:
        subject = plain(request["concept"])
        return Keys(_hash(subject), _hash(subject, plain(request["replacement"])))
    subject = plain(request["subject"])
    return Keys(_hash(subject), _hash(subject, plain(request["prompt"])))


def plain(text: str) -> str:
    """Return a text in one form of its characters, in lower case, with single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _hash(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode("ascii")).hexdigest()
