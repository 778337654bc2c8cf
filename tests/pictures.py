"""Random vision-language models with the processors of their families, and pictures to give them."""

from __future__ import annotations

import importlib
import io
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from errata.host.build import new_tokenizer
from errata.types import Picture
from tests.models import COMMON, ROTARY, TEXTS

TEXT = {**ROTARY, "num_hidden_layers": 2, "vocab_size": 420}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
QWEN_VISION = {
    "depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 14, "out_hidden_size": 32,
    "intermediate_size": 48, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    "fullatt_block_indexes": [0],
}  # fmt: skip
QWEN_VL = {
    "text_config": {**TEXT, "rope_parameters": {**ROPE, "mrope_section": [1, 1, 2]}}, "vision_config": QWEN_VISION,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """How a small model and a processor of a family are made."""

    settings: dict[str, Any]
    processor: str
    images: str
    """Class of its image processor, the one that needs Pillow alone."""
    options: dict[str, Any]
    """Of the image processor."""
    more: dict[str, Any]
    """Of the processor."""
    names: dict[str, str]
    """Tokens that a tokenizer of the family names."""


SMALL = {"size": {"height": 28, "width": 28}}
CLIP = {**SMALL, "do_center_crop": False}
LLAVA = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
TILES = {"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 28}}


def _both(text: str, vision: str | None, **more: Any) -> dict[str, Any]:
    own = {"model_type": vision} if vision else {}
    return {"text_config": {"model_type": text, **TEXT}, "vision_config": {**own, **VISION}, **more}


FAMILIES: dict[str, Family] = {
    "llava": Family(
        _both("llama", "clip_vision_model", vision_feature_layer=-1), "LlavaProcessor", "CLIPImageProcessorPil", CLIP,
        LLAVA, {},
    ),
    "qwen2_vl": Family(
        QWEN_VL, "Qwen2VLProcessor", "Qwen2VLImageProcessorPil",
        {"size": {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 4}}, {"video_processor": None}, {},
    ),
    "idefics3": Family(
        _both("llama", None, scale_factor=1), "Idefics3Processor", "Idefics3ImageProcessorPil", TILES,
        {"image_seq_len": 4}, {},
    ),
    "gemma3": Family(
        {**_both("gemma3_text", "siglip_vision_model", mm_tokens_per_image=4),
         "text_config": {**TEXT, "head_dim": 8, "sliding_window": 64}},
        "Gemma3Processor", "Gemma3ImageProcessorPil", SMALL, {"image_seq_length": 4},
        {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
    ),
    "internvl": Family(
        {"text_config": {"model_type": "qwen2", **TEXT},
         "vision_config": {**VISION, "image_size": [28, 28], "patch_size": [14, 14]}, "downsample_ratio": 1.0},
        "InternVLProcessor", "GotOcr2ImageProcessorPil", {**SMALL, "crop_to_patches": False},
        {"video_processor": None, "image_seq_length": 4},
        {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
         "video_token": "<video>"},
    ),
}  # fmt: skip
PLACEHOLDERS = {
    "llava": "<image>", "qwen2_vl": "<|image_pad|>", "idefics3": "<image>", "gemma3": "<image_soft_token>",
    "internvl": "<IMG_CONTEXT>",
}  # fmt: skip
"""The token in whose places features of a picture go."""
ADDED = [
    "<image>", "<|image_pad|>", "<|video_pad|>", "<start_of_image>", "<end_of_image>", "<image_soft_token>", "<img>",
    "</img>", "<IMG_CONTEXT>", "<video>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>",
    *(f"<row_{i}_col_{j}>" for i in (1, 2) for j in (1, 2)),
]  # fmt: skip


def processor(family: str) -> Any:
    """Return the family's processor over a small tokenizer."""
    own = FAMILIES[family]
    tokenizer = new_tokenizer(TEXTS, 380)
    tokenizer.add_special_tokens({"extra_special_tokens": ADDED})
    for name, token in own.names.items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    images = _image_processor(own.images)(**own.options)
    kind = _unchecked(getattr(transformers, own.processor))
    return kind(image_processor=images, tokenizer=tokenizer, **own.more)


def _unchecked(kind: Any) -> Any:
    """Return a processor's class that does without one of films, which needs torchvision."""
    return type(kind.__name__, (kind,), {"check_argument_for_proper_class": lambda *_: None})


def _image_processor(name: str) -> Any:
    import re

    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.removesuffix("ImageProcessorPil")).lower()
    return getattr(importlib.import_module(f"transformers.models.{snake}.image_processing_pil_{snake}"), name)


def model(family: str) -> tuple[Any, Any]:
    """Return a random model of a family and its processor."""
    with_pictures = processor(family)
    marker = with_pictures.tokenizer.convert_tokens_to_ids(PLACEHOLDERS[family])
    settings = {
        **FAMILIES[family].settings, "image_token_id": marker, "image_token_index": marker,
        "video_token_id": with_pictures.tokenizer.convert_tokens_to_ids("<|video_pad|>"),
    }  # fmt: skip
    config = transformers.AutoConfig.for_model(family, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.AutoModelForImageTextToText.from_config(config).float().eval(), with_pictures


def picture(colour: str = "red", side: int = 28, name: str = "") -> Picture:
    """Return a picture: a square on a ground of one colour."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (side, side), colour)
    ImageDraw.Draw(image).rectangle((4, 6, 16, 20), fill="white")
    out = io.BytesIO()
    image.save(out, "PNG")
    return Picture.of(out.getvalue(), name or f"{colour}.png")


__all__ = ["COMMON", "FAMILIES", "PLACEHOLDERS", "Family", "model", "picture", "processor"]
