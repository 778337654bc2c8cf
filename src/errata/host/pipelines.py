"""The parts of a text-to-image pipeline that read a text, as one module: text encoders and denoiser.

A folder of ``diffusers`` names its parts in ``model_index.json``; each is opened by the class named there, from
safetensors only. A pass gives, for each token, the states that the denoiser reads and behind them the keys and values
of all its cross-attentions: all that a text decides of an image.
"""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from errata.errors import HostError
from errata.extras import need
from errata.host import cross_attention, files
from errata.host.cross_attention import Cross

INDEX = "model_index.json"
"""Names the parts of a pipeline's folder and their classes."""
DENOISERS = ("unet", "transformer")
"""What pipelines call their denoiser."""
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2", "text_encoder_3": "tokenizer_3"}
MASKED = ("t5", "umt5")
"""Types of text encoders that are told which tokens are padding."""
PROBE = "a photo of a dog on a road"
"""What the layout is found with, and tokenizers are compared by."""


def is_pipeline(model: Any) -> bool:
    """Whether a folder holds a diffusers pipeline, or a live object is one; opens no weights."""
    if isinstance(model, nn.Module):
        return False
    if hasattr(model, "components") and hasattr(model, "save_pretrained"):
        return any(base.__module__.startswith("diffusers.") for base in type(model).__mro__)
    try:
        return (Path(model).expanduser() / INDEX).is_file()
    except (OSError, TypeError, ValueError):  # a name may be no possible file
        return False


