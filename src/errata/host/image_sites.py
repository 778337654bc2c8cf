"""The linear and convolutional maps of an image classifier, found by structure.

* sites: every linear or convolutional map that a forward pass runs once, over places of the image, and that
  computes W k + b as checked by computing it;
* tail of a site: the norms and activations that take its output as it is, place by place, found by following
  the tensor from module to module and by changing one place;
* tokens: which one is which patch is read off the model, by changing single pixels.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from errata.errors import HostError
from errata.host import hooks, locking
from errata.host.passes import Pass, run

Part = Literal["conv", "linear"]


@dataclass(frozen=True)
class ImageSite:
    """A map ``y = W k + b`` at every place of an image; for a convolution k is the patch under its kernel."""

    layer: int
    """Number of its block; -1 outside the blocks."""
    part: Part
    name: str
    """Dotted path of the module."""
    d_in: int
    """Length of k; for a convolution channels x kernel height x kernel width."""
    d_out: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    tail: tuple[str, ...] = ()
    """Dotted paths of the norms and activations that follow directly."""

    transposed: ClassVar[bool] = False

    @property
    def parameter(self) -> str:
        """Dotted path of the weight."""
        return f"{self.name}.weight"

    @property
    def taps(self) -> int:
        """Number of places under the kernel."""
        return math.prod(self.kernel)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width of a convolution's output for an input's."""
        return (self._along(height, 0), self._along(width, 1))

    def _along(self, length: int, axis: int) -> int:
        span = self.dilation[axis] * (self.kernel[axis] - 1) + 1
        return (length + 2 * self.padding[axis] - span) // self.stride[axis] + 1

    def keys(self, inputs: Tensor) -> Tensor:
        """Return k at every place of the output, ``[n, places, d_in]``, from the module's input."""
        if self.part == "linear":
            return by_place(inputs, "linear")
        return functional.unfold(
            inputs, self.kernel, dilation=self.dilation, padding=self.padding, stride=self.stride
        ).mT

    def product(self, inputs: Tensor, weight: Tensor) -> Tensor:
        """Return W k everywhere for a weight ``[d_out, d_in]``, in the weight's precision."""
        inputs = inputs.to(weight.dtype)
        if self.part == "linear":
            return functional.linear(inputs, weight)
        shaped = weight.reshape(self.d_out, -1, *self.kernel)
        return functional.conv2d(
            inputs, shaped, stride=self.stride, padding=self.padding, dilation=self.dilation
        )


def by_place(values: Tensor, part: Part) -> Tensor:
    """Lay out a module's input or output as ``[n, places, channels]``."""
    return values.flatten(2).mT if part == "conv" else values.flatten(1, -2)


@dataclass(frozen=True)
class ImageLayout:
    """Where things are in an image classifier."""

    blocks: tuple[str, ...]
    """Dotted paths of the outermost numbered parts: a transformer's layers, a ResNet's stages."""
    sites: tuple[ImageSite, ...]
    """All editable sites, in the order in which the model lists its modules."""
    patches: ImageSite | None
    """The convolution that turns patches into tokens; None in a model without tokens."""
    prefix: int | None
    """How many tokens come before those of the patches; None where that is unknown."""
    refused: str | None
    """Why token sites are missing."""
    adds_directly: bool = True
    """Always: what a site writes is taken at its own output."""

    @property
    def width(self) -> int:
        """Longest output of a site."""
        return max(site.d_out for site in self.sites)

    @property
    def default(self) -> ImageSite:
        """The last site of the block at three quarters of the depth."""
        layer = round(0.75 * (len(self.blocks) - 1))
        inside = [site for site in self.sites if site.layer == layer]
        return (inside or self.sites)[-1]

    def by_name(self, name: str) -> ImageSite:
        """Return the site of a module's name. Raises HostError listing the names there are."""
        for site in self.sites:
            if site.name == name:
                return site
        names = ", ".join(site.name for site in self.sites)
        reason = f" ({self.refused})" if self.refused else ""
        raise HostError(
            f"{name!r} is no editable linear or convolutional map of this model{reason}; it has {names}"
        )


@dataclass(frozen=True)
class _Event:
    """One run of a module without children: its input and output, and how often each had been written to by then."""

    name: str
    module: nn.Module
    live_input: Tensor
    live_output: Tensor
    input_version: int
    output_version: int
    input: Tensor
    """A copy of ``live_input``, which may be overwritten later."""
    output: Tensor


@locking.exclusive
def discover(model: nn.Module, probe: Tensor) -> ImageLayout:
    """Find the layout of an image classifier by running one image ``[1, c, h, w]``.

    Raises HostError when the model has no editable linear or convolutional map.
    """
    with torch.no_grad(), hooks.frozen(model):
        events = _trace(model, probe)
        patches, prefix, refused = _tokens(model, events, probe)
        count = (
            None if patches is None or prefix is None else prefix + math.prod(patches.grid(*probe.shape[-2:]))
        )
        sites = {}
        for i, event in enumerate(events):
            site = _site(event)
            once = sum(other.module is event.module for other in events) == 1
            whole = event.live_input.shape[0] == 1 and (
                event.live_input.ndim == 4 or event.live_input.shape[1] == count
            )
            if site and once and whole:
                sites[event.name] = replace(site, tail=_tail(events, i, site.part))
    order = [name for name, _ in model.named_modules() if name in sites]
    if not order:
        raise HostError(
            f"{type(model).__name__} has no editable linear or convolutional map; {refused or ''}"
        )
    blocks = tuple(dict.fromkeys(b for b in map(_block, order) if b))
    sites = [replace(sites[n], layer=blocks.index(b) if (b := _block(n)) else -1) for n in order]
    return ImageLayout(blocks, tuple(sites), patches, prefix, refused)


