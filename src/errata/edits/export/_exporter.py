"""What all exports have in common: a plan that refuses before anything is written, and a folder with a record."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError

from errata.edits.edit import Edit, versions
from errata.edits.export import _folder as folders
from errata.edits.export._card import CARD, card
from errata.errors import ConfigError, EditError, ErrataError
from errata.host import locking
from errata.host.base import ModelHost
from errata.host.open import DTYPES
from errata.registry import unknown

WRITE_ANYWAY = "nothing was put in place (verify=False / --no-verify writes it all the same)"
Option = Literal["dtype", "pad_to", "rank", "foreign"]
INSTEAD = (
    "keep the edit's own file and apply it with errata where the model runs: Edit.load(path).apply_(host), "
    "or errata ask --edit"
)


@dataclass(frozen=True)
class Options:
    """What may be asked of an export; None: the default."""

    dtype: str | None = None
    """Of a checkpoint's weights: float32, float16 or bfloat16."""
    pad_to: int | None = None
    """The width of feed-forwards that get neurons is a multiple of this."""
    rank: int | None = None
    """Largest rank of an adapter's matrices."""
    foreign: bool = False
    """Whether another host is allowed than the edit was made for."""

    def __post_init__(self) -> None:
        for name in ("pad_to", "rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: expected 1 or more, found {value}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ConfigError(unknown(self.dtype, list(DTYPES), "dtype"))


@dataclass(frozen=True)
class Plan:
    """An export that was not refused: what it will be, and how it is written."""

    facts: Mapping[str, Any]
    """What is to be known about it, as plain data; ``lost``: shares lost to rounding by tensor."""
    write: Callable[[Path], None]
    """Writes all files into an empty folder; called once."""
    verify: Callable[[Path], Mapping[str, Any]]
    """Reads the written files and returns what was compared: ``compared`` in words, counts, the largest difference and
    its bound. Raises EditError for files that do not do what the edit does."""


@dataclass(frozen=True)
class Exporter:
    """A kind of export."""

    name: str
    """Registered name."""
    title: str
    """What it writes."""
    takes: tuple[str, ...]
    """The edits it takes, in words."""
    plan: Callable[[Edit, Any, Options], Plan]
    """Returns the plan for an edit, a host and options. Raises EditError with the reason where it cannot be exact."""
    needs_host: bool = True
    """Whether it needs the model; one that does not gets None."""
    options: frozenset[Option] = frozenset({"foreign"})
    """The options it takes."""
    card: bool = False
    """Whether a model card is written beside its files."""


@dataclass(frozen=True)
class Export:
    """The receipt of an export."""

    to: str
    folder: Path
    digest: str
    """Of the edit."""
    facts: Mapping[str, Any]
    """What is to be known about it, as plain data; ``lost``: shares lost to rounding by tensor."""
    files: tuple[str, ...] = ()
    """Names of the files that were written; none in a dry run."""
    overrides: tuple[str, ...] = field(default=())
    """Checks that were overruled, in words."""
    verified: Mapping[str, Any] | None = None
    """What was compared after reading the files again, see :attr:`Plan.verify`; None where nothing was."""

    def to_dict(self) -> dict[str, Any]:
        """Return the receipt as plain data."""
        return {
            "to": self.to, "folder": str(self.folder), "edit": self.digest, **self.facts, "files": list(self.files),
            "overrides": list(self.overrides), "verified": None if self.verified is None else dict(self.verified),
        }  # fmt: skip


def check_options(exporter: Exporter, options: Options, *, host: bool) -> None:
    """Raise ConfigError for an option that an exporter does not take, and for a host that it needs or does not.

    ``host``: whether there is one.
    """
    default = Options()
    given = {f.name for f in fields(Options) if getattr(options, f.name) != getattr(default, f.name)}
    wrong = sorted(given - set(exporter.options))
    if wrong:
        known = ", ".join(sorted(exporter.options)) or "no options"
        raise ConfigError(f"an export to {exporter.name} takes no {' and no '.join(wrong)}; it takes {known}")
    if exporter.needs_host and not host:
        raise ConfigError(
            f"an export to {exporter.name} needs the model that the edit was made for (--model, host=)"
        )
    if host and not exporter.needs_host:
        raise ConfigError(f"an export to {exporter.name} needs no model: leave it out (--model, host=)")


def write_folder(
    exporter: Exporter, edit: Edit, host: ModelHost | None, options: Options, folder: str | os.PathLike[str], *,
    force: bool, dry_run: bool, verify: bool,
) -> Export:  # fmt: skip
    """Plan an export and write it; a folder is complete, and does what the edit does, or is not there.

    ``verify``: whether what was written is read again and compared before it is put in place. Raises EditError with
    nothing written.
    """
    target = folders.check_folder(folder, force=force)

    def run() -> Export:
        overrides: tuple[str, ...] = ()
        if host is not None:
            if host.edited:
                raise EditError(
                    f"edits are in place on {host.name}: {', '.join(host.placed)}; revert them, so that the export "
                    "holds this edit alone"
                )
            overrides = edit.overridden_checks(host, foreign=options.foreign)
        plan = exporter.plan(edit, host, options)
        if dry_run:
            return Export(exporter.name, target, edit.digest, plan.facts, (), overrides)
        record = {
            "exporter": exporter.name, "edit": edit.digest, "kind": edit.kind, "method": edit.provenance.method,
            "requests": len(edit.provenance.requests), "host": edit.provenance.host, "versions": versions(),
            "overrides": list(overrides), **plan.facts,
        }  # fmt: skip

        def check(part: Path) -> Mapping[str, Any]:
            return {"verified": _verified(plan, part) if verify else None}

        def fill(part: Path) -> None:
            plan.write(part)
            if exporter.card:
                (part / CARD).write_text(card(record), encoding="utf-8")

        names, checked = folders.write(target.absolute(), record, fill, check)
        return Export(exporter.name, target, edit.digest, plan.facts, names, overrides, checked["verified"])

    return run() if host is None else locking.alone(host, run)


def _verified(plan: Plan, folder: Path) -> dict[str, Any]:
    """Return what a plan says of the files that it reads again. Raises EditError also where they cannot be read."""
    try:
        return dict(plan.verify(folder))
    except ErrataError:
        raise
    except (ValueError, KeyError, SafetensorError) as problem:
        raise EditError(f"what was written cannot be read again: {problem}; {WRITE_ANYWAY}") from problem
