"""Text-to-image pipelines as hosts: a pass gives what a text decides of an image, its keys and values.

No image is drawn: schedulers and image decoders are not opened, and stay as they are.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from errata.errors import HostError, RequestError
from errata.host import hooks, locking
from errata.host.base import ModelHost
from errata.host.cross_attention import PipelineLayout
from errata.host.images import refuse_unusable
from errata.host.kinds import TEXT_TO_IMAGE
from errata.host.layout import discover
from errata.host.open import as_device, as_dtype
from errata.host.passes import Pass
from errata.host.pipelines import PipelineParts, is_pipeline, of_live, open_folder, open_tokenizer
from errata.host.text import check_characters

BATCH = 32
"""Texts read at once."""


@dataclass(frozen=True)
class Reading:
    """A text as the text encoder reads it."""

    ids: tuple[int, ...]
    """With the tokens that mark its beginning and end, no padding."""
    spans: tuple[tuple[int, int], ...]
    """Characters ``[start, end)`` of each token; empty intervals for tokens of no characters."""

    def last(self, start: int, end: int) -> int:
        """Return the last token that shares a character with an interval; of an empty one the last before the end."""
        inside = [i for i, (a, b) in enumerate(self.spans) if a < end and b > start and a < b]
        return inside[-1] if inside else max(0, len(self.ids) - 2)


class TextToImageHost(ModelHost):
    """A text-to-image pipeline: its text encoders and the cross-attention maps of its denoiser.

    Not changed by anything but an edit's ``apply_`` and ``on``.
    """

    kind = TEXT_TO_IMAGE

    def __init__(self, parts: PipelineParts, *, name: str) -> None:
        super().__init__(parts, name=name)
        self.tokenizer = parts.tokenizer
        if not getattr(self.tokenizer, "is_fast", False):
            raise HostError(f"the tokenizer of {name} does not say which characters a token stands for")
        with hooks.plain_torch(), hooks.evaluating(parts):
            _ = parts.cross  # found before anything is edited

    def __repr__(self) -> str:
        return f"TextToImageHost({self.name!r}, {self.family}, {len(self.layout.cross)} maps, {self.dtype})"

    # --- facts -----------------------------------------------------------------------------

    @property
    def family(self) -> str:
        """Class of the pipeline."""
        return str(self.model.pipeline)

    @property
    def device(self) -> torch.device:
        """Where texts go."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the text encoder's weights."""
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    @cached_property
    def layout(self) -> PipelineLayout:
        """Maps of keys and values, and the text encoder's layers. Raises HostError where there are neither."""
        cross = self.model.cross
        if len(self.model.encoders) > 1:
            several = (
                f"{' and '.join(self.model.encoders)} read a text together, and one of them is edited alone"
            )
            return PipelineLayout(cross.sites, None, "; ".join(filter(None, [cross.refused, several])))
        tower = _Tower(self.model)
        ids = torch.arange(5, device=self.device)[None]
        with hooks.plain_torch():
            text = discover(tower, Pass(ids, torch.ones_like(ids)))
        return PipelineLayout(cross.sites, text, cross.refused or text.refused)

    @property
    def window(self) -> int | None:
        """Longest text in tokens; None where the tokenizer sets no bound."""
        positions = getattr(self.config, "max_position_embeddings", None)
        longest = int(self.tokenizer.model_max_length)
        return positions if longest > 10**6 else longest if positions is None else min(longest, positions)

    def _vocabulary(self) -> bytes:
        vocabulary = sorted(self.tokenizer.get_vocab().items(), key=lambda item: item[1])
        return repr(vocabulary).encode()

    # --- texts -----------------------------------------------------------------------------

    def read(self, text: str) -> Reading:
        """Tokenise a text. Raises RequestError for one that is longer than the encoder's window."""
        check_characters(text)
        made = self.tokenizer(text, return_offsets_mapping=True, verbose=False)  # its length is checked here
        ids = tuple(made["input_ids"])
        if self.window is not None and len(ids) > self.window:
            raise RequestError(f"a text of {len(ids)} tokens is longer than the text encoder's {self.window}")
        return Reading(ids, tuple((int(a), int(b)) for a, b in made["offset_mapping"]))

    def as_pass(self, texts: Sequence[str], *, pad: bool = False) -> Pass:
        """Return texts as a pass; ``pad``: filled up to the window, as for drawing, not only to one length.

        Raises HostError for ``pad`` where nothing sets a bound.
        """
        rows = [self.read(text).ids for text in texts]
        length = max(map(len, rows))
        if pad:
            if self.window is None:
                raise HostError(f"{self.name} sets no length that texts are filled up to")
            length = self.window
        fill = self.tokenizer.pad_token_id or 0
        ids = torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows], device=self.device)
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=self.device)
        return Pass(ids, mask)

    @torch.no_grad()
    @locking.exclusive
    def inputs(self, texts: Sequence[str], *, pad: bool = False) -> dict[str, Tensor]:
        """Return what the cross-attention maps are given for texts, ``[n, length, d_in]`` for each source.

        Float32 or wider; rows beyond a text's own tokens are those of padding. Raises HostError without such maps.
        """
        firsts = {site.source: site for site in reversed(self.layout.cross_sites())}
        gathered: dict[str, list[Tensor]] = {source: [] for source in firsts}
        wide = torch.promote_types(self.dtype, torch.float32)
        with contextlib.ExitStack() as stack:
            for source, site in firsts.items():
                keep = gathered[source]
                module = self.model.get_submodule(site.name)
                stack.enter_context(hooks.on_input(module, lambda x, keep=keep: keep.append(x.to(wide))))
            for start in range(0, len(texts), BATCH):
                self.run(self.as_pass(texts[start : start + BATCH], pad=pad))
        return {source: _stacked(rows) for source, rows in gathered.items()}

    @torch.no_grad()
    def keys_and_values(self, text: str, at: int) -> dict[str, Tensor]:
        """Return what each cross-attention map gives at one token of a text, ``[d_out]`` by the map's name."""
        sites = self.layout.cross_sites()
        outputs = self.run(self.as_pass([text])).logits[0, at].float()
        parts = outputs[-sum(site.d_out for site in sites) :].split([site.d_out for site in sites])
        return {site.name: part for site, part in zip(sites, parts, strict=True)}

    # --- copies ----------------------------------------------------------------------------

    def checkpoint_obstacle(self) -> str | None:
        """Return why the pipeline cannot be written as a folder of its own; None where it can."""
        if self.model.folder is None:
            return "it was given live, and its other parts are in no folder: save it, and open the folder"
        return None

    def write_checkpoint(self, model: Any, folder: Path) -> None:
        """Write a copy's parts, with the pipeline's others, as a folder that diffusers opens."""
        model.save_pretrained(folder)

    def tokenizer_in(self, folder: Path) -> Any:
        """Open the tokenizer in a folder that :meth:`write_checkpoint` wrote."""
        return open_tokenizer(folder, self.model.encoders[0])


