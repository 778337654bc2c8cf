"""One SHA-256 over all that a file of ours says: its header and its tensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


FIELD = "sha256"
"""The field of a header that holds the hash of the others and of the tensors."""


def checksum(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Return the hash of a JSON header, without its hash, and of tensors by name, dtype, shape and bytes.

    Tensors ``[...]`` of any shape; 64 hex digits. It is a field of the header rather than a second text beside it,
    for safetensors writes several texts in any order, and equal content is to give equal bytes.
    """
    import torch

    text = json.dumps({name: value for name, value in header.items() if name != FIELD}, sort_keys=True)
    digest = hashlib.sha256(f"{len(text)} {text}".encode(errors="surrogatepass"))
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{len(name)} {name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(raw.numpy().data if len(raw) else b"")
    return digest.hexdigest()
