"""Edits from files that other programs wrote: a LoRA adapter, or a whole checkpoint of the same architecture.

Both are changes of weights, so each becomes a :class:`WeightEdit` that is placed, reverted and exported like any other.
What an adapter says is taken exactly or refused; pickled files are never opened. An export of errata names the model
that it was made for and the checksums of its files, which are checked; in other folders names and shapes alone speak.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from errata import files
from errata.edits.adapter_settings import AdapterSettings
from errata.edits.deltas import Delta
from errata.edits.edit import Provenance, timestamp, versions
from errata.edits.export import _verify as verifying
from errata.edits.export._adapter import CONFIG, PREFIX, WEIGHTS
from errata.edits.export._folder import RECORD
from errata.edits.weight import WeightEdit
from errata.errors import EditError, HostError
from errata.host import files as model_files
from errata.host import locking, placement
from errata.host.base import ModelHost
from errata.host.layout import stored_transposed
from errata.host.reopen import reopen
from errata.linalg.lowrank import LowRank, balance
from errata.linalg.routines import norm, svd

METHOD = "import"
"""What an imported edit has in the place of a method's name."""
FACTOR = re.compile(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight")
NO_PICKLE = "pickled weights are never opened: save it with safe_serialization, or convert it to safetensors"


def import_edit(folder: str | os.PathLike[str], host: ModelHost, *, foreign: bool = False) -> WeightEdit:
    """Return what a folder does to a host as an edit: a PEFT LoRA adapter, or a checkpoint of the same architecture.

    ``host``: the model without edits; it is left as it was. ``foreign``: allow an export of errata for another host. A
    checkpoint is opened beside the host, which takes the memory of one more model; its differences are kept as thin
    factors where they have a low rank up to the rounding of the weights, else whole. The edit has no requests.

    Raises EditError with the reason for anything that is not taken exactly.
    """
    place = Path(folder).expanduser()
    if not place.is_dir():
        raise EditError(f"cannot import {folder}: no such folder; expected an adapter's or a checkpoint's")

    def run() -> WeightEdit:
        if host.edited:
            raise EditError(f"edits are in place on {host.name}: {', '.join(host.placed)}; revert them first")
        placement.refuse_away(host.model)
        if placement.adapters(host.model):
            raise EditError(f"{host.name} has PEFT adapters; merge or unload them first")
        made_for = _check_record(place, host, foreign=foreign)
        if (place / CONFIG).is_file():
            kind, (deltas, transposed, facts) = "peft", _adapter(place, host)
        elif (place / "config.json").is_file():
            kind, (deltas, transposed, facts) = "checkpoint", _checkpoint(place, host)
        else:
            raise EditError(
                f"{folder} holds neither {CONFIG} (a LoRA adapter) nor config.json (a checkpoint), so there is nothing "
                "to import"
            )
        provenance = Provenance(
            METHOD, (), {"kind": kind, "folder": place.resolve().name, **facts}, host.fingerprint, host.name,
            versions=versions(), notes={"dtype": str(host.dtype).removeprefix("torch."), **made_for},
            created=timestamp(),
        )  # fmt: skip
        edit = WeightEdit(deltas, transposed, provenance)
        if edit.norm() == 0:
            raise EditError(f"{folder} changes no weight of {host.name}, so there is no edit in it")
        return edit

    return locking.alone(host, run)


def _check_record(folder: Path, host: ModelHost, *, foreign: bool) -> dict[str, Any]:
    """Compare an export of errata with its own record. Raises EditError for changed files and for another host."""
    path = folder / RECORD
    if not path.is_file():
        return {}
    record = _object(path)
    names = record.get("files")
    if not isinstance(names, dict):
        raise EditError(f"{path} is damaged: it names no files")
    for name, expected in cast("dict[str, Any]", names).items():
        inside = (folder / name).resolve().is_relative_to(folder.resolve())
        if not inside or not (folder / name).is_file() or files.sha256(folder / name) != expected:
            raise EditError(f"{folder / name!s:.200} is not what the export wrote; export the edit again")
    if record.get("host") != host.fingerprint and not foreign:
        raise EditError(
            f"{folder} was exported for host {record.get('host')!s:.80}, and {host.name} is host {host.fingerprint}; "
            "open the right model, or overrule with foreign=True / --foreign"
        )
    return {"exported_from": str(record.get("edit"))[:64]}


def _object(path: Path) -> dict[str, Any]:
    def fail(reason: str) -> EditError:
        return EditError(f"{path} is damaged: {reason}")

    value = files.parse_json(files.read_text(path, EditError), fail)
    if not isinstance(value, dict):
        raise fail("expected an object")
    return cast("dict[str, Any]", value)


# --- adapters ---------------------------------------------------------------------------------

Found = tuple[dict[str, Delta], frozenset[str], dict[str, Any]]
"""Changes by parameter, those stored transposed, and facts for the provenance."""


def _adapter(folder: Path, host: ModelHost) -> Found:
    """Read a LoRA adapter. Raises EditError for what is not exactly a change of linear maps."""
    settings = AdapterSettings.read(_object(folder / CONFIG), folder / CONFIG)
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = sorted(
            one.name for one in folder.iterdir() if one.suffix in (".bin", ".pt", ".pth", ".pkl")
        )
        raise EditError(
            f"{folder} holds no {WEIGHTS}" + (f" but {pickled[0]}: {NO_PICKLE}" if pickled else "")
        )
    content = files.read_bytes(path, EditError, most=path.stat().st_size)
    try:
        tensors: dict[str, Tensor] = load(content)
    except (SafetensorError, ValueError, KeyError) as error:
        raise EditError(f"{path} is damaged: {error}") from error
    pairs = _pairs(tensors, path)
    _check_targets(pairs, settings, host, path)
    deltas: dict[str, Delta] = {}
    transposed: set[str] = set()
    for module, (a, b) in sorted(pairs.items()):
        stored = _linear(host, module, path)
        weight = host.model.get_submodule(module).weight
        shape = tuple(reversed(weight.shape)) if stored else tuple(weight.shape)
        if not placement.is_packed(host.model.get_submodule(module)) and (b.shape[0], a.shape[1]) != shape:
            raise EditError(
                f"{path} changes {module} as {[b.shape[0], a.shape[1]]}, and {host.name} has {list(shape)} there: the "
                "adapter is of another model"
            )
        deltas[f"{module}.weight"] = LowRank(b.float() * settings.scale(module, len(a)), a.float())
        if stored:
            transposed.add(f"{module}.weight")
    digest = hashlib.sha256(content + json.dumps(settings.raw, sort_keys=True).encode()).hexdigest()
    return deltas, frozenset(transposed), {"sha256": digest, "base_model": settings.base_model}


def _pairs(tensors: Mapping[str, Tensor], path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the factors A ``[r, d_in]`` and B ``[d_out, r]`` by module."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = FACTOR.fullmatch(name)
        if match is None:
            raise EditError(
                f"{path} holds {name!r:.120}, which is no factor of a linear map: embeddings, biases, magnitudes "
                "(DoRA) and whole modules (modules_to_save) are not imported"
            )
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor.float()).all()):
            raise EditError(f"{name!r:.120} in {path} holds NaN or infinite numbers, or none at all; refused")
        parts.setdefault(match[1], {})[match[2]] = tensor
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for module, both in parts.items():
        a, b = both.get("A"), both.get("B")
        if a is None or b is None or a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or not len(a):
            raise EditError(
                f"the factors of {module!r:.120} in {path} do not form a product, or one is missing"
            )
        pairs[module] = a, b
    if not pairs:
        raise EditError(f"{path} holds no factors, so there is nothing to import")
    return pairs


