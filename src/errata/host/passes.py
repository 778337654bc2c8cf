"""The one door to a model: a forward pass as a record, and the only code that runs it.

Whoever wants something of a model says which rows it is to read, what they continue and where logits are wanted;
hooks, caches and edits in place act on what is run here and nowhere else.
"""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from errata.host import hooks

Places = tuple[Tensor, Tensor]
"""Row and column of tokens, int64 ``[n]`` each."""


@dataclass(frozen=True, eq=False)
class Pass:
    """Rows that a model reads in one forward pass: token ids, or images."""

    ids: Tensor | None = None
    """int64 ``[rows, length]``; of an encoder-decoder what its decoder is given."""
    mask: Tensor | None = None
    """int64 ``[rows, length of the prefix + length]``, 1 for tokens."""
    positions: Tensor | None = None
    """int64 ``[rows, length]``, each token's index in its whole text; None lets the model count."""
    source: Places | None = None
    """Ids and mask ``[rows, length]`` that an encoder reads."""
    pixels: Tensor | None = None
    """Images as the model takes them ``[rows, channels, height, width]``, in place of ids."""
    prefix: Any = None
    """Attention keys and values of the tokens that rows continue, a transformers cache."""
    use_cache: bool = False
    """Whether keys and values of these rows are wanted, to be continued later."""
    at: Places | None = None
    """Where logits are wanted; None: everywhere."""
    last: int | None = None
    """Of how many last columns logits are wanted; None: of all."""

    def inputs(self, accepts: frozenset[str]) -> dict[str, Any]:
        """Return arguments of a model's forward; ``accepts`` names those it takes."""
        if self.pixels is not None:
            return {"pixel_values": self.pixels}
        inputs: dict[str, Any] = {"input_ids": self.ids, "attention_mask": self.mask}
        if self.source is not None:
            inputs = {
                "input_ids": self.source[0],
                "attention_mask": self.source[1],
                "decoder_input_ids": self.ids,
                "decoder_attention_mask": self.mask,
            }
        elif self.positions is not None and "position_ids" in accepts:
            inputs["position_ids"] = self.positions
        if self.prefix is not None and "past_key_values" in accepts:
            inputs["past_key_values"] = self.prefix
        if self.last is not None and "logits_to_keep" in accepts:
            inputs["logits_to_keep"] = self.last
        return {**inputs, "use_cache": self.use_cache}


@dataclass(frozen=True, eq=False)
class Ran:
    """What a pass gave."""

    logits: Tensor
    """``[rows, length, vocab]``; ``[n, vocab]`` where places were named, ``[rows, classes]`` of images."""
    prefix: Any = None
    """Keys and values of all tokens so far, where they were wanted."""


def arguments(model: nn.Module) -> frozenset[str]:
    """Return the names of the arguments that a model's forward takes."""
    return frozenset(inspect.signature(model.forward).parameters)


def run(model: nn.Module, request: Pass, accepts: frozenset[str] | None = None) -> Ran:
    """Run a pass in evaluation mode; ``accepts`` as :func:`arguments` gives it.

    With a large vocabulary the output head costs as much as many blocks, so where places are named it computes
    those alone.
    """
    inputs = request.inputs(arguments(model) if accepts is None else accepts)
    head = output_head(model) if request.at is not None and request.source is None else None
    reduce = nullcontext() if head is None or request.at is None else hooks.gathering(head, *request.at)
    with hooks.evaluating(model), reduce:
        out = model(**inputs)
    prefix = out.past_key_values if request.use_cache else None
    if request.at is None:
        return Ran(out.logits if request.last is None else out.logits[:, -request.last :], prefix)
    if head is not None:
        return Ran(out.logits[0], prefix)
    row, column = (index.to(out.logits.device) for index in request.at)
    return Ran(out.logits[row, column], prefix)


def output_head(model: nn.Module) -> nn.Module | None:
    """Return the map from hidden states to the vocabulary; None for a model that names none."""
    named = getattr(model, "get_output_embeddings", None)
    return None if named is None else named()


def generate(model: Any, inputs: dict[str, Any], **options: Any) -> Any:
    """Let transformers' own loop continue rows; what it returns for the options."""
    with hooks.evaluating(model):
        return model.generate(**inputs, **options)
