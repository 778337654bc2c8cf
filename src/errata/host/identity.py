"""What a model holds, told cheaply: to notice that weights were changed, and to name a host by them.

PyTorch's own counter of changes is no guide here: ``weight.data += change``, as adapters are merged, does
not move it. So contents are compared, as sums of the bits along both axes, which take a pass of memory
where they lie.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from errata.errors import HostError
from errata.host import placement

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


def contents(model: nn.Module, overlays: Mapping[str, Any]) -> bytes:
    """Name what all parameters and buffers of a model hold without the edits merged into them.

    ``overlays``: what is merged into each weight. Raises HostError for weights that are sharded.
    """
    digest = hashlib.sha256(placement.adapters(model).encode())
    if any(placement.sharded(weight) for weight in model.parameters()):
        raise HostError(f"weights are sharded over processes; {placement.GATHER}")
    for name, tensor in placement.named_tensors(model, buffers=True):
        overlay = overlays.get(name)
        digest.update(name.encode() + (content(tensor) if overlay is None else overlay.unedited_hash(tensor)))
    return digest.digest()
