"""The kinds of model that can be opened, by name: what each reads, what it answers with, what it lacks."""

from __future__ import annotations

from dataclasses import dataclass

from errata.errors import ConfigError, HostError
from errata.registry import unknown

CAUSAL, ENCODER_DECODER = "causal_lm", "encoder_decoder"
MASKED, CLASSIFIER, IMAGES = "masked_lm", "sequence_classifier", "image_classifier"
TEXT_TO_IMAGE = "text_to_image"
TEXT_HOSTS = (CAUSAL, ENCODER_DECODER, MASKED, CLASSIFIER)
"""Kinds that read text and score an answer to it, which is all that fine-tuning needs."""


@dataclass(frozen=True)
class Kind:
    """A kind of model, as methods name it in ``hosts``."""

    name: str
    """Registered name."""
    title: str
    """One of them, in tables."""
    plural: str
    """Several of them, in messages."""
    lacks: str = ""
    """Why methods made for causal language models do not edit it."""


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(CAUSAL, "language model", "causal language models"),
        Kind(
            ENCODER_DECODER, "encoder-decoder", "encoder-decoders",
            "subject and answer are read and written by two stacks, and the method needs both in one row of one stack",
        ),
        Kind(
            MASKED, "masked language model", "masked language models",
            "it fills masks and continues no text, so there is no text of its own to take contexts and statistics from",
        ),
        Kind(
            CLASSIFIER, "text classifier", "text classifiers",
            "its answer is a label and no token, so there is no text to continue",
        ),
        Kind(IMAGES, "image classifier", "image classifiers", "it reads images and answers with a label"),
        Kind(
            TEXT_TO_IMAGE, "text-to-image pipeline", "text-to-image pipelines",
            "it reads a text and draws an image, so there is no answer in words to train or to ask for",
        ),
    )
}  # fmt: skip


def check_asked(name: str, own: str, what: str) -> None:
    """Raise HostError where ``what`` asks for answers in words and a model of a kind draws images."""
    if own == TEXT_TO_IMAGE:
        raise HostError(
            f"{name} is a text-to-image pipeline: it reads a text and draws an image, and {what} asks for answers in "
            "words"
        )


def kind(name: str) -> Kind:
    """Return a kind by its name. Raises ConfigError for one that is not known."""
    if name not in KINDS:
        raise ConfigError(unknown(name, list(KINDS), "kind of model"))
    return KINDS[name]
