"""Exports of edits: files that are used without errata. One file is one kind of export, found by its name."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from errata.edits.export._exporter import Export, Options, check_options, write_folder
from errata.registry import Registry

if TYPE_CHECKING:
    from errata.edits.edit import Edit
    from errata.edits.export._exporter import Exporter
    from errata.host.base import ModelHost

EXPORTERS: Registry[Exporter] = Registry(
    "errata.edits.export", "EXPORTER", "Exporter", group="errata.exporters"
)

__all__ = ["EXPORTERS", "Export", "export"]


def export(
    edit: Edit, folder: str | os.PathLike[str], *, to: str, host: ModelHost | None = None,
    dtype: str | None = None, pad_to: int | None = None, rank: int | None = None, foreign: bool = False,
    force: bool = False, verify: bool = True, dry_run: bool = False,
) -> Export:  # fmt: skip
    """Write an edit as files that are used without errata: ``to`` a ``checkpoint``, a ``peft`` adapter, ``prompts``.

    What the files make of a prompt is what the edit in place makes of it; an edit for which that is not possible is
    refused. ``host``: the model that the edit was made for, without edits in place; it is left as it was. ``prompts``
    takes none. ``dtype``: of the checkpoint's weights, default the host's. ``pad_to``: feed-forwards of a checkpoint
    that get neurons are widened to a multiple of this, default 64. ``rank``: an adapter's largest rank; a change of a
    higher rank is approximated, with the error reported. ``foreign``: allow another host. ``force``: replace an
    earlier export in the folder, never anything else. ``verify``: read what was written and compare it with the edit
    in place before it counts, see :attr:`Export.verified`; for a checkpoint that takes the memory of one more model.
    ``dry_run``: refuse or report, and write nothing.

    Raises EditError with the reason for an edit that cannot be exported so, for another host, for a folder that holds
    anything else, and where what was written does not do what the edit does; ConfigError for an unknown export or an
    option that it does not take. Nothing is put in place then.
    """
    exporter = EXPORTERS.get(to)
    options = Options(dtype, pad_to, rank, foreign)
    check_options(exporter, options, host=host is not None)
    return write_folder(exporter, edit, host, options, folder, force=force, dry_run=dry_run, verify=verify)