def _check_targets(pairs: Mapping[str, Any], settings: AdapterSettings, host: ModelHost, path: Path) -> None:
    """Raise EditError where the modules that the settings name are not those that there are factors for."""
    extra = [module for module in pairs if not settings.targets(module)]
    if extra:
        raise EditError(
            f"{path} has factors of {min(extra)!r:.120}, which target_modules in {CONFIG} does not name"
        )
    named = {
        name for name, module in host.model.named_modules()
        if settings.is_whole and settings.targets(name) and stored_transposed(module) is not None
    }  # fmt: skip
    missing = named - pairs.keys()
    if missing:
        raise EditError(
            f"{path} has no factors of {min(missing)!r:.120}, which target_modules in {CONFIG} names: the file is not "
            "complete"
        )


def _linear(host: ModelHost, module: str, path: Path) -> bool:
    """Whether a linear map stores its weight transposed. Raises EditError for anything but a linear map."""
    try:
        stored = stored_transposed(host.model.get_submodule(module))
    except AttributeError as error:
        raise EditError(f"{path} changes {module!r:.120}, which {host.name} does not have") from error
    if stored is None:
        raise EditError(f"{path} changes {module!r:.120}, which is no linear map in {host.name}")
    return stored


# --- checkpoints ------------------------------------------------------------------------------


