"""Open a model of any kind: the lab's, a saved one, or one that is in memory."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from torch import nn

from errata import lab
from errata.errors import ConfigError
from errata.host.host import Host
from errata.host.images import is_image_classifier, load_images
from errata.host.open import load as open_host
from errata.host.text_to_image import is_pipeline, load_pipeline
from errata.stats.corpora import as_corpus
from errata.types import Corpus


def load(
    model: str | os.PathLike[str] | nn.Module, tokenizer: Any = None, *, device: str = "auto",
    dtype: Any = "auto", revision: str | None = None, trust_remote_code: bool = False,
    corpus: str | os.PathLike[str] | Corpus | None = None,
) -> Host:  # fmt: skip
    """Open a model: one of the lab's, a hub name, a folder, or a live transformers model with its tokenizer.

    A model that reads text opens as a ``Host``: a causal or masked language model, an encoder-decoder, a text
    classifier. An image classifier, in a folder or live without tokenizer, opens as an ``ImageHost``; a pipeline of
    ``diffusers`` that draws images, in a folder or live, as a ``TextToImageHost``.
    ``host.kind`` names the kind, and a method's ``hosts`` those that it edits. ``"lab"``, ``"lab-t5"``
    and the others of ``errata.lab.MODELS`` are always the embedded models; a folder of that name is ``"./lab"``.
    ``device``: auto, cpu, cuda, cuda:N. ``dtype``:
    auto, float32, float16, bfloat16. ``corpus``: a text file, or an ``errata.types.Corpus``, that fits and
    evaluations of this host take statistics and neutral text from unless told otherwise; ``host.resources`` holds it.
    Raises HostError when the model cannot be opened or cannot be trusted to be edited, DataError for a corpus that
    cannot be read.
    """
    host = _open(
        model, tokenizer, device=device, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code
    )
    if corpus is not None:
        host.resources = replace(host.resources, corpus=as_corpus(corpus), neutral_texts=None)
    return host


def _open(
    model: str | os.PathLike[str] | nn.Module, tokenizer: Any, *, device: str, dtype: Any,
    revision: str | None, trust_remote_code: bool,
) -> Host:  # fmt: skip
    if isinstance(model, str) and model in lab.MODELS:
        return lab.load(model, device=device, dtype=dtype)
    if is_pipeline(model):
        if tokenizer is not None:
            raise ConfigError("a text-to-image pipeline has its own tokenizer; leave it out")
        pipeline: Any = load_pipeline(model, device=device, dtype=dtype)
        return pipeline
    if is_image_classifier(model):
        if tokenizer is not None:
            raise ConfigError("an image classifier takes no tokenizer; leave it out")
        images: Any = load_images(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        return images  # a host all the same for edits, which ask for what a ModelHost has
    return open_host(
        model, tokenizer, device=device, dtype=dtype, revision=revision,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
