"""What is in place on a model besides changed weights: interventions at modules, and rewriters of prompts.

Kept on the model itself, so that two hosts of it agree and a copy of the model has a copy. Written to by the edits
room alone. Nothing is hung into a model on which nothing is in place.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast
from weakref import WeakKeyDictionary, ref

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

    def takes(self, sets: int | Collection[int] | None) -> bool:
        """Whether it rewrites a prompt that belongs to some edit sets, by number; None: to none."""
        own = () if sets is None else (sets,) if isinstance(sets, int) else sets
        return self.number is None or self.number in own


class Substitute(Protocol):
    """What an edit puts in place of a model's logits: those of another model."""

    digest: str
    order: tuple[str, str]

    def __call__(self, reading: Reading, logits: Tensor, routing: passes.Routing) -> Tensor:
        """Return other logits ``[n, vocab]`` at the places of a pass, given the model's own."""
        ...


@dataclass(frozen=True, eq=False)
class Reading:
    """What a model reads in one pass, and where logits are returned."""

    ids: Tensor
    """int64 ``[rows, length]``."""
    mask: Tensor
    """Of these ids, bool ``[rows, length]``: True for tokens."""
    before: int
    """Columns of earlier passes that the rows continue."""
    row: Tensor
    """Of each place, int64 ``[n]``."""
    column: Tensor
    """Of each place, in this pass, int64 ``[n]``."""


@dataclass
class Placed:
    """Interventions by module path, oldest edit first, rewriters, and substitutes."""

    interventions: Mapping[str, tuple[Intervention, ...]] = field(default_factory=dict)
    """Replaced, never changed, for another thread may be reading."""
    rewriters: tuple[Rewriter, ...] = ()
    substitutes: tuple[Substitute, ...] = ()
    acts: dict[str, _ModuleActs] = field(default_factory=dict)
    sets: dict[str, int] = field(default_factory=dict)
    """Numbers of edit sets by name, in the order they were first named."""

    @property
    def reads_blocks(self) -> bool:
        """Whether an intervention reads what lower blocks get, so that none of them may be left out of a pass."""
        return any(
            getattr(one, "reads_blocks", False) for several in self.interventions.values() for one in several
        )

    @property
    def digests(self) -> frozenset[str]:
        """Edits that have anything in place here."""
        acting = {one.digest for several in self.interventions.values() for one in several}
        return frozenset(acting | {one.digest for one in (*self.rewriters, *self.substitutes)})


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


def numbers(model: nn.Module, sets: Sequence[str | Sequence[str] | None]) -> Tensor:
    """Return the numbers of each row's sets, int64 ``[rows, k]``; 0 for none. Raises ConfigError for an unknown one."""
    by_name = on(model).sets
    named = [() if one is None else (one,) if isinstance(one, str) else tuple(one) for one in sets]
    strange = sorted({name for several in named for name in several if name not in by_name})
    if strange:
        raise ConfigError(
            f"no edit was placed for the set {strange[0]!r}; known: {', '.join(sorted(by_name)) or 'none'}"
        )
    return number_rows([[by_name[name] for name in several] for several in named])


def number_rows(sets: Sequence[Sequence[int]]) -> Tensor:
    """Return numbers of each row's sets as one tensor, int64 ``[rows, k]``, filled with 0."""
    width = max([1, *map(len, sets)])
    return torch.tensor([[*own, *[0] * (width - len(own))] for own in sets]).reshape(len(sets), width)


def attach(model: nn.Module, path: str, intervention: Intervention) -> None:
    """Have an intervention act on a module's output in every thread, after changes of its weights."""
    state: Placed = model.__dict__.setdefault(PLACED, Placed())
    acts = state.acts.setdefault(path, _ModuleActs())
    several = tuple(sorted((*state.interventions.get(path, ()), intervention), key=lambda one: one.order))
    state.interventions = {**state.interventions, path: several}
    acts.interventions = several
    hooks.attach(model.get_submodule(path), acts, rank=1)
    _watch(model)


def add_rewriter(model: nn.Module, rewriter: Rewriter) -> None:
    """Have prompts rewritten, by the oldest edit first."""
    state: Placed = model.__dict__.setdefault(PLACED, Placed())
    state.rewriters = tuple(sorted((*state.rewriters, rewriter), key=lambda one: one.order))


def substitute(model: nn.Module, other: Substitute) -> None:
    """Have another model's logits in place of a model's own, in every thread; of several the newest edit's last."""
    state: Placed = model.__dict__.setdefault(PLACED, Placed())
    state.substitutes = tuple(sorted((*state.substitutes, other), key=lambda one: one.order))
    _watch(model)


def remove(model: nn.Module, digest: str) -> None:
    """Take away all that an edit has in place here, if anything."""
    state: Placed | None = model.__dict__.get(PLACED)
    if state is None:
        return
    state.rewriters = tuple(one for one in state.rewriters if one.digest != digest)
    state.substitutes = tuple(one for one in state.substitutes if one.digest != digest)
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
    watched = bool(remaining or state.substitutes)
    if not watched:
        _unwatch(model)
    if not watched and not state.rewriters and not state.sets:
        del model.__dict__[PLACED]


