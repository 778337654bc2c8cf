"""Image classifiers as hosts: opened, run and looked into; images in, logits out."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from errata.errors import HostError, RequestError, shown
from errata.host import files, hooks, locking, two_towers
from errata.host.base import ModelHost
from errata.host.image_sites import ImageLayout, ImageSite, Part, discover
from errata.host.kinds import IMAGES
from errata.host.memory import ran_out
from errata.host.open import as_device, as_dtype
from errata.host.passes import Pass, Ran

BATCH = 32
PROBE = 64
"""Side of the image a layout is found with where the model names none, pixels."""


LARGEST_SIDE = 2**14
"""Most pixels that a side of an image may have."""


@dataclass(frozen=True)
class Pixels:
    """How images become a model's input: ``(image * scale - mean) / std``, per channel."""

    scale: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    size: tuple[int, int] | None = None
    """Height and width the model was made for, where known."""


class ImageHost(ModelHost):
    """An image classifier with its layout; images go in as ``[n, c, h, w]``.

    Not changed by anything but an edit's ``apply_`` and ``on``.
    """

    kind = IMAGES

    def __init__(self, model: nn.Module, *, name: str, pixels: Pixels | None = None) -> None:
        super().__init__(model, name=name)
        self.pixels = pixels or Pixels()

    def __repr__(self) -> str:
        return f"ImageHost({self.name!r}, {self.family}, {len(self.layout.sites)} sites, {self.dtype})"

    # --- facts -----------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the weights."""
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    @cached_property
    def size(self) -> tuple[int, int] | None:
        """Height and width of images the model was made for; None if any will do or if that is unknown.

        The image processor's, unless the configuration names another and the model takes that alone.
        """
        named, own = self.pixels.size, _pair("config.json", getattr(_vision(self.config), "image_size", None))
        if named is None or own is None or named == own:
            return named or own
        return named if self._takes(named) else own

    @torch.no_grad()
    def _takes(self, size: tuple[int, int]) -> bool:
        """Whether the model runs on an image of a size; tables of positions may allow one alone."""
        try:
            self._run(torch.zeros(1, self.channels, *size))
        except (RequestError, RuntimeError, TypeError) as error:
            if ran_out(error):
                raise
            return False
        return True

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return int(getattr(_vision(self.config), "num_channels", 3))

    @cached_property
    def layout(self) -> ImageLayout:
        """Sites found by structure. Raises HostError where there are none to find."""
        height, width = self.size or (PROBE, PROBE)
        count = self.channels * height * width
        ramp = (torch.arange(count, dtype=torch.float64) * 0.37).sin()  # no two places alike
        probe = ramp.reshape(1, self.channels, height, width).to(self.device, self.dtype)
        return discover(self.model, probe)

    def _take_fingerprint(self) -> str:
        """Name weights and running statistics; see :attr:`ModelHost.fingerprint`."""
        digest = hashlib.sha256(f"errata image host 1 {super()._take_fingerprint()}".encode())
        for name, buffer in self.model.named_buffers():
            if buffer.is_floating_point():
                flat = buffer.detach().to(torch.bfloat16).contiguous().cpu().reshape(-1)
                digest.update(
                    f"{name}:{tuple(buffer.shape)}:".encode() + flat.view(torch.uint8).numpy().tobytes()
                )
        return digest.hexdigest()[:16]

    # --- running ---------------------------------------------------------------------------

    def prepare(self, images: Tensor) -> Tensor:
        """Turn images ``[n, c, h, w]`` into the model's input by :class:`Pixels`.

        A host opened from a folder takes values from 0 to 1 and normalises them by the folder's settings; a live
        model gets them as they are. Raises RequestError for other shapes.
        """
        if images.ndim != 4 or images.shape[1] != self.channels:
            raise RequestError(
                f"images are {list(images.shape)}, expected [n, {self.channels}, height, width] for {self.name}"
            )
        wide = images.detach().to(self.device, torch.promote_types(self.dtype, torch.float32))
        mean, std = (
            torch.tensor(values, dtype=wide.dtype, device=wide.device)[:, None, None]
            for values in (self.pixels.mean, self.pixels.std)
        )
        return ((wide * self.pixels.scale - mean) / std).to(self.dtype)

    @torch.no_grad()
    def logits(self, images: Tensor, *, batch_size: int = BATCH) -> Tensor:
        """Classify images ``[n, c, h, w]``; logits ``[n, classes]``, of a two-tower model embeddings ``[n, d]``."""
        return torch.cat([self._run(part).logits for part in images.split(batch_size)])

    def labels(self, images: Tensor) -> list[str]:
        """Name the most probable class of each image ``[n, c, h, w]``. Raises HostError for a two-tower model."""
        if two_towers.is_two_towers(self.model):
            raise HostError(
                f"{self.name} has no classes of its own; compare its embeddings with a head: "
                "errata.host.two_towers.text_head"
            )
        names = getattr(self.config, "id2label", None) or {}
        return [str(names.get(i, i)) for i in self.logits(images).argmax(-1).tolist()]

    @torch.no_grad()
    @locking.exclusive
    def at(self, site: ImageSite, images: Tensor, *, batch_size: int = BATCH) -> tuple[Tensor, Tensor]:
        """Return a site's inputs and outputs ``[n, ...]`` for images ``[n, c, h, w]``, as the module has them."""
        module, inputs, outputs = self.model.get_submodule(site.name), [], []
        for part in images.split(batch_size):
            with (
                hooks.on_input(module, lambda x: inputs.append(x.clone())),
                hooks.on_output(module, lambda y: outputs.append(y.clone())),  # others may add in place
                hooks.stop_after(module),
                contextlib.suppress(hooks.Stopped),
            ):
                self._run(part)
        return torch.cat(inputs), torch.cat(outputs)

    def follow(self, site: ImageSite, values: Tensor) -> Tensor:
        """Send a site's output ``[n, ...]`` through its tail."""
        values = values.clone()  # an activation may work in place
        for name in site.tail:
            values = self.model.get_submodule(name)(values)
        return values

    @locking.exclusive
    def through(
        self, name: str, images: Tensor, site: ImageSite | None = None, change: Tensor | None = None
    ) -> Tensor:
        """Return a module's output for images, with ``change`` ``[d_out, d_in]`` added to a site's weight.

        Gradients reach ``change``. Raises HostError for a module that is not there, not run, or outputs no tensor.
        """
        try:
            module = self.model.get_submodule(name)
        except AttributeError as error:
            raise HostError(f"the model has no module {name!r}") from error
        outputs: list[Tensor] = []
        with contextlib.ExitStack() as stack:
            if site is not None and change is not None:
                stack.enter_context(_beside(self.model.get_submodule(site.name), site, change))
            stack.enter_context(hooks.on_output(module, lambda y: outputs.append(y.clone())))
            stack.enter_context(hooks.stop_after(module))
            stack.enter_context(contextlib.suppress(hooks.Stopped))
            try:
                self._run(images)
            except TypeError as error:
                raise HostError(f"module {name!r} gives no tensor to look at: {error}") from error
        if not outputs:
            raise HostError(f"module {name!r} is not run by the model")
        return outputs[0]

    def mask_at(self, mask: Tensor, values: Tensor, part: Part) -> Tensor:
        """Bring masks ``[n, h, w]`` of images to the places of a module's input or output, ``[n, places]``.

        Each place gets the masked share of its area; tokens of no patch get 0. Raises HostError
        where the places of ``values`` are not known to be places of the image.
        """
        prefix = 0
        if part == "linear" and values.ndim == 3:
            height, width = self._tokens(values.shape[1], mask)
            prefix = self.layout.prefix or 0
        elif values.ndim == 4:
            height, width = values.shape[2:] if part == "conv" else values.shape[1:3]
        else:
            raise HostError(f"values of shape {list(values.shape)} have no places in the image to mask")
        wide = torch.promote_types(self.dtype, torch.float32)
        small = functional.adaptive_avg_pool2d(mask.to(self.device, wide)[:, None], (height, width))
        return functional.pad(small.flatten(1), (prefix, 0))

    def _tokens(self, count: int, mask: Tensor) -> tuple[int, int]:
        layout = self.layout
        if layout.patches is None or layout.prefix is None:
            raise HostError(f"tokens have no known places in the image: {layout.refused}")
        grid = layout.patches.grid(*mask.shape[-2:])
        if layout.prefix + math.prod(grid) != count:
            raise HostError(
                f"{count} tokens are not {layout.prefix} and a grid of {grid[0]} x {grid[1]} patches"
            )
        return grid

    @locking.exclusive
    def _run(self, images: Tensor) -> Ran:
        """Run the model; batch norms in a model that is being trained are not to count what they see here."""
        values = self.prepare(images)
        try:
            with hooks.frozen(self.model):
                return self.run(Pass(pixels=values))
        except ValueError as error:
            raise RequestError(f"{self.name} does not take images {list(images.shape)}: {error}") from error


