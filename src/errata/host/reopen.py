"""Open what was written of a host's model, to compare it with the model: a checkpoint, or a PEFT adapter."""

from __future__ import annotations

import copy
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from errata.host import files, placement, sharing
from errata.host.base import ModelHost


def reopen(host: ModelHost, folder: Path) -> Any:
    """Return a host of the model in a folder, opened by transformers alone: a second model in memory.

    It runs passes as the first host makes them. Raises HostError where the folder cannot be opened as the same kind of
    model, or lacks weights.
    """
    with files.reading(f"the written folder {folder.name!r}"):
        model, report = type(host.model).from_pretrained(
            folder, dtype="auto", use_safetensors=True, output_loading_info=True, local_files_only=True
        )
        files.check_loaded(folder.name, model, report)
        return viewing(host, model.to(host.device))


def with_adapter(host: ModelHost, folder: Path) -> Any:
    """Return a host of a copy of the model with a PEFT adapter; the copy shares the weights of the original.

    Raises HostError where peft cannot open the adapter.
    """
    with files.reading(f"the written adapter {folder.name!r}"):
        import peft

        model = sharing.sharing_copy(host.model)
        sharing.replace_(
            model, lambda weight: weight
        )  # peft switches gradients off, which is the original's business
        with warnings.catch_warnings():
            # of names that peft calls transformers by, which is nothing that a user could mend
            warnings.simplefilter("ignore", FutureWarning)
            adapted = peft.PeftModel.from_pretrained(model, folder)
        return viewing(host, adapted.get_base_model())


def can_adapt(host: ModelHost) -> str | None:
    """Return why :func:`with_adapter` is not possible; None where it is."""
    if find_spec("peft") is None:
        return "peft is not installed"
    if any(placement.is_packed(module) for module in host.model.modules()):
        return "a quantised model is not copied"
    return None


def viewing(host: ModelHost, model: Any) -> Any:
    """Return a host like another one whose passes go to another model of the same kind."""
    view = copy.copy(host)
    view.model = model
    return view
