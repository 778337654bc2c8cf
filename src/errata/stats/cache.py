"""Second moments on disk: safetensors files named by what they were made from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from errata.linalg.moments import Moments

FORMAT = "errata-moments-1"


def cache_dir() -> Path:
    """Folder of everything that can be computed again; ``ERRATA_CACHE`` moves it."""
    override = os.environ.get("ERRATA_CACHE")
    if override:
        return Path(override)
    from platformdirs import user_cache_path

    return user_cache_path("errata")


def key(facts: Mapping[str, Any]) -> str:
    """Name a content: 24 hex digits over its facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


def read(folder: Path, facts: Mapping[str, Any]) -> Moments | None:
    """Return what was stored under these facts, or None. A damaged file counts as absent."""
    from safetensors import SafetensorError, safe_open

    path = folder / f"moments-{key(facts)}.safetensors"
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            stored = json.loads((file.metadata() or {}).get("errata", "{}"))
            if stored.get("format") != FORMAT or stored.get("facts") != dict(facts):
                return None
            return Moments(stored["count"], file.get_tensor("total"), file.get_tensor("gram"))
    except SafetensorError:
        return None


def write(folder: Path, facts: Mapping[str, Any], moments: Moments) -> Path:
    """Store moments; the file appears whole or not at all."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"moments-{key(facts)}.safetensors"
    part = path.with_suffix(f".{os.getpid()}.part")
    header = {"format": FORMAT, "facts": dict(facts), "count": moments.count}
    tensors = {"total": moments.total.cpu(), "gram": moments.gram.cpu()}
    save_file(tensors, part, metadata={"errata": json.dumps(header)})
    part.replace(path)
    return path
