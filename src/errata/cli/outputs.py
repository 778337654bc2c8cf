"""Check output files before the work begins: existing ones are replaced only with --force."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from errata.edits import Edit
    from errata.job import Job

SUFFIX = ".safetensors"
"""Of edit files."""


def check_edit_name(path: Path) -> None:
    """Raise EditError if an edit cannot be written under this name."""
    from errata.edits.format import check_writable
    from errata.errors import EditError

    if path.suffix.lower() != SUFFIX:
        raise EditError(f"edits are {SUFFIX} files: expected -o {path.with_suffix(SUFFIX)}, found {path}")
    check_writable(path)


def check_new_edit(path: Path, *, force: bool) -> None:
    """Raise EditError if an edit cannot be written or, without ``force``, would replace a file."""
    check_edit_name(path)
    if not force:
        check_new(path)


def check_new(path: Path) -> None:
    """Raise EditError if the file exists."""
    if _exists(path):
        raise _replaces(path, "exists")


def check_report_name(path: Path) -> None:
    """Raise EditError if a report, which may overwrite files, has the name of an edit."""
    from errata.edits.format import check_writable
    from errata.errors import EditError

    if path.suffix.lower() == SUFFIX:
        raise EditError(
            f"{path} is a name for an edit; expected one for a report, {path.with_suffix('.json')}"
        )
    check_writable(path)


def check_figure(path: Path | None) -> None:
    """Raise ConfigError, or DataError for its place, if a figure, drawn when the work is done, could not be."""
    if path is not None:
        from errata import files
        from errata.report.figures import require_matplotlib
        from errata.report.heatmap import check_suffix

        check_suffix(path)
        files.output(path)
        require_matplotlib()


def earlier_edit(path: Path, *, force: bool, repeatable: bool) -> Edit | None:
    """Return the existing edit, which only a fit of the same edit may replace; None if there is no such file.

    ``repeatable``: whether the two fits can be compared. Raises EditError for any other existing file.
    """
    from errata.edits import Edit
    from errata.errors import EditError

    check_edit_name(path)
    if force or not _exists(path):
        return None
    if not repeatable:
        raise _replaces(path, "exists")
    try:
        return Edit.load(path)
    except EditError as error:
        raise _replaces(path, "exists and is no readable edit") from error


def check_repeat(path: Path, earlier: Edit | None, job: Job, options: Collection[str]) -> None:
    """Raise EditError unless a job repeats the one that made the earlier edit, so that nothing is lost.

    ``options``: the settings that were given; of the others, those still undetermined are not compared.
    """
    if earlier is None:
        return
    old, new = earlier.provenance, job.provenance
    old_settings, settings = _plain(old.config), _plain(new.config)
    differences = {
        "method": old.method != new.method,
        "requests": _plain([_fields(r) for r in new.requests]) != _plain([_fields(r) for r in old.requests]),
        "seed": old.seed != new.seed,
        "model": old.host != new.host,
        "versions": dict(old.versions) != dict(new.versions),
        "settings": any(
            value != old_settings.get(name)
            for name, value in settings.items()
            if name in options or value is not None
        ),
    }
    other = [name for name, differs in differences.items() if differs]
    if other:
        raise _replaces(path, f"holds an edit with other {' and '.join(other)}")


def save_edit(edit: Edit, path: Path, earlier: Edit | None) -> Path:
    """Write an edit and return its path: a new name if the earlier edit turns out to have other settings.

    If the earlier edit is the same one, its file is kept.
    """
    if earlier is not None and earlier.digest == edit.digest:
        return path
    if earlier is not None and _plain(earlier.provenance.config) != _plain(edit.provenance.config):
        numbers = (path.with_stem(f"{path.stem}-{number}") for number in range(2, 10_000))
        free = next(each for each in numbers if not _exists(each))
        print(
            f"warning: {path} holds an edit with other settings and was kept; written to {free}",
            file=sys.stderr,
        )
        path = free
    return edit.save(path)


def _replaces(path: Path, what: str) -> Exception:
    from errata.errors import EditError

    return EditError(f"{path} {what}; name another file, or replace it with --force")


def _exists(path: Path) -> bool:
    return path.expanduser().exists() or path.expanduser().is_symlink()


def _fields(request: Any) -> dict[str, Any]:
    return request.to_dict() if hasattr(request, "to_dict") else asdict(request)


def _plain(value: Any) -> Any:
    """Return a value after a round trip through JSON."""
    return json.loads(json.dumps(value, default=str))
