"""Two-tower models (CLIP) as image hosts: a pass gives the embedding of each image, classes are heads made of texts.

A head is a matrix with a row per class, the direction of the class's name in the text tower; an image is of the class
whose row its embedding is most alike. Heads are no part of the model: what edits the weights leaves them as they are.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from errata.errors import ConfigError, HostError, shown
from errata.host import files, hooks

ARCHITECTURES = ("CLIPModel",)
"""Names of the classes that are opened so."""
TEMPLATE = "a photo of a {}."
"""The prompt that a class's name stands in (CLIP's first one)."""


def names_two_towers(architectures: Any) -> bool:
    """Whether a configuration's architectures are of a two-tower model."""
    return isinstance(architectures, list) and any(one in ARCHITECTURES for one in architectures)


def is_two_towers(model: nn.Module) -> bool:
    """Whether a live model has an image tower and a text tower with a common space."""
    return type(model).__name__ in ARCHITECTURES


def looking(cls: type[Any]) -> type[Any]:
    """Return the class of a two-tower model, under its own name, whose forward takes images and gives embeddings.

    Weights, their names and what is saved are those of the model.
    """

    def forward(self: Any, pixel_values: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=pooled(self.get_image_features(pixel_values=pixel_values)))

    return type(cls.__name__, (cls,), {"forward": forward, "main_input_name": "pixel_values"})


def pooled(output: Any) -> Tensor:
    """Return embeddings ``[n, d]`` of length one from what a tower gives."""
    features = output if isinstance(output, Tensor) else output.pooler_output
    return functional.normalize(features, dim=-1)


def open_folder(folder: Path, dtype: torch.dtype | None, *, trust: bool) -> Any:
    """Open a folder's model, both towers, as :func:`looking` makes it. Raises HostError as for other models."""
    import transformers

    files.check_folder(folder)
    with files.reading(f"model {str(folder)!r}"):
        model, report = looking(transformers.CLIPModel).from_pretrained(
            str(folder), dtype=dtype or "auto", trust_remote_code=trust, use_safetensors=True,
            output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
        files.check_loaded(str(folder), model, report)
    return model


def read_tokenizer(folder: str | os.PathLike[str]) -> Any:
    """Return the tokenizer of a folder. Raises HostError where there is none that can be read."""
    from transformers import AutoTokenizer

    with files.reading(f"the tokenizer of {os.fspath(folder)!r}"):
        return AutoTokenizer.from_pretrained(os.fspath(folder), local_files_only=True)


@torch.no_grad()
def text_head(
    model: nn.Module, tokenizer: Any, classes: Sequence[str], templates: Sequence[str] = (TEMPLATE,)
) -> Tensor:
    """Return a head ``[classes, d]``: for each name the mean of its embeddings in all templates, of length one.

    Raises ConfigError for a template without its one slot ``{}``, HostError for a model without a text tower.
    """
    wrong = [one for one in templates if one.count("{}") != 1]
    if wrong or not templates:
        raise ConfigError(
            f"templates: expected texts with one slot {{}} each, found {shown(wrong or list(templates))}"
        )
    if not is_two_towers(model):
        raise HostError(f"{type(model).__name__} has no text tower to make a head of names with")
    texts = [template.replace("{}", name) for name in classes for template in templates]
    inputs: Mapping[str, Tensor] = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    device = next(model.parameters()).device
    tower: Any = model
    with hooks.evaluating(model):
        rows = pooled(
            tower.get_text_features(
                input_ids=inputs["input_ids"].to(device), attention_mask=inputs["attention_mask"].to(device)
            )
        )
    means = rows.float().reshape(len(classes), len(templates), -1).mean(1)
    return functional.normalize(means, dim=-1)
