"""What a model's generation settings mean: which tokens end a text, and whether greedy text is plain."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from errata.host.text import TextHost

HARMLESS = frozenset(
    (
        # sampling
        "do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff",
        # beams, of which there is one
        "num_beams", "num_beam_groups", "early_stopping", "length_penalty", "diversity_penalty",
        "num_return_sequences",
        # lengths and ends, which callers give
        "max_length", "max_new_tokens", "max_time", "pad_token_id", "bos_token_id", "eos_token_id",
        "decoder_start_token_id",
        # caches, compiling and drafts: how the same text is computed
        "use_cache", "cache_implementation", "cache_config", "max_cache_len", "compile_config", "disable_compile",
        "continuous_batching_config", "prefill_chunk_size", "low_memory", "use_mtp", "is_assistant",
        "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
        "prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind",
        "target_lookbehind", "assistant_ensemble_weight", "speculation_type",
        # what is returned
        "output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate",
        "renormalize_logits", "transformers_version",
    )
)  # fmt: skip
"""Settings of generation that leave greedy text as it is. Any other field of transformers' GenerationConfig may change
it where it is not at its default, also one that a later version adds."""


@lru_cache(maxsize=1)
def plain_values() -> dict[str, Any]:
    """Return transformers' defaults of the settings of generation that may change greedy text."""
    from transformers import GenerationConfig

    config = GenerationConfig()
    # a new config leaves its fields open; transformers documents their defaults elsewhere
    defaults = getattr(config, "_get_default_generation_params", dict)()
    fields = {**vars(config), **defaults}
    return {
        name: value for name, value in fields.items() if name not in HARMLESS and not name.startswith("_")
    }


def end_tokens(host: TextHost) -> frozenset[int]:
    """Return the ids that end a text, by the model's generation settings and by the tokenizer."""
    setting = getattr(getattr(host.model, "generation_config", None), "eos_token_id", None)
    ids = setting if isinstance(setting, (list, tuple)) else [setting]
    own = getattr(host.tokenizer, "eos_token_id", None)
    return frozenset(int(token) for token in (*ids, own) if token is not None)


def departures(host: TextHost) -> dict[str, Any]:
    """Return the model's generation settings that may change greedy text: each time the most probable token."""
    config = getattr(host.model, "generation_config", None)
    found: dict[str, Any] = {}
    for name, default in plain_values().items():
        value = getattr(config, name, None)
        if (
            value is not None and value != default and (value or default)
        ):  # 0, False and [] are off where None is
            found[name] = value
    return found


def is_plain(host: TextHost) -> bool:
    """Whether the model's generation settings leave greedy text as it is."""
    return not departures(host)
