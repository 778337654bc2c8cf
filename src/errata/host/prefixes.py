"""When work on a beginning may be shared: tokens run once and continued, in attention's keys and values.

Two engines use it: :mod:`errata.host.continuing` (rows that go on from whole beginnings) and
:mod:`errata.host.partial` (only some blocks, behind tokens run before). Both may be used where

* the model keeps nothing but attention's keys and values of the tokens it has read (:func:`keeps_attention_only`),
* a trial of the engine itself gives the same numbers in one piece and in two (:func:`agree`), and
* for rows that differ behind one beginning, everything in place depends on the text alone
  (:attr:`errata.host.load.Host.shareable`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from errata.host.load import Host

SHAREABLE_LAYERS = frozenset({"full_attention", "sliding_attention"})
TRIAL_ERRORS = (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError)
"""What a model raises in a trial that keeps something else than keys and values, or takes no padding."""


def keeps_attention_only(host: Host) -> bool:
    """Whether a model takes a cache and by its configuration keeps attention's keys and values alone."""
    kinds = set(getattr(host.text_config, "layer_types", None) or ())
    stateful = bool(getattr(host.model, "_is_stateful", False))
    return "past_key_values" in host.accepts and not stateful and kinds <= SHAREABLE_LAYERS


def agree(whole: Tensor, cut: Tensor, dtype: torch.dtype) -> bool:
    """Whether a text in one piece and in two ended alike, up to the rounding of a model's ``dtype``.

    The bound is relative to the largest entry of ``whole``; both are ``[...]`` of one shape.
    """
    bound = 5e-2 if dtype in (torch.float16, torch.bfloat16) else 1e-3
    return bool((whole - cut).abs().max() <= bound * whole.abs().max())
