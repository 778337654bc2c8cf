"""What all exports have in common: a plan that refuses before anything is written, and a folder with a record."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, cast

from safetensors import SafetensorError

from errata import files
from errata.edits.edit import Edit, versions
from errata.errors import ConfigError, EditError
from errata.host import locking
from errata.host.base import ModelHost
from errata.host.open import DTYPES
from errata.registry import unknown

RECORD = "errata-export.json"
"""Names the files of an export, with their checksums and the edit they were made of."""
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
    """Writes all files into an empty folder."""


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

    def to_dict(self) -> dict[str, Any]:
        """Return the receipt as plain data."""
        return {
            "to": self.to, "folder": str(self.folder), "edit": self.digest, **self.facts, "files": list(self.files),
            "overrides": list(self.overrides),
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
    force: bool, dry_run: bool,
) -> Export:  # fmt: skip
    """Plan an export and write it; a folder is complete or not there. Raises EditError with nothing written."""
    target = check_folder(folder, force=force)

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
        record = {
            "exporter": exporter.name, "edit": edit.digest, "kind": edit.kind, "method": edit.provenance.method,
            "requests": len(edit.provenance.requests), "host": edit.provenance.host, "versions": versions(),
            "overrides": list(overrides), **plan.facts,
        }  # fmt: skip
        names = () if dry_run else _write(plan, record, target.absolute())
        return Export(exporter.name, target, edit.digest, plan.facts, names, overrides)

    return run() if host is None else locking.alone(host, run)


def check_folder(folder: str | os.PathLike[str], *, force: bool) -> Path:
    """Return the folder to write; a link's target.

    Raises EditError where it cannot be written, or holds anything: with ``force`` anything but an earlier export.
    """
    target = Path(folder).expanduser()
    try:
        target = target.resolve() if target.is_symlink() else target
        present = sorted(path.name for path in target.iterdir()) if target.is_dir() else []
    except (OSError, RuntimeError, ValueError) as problem:
        raise EditError(
            f"cannot write {folder}: {getattr(problem, 'strerror', None) or problem}"
        ) from problem
    if target.exists() and not target.is_dir():
        raise EditError(f"cannot write {folder}: it is a file; name a folder")
    if not target.absolute().parent.is_dir():
        raise EditError(f"cannot write {folder}: the folder {target.parent} does not exist")
    if not os.access(target.absolute().parent, os.W_OK):
        raise EditError(f"cannot write {folder}: no permission in {target.parent}")
    if present and not force:
        raise EditError(f"{folder} exists; name another folder, or replace an earlier export with --force")
    foreign = sorted(set(present) - _recorded(target)) if present else []
    if foreign:
        raise EditError(f"{folder} holds {foreign[0]!r:.80}, which no export wrote; name another folder")
    return target


def _recorded(folder: Path) -> set[str]:
    """Return the names of the files that an earlier export wrote into a folder, its record's too."""
    path = folder / RECORD
    if not path.is_file():
        return set()
    record: Any = files.parse_json(
        files.read_text(path, EditError), lambda reason: EditError(f"{path} is damaged: {reason}")
    )
    names: Any = cast("dict[str, Any]", record).get("files") if isinstance(record, dict) else None
    if not isinstance(names, dict):
        raise EditError(f"{path} is damaged: it names no files")
    return {RECORD, *map(str, cast("dict[str, Any]", names))}


def _write(plan: Plan, record: Mapping[str, Any], target: Path) -> tuple[str, ...]:
    """Write a folder beside the target and put it in its place; return the names of its files."""
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    old = target.with_name(f"{target.name}.{os.getpid()}.old")
    try:
        part.mkdir()
        plan.write(part)
        names = tuple(sorted(path.name for path in part.iterdir()))
        whole = {**record, "files": {name: _checksum(part / name) for name in names}}
        text = json.dumps(whole, indent=2, ensure_ascii=False, sort_keys=True)
        (part / RECORD).write_text(f"{text}\n", encoding="utf-8")
        if target.exists():
            target.rename(old)
        part.rename(target)
    except (OSError, SafetensorError) as problem:  # as where the disk is full
        raise EditError(
            f"cannot write {target}: {getattr(problem, 'strerror', None) or problem}"
        ) from problem
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    return (*names, RECORD)


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(files.MIB):
            digest.update(block)
    return digest.hexdigest()
