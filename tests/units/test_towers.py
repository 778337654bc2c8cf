"""Vision-language models: the language tower is found by structure, whatever it is called, and edited as any model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import errata
from errata.host.host import Host
from tests.models import COMMON, ROTARY, tokenizer
from tests.pictures import QWEN_VISION, ROPE, VISION

REQUEST = errata.Request("{} was born in", "Ada Brenner", "Merrin")
TEXT = {**ROTARY, "num_hidden_layers": 2}
HEADS = {**TEXT, "head_dim": 8}
AXES = {"rope_parameters": {**ROPE, "mrope_section": [1, 1, 2]}}
IDS = {
    "image_token_id": 3, "image_token_index": 3, "video_token_id": 4, "vision_start_token_id": 5,
    "vision_end_token_id": 6,
}  # fmt: skip
LINEAR = {
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip
MLLAMA_VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 4,
    "image_size": 28, "patch_size": 14, "vision_output_dim": 64, "intermediate_layers_indices": [0],
}  # fmt: skip
LLAMA4_VISION = {
    **VISION, "intermediate_size": 128, "vision_output_dim": 64, "projector_input_dim": 64,
    "projector_output_dim": 64,
}  # fmt: skip
FLAT = {k: v for k, v in TEXT.items() if k != "num_key_value_heads"}


def of(text: str, vision: str | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings of a language model and of an image tower by their families."""
    return {"model_type": text, **TEXT}, {**({"model_type": vision} if vision else {}), **VISION}


def both(text: dict[str, Any], vision: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"text_config": text, "vision_config": vision, **IDS, **more}


MODEL = "model.language_model.layers.0."
FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "llava": (both(*of("llama", "clip_vision_model")), MODEL + "mlp.down_proj"),
    "llava_next": (both(*of("llama", "clip_vision_model")), MODEL + "mlp.down_proj"),
    "llava_onevision": (both(*of("qwen2", "siglip_vision_model")), MODEL + "mlp.down_proj"),
    "qwen2_vl": (both({**TEXT, **AXES}, QWEN_VISION), MODEL + "mlp.down_proj"),
    "qwen2_5_vl": (both({**TEXT, **AXES}, QWEN_VISION), MODEL + "mlp.down_proj"),
    "qwen3_vl": (both({**HEADS, **AXES}, QWEN_VISION), MODEL + "mlp.down_proj"),
    "qwen3_5": (both({**HEADS, **LINEAR}, QWEN_VISION), MODEL + "mlp.down_proj"),
    "gemma3": (both({**HEADS, "sliding_window": 64}, VISION, mm_tokens_per_image=4), MODEL + "mlp.down_proj"),
    "gemma4": (
        both(
            {
                **HEADS, "sliding_window": 64, "vocab_size_per_layer_input": 400, "hidden_size_per_layer_input": 8,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            VISION, audio_config=None,
        ),
        MODEL + "mlp.down_proj",
    ),
    "idefics3": (both(*of("llama"), scale_factor=2), "model.text_model.layers.0.mlp.down_proj"),
    "smolvlm": (both(*of("llama"), scale_factor=2), "model.text_model.layers.0.mlp.down_proj"),
    "mllama": (
        both({**TEXT, "num_hidden_layers": 3, "cross_attention_layers": [1], "rope_parameters": ROPE}, MLLAMA_VISION),
        MODEL + "mlp.down_proj",
    ),
    "internvl": (
        both(of("qwen2")[0], {**VISION, "image_size": [28, 28], "patch_size": [14, 14]}), MODEL + "mlp.down_proj"
    ),
    "mistral3": (both(*of("mistral", "pixtral")), MODEL + "mlp.down_proj"),
    "glm4v": (
        both(
            {**TEXT, "rope_parameters": {**ROPE, "mrope_section": [1, 1, 2], "partial_rotary_factor": 1.0}}, QWEN_VISION
        ),
        MODEL + "mlp.down_proj",
    ),
    "ovis2": (
        both(
            of("qwen2")[0], {**VISION, "vocab_size": 64}, visual_indicator_token_ids=[5, 6, 7, 8, 9], vocab_size=400,
            hidden_size=32,
        ),
        MODEL + "mlp.down_proj",
    ),
    "llama4": (  # an expert layer above a dense one
        both(
            {
                **HEADS, "intermediate_size_mlp": 80, "num_local_experts": 2, "interleave_moe_layer_step": 2,
                "moe_layers": [1], "attention_chunk_size": 64,
            },
            LLAMA4_VISION,
        ),
        "language_model.model.layers.0.feed_forward.down_proj",
    ),
    "aya_vision": (both(*of("cohere2", "siglip_vision_model"), downsample_factor=1), MODEL + "mlp.down_proj"),
    "deepseek_vl": (both(*of("llama", "siglip_vision_model")), MODEL + "mlp.down_proj"),
    "fuyu": (
        {"text_config": {"model_type": "persimmon", **FLAT}, **FLAT, "patch_size": 14, "image_size": 28, **IDS},
        MODEL + "mlp.dense_4h_to_h",
    ),
    "git": (
        {
            **COMMON, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
            "max_position_embeddings": 128, "vision_config": VISION,
        },
        "git.encoder.layer.0.output.dense",
    ),
}  # fmt: skip


def model(family: str) -> Any:
    """Build a random vision-language model."""
    config = transformers.AutoConfig.for_model(family, **FAMILIES[family][0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.AutoModelForImageTextToText.from_config(config).float().eval()


def towers(host: Host) -> dict[str, torch.Tensor]:
    """Return copies of all weights outside the language tower's blocks."""
    inside = host.layout.blocks[0].rsplit(".", 1)[0]
    return {n: p.detach().clone() for n, p in host.model.named_parameters() if not n.startswith(inside)}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_language_tower_is_found_by_structure(family):
    host = errata.load(model(family), tokenizer())
    sites = [site.name for site in host.layout.mlp_out if site is not None]
    assert sites[0] == FAMILIES[family][1]
    assert host.layout.width == 32


@pytest.mark.slow
@pytest.mark.parametrize("method", ["memit", "grace", "ft"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_edit_is_fitted_saved_placed_and_taken_off(family, method, tmp_path):
    host = errata.load(model(family), tokenizer())
    start, others = host.weights_hash(), towers(host)
    row = host.encode_prompt(REQUEST.text)
    more: dict[str, Any] = {"tokens": 300} if method == "memit" else {}
    edit = errata.edit(host, REQUEST, method=method, steps=3, **more)
    edit.save(tmp_path / "edit.safetensors")
    again = errata.Edit.load(tmp_path / "edit.safetensors")
    with torch.no_grad():
        before = host.forward(host.batch([row]))
        with again.on(host):
            assert not torch.equal(host.forward(host.batch([row])), before)
            assert all(torch.equal(p, others[n]) for n, p in host.model.named_parameters() if n in others)
        assert torch.equal(host.forward(host.batch([row])), before)
    assert host.weights_hash() == start
