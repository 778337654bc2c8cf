"""One lock per model: whoever changes a model or hangs hooks into it is alone, and generation runs side by side.

The lock lives with the model, so that two hosts of one model share it. It is re-entrant: a fit that
generates inside itself, or puts its own trial edits in place, goes on in the same thread. A copy of a model
gets a lock of its own, and a pickled model none.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from torch import nn

from errata.errors import HostError

LOCK = "_errata_lock"
P = ParamSpec("P")
T = TypeVar("T")


class _Side:
    """One way of holding a lock, as a context manager without state of its own."""

    __slots__ = ("_acquire", "_release")

    def __init__(self, acquire: Callable[[], None], release: Callable[[], None]) -> None:
        self._acquire, self._release = acquire, release

    def __enter__(self) -> None:
        self._acquire()

    def __exit__(self, *_: object) -> None:
        self._release()


class ModelLock:
    """A re-entrant lock that many threads may share, or one hold alone.

    A thread that waits to be alone goes before threads that come to share later, so it is not starved.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._owner: int | None = None
        self._depth = 0
        self._sharing: dict[int, int] = {}
        self._waiting = 0
        self._upgrading: int | None = None
        self._section = 0
        self._evaluations = 0
        self._training: list[nn.Module] = []
        self.shared = _Side(self._acquire_shared, self._release_shared)
        """Run the model beside other threads that do."""
        self.exclusive = _Side(self._acquire_exclusive, self._release_exclusive)
        """Change the model, or hang hooks into it; others wait. Raises HostError where two threads that
        share the lock both ask for this, for each would wait for the other."""

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelLock:
        return ModelLock()

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # a model that is opened again needs a lock of its own, and no errata for that

    @property
    def section(self) -> int | None:
        """Number of the stretch for which this thread has been alone; None where it is not."""
        return self._section if self._owner == threading.get_ident() else None

    @contextmanager
    def evaluating(self, model: nn.Module) -> Iterator[None]:
        """Have the model in evaluation mode inside the block; the last thread to leave puts training mode back."""
        with self._changed:
            if not self._evaluations:
                self._training = [module for module in model.modules() if module.training]
                for module in self._training:
                    module.training = False
            self._evaluations += 1
        try:
            yield
        finally:
            with self._changed:
                self._evaluations -= 1
                if not self._evaluations:
                    for module in self._training:
                        module.training = True
                    self._training = []

    def _acquire_shared(self) -> None:
        me = threading.get_ident()
        with self._changed:
            if self._owner != me and me not in self._sharing:
                self._changed.wait_for(lambda: self._owner is None and not self._waiting)
            self._sharing[me] = self._sharing.get(me, 0) + 1

    def _release_shared(self) -> None:
        me = threading.get_ident()
        with self._changed:
            if self._sharing[me] > 1:
                self._sharing[me] -= 1
            else:
                del self._sharing[me]
                self._changed.notify_all()

    def _acquire_exclusive(self) -> None:
        me = threading.get_ident()
        with self._changed:
            if self._owner != me:
                self._wait_alone(me)
                self._section += 1
            self._owner, self._depth = me, self._depth + 1

    def _wait_alone(self, me: int) -> None:
        upgrade = me in self._sharing
        if upgrade and self._upgrading is not None:
            raise HostError(
                "two threads that are running this model both ask to change it, and would wait for each other "
                "for ever; let each finish its generation first"
            )
        self._waiting += 1
        self._upgrading = me if upgrade else self._upgrading
        try:
            self._changed.wait_for(lambda: self._owner is None and not self._sharing.keys() - {me})
        finally:
            self._waiting -= 1
            self._upgrading = None if upgrade else self._upgrading
            self._changed.notify_all()

    def _release_exclusive(self) -> None:
        with self._changed:
            self._depth -= 1
            if not self._depth:
                self._owner = None
                self._changed.notify_all()


def of(owner: Any) -> ModelLock:
    """Return the lock of a model, or of a host's model."""
    attributes = (owner if isinstance(owner, nn.Module) else owner.model).__dict__
    # a pickled model left None behind; setdefault is one step for all threads
    for count in itertools.count():
        lock = attributes.get(f"{LOCK}{count}") or attributes.setdefault(f"{LOCK}{count}", ModelLock())
        if lock is not None:
            return lock
    raise AssertionError("unreachable")


def shared(function: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], T]:
    """Run a function of a host or model beside others that only run the model."""

    @wraps(function)
    def run(owner: Any, *args: P.args, **kwargs: P.kwargs) -> T:
        with of(owner).shared:
            return function(owner, *args, **kwargs)

    return run


def exclusive(function: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], T]:
    """Run a function of a host or model while no other thread runs or changes the model."""

    @wraps(function)
    def run(owner: Any, *args: P.args, **kwargs: P.kwargs) -> T:
        with of(owner).exclusive:
            return function(owner, *args, **kwargs)

    return run


def alone(owner: Any, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run any function while no other thread runs or changes the model of a host."""
    with of(owner).exclusive:
        return function(*args, **kwargs)
