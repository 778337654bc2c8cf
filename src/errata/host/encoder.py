"""Sentence encoders: a text becomes the mean of its tokens' last hidden states."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from errata.errors import HostError

Encoder = Callable[[Sequence[str]], Tensor]
ROWS = 64


def open_encoder(name: str, *, device: torch.device) -> Encoder:
    """Open a transformers encoder by name or folder; texts to float32 ``[n, d]`` on the CPU.

    Only safetensors are opened, and no code of the model's repository is run. Raises HostError where it cannot be
    opened.
    """
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        encoder = AutoModel.from_pretrained(name, use_safetensors=True).to(device).eval()
    except (OSError, ValueError, KeyError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise HostError(f"cannot open the encoder {name!r}: {first}") from error

    @torch.no_grad()
    def encode(texts: Sequence[str]) -> Tensor:
        parts = []
        for begin in range(0, len(texts), ROWS):
            batch = tokenizer(
                list(texts[begin : begin + ROWS]), padding=True, truncation=True, return_tensors="pt"
            ).to(device)
            states = encoder(**batch).last_hidden_state.float()  # [rows, length, d]
            mask = batch["attention_mask"][..., None]
            parts.append(((states * mask).sum(1) / mask.sum(1).clamp_min(1)).cpu())
        return torch.cat(parts) if parts else torch.zeros(0, int(encoder.config.hidden_size))

    return encode
