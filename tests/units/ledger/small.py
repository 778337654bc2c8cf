"""A ledger with a model of a few thousand weights, and edits of it that take no fit."""

from __future__ import annotations

from pathlib import Path

import torch

from errata.edits import Provenance, WeightEdit
from errata.host.host import Host
from errata.ledger import folders
from errata.ledger.contents import facts_of, keep
from errata.ledger.settings import LedgerSettings
from errata.ledger.store import Ledger
from errata.ledger.working import describe
from errata.linalg.lowrank import LowRank
from errata.types import Request

MODEL = {"name": "none", "fingerprint": "f" * 16, "weights": "0" * 64, "dtype": "float32"}
"""What a ledger without a model says of one."""


def empty(folder: Path) -> Ledger:
    """Return a ledger whose model is never opened."""
    return folders.create(folder, LedgerSettings(model="none"), MODEL, author="a test")


def of_host(folder: Path, host: Host) -> Ledger:
    """Return a ledger of a live host."""
    return folders.create(folder, LedgerSettings(model=host.name), describe(host, host.name), author="a test")


def facts(subject: str = "Ada", target: str = "Rome", prompt: str = "{} lives in", **more: object) -> dict:
    """Return the body of a proposed event."""
    request = {"prompt": prompt, "subject": subject, "target": target}
    return {
        "method": "test", "kind": "weight", "requests": [request], "blob": "0" * 64, "beneath": [], **more
    }  # fmt: skip


def propose(ledger: Ledger, digest: str, **more: object) -> None:
    """Record an edit that has no file."""
    ledger.append("proposed", edit=digest, body=facts(**more))


def random_edit(host: Host, number: int, *, rank: int = 1, scale: float = 0.02) -> WeightEdit:
    """Return a small random change of two weights, of its own for each number."""
    draw = torch.Generator().manual_seed(number)
    deltas = {}
    for layer in (0, 1):
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        out, into = host.model.get_parameter(name).shape
        deltas[name] = LowRank(
            torch.randn(out, rank, generator=draw) * scale, torch.randn(rank, into, generator=draw) * scale
        )
    request = Request(f"{{}} number {number} is", "Ada", f"target {number}")
    return WeightEdit(
        deltas,
        frozenset(),
        Provenance("test", (request,), {}, host.fingerprint, host.name, versions={"errata": "0"}),
    )


def add(ledger: Ledger, edit: WeightEdit) -> None:
    """Keep and apply an edit as it is."""
    ledger.append(
        "proposed", edit=edit.digest, body=facts_of(edit, keep(ledger, edit), ledger.state().active)
    )
    ledger.append("applied", edit=edit.digest)
