"""Another model beside a host, of the same vocabulary: a copy of it, or one built from a configuration and weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from errata.errors import HostError
from errata.host import placement
from errata.host.codec import text_config
from errata.host.host import Host
from errata.host.memory import ran_out
from errata.host.pictures import PictureCodec

LEFT_OUT = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "quantization_config")
"""Fields of a configuration that say where a model came from, not what it computes."""


def configuration(host: Host) -> dict[str, Any]:
    """Return what a model of the host's shape is built from, as plain data."""
    return {name: value for name, value in host.config.to_dict().items() if name not in LEFT_OUT}


@torch.no_grad()
def weights_of(host: Host) -> dict[str, Tensor]:
    """Return copies of a model's weights and stored buffers ``[...]`` without edits, float32, on the CPU.

    A weight that is tied to another is in it once. Raises HostError for packed weights, which cannot be read.
    """
    packed = next((name for name, module in host.model.named_modules() if placement.is_packed(module)), None)
    if packed is not None:
        raise HostError(
            f"{host.name} cannot be copied: the weights of {packed} are packed; open it unquantised"
        )
    overlays, stored = host.overlays, set(host.model.state_dict())
    named = [*host.model.named_parameters(), *host.model.named_buffers()]
    plain = {n: overlays[n].unedited(t) if n in overlays else t for n, t in named if n in stored}
    return {
        n: t.detach().to("cpu", torch.float32 if t.is_floating_point() else t.dtype, copy=True)
        for n, t in plain.items()
    }


def model_beside(host: Host, config: Mapping[str, Any], weights: Mapping[str, Tensor], *, name: str) -> Host:
    """Build a causal language model with the host's tokenizer, on its device and in its dtype.

    One with an image tower reads pictures as the host does, by its processor.

    ``config``, ``weights`` ``[...]``: as of :func:`configuration` and :func:`weights_of`. Raises HostError where they
    describe no model, or one of another vocabulary.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    values = dict(config)
    try:
        settings = AutoConfig.for_model(str(values.pop("model_type")), **values)
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            mapping: Any = AutoModelForImageTextToText._model_mapping
            shows = type(settings) in mapping and type(host.model) is mapping[type(settings)]
            kind = AutoModelForImageTextToText if shows else AutoModelForCausalLM
            model: Any = kind.from_config(settings)
        result = model.load_state_dict(dict(weights), strict=False)
    except (KeyError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        if ran_out(error):
            raise
        raise HostError(f"{name} cannot be built from its configuration and weights: {error}") from error
    needed = {n for n, _ in model.named_parameters()}
    missing = sorted(needed & set(result.missing_keys))
    if missing or result.unexpected_keys:
        what = f"no weight {missing[0]}" if missing else f"an unknown weight {result.unexpected_keys[0]}"
        raise HostError(f"{name} cannot be built from its configuration and weights: found {what}")
    own, other = (int(text_config(c).vocab_size) for c in (host.config, settings))
    if own != other:
        raise HostError(
            f"{name} has a vocabulary of {other} tokens, and {host.name} of {own}: they must be the same"
        )
    model = model.to(host.device, host.dtype)
    codec = host.codec.beside(model, name) if shows and isinstance(host.codec, PictureCodec) else None
    return Host(model, host.tokenizer, name=name, codec=codec).with_prompt_format(host.prompt_format)