class PipelineParts(nn.Module):
    """Text encoders and denoiser of a pipeline, under the pipeline's names; its tokenizers beside them."""

    def __init__(
        self, name: str, parts: Mapping[str, nn.Module], tokenizers: Mapping[str, Any], folder: Path | None
    ) -> None:
        """``name``: class of the pipeline. ``folder``: where its other parts are; None: in memory only.

        Raises HostError without a text encoder or denoiser, and for encoders that cut texts into other tokens.
        """
        super().__init__()
        self.pipeline = name
        self.folder = folder
        for part, module in parts.items():
            self.add_module(part, module)
        self.encoders = tuple(part for part in ENCODERS if part in parts)
        self.denoiser = next((part for part in DENOISERS if part in parts), "")
        if not self.encoders or not self.denoiser:
            missing = "text encoder" if not self.encoders else "denoiser (unet, transformer)"
            raise HostError(f"the pipeline {name} has no {missing}, so no text decides what it draws")
        self.tokenizers = {part: tokenizers[part] for part in self.encoders}
        ids = [one(PROBE)["input_ids"] for one in self.tokenizers.values()]
        self.joint = all(one == ids[0] for one in ids)
        """Whether all encoders read the same tokens."""

    def part(self, name: str) -> Any:
        """Return a part by the pipeline's name of it."""
        return getattr(self, name)

    @property
    def tokenizer(self) -> Any:
        """The first encoder's."""
        return self.tokenizers[self.encoders[0]]

    @property
    def config(self) -> Any:
        """The first text encoder's configuration."""
        return self.part(self.encoders[0]).config

    # --- reading a text ----------------------------------------------------------------------

    @property
    def penultimate(self) -> bool:
        """Whether the denoiser reads the encoders' last but one layer, as of Stable Diffusion XL."""
        return getattr(self.part(self.denoiser).config, "addition_embed_type", None) == "text_time"

    def states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the states ``[rows, length, d]`` that the denoiser reads; ids and mask ``[rows, length]``."""
        parts = self.encoders if self.joint else self.encoders[:1]
        return torch.cat([self._states(part, ids, mask) for part in parts], -1)

    def _states(self, part: str, ids: Tensor, mask: Tensor) -> Tensor:
        encoder, tokenizer = self.part(part), self.tokenizers[part]
        padding = ids[:, -1:] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        own = torch.where(mask.bool(), ids, padding)  # each encoder has padding of its own
        config = encoder.config
        masked = config.model_type in MASKED or getattr(config, "use_attention_mask", False)
        out = encoder(
            input_ids=own, attention_mask=mask if masked else None, output_hidden_states=self.penultimate
        )
        return out.hidden_states[-2] if self.penultimate else out.last_hidden_state

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False
    ) -> SimpleNamespace:
        """Return, as ``logits``, states and all keys and values of ids ``[rows, length]``."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        states = self.states(input_ids, mask)
        made = {"": states}
        outputs = [states]
        for site in self.cross.sites:
            if site.source not in made:
                made[site.source] = self.get_submodule(site.source)(states)
            outputs.append(self.get_submodule(site.name)(made[site.source]))
        return SimpleNamespace(logits=torch.cat(outputs, -1))

    # --- the denoiser ------------------------------------------------------------------------

    @cached_property
    def cross(self) -> Cross:
        """The denoiser's maps of keys and values, found once."""
        if not self.joint:
            return Cross(refused=f"{' and '.join(self.encoders)} cut a text into different tokens")
        ids = torch.tensor([self.tokenizer(PROBE)["input_ids"]], device=next(self.parameters()).device)
        with torch.no_grad():
            states = self.states(ids, torch.ones_like(ids))
        width = _width(self.part(self.denoiser).config)
        if width is not None and width != states.shape[-1]:
            return Cross(
                refused=f"{type(self.part(self.denoiser)).__name__} reads states of width {width}, and the text "
                f"encoders give {states.shape[-1]}"
            )
        return cross_attention.discover(self.part(self.denoiser), self.denoiser, states, self.draw)

    def draw(self, states: Tensor) -> Any:
        """Run the denoiser once on a small random image for states ``[1, length, d]``."""
        denoiser = self.part(self.denoiser)
        config = denoiser.config
        side = 2 ** max(3, len(getattr(config, "block_out_channels", None) or ()))
        draw = torch.Generator().manual_seed(0)
        image = torch.randn(1, config.in_channels, side, side, generator=draw).to(states)
        inputs: dict[str, Any] = {"encoder_hidden_states": states, "return_dict": False}
        names = inspect.signature(denoiser.forward).parameters
        inputs["sample" if "sample" in names else "hidden_states"] = image
        inputs["timestep"] = torch.ones(1, device=states.device, dtype=torch.long)
        if self.penultimate:
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            inputs["added_cond_kwargs"] = {
                "text_embeds": states.new_zeros(1, pooled),
                "time_ids": states.new_zeros(1, 6),
            }
        elif getattr(denoiser, "use_additional_conditions", None):
            inputs["added_cond_kwargs"] = {
                "resolution": states.new_ones(1, 2),
                "aspect_ratio": states.new_ones(1, 1),
            }
        elif "hidden_states" in inputs and "added_cond_kwargs" in names:
            inputs["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
        return denoiser(**inputs)

    # --- files -------------------------------------------------------------------------------

    def save_pretrained(self, folder: Path) -> None:
        """Write the whole pipeline: these parts as they are, all others copied from the folder it was opened from.

        Raises ValueError for a pipeline that is in memory only.
        """
        if self.folder is None:
            raise ValueError(
                "the pipeline was given live, so its other parts are in no folder to copy them from"
            )
        own = (*self.encoders, self.denoiser)
        for path in sorted(self.folder.iterdir()):
            if path.is_dir() and path.name not in own and not path.name.startswith("."):
                shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns(".*", "__pycache__"))
        shutil.copyfile(self.folder / INDEX, folder / INDEX)
        for part in own:
            self.part(part).save_pretrained(folder / part, safe_serialization=True)

    @classmethod
    def from_pretrained(
        cls, folder: Path, *, dtype: Any = "auto", **_: Any
    ) -> tuple[PipelineParts, dict[str, Any]]:
        """Open a folder as :func:`open_folder` does; for what opens other models by their class."""
        return open_folder(folder, None if dtype == "auto" else dtype), {}


def _width(config: Any) -> int | None:
    """Return the width of the states that a denoiser reads, where its configuration names it."""
    for name in ("encoder_hid_dim", "caption_channels", "cross_attention_dim", "joint_attention_dim"):
        value: Any = getattr(config, name, None)
        values: set[Any] = set(value) if isinstance(value, (list, tuple)) else {value}
        if value is not None and len(values) == 1:
            return int(values.pop())
    return None


def of_live(pipeline: Any) -> PipelineParts:
    """Return the parts of a live pipeline; they stay the pipeline's own."""
    components = pipeline.components
    parts = {name: components[name] for name in (*ENCODERS, *DENOISERS) if components.get(name) is not None}
    tokenizers = {part: components.get(TOKENIZERS[part]) for part in parts if part in TOKENIZERS}
    _refuse_without(tokenizers, type(pipeline).__name__)
    return PipelineParts(type(pipeline).__name__, parts, tokenizers, None)


