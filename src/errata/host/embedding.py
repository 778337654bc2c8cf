"""Embeddings of texts for similarity search, from the host itself or from a sentence encoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from errata.errors import HostError
from errata.host import hooks, tokens
from errata.host.encoder import open_encoder
from errata.host.host import Host

BATCH_TOKENS = 8192


@torch.no_grad()
def embed(host: Host, texts: Sequence[str], *, encoder: str | None = None) -> Tensor:
    """Return one unit vector per text, float32 ``[n, d]`` on the CPU.

    ``encoder``: name or folder of a transformers encoder, whose last hidden states are averaged over the tokens of a
    text, as sentence-transformers does; None uses the host's own hidden states at half its depth, averaged likewise.
    Raises HostError for an encoder that cannot be opened.
    """
    if encoder is not None:
        encode, _ = open_encoder(encoder, host.device)
        return functional.normalize(encode(texts), dim=1)
    layer = len(host.layout.blocks) // 2
    block = host.model.get_submodule(host.layout.blocks[layer])
    rows = [host.encode(text).ids[: host.window] for text in texts]
    vectors = torch.zeros(len(rows), host.layout.width)
    for group in tokens.by_length(rows, BATCH_TOKENS):
        batch = host.batch([rows[i] for i in group])
        states: list[Tensor] = []
        with hooks.on_output(block, states.append):
            host.forward(batch, keep=1)
        mask = batch.mask[..., None].to(states[0].device)
        mean = (states[0].float() * mask).sum(1) / mask.sum(1)
        vectors[torch.tensor(group)] = mean.cpu()
    return functional.normalize(vectors, dim=1)


def encoder_digest(host: Host, encoder: str | None) -> str:
    """Return the checksum of what :func:`embed` compares texts with; empty for the host itself."""
    return "" if encoder is None else open_encoder(encoder, host.device)[1]


def word_embeddings(host: Host) -> tuple[str, Tensor]:
    """Return the path of the module that embeds tokens, and its table, float32 ``[vocab, d]`` on the CPU.

    Raises HostError for a host whose table cannot be read.
    """
    module = host.model.get_input_embeddings()
    table = getattr(module, "weight", None)
    paths = [path for path, one in host.model.named_modules() if one is module]
    if not isinstance(table, Tensor) or table.ndim != 2 or not table.is_floating_point() or not paths:
        raise HostError(f"{host.name} has no table of word embeddings that can be read")
    return paths[0], table.detach().float().cpu()
