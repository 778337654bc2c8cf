"""What every host has, whatever its model reads: the model, its weights and their name, sites, what is in place."""

from __future__ import annotations

import hashlib
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from errata.errors import HostError
from errata.host import files, identity, locking, passes, placed, placement
from errata.host.passes import Pass, Ran
from errata.host.prompts import PromptFormat
from errata.types import Resources

FEW_NUMBERS = 2**20
"""Weights of a model below which threads take longer to start than hashing takes."""
BRANCHES = "_errata_branches"
OVERLAYS = "_errata_overlays"


@dataclass(frozen=True)
class _Fingerprint:
    """A fingerprint and what it was taken of."""

    contents: bytes
    tokenizer: Any
    tokens: int
    section: int | None
    """Stretch of holding the model alone in which the contents were looked at."""
    value: str


class ModelHost(ABC):
    """A model under a name, with a layout of sites; hosts of text and of images are made of it.

    Not changed by anything but an edit's ``apply_`` and ``on``.
    """

    kind: str
    """Name of the kind of model, see :mod:`errata.host.kinds`."""
    tokenizer: Any = None
    """What turns text into ids; None for a model that reads no text."""
    prompt_format: PromptFormat = PromptFormat()
    """How prompts are formatted, as edits record it; of a model that reads no text always the default."""

    def __init__(self, model: nn.Module, *, name: str) -> None:
        self.model: Any = model
        self.name = name
        self.resources = Resources()
        """Texts and examples of its own, that fits and evaluations take by default."""
        self.model.eval()
        locking.of(self.model)  # created before there are threads
        placement.keep_gradients_(self.model)

    # --- facts -----------------------------------------------------------------------------

    @property
    def config(self) -> Any:
        """The model's transformers configuration."""
        return self.model.config

    @property
    def family(self) -> str:
        """Architecture name, e.g. ``llama``."""
        return str(getattr(self.config, "model_type", type(self.model).__name__))

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where inputs go."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Floating type of the weights that inputs meet first."""

    @property
    @abstractmethod
    def layout(self) -> Any:
        """Sites found by structure. Raises HostError where there are none to find."""

    @property
    def fingerprint(self) -> str:
        """Identity of weights and vocabulary, 16 hex digits; see :mod:`errata.host.identity`.

        Weights count as rounded to bfloat16, so that one checkpoint opened in float32 and in bfloat16 is
        the same host; so it is in float16, unless it holds numbers too small for that. A quantised copy
        is another host. Names the unedited model, also while edits are in place, and is taken anew once
        something else has changed the weights; a thread that holds the model alone, as a fit does, looks
        once and not again until it lets go. Raises HostError for weights that cannot be read.
        """
        lock = locking.of(self.model)
        with lock.shared:
            cached: _Fingerprint | None = self.__dict__.get("_fingerprint")
            size = 0 if self.tokenizer is None else len(self.tokenizer)
            same = cached is not None and cached.tokenizer is self.tokenizer and cached.tokens == size
            if cached is not None and same and lock.section is not None and lock.section == cached.section:
                return cached.value
            try:
                contents = identity.contents(self.model, self.overlays)
            except HostError:
                if cached is None or not same:
                    raise
                return cached.value  # weights that are away by now: there is nothing to compare
            if cached is not None and same and cached.contents == contents:
                value = cached.value
            else:
                value = self._take_fingerprint()
            vars(self)["_fingerprint"] = _Fingerprint(contents, self.tokenizer, size, lock.section, value)
            return value

    def _take_fingerprint(self) -> str:
        digest = hashlib.sha256(b"errata host 1")
        for name, part in self._hashes(torch.bfloat16):
            digest.update(f"{name}:{part}\n".encode())
        digest.update(self._vocabulary())
        digest.update(placement.adapters(self.model).encode())
        return digest.hexdigest()[:16]

    def _vocabulary(self) -> bytes:
        """Return what the fingerprint has to name besides weights: the vocabulary of a host that reads text."""
        return b""

    @locking.shared
    def weights_hash(self) -> str:
        """SHA-256 over the names, shapes and bytes of every parameter and buffer as they are now."""
        digest = hashlib.sha256()
        for name, part in self._hashes(None):
            digest.update(f"{name}:{part}\n".encode())
        return digest.hexdigest()

    def _hashes(self, dtype: torch.dtype | None) -> list[tuple[str, str]]:
        tensors = list(placement.named_tensors(self.model, buffers=dtype is None))
        if dtype is not None:
            tensors = [(n, self.overlays[n].unedited(p) if n in self.overlays else p) for n, p in tensors]

        def part(item: tuple[str, Tensor]) -> tuple[str, str]:
            name, tensor = item
            tensor = tensor.detach()
            tensor = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
            flat = tensor.contiguous().cpu().reshape(-1).view(torch.uint8)
            head = f"{tuple(tensor.shape)}:{tensor.dtype}:".encode()
            return name, hashlib.sha256(head + flat.numpy().tobytes()).hexdigest()

        if sum(tensor.numel() for _, tensor in tensors) < FEW_NUMBERS:
            return list(map(part, tensors))
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            return list(pool.map(part, tensors))

    def device_of(self, site: Any) -> torch.device:
        """Where a site computes; with a device map not everything is where the embeddings are."""
        return placement.runs_on(self.model.get_submodule(site.name))

    @torch.no_grad()
    @locking.shared
    def weight(self, site: Any) -> Tensor:
        """Return a copy of a site's weight as it acts now, ``[d_out, d_in]``, float32 or wider.

        With the edits in place, merged or beside. A packed weight is read by running its module on unit
        vectors, so it has the precision of the host's dtype.
        """
        module: Any = self.model.get_submodule(site.name)
        if not site.packed:
            weight = getattr(module, site.leaf).detach()
            if site.experts:  # side by side, [d_out, experts * m]
                weight = weight.flatten(0, 1) if site.transposed else weight.transpose(0, 1).flatten(1)
            columns = (weight if site.transposed else weight.mT).to(
                torch.promote_types(weight.dtype, torch.float32), copy=True
            )  # [d_in, d_out]: a column is what a unit vector gives
        else:
            units = torch.eye(site.d_in, dtype=self.dtype, device=self.device_of(site))
            zero = module.forward(units.new_zeros(1, 1, site.d_in)).float()  # the bias, if there is one
            parts = [module.forward(part[None]).float() - zero for part in units.split(1024)]
            columns = torch.cat([part.reshape(-1, site.d_out) for part in parts])
        beside = self.branches.get(site.parameter)
        if beside is not None:
            columns = beside(torch.eye(site.d_in, dtype=columns.dtype, device=columns.device), columns)
        return columns.mT

    @property
    def placed(self) -> tuple[str, ...]:
        """Digests of all edits in place on the model, of whatever kind, sorted."""
        # changes of weights are named by what orders them and by the edit's digest
        keys = {key for one in (*self.overlays.values(), *self.branches.values()) for key in one.deltas}
        weights = {key.rpartition(".")[2] for key in keys}
        return tuple(sorted(weights | placed.on(self.model).digests))

    @property
    def edited(self) -> bool:
        """Whether any edit is in place."""
        return bool(self.placed)

    @property
    def shareable(self) -> bool:
        """Whether what follows a text depends on the text alone: not while routers decide at prompts' ends."""
        here = placed.on(self.model)
        return not here.interventions and not here.substitutes

    @property
    def branches(self) -> Mapping[str, Any]:
        """What acts beside weights, by parameter; stored on the model, as :attr:`overlays` are.

        Written by the edits room alone; each entry maps a module's input and output to its new output.
        """
        return self.model.__dict__.get(BRANCHES, {})

    @property
    def overlays(self) -> Mapping[str, Any]:
        """The changes of each edited weight; stored on the model, so that two hosts of it agree.

        Written by the edits room alone; each entry has the original bits as ``base``.
        """
        return self.model.__dict__.get(OVERLAYS, {})

    # --- copies ----------------------------------------------------------------------------

    def checkpoint_obstacle(self) -> str | None:
        """Return why no folder can be written that others open as this model; None where it can."""
        model = self.model
        if hasattr(model, "save_pretrained") and type(model).__module__.startswith("transformers."):
            return None
        return f"it is a {type(model).__name__}, which transformers does not open by itself"

    def write_checkpoint(self, model: Any, folder: Path) -> None:
        """Write a model of this kind with what prepares its inputs. Raises ValueError where it refuses to be saved."""
        model.save_pretrained(folder)
        for path in files.processor_files(self.name):
            shutil.copyfile(path, folder / path.name)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)

    def tokenizer_in(self, folder: Path) -> Any:
        """Open the tokenizer in a folder that :meth:`write_checkpoint` wrote."""
        return files.open_tokenizer(str(folder), None, False)

    # --- running ---------------------------------------------------------------------------

    def see(self, items: Iterable[Any]) -> None:
        """Take the pictures that requests and probes go with; hosts that read no text have requests without any."""
        return None

    @cached_property
    def accepts(self) -> frozenset[str]:
        """Arguments of the model's forward."""
        return passes.arguments(self.model)

    @locking.shared
    def run(self, request: Pass) -> Ran:
        """Run one forward pass, the only way that anything reaches the model; see :mod:`errata.host.passes`."""
        return passes.run(self.model, request, self.accepts, placed.substituting(self.model))
