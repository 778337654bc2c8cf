"""Tiny random text-to-image pipelines, written as diffusers writes them."""

from __future__ import annotations

import json
import string
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import errata
from errata.edits.weight import WeightEdit
from errata.host.pipelines import PipelineParts
from errata.host.text_to_image import TextToImageHost, load_pipeline

diffusers: Any = import_module("diffusers")
WINDOW = 24
"""Tokens that a text is filled up to."""
WORDS = (
    "a", "an", "of", "by", "red", "blue", "roses", "pack", "dog", "cat", "house", "art", "painting", "photo", "artist",
    "monet", "vase", "doctor", "woman", "man", "on", "road", "the", "image", "picture", "portrait",
)  # fmt: skip


@lru_cache(maxsize=1)
def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Letters, and some words as one token each."""
    pieces = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            left, right = parts[0], parts[1]
            if (left, right) not in merges:
                merges.append((left, right))
            parts = [left + right, *parts[2:]]
            if parts[0] not in pieces:
                pieces.append(parts[0])
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    return {piece: i for i, piece in enumerate(pieces)}, merges


def clip_tokenizer(**more: Any) -> Any:
    vocabulary, merges = _vocabulary()
    made: dict[str, Any] = {"vocab": dict(vocabulary), "merges": list(merges), "model_max_length": WINDOW}
    return CLIPTokenizer(**made, **more)


def text_config(width: int = 24, **changes: Any) -> CLIPTextConfig:
    size = len(_vocabulary()[0])
    settings: dict[str, Any] = {
        "vocab_size": size, "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 3,
        "num_attention_heads": 4, "max_position_embeddings": WINDOW, "bos_token_id": size - 2,
        "eos_token_id": size - 1, "pad_token_id": size - 1, "projection_dim": 16, "initializer_range": 0.2,
        "initializer_factor": 4.0,
    }  # fmt: skip
    return CLIPTextConfig(**{**settings, **changes})


def unet(width: int = 24, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "block_out_channels": (8, 16), "layers_per_block": 1, "sample_size": 8, "in_channels": 4, "out_channels": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": width, "norm_num_groups": 4,
        "attention_head_dim": 4,
    }  # fmt: skip
    return diffusers.UNet2DConditionModel(**{**settings, **changes})


def _seeded(make: Any, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().eval()


def _common(seed: int) -> dict[str, Any]:
    """Return the parts that draw an image of what a denoiser gives."""
    return {
        "vae": _seeded(
            lambda: diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4),
            seed,
        ),
        "scheduler": diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
    }


def stable_diffusion(seed: int = 0) -> Any:
    """Return a live pipeline of the first Stable Diffusion's structure: CLIP text encoder, UNet."""
    without: dict[str, Any] = {
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    return diffusers.StableDiffusionPipeline(
        **_common(seed), text_encoder=_seeded(lambda: CLIPTextModel(text_config()), seed),
        tokenizer=clip_tokenizer(), unet=_seeded(unet, seed), **without,
    )  # fmt: skip


def stable_diffusion_xl(seed: int = 0) -> Any:
    """Return a live pipeline of Stable Diffusion XL's structure: two text encoders, read at the last layer but one."""
    added = {
        "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 16 + 48,
    }  # fmt: skip
    return diffusers.StableDiffusionXLPipeline(
        **_common(seed), text_encoder=_seeded(lambda: CLIPTextModel(text_config()), seed),
        text_encoder_2=_seeded(lambda: CLIPTextModelWithProjection(text_config(width=16)), seed + 1),
        tokenizer=clip_tokenizer(), tokenizer_2=clip_tokenizer(pad_token="a</w>"),
        unet=_seeded(lambda: unet(40, **added), seed),
    )  # fmt: skip


def pixart(seed: int = 0) -> Any:
    """Return a live pipeline of a transformer whose captions, read by T5, are projected before attention."""
    from transformers import T5Config, T5EncoderModel

    from tests.models import COMMON, tokenizer

    sizes: dict[str, Any] = {
        "d_model": 24,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "dropout_rate": 0.0,
    }
    return diffusers.PixArtAlphaPipeline(
        **_common(seed), tokenizer=tokenizer(),
        text_encoder=_seeded(lambda: T5EncoderModel(T5Config(**COMMON, **sizes)), seed),
        transformer=_seeded(
            lambda: diffusers.PixArtTransformer2DModel(
                num_attention_heads=2, attention_head_dim=8, num_layers=2, caption_channels=24, sample_size=8,
                cross_attention_dim=16, norm_num_groups=4, interpolation_scale=1, use_additional_conditions=False,
            ), seed,
        ),
    )  # fmt: skip


def stable_diffusion_3(seed: int = 0) -> Any:
    """Return parts of a pipeline whose text meets the image before attention, as in joint attention."""
    transformer = _seeded(
        lambda: diffusers.SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=24, caption_projection_dim=16, pooled_projection_dim=8, out_channels=4,
        ), seed,
    )  # fmt: skip
    encoder = _seeded(lambda: CLIPTextModel(text_config()), seed)
    return PipelineParts(
        "JointPipeline",
        {"text_encoder": encoder, "transformer": transformer},
        {"text_encoder": clip_tokenizer()},
        None,
    )


def edited(host: Any, requests: Any, **options: Any) -> WeightEdit:
    """Fit an edit of weights."""
    edit = errata.edit(host, requests, **options)
    assert isinstance(edit, WeightEdit)
    return edit


def fresh_pipeline(seed: int = 0) -> TextToImageHost:
    """Return a host of a live pipeline; nothing is shared with other tests."""
    return load_pipeline(stable_diffusion(seed), name="tiny text-to-image")


def written(folder: Path, pipeline: Any | None = None) -> Path:
    """Write a pipeline's folder."""
    (stable_diffusion() if pipeline is None else pipeline).save_pretrained(str(folder))
    assert (
        "unet" in json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        or pipeline is not None
    )
    return folder


def board() -> None:
    """Print the table of docs/diffusion.md: how far edits move the random pipeline's keys and values."""
    from statistics import mean

    from errata.evaluation.concepts import distances

    host = fresh_pipeline()
    paint = errata.Request("a painting by {}", "monet", "an artist")
    roses = errata.Request("a pack of {}", "roses", "blue roses")
    kept = ("a cat", "a vase", "a woman")
    rows: list[tuple[str, dict[str, Any]]] = [
        ("uce", {}), ("uce", {"erase_scale": 10}), ("uce", {"preserve": kept}),
        ("uce", {"preserve": kept, "erase_scale": 100, "preserve_scale": 100}), ("time", {}),
        ("time", {"padding": False}), ("refact", {}),
        ("refact", {"similarity": "cosine", "layer": 0, "learning_rate": 0.3}),
    ]  # fmt: skip
    print("| | settings | distance left | preserved moved | others moved |\n|---|---|---|---|---|")
    for name, options in rows:
        edit = edited(host, roses if name == "time" else paint, method=name, **options)
        found = distances(host, edit, preserved=kept)
        moved = [mean(one.moved for one in found if one.kind == kind) for kind in ("preserved", "other")]
        named = {key: "[...]" if key == "preserve" else value for key, value in options.items()}
        said = ", ".join(f"`{key}={value}`" for key, value in named.items())
        print(f"| `{name}` | {said} | {found[0].left:.3f} | {moved[0]:.3f} | {moved[1]:.3f} |")


if __name__ == "__main__":
    board()
