"""Tiny random image classifiers, and pairs of images with a patch in common."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from errata.host.images import ImageHost
from errata.types import ImageRequest

SIDE = 32


def fresh_images(family: str, *, seed: int = 0, **changes: Any) -> ImageHost:
    """Build a new random classifier of images of 32 x 32 pixels; nothing is shared with other tests."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _vit(changes) if family == "vit" else _resnet(changes)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):  # as after training: no two channels alike
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2.0)
                module.weight.data.uniform_(0.5, 1.5)
                module.bias.data.normal_(0, 0.2)
    return ImageHost(model.float(), name=f"tiny {family}")


def _vit(changes: dict[str, Any]) -> nn.Module:
    settings = {
        "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40,
        "image_size": SIDE, "patch_size": 8, "num_labels": 5, "initializer_range": 0.2,
    }  # fmt: skip
    return ViTForImageClassification(ViTConfig(**{**settings, **changes}))


def _resnet(changes: dict[str, Any]) -> nn.Module:
    settings = {
        "embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 2], "layer_type": "basic", "num_labels": 5,
    }  # fmt: skip
    return ResNetForImageClassification(ResNetConfig(**{**settings, **changes}))


def pairs(count: int = 3, *, seed: int = 0, side: int = SIDE, **changes: Any) -> ImageRequest:
    """Draw noise images and put one texture into a square of each; the mask marks the square."""
    generator = torch.Generator().manual_seed(seed)
    original = torch.randn(count, 3, side, side, generator=generator)
    texture = torch.randn(3, side, side, generator=generator) + 1.5
    mask = torch.zeros(count, side, side)
    for i in range(count):
        mask[i, 8 + 4 * (i % 2) : 24, 4 : 20 + 2 * (i % 3)] = 1.0
    changed = torch.where(mask[:, None] > 0, texture, original)
    given = {"concept": "road", "replacement": "snow", **changes}
    return ImageRequest(original, changed, mask, **given)
