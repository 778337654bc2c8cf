"""Which codec a model has: causal, encoder-decoder, or one that fills places, by its structure."""

from __future__ import annotations

from typing import Any

from errata.errors import HostError
from errata.host.codec import CausalCodec, Codec
from errata.host.pictures import PictureCodec, is_processor
from errata.host.seq2seq import EncoderDecoderCodec, is_encoder_decoder
from errata.host.slots import slot_codec


def codec_for(model: Any, tokenizer: Any, *, name: str) -> Codec:
    """Return the codec of a model's kind, detected by its structure; ``name``: the host's, for messages.

    ``tokenizer``: that of the model, or its processor of text and pictures. Raises HostError for an encoder-decoder
    that predicts no tokens.
    """
    if is_processor(tokenizer):
        if slot_codec(model) is None and not is_encoder_decoder(model):
            return PictureCodec(model, tokenizer, name=name)
        tokenizer = tokenizer.tokenizer
    slots = slot_codec(model)
    if slots is not None:
        return slots(model, tokenizer, name=name)
    if not is_encoder_decoder(model):
        return CausalCodec(model, tokenizer, name=name)
    if model.get_output_embeddings() is None:
        raise HostError(
            f"{type(model).__name__} is an encoder-decoder without a language modelling head; "
            "open it as AutoModelForSeq2SeqLM does"
        )
    return EncoderDecoderCodec(model, tokenizer, name=name)
