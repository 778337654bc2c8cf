"""Attention weights of a model while it runs: shown, and with an output put in place of a layer's.

Kernels keep no weights, so the model computes attention by its family's own plain function meanwhile, as
transformers' ``eager`` does; numbers agree to rounding. Also how many heads a layer's attention has.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from errata.errors import HostError
from errata.host.host import Host
from errata.host.layout import Site

NAME = "errata_weights"
"""Under which the function is registered with transformers."""
PLAIN = "eager_attention_forward"
"""What a family's module calls its plain attention."""


@dataclass(frozen=True, eq=False)
class Attended:
    """What one layer's attention computes."""

    weights: Tensor
    """``[rows, heads, queries, keys]``."""
    values: Tensor
    """Of each head ``[rows, heads, keys, d]``."""
    output: Tensor
    """Weights times values ``[rows, queries, heads, d]``, before the output projection."""


Act = Callable[[int, Attended], Tensor | None]
"""Given a layer and what it computes; what it returns, unless None, takes the output's place."""

_ACT: ContextVar[Callable[[nn.Module, Attended], Tensor | None] | None] = ContextVar(
    "errata_attention", default=None
)


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **settings: Any) -> Any:
    """Compute attention as the module's family does, and let what is in place see it."""
    plain = getattr(sys.modules[type(module).__module__], PLAIN)
    output, weights = plain(module, query, key, value, mask, **settings)
    act = _ACT.get()
    if act is None:
        return output, weights
    values = value.repeat_interleave(weights.shape[1] // value.shape[1], 1)
    changed = act(module, Attended(weights, values, output))
    return (output if changed is None else changed), weights


def head_count(host: Host, site: Site) -> int | None:
    """Return how many heads' outputs, side by side, an attention's output map reads.

    None where something else mixes the tokens: a state space, a recurrence, a convolution, linear attention.
    """
    config = host.text_config
    count = getattr(config, "num_attention_heads", None)
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
    kind = str(kinds[site.layer]) if site.layer < len(kinds) else "attention"
    attends = kind == "hybrid" or (kind.endswith("attention") and kind != "linear_attention")
    return int(count) if attends and count and site.d_in % count == 0 else None


@contextmanager
def attending(host: Host, act: Act) -> Iterator[None]:
    """Show every layer's attention to ``act`` inside the block.

    Raises HostError for a family whose attention is not exchangeable in transformers.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    layers = _modules(host)
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, eager_mask)
    configs = list({id(one.config): one.config for one in [host.model, *layers]}.values())
    before = [config._attn_implementation for config in configs]
    token = _ACT.set(lambda module, attended: act(layers[module], attended) if module in layers else None)
    try:
        for config in configs:
            config._attn_implementation = NAME
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name
        _ACT.reset(token)


def _modules(host: Host) -> dict[Any, int]:
    """Return the attention of each block with its layer."""
    found: dict[Any, int] = {}
    for layer, block in enumerate(host.layout.blocks):
        own = [
            module for module in host.model.get_submodule(block).modules()
            if hasattr(module, "layer_idx") and hasattr(module, "config")
            and hasattr(sys.modules[type(module).__module__], PLAIN)
        ]  # fmt: skip
        if len(own) != 1:
            raise HostError(
                f"{host.name} does not show its attention weights ({host.family}): its attention is not one that "
                "transformers lets exchange; use errata trace --edges"
            )
        found[own[0]] = layer
    return found
