"""Make new models and tokenizers: for the lab, and for tests that need a family in miniature."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from errata.errors import ConfigError
from errata.host.kinds import CAUSAL, ENCODER_DECODER, MASKED
from errata.registry import unknown

if TYPE_CHECKING:
    from torch import nn

BEGIN, END, PAD, MASK = "<|begin|>", "<|end|>", "<|pad|>", "<|mask|>"

VISION_LANGUAGE = "vision_language"
"""Stands for a causal language model with an image tower before it, among kinds of models to make."""
_TEMPLATES = {
    CAUSAL: (f"{BEGIN} $A", f"{BEGIN} $A $B"),
    ENCODER_DECODER: (f"$A {END}", f"$A {END} $B {END}"),
    MASKED: (f"{BEGIN} $A {END}", f"{BEGIN} $A {END} $B {END}"),
}
"""What a tokenizer puts around a text, and around two, by kind of model."""
_CLASSES = {
    CAUSAL: "AutoModelForCausalLM",
    ENCODER_DECODER: "AutoModelForSeq2SeqLM",
    MASKED: "AutoModelForMaskedLM",
    VISION_LANGUAGE: "AutoModelForImageTextToText",
}
"""The transformers class that makes a model of a kind."""


def new_tokenizer(texts: Iterable[str], vocab_size: int, *, kind: str = CAUSAL) -> Any:
    """Train a byte-level BPE tokenizer for a kind of model; the vocabulary is the same for all.

    Of a causal model, it puts a begin token before every text. Of an encoder-decoder it closes every text with the end
    token, and of a masked model it does both and knows a mask, one token more. For these two the first word of a text
    has the token it has inside a line, since their answers are texts of their own.

    Returns a fast transformers tokenizer with begin, end and padding tokens. Deterministic in the
    order and content of ``texts``. Raises ConfigError for another kind of model.
    """
    if kind not in _TEMPLATES:
        raise ConfigError(unknown(kind, list(_TEMPLATES), "kind of model with a tokenizer of its own"))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BEGIN, END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    if kind != CAUSAL:
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    single, pair = _TEMPLATES[kind]
    core.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=single,
                pair=pair,
                special_tokens=[(t, core.token_to_id(t)) for t in (BEGIN, END) if t in pair],
            ),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )
    if kind == MASKED:
        mask: Any = AddedToken(MASK, lstrip=True, special=True)
        tokenizer.add_special_tokens({"mask_token": mask})
    return tokenizer


def new_model(model_type: str, settings: Mapping[str, Any], *, seed: int, kind: str = CAUSAL) -> nn.Module:
    """Build a model of a kind with random weights from a family name and its settings.

    The global random state is left as it was. Raises ConfigError for another kind of model.
    """
    import torch
    import transformers

    if kind not in _CLASSES:
        raise ConfigError(unknown(kind, list(_CLASSES), "kind of model to make"))
    config = transformers.AutoConfig.for_model(model_type, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return getattr(transformers, _CLASSES[kind]).from_config(config)


def new_picture_processor(tokenizer: Any, *, side: int, patch: int, token: str) -> Any:
    """Return a processor of LLaVA's kind: square pictures of ``side`` pixels, a token for each patch.

    ``token`` is added to the tokenizer. Needs Pillow.
    """
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer.add_special_tokens({"extra_special_tokens": [token]})
    half = [0.5, 0.5, 0.5]
    images = CLIPImageProcessorPil(
        size={"height": side, "width": side}, do_center_crop=False, image_mean=half, image_std=half
    )
    return LlavaProcessor(
        images, tokenizer, patch_size=patch, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, image_token=token,
    )  # fmt: skip
