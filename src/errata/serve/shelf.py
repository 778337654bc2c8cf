"""The edits that are in place on the served model: each for the rows that ask for it, one by one.

An edit is put in place for an edit set of its own, named by its digest, and a row belongs to the sets of all its edits.
So one pass answers rows with different edits. A change of weights that no module can apply beside its weight (of an
embedding, a norm, a bias) has to be merged: the rows that ask for it are run by themselves, while it is merged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from errata.edits import Edit
from errata.edits.weight import WeightEdit
from errata.errors import EditError
from errata.host import passes, placed
from errata.host.host import Host

IDLE = 64
"""Other edits than those wanted that stay in place although no row asks for them."""


@dataclass(frozen=True)
class Places:
    """How the edits of a row are in place."""

    numbers: tuple[int, ...]
    """Of the edit sets that the row belongs to."""
    merged: tuple[str, ...]
    """Digests of the edits that have to be merged while the row is run."""


class Shelf:
    """Puts edits in place when rows ask for them, and off when there are too many. Used by one thread."""

    def __init__(self, host: Host, load: Callable[[str], Edit], *, foreign: bool = False) -> None:
        """``load``: returns an edit by its digest. ``foreign``: takes edits of another model."""
        self.host, self._load, self._foreign = host, load, foreign
        self._numbers: dict[str, int] = {}
        """By digest, of the edits in place for a set of their own; the ones used last come last."""
        self._must_merge: dict[str, Edit] = {}
        self._edits: dict[str, Edit] = {}
        self._users: Counter[str] = Counter()
        self._merged: tuple[str, ...] = ()
        self.wanted: frozenset[str] = frozenset()
        """Digests of edits that stay in place whether rows ask for them or not."""

    def take(self, digests: Sequence[str]) -> Places:
        """Have some edits in place for a row until they are given back.

        Raises EditError or LedgerError, with none taken, for one that cannot be read or put in place.
        """
        for digest in digests:
            if digest in self._numbers:
                self._numbers[digest] = self._numbers.pop(digest)
            elif digest not in self._must_merge:
                self._place(digest)
        self._users.update(digests)
        self._make_room()
        numbers = tuple(self._numbers[one] for one in digests if one in self._numbers)
        return Places(numbers, tuple(sorted(one for one in digests if one in self._must_merge)))

    def give_back(self, digests: Sequence[str]) -> None:
        """Say that a row has no more use for its edits."""
        self._users.subtract(digests)
        self._users = +self._users

    def merge(self, digests: tuple[str, ...]) -> None:
        """Have exactly these edits merged into the weights. Raises EditError, with none merged, if one cannot be."""
        if digests == self._merged:
            return
        for digest in reversed(self._merged):
            self._must_merge[digest].revert_(self.host)
        self._merged = ()
        for digest in digests:
            try:
                self._must_merge[digest].place(self.host, foreign=self._foreign)
            except BaseException:
                self.merge(())
                raise
            self._merged = (*self._merged, digest)

    def clear(self) -> None:
        """Take everything off."""
        self.merge(())
        for digest in list(self._numbers):
            self._take_off(digest)

    @property
    def in_place(self) -> tuple[str, ...]:
        """Digests of the edits that are in place for rows that ask for them."""
        return tuple(self._numbers)

    def _place(self, digest: str) -> None:
        edit = self._load(digest)
        try:
            edit.place(self.host, foreign=self._foreign, rows=digest)
            number = placed.on(self.host.model).sets[digest]
            self._try(edit, number)
        except EditError:
            if edit.in_place(self.host):
                edit.revert_(self.host)
            if not isinstance(edit, WeightEdit):
                raise
            edit.overridden_checks(
                self.host, foreign=self._foreign
            )  # another host's would be refused merged too
            self._must_merge[digest] = edit
            return
        self._numbers[digest], self._edits[digest] = number, edit

    @torch.no_grad()
    def _try(self, edit: Edit, number: int) -> None:
        """Run the model once for a row of an edit's set. Raises EditError where a module cannot tell rows apart."""
        if isinstance(edit, WeightEdit):
            batch = self.host.batch([(self.host.pad_id,)])
            self.host.run(self.host.as_pass(batch, last=1, routes={passes.SETS: torch.tensor([number])}))

    def _make_room(self) -> None:
        idle = [one for one in self._numbers if not self._users[one] and one not in self.wanted]
        for digest in idle[: max(0, len(idle) - IDLE)]:
            self._take_off(digest)

    def _take_off(self, digest: str) -> None:
        self._edits.pop(digest).revert_(self.host)
        del self._numbers[digest]