def open_folder(folder: Path, dtype: torch.dtype | None) -> PipelineParts:
    """Open the text encoders and the denoiser of a pipeline's folder; None: in the dtype of their files.

    Raises ConfigError without ``diffusers``, HostError for parts that are missing, damaged or of foreign code.
    """
    (diffusers,) = need("a text-to-image pipeline", "diffusion", "diffusers")
    import transformers

    index = _index(folder)
    libraries: dict[str, ModuleType] = {"diffusers": diffusers, "transformers": transformers}
    parts: dict[str, nn.Module] = {}
    tokenizers: dict[str, Any] = {}
    for name in (*ENCODERS, *DENOISERS):
        if name in index:
            parts[name] = _open_part(folder / name, _class(folder, name, index[name], libraries), dtype)
        if name in index and name in TOKENIZERS:
            tokenizers[name] = open_tokenizer(folder, name)
    return PipelineParts(str(index.get("_class_name", "pipeline")), parts, tokenizers, folder)


def open_tokenizer(folder: Path, part: str) -> Any:
    """Open the tokenizer of one of a folder's text encoders. Raises HostError where it cannot be read."""
    (diffusers,) = need("a text-to-image pipeline", "diffusion", "diffusers")
    import transformers

    own, index = TOKENIZERS[part], _index(folder)
    if own not in index:
        raise HostError(f"{folder / INDEX} names no {own} for {part}")
    with files.reading(f"the tokenizer in {str(folder / own)!r}"):
        opener = _class(folder, own, index[own], {"diffusers": diffusers, "transformers": transformers})
        tokenizer = opener.from_pretrained(str(folder / own), local_files_only=True)
        files.check_tokenizer(tokenizer)
    return tokenizer


def _refuse_without(tokenizers: Mapping[str, Any], name: str) -> None:
    missing = [part for part, one in tokenizers.items() if one is None]
    if missing:
        raise HostError(f"the pipeline {name} has no tokenizer for {missing[0]}")


def _index(folder: Path) -> dict[str, Any]:
    """Read which parts a folder has; those that it leaves empty are left out."""
    path = folder / INDEX
    with files.reading(f"the pipeline {str(folder)!r}"):
        entries = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(entries, dict):
        raise HostError(f"{path} holds {type(entries).__name__}, expected an object that names the parts")
    return {
        name: entry for name, entry in entries.items()
        if not (isinstance(entry, list) and all(one is None for one in entry))
    }  # fmt: skip


def _class(folder: Path, name: str, entry: Any, libraries: Mapping[str, ModuleType]) -> Any:
    """Return the class of a part. Raises HostError for one of code that is not installed."""
    library, own = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
    found = getattr(libraries.get(str(library)), str(own), None) if isinstance(own, str) else None
    if found is None or not hasattr(found, "from_pretrained"):
        raise HostError(
            f"{folder / INDEX} names {entry!r:.80} as {name}, expected a class of diffusers or transformers: code of "
            "a pipeline's own is never run"
        )
    return found


def _open_part(folder: Path, kind: Any, dtype: torch.dtype | None) -> Any:
    files.check_folder(folder)
    with files.reading(f"{folder.name} of the pipeline {str(folder.parent)!r}"):
        options: dict[str, Any] = {
            "use_safetensors": True,
            "output_loading_info": True,
            "local_files_only": True,
        }
        if kind.__module__.startswith("transformers."):
            options |= {"dtype": dtype or "auto", "ignore_mismatched_sizes": True}
        else:
            options["torch_dtype"] = dtype or _stored_dtype(folder)
        model, report = kind.from_pretrained(str(folder), **options)
        files.check_loaded(str(folder), model, report)
    return model.eval()


def _stored_dtype(folder: Path) -> torch.dtype:
    """Return the dtype of the first floating tensor in a folder's files."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                dtype = {
                    "F64": torch.float64,
                    "F32": torch.float32,
                    "F16": torch.float16,
                    "BF16": torch.bfloat16,
                }.get(file.get_slice(name).get_dtype())
                if dtype is not None:
                    return dtype
    raise HostError(f"{folder} holds no floating-point weights")
