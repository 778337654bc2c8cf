"""Read a dictionary of features of hidden states, a sparse autoencoder, from a ``.safetensors`` file.

Names and shapes, of f features of states with d entries: ``W_dec`` ``[f, d]``, ``W_enc`` ``[d, f]`` (or ``[f, d]``),
``b_enc`` ``[f]``; optionally ``b_dec`` ``[d]`` and ``threshold`` ``[f]``, for JumpReLU. Others are ignored.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from errata.errors import DataError


@dataclass(frozen=True, eq=False)
class Dictionary:
    """Features of states, float32: a(h) = JumpReLU(encoder (h - centre) + bias), h about decoder^T a + centre."""

    encoder: Tensor
    """``[f, d]``."""
    bias: Tensor
    """``[f]``."""
    threshold: Tensor
    """``[f]``, 0 for ReLU."""
    decoder: Tensor
    """``[f, d]``."""
    centre: Tensor
    """``[d]``."""
    name: str
    """File and digest, for records."""

    @property
    def features(self) -> int:
        """How many features there are."""
        return len(self.bias)


def read_dictionary(path: str, width: int) -> Dictionary:
    """Read a dictionary of states with ``width`` entries. Raises DataError for a file that is none, or of others."""
    place = Path(path).expanduser()
    try:
        tensors = {name: tensor.float() for name, tensor in load_file(place).items()}
    except Exception as error:  # the reader raises many types
        raise DataError(f"{place} is no .safetensors file that can be read: {error}") from error
    missing = [name for name in ("W_enc", "W_dec", "b_enc") if name not in tensors]
    if missing:
        raise DataError(
            f"{place} has no {missing[0]}; a dictionary has W_enc, W_dec and b_enc, found {', '.join(sorted(tensors))}"
        )
    decoder, encoder = tensors["W_dec"], tensors["W_enc"]
    count = decoder.shape[0] if decoder.ndim else 0
    if not count:
        raise DataError(
            f"{place}: W_dec is {list(decoder.shape)}, expected [features, {width}] with a feature at least"
        )
    if encoder.shape == (width, count) and count != width:
        encoder = encoder.mT
    elif count == width:
        encoder = encoder.mT  # a square one says nothing about its orientation: [d, f], as documented
    shapes = {
        "W_dec": (decoder, (count, width)), "W_enc": (encoder, (count, width)), "b_enc": (tensors["b_enc"], (count,)),
        "b_dec": (tensors.get("b_dec", torch.zeros(width)), (width,)),
        "threshold": (tensors.get("threshold", torch.zeros(count)), (count,)),
    }  # fmt: skip
    for name, (tensor, shape) in shapes.items():
        if tuple(tensor.shape) != shape:
            raise DataError(f"{place}: {name} is {list(tensor.shape)}, expected {list(shape)} for this model")
        if not bool(torch.isfinite(tensor).all()):
            raise DataError(f"{place}: {name} holds NaN or infinite numbers")
    digest = hashlib.sha256()
    for name in sorted(shapes):
        digest.update(shapes[name][0].contiguous().numpy().tobytes())
    label = f"{place.name}@{digest.hexdigest()[:16]}"
    return Dictionary(
        encoder.contiguous(), shapes["b_enc"][0], shapes["threshold"][0], decoder, shapes["b_dec"][0], label
    )
