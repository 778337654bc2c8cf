"""Look into a running model, change what flows through it, stop it early. Always undone on exit.

What is hung into a model here acts on passes of the thread that hung it there: another thread may be
generating from the same model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from errata.host import locking
from errata.host.experts import Stack, stack_of

Call = tuple[tuple[Any, ...], Mapping[str, Any]]
"""Positional and named arguments of a module."""


class Stopped(Exception):
    """Raised inside a forward pass to end it; caught by :func:`stop_after`'s user."""


def first_tensor(value: Any) -> Tensor:
    """Return the hidden states from a module's output, be it a tensor ``[..., d]`` or a tuple led by one."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (tuple, list)) and value and isinstance(value[0], Tensor):
        return value[0]
    raise TypeError(f"expected a tensor or a tuple led by one, found {type(value).__name__}")


def with_first(value: Any, tensor: Tensor) -> Any:
    """Return the same output with other hidden states ``[..., d]``."""
    if isinstance(value, Tensor):
        return tensor
    return type(value)((tensor, *value[1:]))


@contextmanager
def on_input(module: nn.Module, act: Callable[[Tensor], None]) -> Iterator[None]:
    """Show a module's hidden-state input ``[..., d_in]`` to ``act``; positional or by keyword.

    That of stacked experts is their block key, see :mod:`errata.host.experts`.
    """

    owner, stack = get_ident(), stack_of(module)

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if get_ident() != owner:
            return
        if stack is not None:
            act(stack.keys(module, args, kwargs))
        elif args:
            act(first_tensor(args))
        else:
            act(first_tensor([v for v in kwargs.values() if isinstance(v, Tensor)]))

    with module.register_forward_pre_hook(hook, with_kwargs=True):
        yield


@contextmanager
def on_output(module: nn.Module, act: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Show a module's output ``[..., d_out]`` to ``act``; what it returns, unless None, takes the output's place."""

    owner = get_ident()

    def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        changed = act(first_tensor(output)) if get_ident() == owner else None
        return None if changed is None else with_first(output, changed)

    with module.register_forward_hook(hook):
        yield


@contextmanager
def on_call(module: nn.Module, act: Callable[[Call], None]) -> Iterator[None]:
    """Show all that a module is called with to ``act``."""

    owner = get_ident()

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if get_ident() == owner:
            act((args, kwargs))

    with module.register_forward_pre_hook(hook, with_kwargs=True):
        yield


@contextmanager
def on_answer(module: nn.Module, act: Callable[[Any], None]) -> Iterator[None]:
    """Show all that a module returns to ``act``."""

    owner = get_ident()

    def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if get_ident() == owner:
            act(output)

    with module.register_forward_hook(hook):
        yield


def attach(module: nn.Module, act: Callable[[Tensor, Tensor], Tensor], *, rank: int = 0) -> None:
    """Let ``act``, given a module's input and output, answer for it in every thread until :func:`leave`.

    Input ``[..., d_in]``, of stacked experts their block key; output and answer ``[..., d_out]``.
    Goes before all other hooks, also older ones, so that they see the module with its answer; of several acts
    those of a lower ``rank`` go first. A copy of the model takes a copy of ``act``. Nothing happens where it
    is there already.
    """
    if _places(module, act):
        return
    module.register_forward_hook(_Answer(act, rank, stack_of(module)), with_kwargs=True)
    acting = [(hook.rank, key) for key, hook in module._forward_hooks.items() if isinstance(hook, _Answer)]
    for _, key in sorted(acting, reverse=True):
        order: Any = module._forward_hooks  # an OrderedDict
        order.move_to_end(key, last=False)


def detach(module: nn.Module, act: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Take away what :func:`attach` added, if anything; ``act`` maps ``[..., d_in], [..., d_out]`` to the latter."""
    for place in _places(module, act):
        # found by what it does and not by a handle, which an interrupt may have kept from being stored
        for registry in (module._forward_hooks, module._forward_hooks_with_kwargs):
            registry.pop(place, None)


def _places(module: nn.Module, act: Callable[[Tensor, Tensor], Tensor]) -> list[int]:
    return [k for k, hook in module._forward_hooks.items() if isinstance(hook, _Answer) and hook.act is act]


class _Answer:
    """A hook as an object, since copying a model does not copy what a function closes over."""

    def __init__(self, act: Callable[[Tensor, Tensor], Tensor], rank: int, stack: Stack | None) -> None:
        self.act, self.rank, self.stack = act, rank, stack

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self.stack is not None:
            inputs = self.stack.keys(module, args, kwargs)
        else:
            inputs = first_tensor(args or [v for v in kwargs.values() if isinstance(v, Tensor)])
        return with_first(output, self.act(inputs, first_tensor(output)))


@contextmanager
def gathering(head: nn.Module, row: Tensor, at: Tensor) -> Iterator[None]:
    """Let an output head see only some positions: ``[rows, length, d]`` becomes ``[1, n, d]``.

    With a large vocabulary the head costs as much as many blocks, and few positions matter.
    """

    owner = get_ident()

    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if get_ident() != owner:
            return args
        here = args[0].device  # with weights on several devices, not that of the inputs
        return (args[0][row.to(here), at.to(here)][None], *args[1:])

    with head.register_forward_pre_hook(hook):
        yield


@contextmanager
def stop_after(module: nn.Module) -> Iterator[None]:
    """End any forward pass in the block once ``module`` has run; the pass returns nothing.

    Wrap each forward in ``contextlib.suppress(Stopped)``.
    """

    owner = get_ident()

    def hook(*_: Any) -> None:
        if get_ident() == owner:
            raise Stopped

    with module.register_forward_hook(hook):
        yield


@contextmanager
def answer_with(outputs: Mapping[nn.Module, Any]) -> Iterator[None]:
    """Make modules return given outputs without computing: what is below an edit never changes."""
    with ExitStack() as stack:
        for module, output in outputs.items():
            stack.enter_context(_fixed(module, output))
        yield


@contextmanager
def _fixed(module: nn.Module, output: Any) -> Iterator[None]:
    own, owner = module.__dict__.get("forward"), get_ident()

    def forward(*args: Any, **kwargs: Any) -> Any:
        if get_ident() == owner:
            return output
        return own(*args, **kwargs) if own is not None else type(module).forward(module, *args, **kwargs)

    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode with no parameter asking for gradients; both as before on exit."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    training: Sequence[nn.Module] = [m for m in model.modules() if m.training]
    for parameter in trainable:
        parameter.requires_grad_(False)
    model.eval()
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; a model that is being trained goes on as it was."""
    with locking.of(model).evaluating(model):
        yield


@contextmanager
def plain_torch() -> Iterator[None]:
    """PyTorch as it starts, whatever the caller has around: what is fitted must not depend on that.

    Gradients are recorded, inference mode and autocast are off, new tensors are float32 and in main memory.
    All is as before on exit.
    """
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if dtype != torch.float32:
            stack.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(torch.float32)
        yield
