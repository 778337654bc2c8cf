"""What is in place on a model besides changed weights: interventions at modules, and rewriters of prompts.

Kept on the model itself, so that two hosts of it agree and a copy of the model has a copy. Written to by the edits
room alone. Nothing is hung into a model on which nothing is in place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from errata.errors import ConfigError
from errata.host import hooks, passes

PLACED = "_errata_placed"


class Intervention(Protocol):
    """What an edit does to a module's output while the model runs."""

    digest: str
    """Of the edit it belongs to."""
    order: tuple[str, str]
    """When its edit was made, and its digest: of several at one module the newest acts last, whatever was placed
    first."""

    number: int | None
    """Of the edit set whose rows it acts on; None: on all rows."""

    def __call__(self, inputs: Tensor, output: Tensor, routing: passes.Routing) -> Tensor:
        """Return another output ``[rows, length, d_out]`` from inputs ``[rows, length, d_in]`` and output."""
        ...


@dataclass(frozen=True)
class Rewriter:
    """What an edit makes of every prompt before it is formatted."""

    digest: str
    order: tuple[str, str]
    rewrite: Callable[[str], str]
    number: int | None = None
    """Of the edit set whose prompts it rewrites; None: all prompts."""


@dataclass
class Placed:
    """Interventions by module path, oldest edit first, and rewriters."""

    interventions: Mapping[str, tuple[Intervention, ...]] = field(default_factory=dict)
    """Replaced, never changed, for another thread may be reading."""
    rewriters: tuple[Rewriter, ...] = ()
    acts: dict[str, _ModuleActs] = field(default_factory=dict)
    sets: dict[str, int] = field(default_factory=dict)
    """Numbers of edit sets by name, in the order they were first named."""

    @property
    def digests(self) -> frozenset[str]:
        """Edits that have anything in place here."""
        acting = {one.digest for several in self.interventions.values() for one in several}
        return frozenset(acting | {one.digest for one in self.rewriters})


_NOTHING = Placed()


def on(model: nn.Module) -> Placed:
    """Return what is in place on a model; not to be written to."""
    state: Placed = model.__dict__.get(PLACED, _NOTHING)
    return state


def set_number(model: nn.Module, name: str | None) -> int | None:
    """Return the number of an edit set, naming it if it is new; None for the edits of all rows."""
    if name is None:
        return None
    state: Placed = model.__dict__.setdefault(PLACED, Placed())
    return state.sets.setdefault(name, len(state.sets) + 1)


def numbers(model: nn.Module, sets: Sequence[str | None]) -> Tensor:
    """Return the number of each row's set, int64 ``[rows]``; 0 for none. Raises ConfigError for an unknown one."""
    by_name = on(model).sets
    strange = sorted({name for name in sets if name is not None and name not in by_name})
    if strange:
        raise ConfigError(
            f"no edit was placed for the set {strange[0]!r}; known: {', '.join(sorted(by_name)) or 'none'}"
        )
    return torch.tensor([0 if name is None else by_name[name] for name in sets])


def attach(model: nn.Module, path: str, intervention: Intervention) -> None:
    """Have an intervention act on a module's output in every thread, after changes of its weights."""
    state: Placed = model.__dict__.setdefault(PLACED, Placed())
    acts = state.acts.setdefault(path, _ModuleActs())
    several = tuple(sorted((*state.interventions.get(path, ()), intervention), key=lambda one: one.order))
    state.interventions = {**state.interventions, path: several}
    acts.interventions = several
    hooks.attach(model.get_submodule(path), acts, rank=1)
    if not any(isinstance(hook, _Watch) for hook in model._forward_pre_hooks.values()):
        watch = _Watch()
        model.register_forward_pre_hook(watch, with_kwargs=True)
        model.register_forward_hook(watch.after, with_kwargs=True, always_call=True)


def add_rewriter(model: nn.Module, rewriter: Rewriter) -> None:
    """Have prompts rewritten, by the oldest edit first."""
    state: Placed = model.__dict__.setdefault(PLACED, Placed())
    state.rewriters = tuple(sorted((*state.rewriters, rewriter), key=lambda one: one.order))


def remove(model: nn.Module, digest: str) -> None:
    """Take away all that an edit has in place here, if anything."""
    state: Placed | None = model.__dict__.get(PLACED)
    if state is None:
        return
    state.rewriters = tuple(one for one in state.rewriters if one.digest != digest)
    remaining: dict[str, tuple[Intervention, ...]] = {}
    for path, several in state.interventions.items():
        rest = tuple(one for one in several if one.digest != digest)
        state.acts[path].interventions = rest
        if rest:
            remaining[path] = rest
        else:
            _leave(model, path, state.acts[path])
    state.interventions = remaining
    state.acts = {path: acts for path, acts in state.acts.items() if path in remaining}
    if not remaining:
        _unwatch(model)
    if not remaining and not state.rewriters and not state.sets:
        del model.__dict__[PLACED]


def _leave(model: nn.Module, path: str, acts: _ModuleActs) -> None:
    try:
        module = model.get_submodule(path)
    except AttributeError:  # a module that is gone took its hook along
        return
    hooks.detach(module, acts)


def _unwatch(model: nn.Module) -> None:
    for registry in (model._forward_pre_hooks, model._forward_hooks):
        for key, hook in list(registry.items()):
            if isinstance(hook, _Watch) or isinstance(getattr(hook, "__self__", None), _Watch):
                registry.pop(key)
                for beside in (
                    model._forward_pre_hooks_with_kwargs,
                    model._forward_hooks_with_kwargs,
                    model._forward_hooks_always_called,
                ):
                    beside.pop(key, None)


class _ModuleActs:
    """All interventions at one module; the hook itself."""

    def __init__(self) -> None:
        self.interventions: tuple[Intervention, ...] = ()

    def __call__(self, inputs: Tensor, output: Tensor) -> Tensor:
        if passes.is_plain():
            return output
        current = passes.routing() or passes.Routing()
        for intervention in self.interventions:
            output = intervention(inputs, output, current)
        return output


class _Watch:
    """Gives a routing to passes that come to the model past its host, as from ``model.generate``.

    A prompt's decision is kept by the cache that the tokens after it are read with.
    """

    def __init__(self) -> None:
        self.routings: WeakKeyDictionary[Any, passes.Routing] = WeakKeyDictionary()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Watch:
        return _Watch()

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin a pass, unless a host has begun it."""
        if passes.routing() is not None:
            return
        ids = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs_embeds"))
        length = ids.shape[1] if isinstance(ids, Tensor) and ids.ndim > 1 else 0
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        routing = self.routings.get(cache) if cache is not None and length == 1 else None
        if routing is not None:  # one more token of a row whose prompt was read
            passes.enter(passes.Routing(decided=routing.decided, past=True))
            return
        plain = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        prefix = 0 if plain is None else plain.shape[1] - length
        tokens = ids if isinstance(ids, Tensor) and ids.ndim == 2 else None
        passes.enter(passes.Routing(mask=plain, prefix=prefix, ids=tokens))

    def after(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """End the pass that was begun here; its cache keeps the decisions."""
        current = passes.leave()
        cache = getattr(output, "past_key_values", None)
        if current is not None and cache is not None:
            self.routings[cache] = current