@contextlib.contextmanager
def _beside(module: nn.Module, site: ImageSite, change: Tensor):
    """Add a change's product to a map's output, without touching its weight."""
    inputs: list[Tensor] = []

    def add(output: Tensor) -> Tensor:
        return output + site.product(inputs.pop(), change).to(output.dtype)

    with hooks.on_input(module, inputs.append), hooks.on_output(module, add):
        yield


# --- opening ------------------------------------------------------------------------------


def is_image_classifier(model: str | os.PathLike[str] | nn.Module) -> bool:
    """Whether a live model, or the model in a folder, classifies images; opens no weights."""
    if isinstance(model, nn.Module):
        if two_towers.is_two_towers(model):
            return getattr(model, "main_input_name", None) == "pixel_values"
        config = getattr(model, "config", None)
        reads = getattr(config, "get_text_config", None)
        text = reads is not None and reads() is not config  # a language model beside the image tower
        return getattr(model, "main_input_name", None) == "pixel_values" and not text
    names = _read(Path(model).expanduser() / "config.json").get("architectures")
    if two_towers.names_two_towers(names):
        return True
    return isinstance(names, list) and any(str(one).endswith("ForImageClassification") for one in names)


def _vision(config: Any) -> Any:
    """Return the configuration of the image tower, where a model has a text tower too."""
    return getattr(config, "vision_config", None) or config


