"""One SHA-256 over all that a file of ours says: its text and its tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the hash of a text and of tensors with their names, dtypes, shapes and bytes; 64 hex digits."""
    import torch

    digest = hashlib.sha256(f"{len(text)} {text}".encode(errors="surrogatepass"))
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{len(name)} {name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(raw.numpy().data if len(raw) else b"")
    return digest.hexdigest()