def _checkpoint(folder: Path, host: ModelHost) -> Found:
    """Return a checkpoint's differences from the host. Raises EditError where they do not make the one the other."""
    name = _object(folder / "config.json").get("model_type")
    if name != host.family:
        raise EditError(
            f"{folder} holds a model of type {name!r:.80}, and {host.name} is of type {host.family}"
        )
    if any(placement.is_packed(module) for module in host.model.modules()):
        raise EditError(f"{host.name} is quantised, and a difference of weights needs the weights themselves")
    try:
        model_files.check_folder(folder)
        other = reopen(host, folder)
    except HostError as error:
        raise EditError(f"cannot import {folder}: {error}") from error
    deltas: dict[str, Delta] = {}
    transposed: set[str] = set()
    found: dict[str, Tensor] = dict(other.model.named_parameters())
    if found.keys() != dict(host.model.named_parameters()).keys():
        raise EditError(f"{folder} holds other weights by name than {host.name} has")
    for name, own in host.model.named_parameters():
        delta = _change(name, own.detach(), found[name].detach(), folder)
        if delta is None:
            continue
        module = host.model.get_submodule(name.rpartition(".")[0])
        if own.ndim == 2 and name.endswith(".weight") and stored_transposed(module):
            transposed.add(name)
            delta = LowRank(delta.A.mT, delta.B.mT) if isinstance(delta, LowRank) else delta.mT
        deltas[name] = delta
    forms = {"thin": sum(isinstance(one, LowRank) for one in deltas.values()), "weights": len(deltas)}
    edit = WeightEdit(deltas, frozenset(transposed), Provenance(METHOD, (), {}, host.fingerprint))
    if deltas:
        edit.trial(host)  # raises for what cannot be placed, such as tied weights
        _compare(edit, host, other, folder)
    digest = hashlib.sha256("".join(files.sha256(p) for p in sorted(folder.glob("*.safetensors"))).encode())
    return deltas, frozenset(transposed), {"sha256": digest.hexdigest(), **forms}


@torch.no_grad()
def _change(name: str, own: Tensor, other: Tensor, folder: Path) -> Delta | None:
    """Return the difference of a weight ``[...]``, thin where it is; None where there is none.

    Of two dtypes the narrower counts: what rounding to it does is no change.
    """
    if other.shape != own.shape:
        raise EditError(f"{name} is {list(other.shape)} in {folder}, and {list(own.shape)} in the model")
    if not bool(torch.isfinite(other).all()):
        raise EditError(f"{name} in {folder} holds NaN or infinite numbers; refused")
    narrow = max((own.dtype, other.dtype), key=lambda dtype: torch.finfo(dtype).eps)
    if torch.equal(own.to(narrow), other.to(narrow)):
        return None
    wide = torch.promote_types(torch.promote_types(own.dtype, other.dtype), torch.float32)
    change = other.to(wide) - own.to(narrow).to(wide)
    if own.ndim != 2:
        return change.cpu()
    u, s, vh = svd(change.double())
    # what rounding each number of the weight to its neighbour can amount to in one direction
    step = torch.finfo(narrow).eps * float(norm(other.double())) / own.numel() ** 0.5
    rank = max(1, int((s > step * (own.shape[0] ** 0.5 + own.shape[1] ** 0.5)).sum()))
    if rank * sum(own.shape) >= own.numel():
        return change.cpu()
    return balance(u[:, :rank] * s[:rank], vh[:rank]).to(torch.float32, device="cpu")


def _compare(edit: WeightEdit, host: ModelHost, other: ModelHost, folder: Path) -> None:
    """Raise EditError where the host with the differences does not compute what the checkpoint does."""
    reference = verifying.Reference.of(edit, host, merge=False)
    try:
        reference.compare(other, host.dtype, other.dtype, lost={})
    except EditError as error:
        raise EditError(
            f"{folder} computes something else than {host.name} with the differences of the weights added: its "
            "config.json, or a buffer, differs too; import an adapter, or open the checkpoint as a model of its own"
        ) from error