def load_images(
    model: str | os.PathLike[str] | nn.Module,
    *,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
    name: str | None = None,
) -> ImageHost:
    """Open an image classifier: a folder written by ``save_pretrained``, or a live model.

    A folder's ``preprocessor_config.json`` sets how pixels from 0 to 1 are normalised; without one, and for a
    live model, images are passed on unchanged. Raises HostError as :func:`errata.host.open.load` does.
    """
    torch_dtype, place = as_dtype(dtype), as_device(device)
    if isinstance(model, nn.Module):
        live: Any = model
        refuse_unusable(live)
        if device != "auto" or torch_dtype is not None:
            live = live.to(device=None if device == "auto" else place, dtype=torch_dtype)
        label = name or getattr(live.config, "_name_or_path", "") or type(live).__name__
        pixels = Pixels()
    else:
        folder = Path(model).expanduser()
        live = _open(folder, torch_dtype, trust_remote_code).to(place)
        label, pixels = name or str(model), _pixels(folder)
    refuse_unusable(live)
    return ImageHost(live, name=label, pixels=pixels)


def _open(folder: Path, dtype: torch.dtype | None, trust: bool) -> Any:
    if two_towers.names_two_towers(_read(folder / "config.json").get("architectures")):
        return two_towers.open_folder(folder, dtype, trust=trust)
    from transformers import AutoModelForImageClassification

    files.check_folder(folder)
    with files.reading(f"model {str(folder)!r}"):
        model, report = AutoModelForImageClassification.from_pretrained(
            str(folder), dtype=dtype or "auto", trust_remote_code=trust, use_safetensors=True,
            output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
        files.check_loaded(str(folder), model, report)
    return model


def refuse_unusable(model: nn.Module) -> None:
    """Raise HostError for tensors that are not in memory or not finite; running statistics count."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise HostError(f"{name} is on the meta device or offloaded; load the whole model into memory")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise HostError(f"{name} holds NaN or infinite numbers; refused")


def _read(path: Path) -> Mapping[str, Any]:
    """Read a folder's JSON file; nothing where there is none to read."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _pixels(folder: Path) -> Pixels:
    """Read how images are normalised from a folder's image processor. Raises HostError for damaged settings."""
    path = folder / "preprocessor_config.json"
    if not path.exists():
        return Pixels()
    with files.reading(f"model {str(folder)!r}"):
        settings = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise HostError(f"{path} holds {type(settings).__name__}, expected an object of settings")
        scale = 255.0
        if settings.get("do_rescale", True):
            scale *= float(settings.get("rescale_factor", 1 / 255))
        mean, std = (0.0,), (1.0,)
        if settings.get("do_normalize", True) and "image_mean" in settings and "image_std" in settings:
            mean, std = _channels(path, settings, "image_mean"), _channels(path, settings, "image_std")
        if not math.isfinite(scale) or scale == 0.0 or 0.0 in std or len(mean) != len(std):
            raise HostError(
                f"{path} normalises by factor {scale:g}, mean {mean} and deviation {std}: expected finite "
                "numbers, as many means as deviations, none of them or of the factor 0"
            )
        cropped = settings.get("crop_size") if settings.get("do_center_crop", True) else None
        return Pixels(scale, mean, std, _pair(path, settings.get("size") if cropped is None else cropped))


def _channels(path: Path, settings: Mapping[str, Any], key: str) -> tuple[float, ...]:
    """Read one number for each colour channel, or one for all."""
    value = settings[key]
    numbers = tuple(map(float, value)) if isinstance(value, list) else (float(value),)
    if not numbers or not all(map(math.isfinite, numbers)):
        raise HostError(f"{path} sets {key} to {shown(value, 80)}, expected a number for each channel")
    return numbers


def _pair(source: Path | str, value: Any) -> tuple[int, int] | None:
    """Read a height and width given as one number, two, or by name. Raises HostError where they are no sizes."""
    if isinstance(value, Mapping):
        side = value.get("shortest_edge")
        value = [value["height"], value["width"]] if "height" in value and "width" in value else side
    sides = [value, value] if isinstance(value, int) else list(value) if isinstance(value, tuple) else value
    if sides is None:
        return None
    if not (
        isinstance(sides, list)
        and len(sides) == 2
        and all(type(side) is int and 0 < side <= LARGEST_SIDE for side in sides)
    ):
        raise HostError(
            f"{source} sets the image size to {shown(value, 80)}, expected a height and a width from 1 to "
            f"{LARGEST_SIDE}"
        )
    return sides[0], sides[1]