def _leave(model: nn.Module, path: str, acts: _ModuleActs) -> None:
    try:
        module = model.get_submodule(path)
    except AttributeError:  # a module that is gone took its hook along
        return
    hooks.detach(module, acts)


def _watch(model: nn.Module) -> None:
    if not any(isinstance(hook, _Watch) for hook in model._forward_pre_hooks.values()):
        watch = _Watch()
        model.register_forward_pre_hook(watch, with_kwargs=True)
        model.register_forward_hook(watch.after, with_kwargs=True, always_call=True)


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
        joined = output.shape if output.ndim == 2 else None
        if joined is not None:  # a module that gets the tokens of all rows one after the other, as experts do
            apart = current.by_rows(inputs), current.by_rows(output)
            inputs, output = (
                part if rows is None else rows for part, rows in zip((inputs, output), apart, strict=True)
            )
        for intervention in self.interventions:
            output = intervention(inputs, output, current)
        return output if joined is None else output.reshape(joined)


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
            read = passes.Routing(
                decided=routing.decided,
                past=True,
                prefix=_cached(cache),
                rows=None if ids is None else len(ids),
            )
            passes.enter(read)
            return
        plain = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        prefix = 0 if plain is None else plain.shape[1] - length
        tokens = ids if isinstance(ids, Tensor) and ids.ndim == 2 else None
        passes.enter(passes.Routing(mask=plain, prefix=prefix, ids=tokens))

    def after(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """End the pass that was begun here; its cache keeps the decisions. Return the output with other logits."""
        current = passes.leave()
        cache = getattr(output, "past_key_values", None)
        if current is not None and cache is not None:
            self.routings[cache] = current
        substitutes = on(model).substitutes
        routing = current or passes.routing() or passes.Routing()
        # no output: the pass was stopped, or failed
        keeps = any(rows.ndim > 1 for rows in routing.decided.values())
        if output is None or not (substitutes or keeps) or routing.by_host or passes.is_plain():
            return None
        if cache is not None:
            _follow_beams(cache, routing if current is None else None, self.routings)
        if not substitutes:
            return None
        ids, mask = args[0] if args else kwargs.get("input_ids"), kwargs.get("attention_mask")
        if not isinstance(ids, Tensor):
            raise ConfigError(
                "an edit that answers by another model is in place, and a pass has no token ids"
            )
        if not isinstance(mask, Tensor) or mask.ndim != 2:  # transformers leaves out a mask without padding
            mask = ids.new_ones(len(ids), max(ids.shape[1], _cached(cache)))
        request = passes.Pass(routing.numbered(ids), mask)
        logits = _substituted(
            substitutes, request, output[0] if isinstance(output, tuple) else output.logits, routing
        )
        if isinstance(output, tuple):
            return logits, *cast("tuple[Any, ...]", output)[1:]
        output.logits = logits
        return output


def _cached(cache: Any) -> int:
    """Return how many tokens a transformers cache holds, those of the pass that filled it last included."""
    length = getattr(cache, "get_seq_length", None)
    return 0 if length is None else int(length())


def substituting(model: nn.Module) -> passes.Substituting | None:
    """Return what puts other models' logits in place of a model's own; None where nothing does."""
    substitutes = on(model).substitutes
    if not substitutes:
        return None
    return lambda request, logits, routing: _substituted(substitutes, request, logits, routing)


def _substituted(
    substitutes: Sequence[Substitute], request: passes.Pass, logits: Tensor, routing: passes.Routing
) -> Tensor:
    """Return logits of the same shape: ``[n, vocab]`` at the places of a pass, else ``[rows, last columns, vocab]``."""
    assert request.ids is not None and request.mask is not None
    rows, length = request.ids.shape
    if request.at is not None:
        row, column = request.at
    else:
        last = torch.arange(length - logits.shape[1], length)
        row, column = torch.arange(rows).repeat_interleave(len(last)), last.repeat(rows)
    own, before = request.mask[:, -length:].bool(), request.mask.shape[1] - length
    ids = request.ids if request.shown is None else request.shown
    reading = Reading(ids, own, before, row.cpu(), column.cpu())
    changed = logits.reshape(-1, logits.shape[-1])  # [n, vocab]
    for one in substitutes:
        changed = one(reading, changed, routing)
    return changed.reshape(logits.shape)


def _follow_beams(
    cache: Any, routing: passes.Routing | None, routings: WeakKeyDictionary[Any, passes.Routing]
) -> None:
    """Have what is known of rows follow them where a search among beams reorders their cache.

    ``routing``: of the loop that the cache belongs to; None: the one that the cache is looked up by.
    """
    if not hasattr(cache, "reorder_cache") or "reorder_cache" in vars(cache):
        return
    owner = ref(cache)  # not the cache itself, which would then be freed late

    def follow(beams: Tensor) -> None:
        own: Any = owner()
        type(own).reorder_cache(own, beams)
        current = routings.get(own) if routing is None else routing
        if current is not None:
            current.decided = {name: rows[beams.to(rows.device)] for name, rows in current.decided.items()}

    cache.reorder_cache = follow
