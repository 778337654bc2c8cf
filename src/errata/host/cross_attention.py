"""The maps of a denoiser that turn a text into keys and values of its cross-attention, found by running it once.

* candidates: the linear maps that attention modules name as those of keys and values;
* a site is one whose input is the text's states as the pipeline makes them, or what one module makes of these states
  alone (a projection of captions): then nothing but the text decides what it gives;
* in joint attention, as of Flux or Stable Diffusion 3, the text's stream mixes with the image's before it reaches
  these maps, so none of them is a site.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from errata.errors import HostError
from errata.host import hooks
from errata.host.layout import DECODER, Layout, Site
from errata.host.layout import Part as TextPart
from errata.host.memory import ran_out

CrossPart = Literal["cross_key", "cross_value"]
MAPS: dict[str, CrossPart] = {
    "to_k": "cross_key", "add_k_proj": "cross_key", "to_v": "cross_value", "add_v_proj": "cross_value",
}  # fmt: skip
"""What attention modules of diffusers call their maps to keys and values."""


@dataclass(frozen=True)
class CrossSite:
    """A linear map ``y = W c (+ b)`` from a token of a text to a key or a value of cross-attention."""

    layer: int
    """Number of its attention, in the order in which the denoiser lists its modules."""
    part: CrossPart
    name: str
    """Dotted path of the module, which begins with the pipeline's name of the denoiser."""
    d_in: int
    d_out: int
    source: str = ""
    """Dotted path of the module that makes its input of the text's states; empty where that are the states."""

    transposed: ClassVar[bool] = False
    packed: ClassVar[bool] = False
    leaf: ClassVar[str] = "weight"
    experts: ClassVar[int] = 0

    @property
    def parameter(self) -> str:
        """Dotted path of the weight."""
        return f"{self.name}.{self.leaf}"


@dataclass(frozen=True)
class Cross:
    """The cross-attention of a denoiser."""

    sites: tuple[CrossSite, ...] = ()
    refused: str | None = None
    """Why there are no sites."""


@dataclass(frozen=True)
class PipelineLayout:
    """Where things are in a text-to-image pipeline: cross-attention maps, and the layers of its text encoder."""

    cross: tuple[CrossSite, ...]
    """Maps of keys and values, in the order in which the denoiser lists its modules."""
    text: Layout | None
    """The text encoder's blocks; None where several encoders read the text."""
    refused: str | None
    """Why maps or layers are missing."""

    @property
    def blocks(self) -> tuple[str, ...]:
        """Dotted paths of the text encoder's blocks."""
        return () if self.text is None else self.text.blocks

    @property
    def mlp_out(self) -> tuple[Site | None, ...]:
        """Per block of the text encoder, the feed-forward's output projection."""
        return () if self.text is None else self.text.mlp_out

    @property
    def width(self) -> int:
        """Width of the text encoder's states."""
        return self.cross[0].d_in if self.text is None else self.text.width

    @property
    def adds_directly(self) -> bool:
        """Whether what the text encoder's feed-forwards write reaches its states unchanged."""
        return self.text is None or self.text.adds_directly

    def of(self, stack: str) -> Layout:
        """Return the text encoder's layout, whatever the stack is called. Raises HostError where there is none."""
        if self.text is None:
            raise HostError(f"the text encoder has no editable layers: {self.refused}")
        return self.text

    def site(self, layer: int, part: TextPart = "mlp_out") -> Site:
        """Return a site of the text encoder. Raises HostError where there is none."""
        return self.of(DECODER).site(layer, part)

    def cross_sites(self) -> tuple[CrossSite, ...]:
        """Return the maps of keys and values. Raises HostError, with the reason, where there are none."""
        if not self.cross:
            raise HostError(f"no map of keys or values reads the text alone: {self.refused}")
        return self.cross

    @property
    def sites(self) -> list[CrossSite | Site]:
        """All editable sites."""
        return [*self.cross, *([] if self.text is None else self.text.sites)]


@dataclass
class _Trace:
    """What modules of a denoiser made of a text's states alone, and what its candidates were given."""

    states: Tensor
    made: list[tuple[str, Tensor]] = field(default_factory=list[tuple[str, Tensor]])
    given: dict[str, list[Tensor]] = field(default_factory=dict[str, list[Tensor]])

    def of_states(self, value: Any) -> bool:
        return (
            isinstance(value, Tensor) and value.numel() == self.states.numel() and _same(value, self.states)
        )

    def source(self, value: Tensor) -> str | None:
        """Return the module that made a candidate's input; empty: the states; None: it is neither."""
        if self.of_states(value):
            return ""
        return next((name for name, made in self.made if _same(value, made)), None)


def discover(denoiser: nn.Module, name: str, states: Tensor, draw: Callable[[Tensor], Any]) -> Cross:
    """Find the sites of a denoiser by running it once on the states ``[1, length, d]`` of a text.

    ``name``: the pipeline's name of it. ``draw``: runs it on states.
    """
    trace = _Trace(states)
    candidates = _candidates(denoiser)
    with torch.no_grad(), hooks.frozen(denoiser), contextlib.ExitStack() as stack:
        for path, module in denoiser.named_modules():
            if path in candidates:
                trace.given[path] = []
                stack.enter_context(hooks.on_input(module, trace.given[path].append))
            elif path:
                stack.enter_context(_noting(trace, path, module))
        try:
            draw(states)
        except Exception as error:  # what a denoiser of another kind asks for is not known here
            if ran_out(error):
                raise
            return Cross(refused=f"{type(denoiser).__name__} does not run on a text alone ({_line(error)})")
    sites: list[CrossSite] = []
    owners: list[str] = []
    for path, inputs in trace.given.items():
        module: Any = denoiser.get_submodule(path)
        source = trace.source(inputs[0]) if len(inputs) == 1 else None
        if source is None or not isinstance(module, nn.Linear):
            continue
        owner, _, leaf = path.rpartition(".")
        if owner not in owners:
            owners.append(owner)
        sites.append(
            CrossSite(
                owners.index(owner), MAPS[leaf], f"{name}.{path}", module.in_features, module.out_features,
                f"{name}.{source}" if source else "",
            )
        )  # fmt: skip
    if not sites:
        return Cross(
            refused=f"in {type(denoiser).__name__} what keys and values are made of depends on more than the text, "
            "as in joint attention"
        )
    return Cross(tuple(sites))


def _candidates(denoiser: nn.Module) -> list[str]:
    return [
        f"{path}.{leaf}" if path else leaf
        for path, module in denoiser.named_modules() if isinstance(getattr(module, "to_q", None), nn.Module)
        for leaf in MAPS if isinstance(getattr(module, leaf, None), nn.Module)
    ]  # fmt: skip


@contextlib.contextmanager
def _noting(trace: _Trace, path: str, module: nn.Module):
    """Note what a module makes of the states, where it is given nothing else."""
    alone: list[bool] = []

    def enter(call: hooks.Call) -> None:
        values = [value for value in (*call[0], *call[1].values()) if isinstance(value, Tensor)]
        alone.append(bool(values) and all(map(trace.of_states, values)))

    def leave(answer: Any) -> None:
        if alone.pop() and isinstance(answer, Tensor):
            trace.made.append((path, answer))

    with hooks.on_call(module, enter), hooks.on_answer(module, leave):
        yield


def _same(one: Tensor, other: Tensor) -> bool:
    return one.numel() == other.numel() and torch.equal(one.reshape(-1), other.reshape(-1))


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
