"""What other programs that run models know of an architecture: by its name in the model's configuration."""

from __future__ import annotations

import torch
from torch import Tensor

from errata.errors import HostError
from errata.host.base import ModelHost
from errata.host.kinds import CAUSAL, kind

WITHOUT_LORA_IN_VLLM = {
    "gpt2": "GPT-2", "gptj": "GPT-J", "bloom": "Bloom", "falcon": "Falcon", "stablelm": "StableLM",
}  # fmt: skip
"""Architectures that vLLM runs, or ran, without support for adapters."""
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM takes as the largest rank."""
GGUF = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""What llama.cpp calls an architecture, of those whose adapters are known to fit."""
INTERLEAVED = ("llama", "mistral")
"""Architectures of which llama.cpp keeps the outputs of queries and keys in another order."""


def without_lora_in_vllm(host: ModelHost) -> str | None:
    """Return why vLLM serves no adapter of a model; None where nothing is known against it."""
    if host.kind != CAUSAL:
        return f"vLLM serves causal language models, and {host.name} is one of the {kind(host.kind).plural}"
    if host.family in WITHOUT_LORA_IN_VLLM:
        return f"vLLM has no adapters for {WITHOUT_LORA_IN_VLLM[host.family]}"
    return None


def gguf_architecture(host: ModelHost) -> str:
    """Return what llama.cpp calls a model's architecture. Raises HostError where its adapters would not fit."""
    if host.kind != CAUSAL:
        raise HostError(f"llama.cpp takes adapters of causal language models, and {host.name} is none")
    if host.family in GGUF:
        return GGUF[host.family]
    if host.family == "gpt2":
        raise HostError(
            "GPT-2 stores its weights transposed, and llama.cpp's own converter gives its adapters shapes that "
            "its loader refuses"
        )
    raise HostError(
        f"how llama.cpp names and orders the weights of {host.family} is not known here; known: "
        f"{', '.join(sorted(GGUF))}"
    )


def gguf_rows(host: ModelHost, module: str, rows: int) -> Tensor | None:
    """Return in which order llama.cpp keeps the outputs of a linear map, int64 ``[rows]``; None: in their own.

    A rotary embedding turns pairs of a head's outputs. Where transformers pairs the first half of a head with the
    second, llama.cpp has the two of a pair side by side.
    """
    leaf = module.rpartition(".")[2]
    if host.family not in INTERLEAVED or leaf not in ("q_proj", "k_proj"):
        return None
    config = host.config
    heads = int(config.num_attention_heads)
    if leaf == "k_proj":
        heads = int(getattr(config, "num_key_value_heads", None) or heads)
    return torch.arange(rows).reshape(heads, 2, rows // heads // 2).transpose(1, 2).reshape(-1)
