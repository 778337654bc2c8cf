"""What a model holds, told cheaply: to notice that weights were changed, and to name a host by them.

PyTorch's own counter of changes is no guide here: ``weight.data += change``, as adapters are merged, does
not move it. So contents are compared, as sums of the bits along both axes, which take a pass of memory
where they lie.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from errata.errors import HostError
from errata.host import locking, placement

if TYPE_CHECKING:
    from errata.host.base import ModelHost

MOST_COLUMNS = 4096
"""Of the table of eight-byte numbers that is summed; a smaller tensor makes a square one."""
SMALL = 2**13
"""Bytes up to which a tensor is hashed as it is."""


@torch.no_grad()
def content(tensor: Tensor) -> bytes:
    """Name a tensor's dtype, shape ``[...]`` and bits, wherever it lies; no guard against someone who deceives.

    A change goes unnoticed only if it leaves all sums of rows and of columns as they were, bits taken as
    whole numbers.
    """
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    flat = tensor.detach().contiguous().reshape(-1)
    if flat.numel() * flat.element_size() <= SMALL:
        digest.update(flat.cpu().view(torch.uint8).numpy().tobytes())
        return digest.digest()
    if flat.storage_offset() * flat.element_size() % 8:
        flat = flat.clone()  # eight bytes at a time are read from places that eight divides
    raw = flat.view(torch.uint8)
    whole = len(raw) // 8
    width = min(MOST_COLUMNS, 1 << (whole.bit_length() // 2))
    rows = whole // width
    words = raw[: 8 * whole].view(torch.int64)
    table = words[: rows * width].view(rows, width)
    # the rest is shorter than a row and taken as it is
    parts = (table.sum(0), table.sum(1), words[rows * width :], raw[8 * whole :].to(torch.int64))
    digest.update(torch.cat(parts).cpu().numpy().tobytes())
    return digest.digest()


@dataclass(frozen=True)
class _Fingerprint:
    """A fingerprint and what it was taken of."""

    contents: bytes
    tokenizer: Any
    tokens: int
    section: int | None
    """Stretch of holding the model alone in which the contents were looked at."""
    fingerprint: str


def fingerprint(host: ModelHost) -> str:
    """Return a host's fingerprint, taken anew only where weights or vocabulary are not those of the last time.

    A thread that holds the model alone, as a fit does, looks once and not again until it lets go.
    """
    lock = locking.of(host.model)
    with lock.shared:
        cached: _Fingerprint | None = host.__dict__.get("_fingerprint")
        same = cached is not None and cached.tokenizer is host.tokenizer and cached.tokens == _size(host)
        if cached is not None and same and lock.section is not None and lock.section == cached.section:
            return cached.fingerprint
        try:
            contents = _contents(host)
        except HostError:
            if cached is None or not same:
                raise
            return cached.fingerprint  # weights that are away by now: there is nothing to compare
        if cached is not None and same and cached.contents == contents:
            value = cached.fingerprint
        else:
            value = host._take_fingerprint()
        vars(host)["_fingerprint"] = _Fingerprint(contents, host.tokenizer, _size(host), lock.section, value)
        return value


def _size(host: ModelHost) -> int:
    return 0 if host.tokenizer is None else len(host.tokenizer)


def _contents(host: ModelHost) -> bytes:
    digest = hashlib.sha256(placement.adapters(host.model).encode())
    if any(placement.sharded(weight) for weight in host.model.parameters()):
        raise HostError(f"weights are sharded over processes; {placement.GATHER}")
    for name, tensor in placement.named_tensors(host.model, buffers=True):
        overlay = host.overlays.get(name)
        digest.update(name.encode() + (content(tensor) if overlay is None else overlay.unedited_hash(tensor)))
    return digest.digest()