def _stacked(batches: Sequence[Tensor]) -> Tensor:
    """Join batches ``[n, length, d]`` of different lengths along the rows, filled up with zeros."""
    length = max(batch.shape[1] for batch in batches)
    return torch.cat([nn.functional.pad(batch, (0, 0, 0, length - batch.shape[1])) for batch in batches])


class _Tower(nn.Module):
    """The text encoder alone, under the pipeline's name of it, as a model that layouts are found in."""

    def __init__(self, parts: PipelineParts) -> None:
        super().__init__()
        (name,) = parts.encoders
        self.add_module(name, parts.part(name))
        self._states = [parts.states]  # in a list, so that the whole is no part of the part

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool = False) -> Tensor:
        return self._states[0](input_ids, attention_mask)


def load_pipeline(
    model: str | os.PathLike[str] | Any, *, device: str = "auto", dtype: str | torch.dtype = "auto",
    name: str | None = None,
) -> TextToImageHost:  # fmt: skip
    """Open a text-to-image pipeline: a folder written by ``save_pretrained`` of diffusers, or a live pipeline.

    Raises HostError as :func:`errata.host.open.load` does, and for pipelines without text encoder or denoiser;
    ConfigError where ``diffusers`` is not installed.
    """
    torch_dtype, place = as_dtype(dtype), as_device(device)
    if isinstance(model, (str, os.PathLike)):
        folder = Path(model).expanduser()
        parts = open_folder(folder, torch_dtype).to(place)
        label = name or str(model)
    else:
        parts = of_live(model)
        if device != "auto" or torch_dtype is not None:
            parts = parts.to(device=None if device == "auto" else place, dtype=torch_dtype)
        label = name or type(model).__name__
    refuse_unusable(parts)
    return TextToImageHost(parts, name=label)


__all__ = ["TextToImageHost", "is_pipeline", "load_pipeline"]
