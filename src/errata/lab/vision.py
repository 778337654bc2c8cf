"""The lab's vision-language model: an image tower and its projector before the lab's own decoder.

The decoder is that of ``lab``, unchanged, so all that it knows can be asked about what is in a picture, and only the
image tower is trained (:mod:`errata.lab.vision_training`) and stored.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file
from torch import nn

from errata.host.build import VISION_LANGUAGE, new_picture_processor
from errata.host.build import new_model as new
from errata.lab import pictures
from errata.types import IMAGE

if TYPE_CHECKING:
    from errata.host.host import Host

SHAPE = "llava"
"""The architecture, as ``errata lab train --shape`` names it."""
PATCH = 16
TOKENS = (pictures.SIDE // PATCH) ** 2
"""Tokens of a picture."""


@dataclass(frozen=True)
class VisionConfig:
    """All settings that determine the weights of the image tower and its projector."""

    shape: str = SHAPE
    """Architecture."""
    seed: int = 0
    """Seed of the initial weights and of the order of examples."""
    width: int = 128
    """Width of the image tower."""
    inner: int = 512
    """Inner width of its feed-forward."""
    layers: int = 4
    """Its blocks."""
    heads: int = 4
    """Its attention heads."""
    aligned: int = 1_200
    """Steps of the first part: pictures to names."""
    steps: int = 1_900
    """Steps of both parts."""
    cooled: int = 1_550
    """Step at which the rate first reaches zero; the rest is a second decay."""
    reheat: float = 0.7
    """Rate at the start of that second decay, in peak rates of the second part."""
    pictures: int = 96
    """Pictures per step of the first part."""
    rows: int = 24
    """Questions per step of the second part."""
    learning_rate: float = 2e-3
    """Peak rate of AdamW in the first part; linear warm-up, then linear decay to a tenth."""
    second_rate: float = 2e-4
    """Peak rate in the second part; linear warm-up, then linear decay to zero by ``cooled``."""
    warmup: int = 100
    """Steps of each warm-up."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""


# --- the model ------------------------------------------------------------------------------


def new_model(config: VisionConfig, decoder: Host) -> tuple[Any, Any]:
    """Return the model with a new image tower before the decoder of a host, and its processor.

    The host's tokenizer is used up: it gets the image token, which takes a row of the embeddings that no token of the
    vocabulary has. The global random state is left as it was.
    """
    processor = new_picture_processor(decoder.tokenizer, side=pictures.SIDE, patch=PATCH, token=IMAGE)
    settings = {
        "text_config": decoder.config.to_dict(),
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": config.width, "intermediate_size": config.inner,
            "num_hidden_layers": config.layers, "num_attention_heads": config.heads, "hidden_act": "gelu",
            "image_size": pictures.SIDE, "patch_size": PATCH, "projection_dim": config.width,
        },
        "image_token_index": len(decoder.tokenizer) - 1, "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default", "image_seq_length": TOKENS, "tie_word_embeddings": True,
    }  # fmt: skip
    model: Any = new(config.shape, settings, seed=config.seed, kind=VISION_LANGUAGE)
    model.get_decoder().load_state_dict(decoder.model.model.state_dict())
    model.tie_weights()
    return model.float().eval(), processor


def eyes(model: Any) -> nn.ModuleDict:
    """Return what is trained of a model: its image tower and projector."""
    return nn.ModuleDict({"tower": model.model.vision_tower, "projector": model.model.multi_modal_projector})


def assemble(folder: Path, decoder: Host) -> tuple[Any, Any]:
    """Return the model of a folder that holds the image tower alone, before a host's decoder, and its processor."""
    settings = json.loads((folder / "vision.json").read_text(encoding="utf-8"))
    model, processor = new_model(VisionConfig(**settings), decoder)
    weights = {name: value.float() for name, value in load_file(folder / "vision.safetensors").items()}
    eyes(model).load_state_dict(weights)
    return model, processor
