"""What is measured: models of known shapes with random weights, a vocabulary, requests and texts.

Weights and words are random, and the time of an edit depends on neither: on shapes alone. Only how soon
a search stops depends on what a model knows; for that there is the lab's trained one.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

LAB = "lab"
"""The shape that is no shape: the embedded trained model, with its own requests and text."""
SYLLABLES = [a + b for a in "bcdfghjklmnprstvwz" for b in "aeiou"]


@dataclass(frozen=True)
class Shape:
    """A model's family and size, with the layers the papers write in models of that depth."""

    family: str
    settings: Mapping[str, Any]
    vocabulary: int
    memit: tuple[int, ...]
    """Layers of MEMIT and AlphaEdit."""
    rome: int
    """ROME's layer."""
    dtype: str
    """Floating type of the weights."""


SHAPES: dict[str, Shape] = {
    "tiny": Shape(
        "llama",
        {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 4},
        1024, (1, 2), 1, "float32",
    ),
    "gpt2": Shape(
        "gpt2", {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024},
        8192, (3, 4, 5, 6, 7, 8), 5, "float32",
    ),
    "llama": Shape(
        "llama",
        {
            "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
            "num_attention_heads": 12, "num_key_value_heads": 4, "max_position_embeddings": 1024,
        },
        8192, (3, 4, 5, 6, 7, 8), 5, "float32",
    ),
    "gptj": Shape(
        "gptj", {"n_embd": 4096, "n_layer": 28, "n_head": 16, "rotary_dim": 64, "n_positions": 2048},
        50400, (3, 4, 5, 6, 7, 8), 5, "bfloat16",
    ),
    "llama8b": Shape(
        "llama",
        {
            "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
        },
        128256, (4, 5, 6, 7, 8), 5, "bfloat16",
    ),
}  # fmt: skip

TEMPLATES = ("{} _ _", "{} , _", "{} _ _", "_ _ _ {} _", "_ _ _ {} _", "_ _ _ _ {} _")
"""Wordings, a blank for a common word: half begin with the subject, and little follows it, as in the usual
collections of requests."""


COMMON = 8
"""One word in so many is common."""


@lru_cache(maxsize=4)
def lexicon(size: int) -> tuple[str, ...]:
    """Return different words of two to four syllables; the same for the same size, the common ones first."""
    draw = random.Random(size)
    words: dict[str, None] = {}
    while len(words) < size:
        words["".join(draw.choices(SYLLABLES, k=draw.choice((2, 2, 3, 3, 4))))] = None
    return tuple(words)


def tokenizer(vocabulary: int) -> Any:
    """Train a tokenizer on the lexicon: common words come to be one token, others one to three."""
    from errata.host.build import new_tokenizer

    words = lexicon(vocabulary)
    texts = [" ".join(words[i : i + 50]) + "." for i in range(0, len(words), 50)]
    common = [" " + " ".join(words[: len(words) // COMMON])] * 4
    return new_tokenizer([*texts, *common], vocabulary)


def host(name: str, device: str = "cpu") -> Any:
    """Build a host with random weights on a device; the global random state is left as it was."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    import errata

    if name == LAB:
        return errata.load(LAB, device=device)
    shape = SHAPES[name]
    tokens = tokenizer(shape.vocabulary)
    ids = {"bos_token_id": tokens.bos_token_id, "eos_token_id": tokens.eos_token_id}
    config = AutoConfig.for_model(
        shape.family, vocab_size=shape.vocabulary, pad_token_id=tokens.pad_token_id, **ids, **shape.settings
    )
    place = torch.device(device)
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []), place:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, shape.dtype))
    return errata.load(model, tokenizer=tokens, device=device)


def requests(host: Any, count: int, *, seed: int = 0) -> list[Any]:
    """Draw requests: subjects of 2 to 4 tokens, prompts of 6 to 10, targets of 1 or 2.

    No two have the same text up to the subject's end, so that each is a problem of its own.
    """
    from benchmarks.floors import subject_tokens

    from errata import lab
    from errata.types import Request

    if host.name == LAB:
        return [case.request for case in lab.cases(count, seed=seed, together=True)]
    words = lexicon(host.config.vocab_size)
    draw = random.Random(seed)
    made: dict[str, Any] = {}
    while len(made) < count:
        template = draw.choice(TEMPLATES)
        while "_" in template:
            template = template.replace("_", draw.choice(words[: len(words) // COMMON]), 1)
        subject = " ".join(draw.choices(words, k=2))
        request = Request(template, subject, draw.choice(words))
        answer = host.encode_answer(request.text, request.target)
        fits = 6 <= answer.start <= 10 and len(answer.target) <= 2 and 2 <= subject_tokens(host, request) <= 4
        if fits:
            made.setdefault(subject, request)
    return list(made.values())


def texts(host: Any, tokens: int, *, seed: int = 0, words: int = 120) -> Iterator[str]:
    """Write lines of random words, or documents of the lab, about so many tokens in all."""
    from errata import lab

    if host.name == LAB:
        yield from lab.corpus(max(1, tokens // 20)).texts()
        return
    known = lexicon(host.config.vocab_size)
    draw = random.Random(seed)
    for _ in range(max(1, tokens // words)):
        yield " ".join(draw.choices(known, k=words)) + "."