def _block(name: str) -> str | None:
    """Name the outermost numbered part that a module is in."""
    match = re.match(r"(.*?\.\d+)\.", name)
    return match.group(1) if match else None


def _trace(model: nn.Module, probe: Tensor) -> list[_Event]:
    events: list[_Event] = []
    open_: dict[str, tuple[Tensor, int, Tensor]] = {}

    def entering(name: str) -> Callable[[Tensor], None]:
        def note(inputs: Tensor) -> None:
            open_[name] = (inputs, inputs._version, inputs.clone())

        return note

    def leaving(name: str, module: nn.Module) -> Callable[[Tensor], None]:
        def note(outputs: Tensor) -> None:
            inputs, version, copy = open_.pop(name)
            events.append(
                _Event(name, module, inputs, outputs, version, outputs._version, copy, outputs.clone())
            )

        return note

    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            if next(module.children(), None) is None:
                stack.enter_context(hooks.on_input(module, entering(name)))
                stack.enter_context(hooks.on_output(module, leaving(name, module)))
        try:
            run(model, Pass(pixels=probe))
        except ValueError as error:
            raise HostError(
                f"{type(model).__name__} does not take an image of {list(probe.shape)}, so its layout cannot be "
                f"read ({error})"
            ) from error
        except TypeError as error:
            raise HostError(
                f"{type(model).__name__} passes other things than tensors through its modules, so its layout "
                f"cannot be read ({error})"
            ) from error
    return events


def _site(event: _Event) -> ImageSite | None:
    """Describe a map if it computes W k + b, as found by computing it."""
    module: Any = event.module
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(weight, nn.Parameter) or weight.is_meta or not weight.is_floating_point():
        return None
    if isinstance(module, nn.Conv2d):
        if module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str):
            return None
        site = ImageSite(
            -1, "conv", event.name, weight[0].numel(), weight.shape[0],
            _two(module.kernel_size), _two(module.stride), _two(module.padding), _two(module.dilation),
        )  # fmt: skip
    elif isinstance(module, nn.Linear) and event.live_input.ndim in (3, 4):
        site = ImageSite(-1, "linear", event.name, weight.shape[1], weight.shape[0])
    else:
        return None
    product = by_place(site.product(event.input, weight.flatten(1).float()), site.part)
    product = product if bias is None else product + bias.float()
    expected = by_place(event.output, site.part).float()
    if product.shape != expected.shape:
        return None
    close = float((product - expected).abs().max()) < 2e-2 * float(expected.abs().max().clamp_min(1e-6))
    return site if close else None


def _two(sides: Sequence[int]) -> tuple[int, int]:
    return int(sides[0]), int(sides[1])


def _tail(events: Sequence[_Event], at: int, part: Part) -> tuple[str, ...]:
    """Follow a map's output through the norms and activations that take it as it is."""
    tail: list[str] = []
    for event, after in zip(events[at:], events[at + 1 :], strict=False):
        same = after.live_input is event.live_output and after.input_version == event.output_version
        if not same or _is_map(after.module) or not _place_wise(after, part):
            break
        tail.append(after.name)
    return tuple(tail)


def _is_map(module: nn.Module) -> bool:
    return any(p.ndim > 1 for p in module.parameters())


def _place_wise(event: _Event, part: Part) -> bool:
    """Whether changing one place of a module's input changes its output there only."""
    if event.input.shape != event.output.shape:
        return False
    changed = event.input.clone(memory_format=torch.contiguous_format)
    if part == "conv":
        changed[..., 0, 0] += 1.0
    else:
        changed.flatten(1, -2)[:, 0] += 1.0
    moved = by_place(event.module(changed) != event.output, part).any(-1)  # [1, places]
    return not bool(moved[:, 1:].any())


def _tokens(
    model: nn.Module, events: Sequence[_Event], probe: Tensor
) -> tuple[ImageSite | None, int | None, str | None]:
    """Find the map from patches to tokens and how many tokens come before them."""
    first = next((i for i, e in enumerate(events) if e.live_input.ndim == 3), None)
    if first is None:
        return None, None, None
    maps = [site for e in events[:first] if (site := _site(e)) and site.part == "conv"]
    if not maps:
        return None, None, "no convolution comes before the tokens"
    patches, (height, width) = maps[-1], tuple(probe.shape[-2:])
    grid = patches.grid(height, width)
    output = next(e.output for e in events if e.name == patches.name)
    if tuple(output.shape[-2:]) != grid:
        return patches, None, f"{patches.name} does not take the image itself"
    module, tokens = events[first].module, []
    last = [(side - 1) * step for side, step in zip(grid, patches.stride, strict=True)]
    for row, column in (None, None), (0, 0), last:
        image = probe.clone()
        if row is not None:
            image[:, :, row, column] += 10.0
        with (
            hooks.on_input(module, lambda x: tokens.append(x.clone())),
            hooks.stop_after(module),
            contextlib.suppress(hooks.Stopped),
        ):
            run(model, Pass(pixels=image))
    moved = [(other != tokens[0]).any(-1)[0].nonzero().flatten().tolist() for other in tokens[1:]]
    prefix = moved[0][0] if moved[0] else 0
    if moved != [[prefix], [prefix + math.prod(grid) - 1]]:
        return patches, None, "a change of one patch does not change one token, row by row"
    return patches, prefix, None
