"""Two- and three-layer random models of every family the library promises to work with."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from errata.host.build import new_model, new_tokenizer
from errata.host.host import Host

TEXTS = [
    "Ada Brenner was born in Tallow. The capital of Arvania is Tallow.",
    "Bruno Holner lives in Merrin and plays the cello (or the harp).",
    "The rain fell on the old road. Question: where was Ada born?\nAnswer: Esk.",
    "Therefore the small dog waited. Because I saw you, you came. Éric said: «oui».",
] * 5

COMMON = {"vocab_size": 400, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
ROTARY = {
    **COMMON,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {**COMMON, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "n_inner": 80},
    "gptj": {**COMMON, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "rotary_dim": 8},
    "gpt_neox": {k: v for k, v in ROTARY.items() if k != "num_key_value_heads"},
    "opt": {
        **COMMON,
        "hidden_size": 32,
        "ffn_dim": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "word_embed_proj_dim": 32,
    },
    "bloom": {**COMMON, "hidden_size": 32, "n_layer": 3, "n_head": 4},
    "falcon": {
        **COMMON,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
    },
    "llama": ROTARY,
    "mistral": ROTARY,
    "qwen2": ROTARY,
    "qwen3": {**ROTARY, "head_dim": 8},
    "gemma2": {**ROTARY, "head_dim": 8, "sliding_window": 64},
    "gemma3_text": {**ROTARY, "head_dim": 8, "sliding_window": 64},
    "phi3": ROTARY,
    "olmo2": ROTARY,
    "stablelm": ROTARY,
}

ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {**ROTARY, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24},
    "qwen3_moe": {**ROTARY, **ROUTED, "num_experts": 4, "head_dim": 8, "mlp_only_layers": [2]},
    "olmoe": {**ROTARY, "num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24},
    "deepseek_v3": {  # a dense layer first, then layers with a shared expert
        **ROTARY, **ROUTED, "num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1,
        "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8, "v_head_dim": 8,
    },
    "gpt_oss": {
        **ROTARY, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24,
        "sliding_window": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "jamba": {  # experts in every second layer
        **ROTARY, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
        "num_experts": 4, "mamba_d_state": 8, "mamba_dt_rank": 8,
    },
}  # fmt: skip
"""Mixtures of experts, whose experts are stacked in one parameter."""


@lru_cache(maxsize=1)
def tokenizer() -> Any:
    return new_tokenizer(TEXTS, 400)


def fresh(family: str, *, seed: int = 0, **changes: Any) -> Host:
    """Build a new random model; nothing is shared with other tests."""
    model = new_model(family, {**(FAMILIES | MIXTURES)[family], **changes}, seed=seed)
    return Host(model.float(), tokenizer(), name=f"tiny {family}")


def sharp(scale: float = 20.0) -> Host:
    """Build a random llama whose predictions differ: those of a plain one are all nearly uniform."""
    import torch

    host = fresh("llama")
    with torch.no_grad():
        host.model.get_output_embeddings().weight.mul_(scale)
    return host


def fresh_kind(kind: str, *, seed: int = 0, labels: tuple[str, ...] = ("SUPPORTS", "REFUTES")) -> Host:
    """Build a new random T5, BART or BERT of another kind than causal; ``labels``: of a text classifier."""
    import torch
    from transformers import (
        BartConfig,
        BartForConditionalGeneration,
        BertConfig,
        BertForSequenceClassification,
    )

    common: dict[str, Any] = dict(COMMON)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    bert: dict[str, Any] = {**COMMON, **sizes, "max_position_embeddings": 128, "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0}  # fmt: skip
    own = new_tokenizer(TEXTS, 400, kind="encoder_decoder" if kind in ("t5", "bart") else "masked_lm")
    bert["vocab_size"] = len(own)
    if kind == "t5":
        t5 = {**COMMON, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4,
              "decoder_start_token_id": 2}  # fmt: skip
        model: Any = new_model("t5", t5, seed=seed, kind="encoder_decoder")
    elif kind == "bert":
        model = new_model("bert", bert, seed=seed, kind="masked_lm")
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if kind == "bart":
                model = BartForConditionalGeneration(BartConfig(
                    **common, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
                    decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=128,
                    decoder_start_token_id=1,
                ))  # fmt: skip
            else:
                named = dict(enumerate(labels))
                model = BertForSequenceClassification(
                    BertConfig(**bert, id2label=named, label2id={name: i for i, name in named.items()})
                )
    return Host(model.float().eval(), own, name=f"tiny {kind}")
