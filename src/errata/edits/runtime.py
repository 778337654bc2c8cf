"""The common part of edits that change no weights: they act while the model runs, or on its prompts."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from errata.edits.edit import Edit, Outside, Placement
from errata.errors import EditError
from errata.host import locking, placed
from errata.host.base import ModelHost

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, eq=False)
class RuntimeEdit(Edit):
    """An edit that changes no weights, and is reverted by detaching it from the host."""

    def place(
        self, host: ModelHost, *, foreign: bool = False, merge: bool | None = None, rows: str | None = None
    ) -> Placement:
        """Attach the edit to the host; weights stay as they are, so ``merge=True`` is refused.

        Raises EditError, with nothing changed, for another host, one on which this kind of edit cannot act, or an
        edit that is in place already.
        """
        return locking.alone(host, self._place, host, foreign, merge, rows)

    def _place(self, host: ModelHost, foreign: bool, merge: bool | None, rows: str | None) -> Placement:
        if merge:
            raise EditError(f"a {self.kind} edit changes no weights and cannot be merged into them")
        overrides = self.overridden_checks(host, foreign=foreign)
        if self.in_place(host):
            raise EditError(f"edit {self.digest} is active on this host already")
        self._check(host)
        number = placed.set_number(host.model, rows)
        try:
            self._attach(host, number)
        except BaseException:  # an interrupt, too, must leave nothing half done
            placed.remove(host.model, self.digest)
            raise
        return Placement(self.digest, host.fingerprint, overrides=overrides, rows=rows)

    @abstractmethod
    def _check(self, host: ModelHost) -> None:
        """Raise EditError if the edit cannot act on a host."""

    @abstractmethod
    def _attach(self, host: ModelHost, number: int | None) -> None:
        """Attach the edit to the host, for the rows of an edit set; :func:`errata.host.placed.remove` detaches it."""

    @property
    def order(self) -> tuple[str, str]:
        """Sort key of edits that are in place together: the oldest acts first."""
        return self.provenance.created, self.digest

    def revert_(self, host: ModelHost, *, outside: Outside = "refuse") -> None:
        """Take the edit off; ``outside`` does not matter, since no weight was changed.

        Raises EditError if the edit is not in place.
        """
        locking.alone(host, self._revert, host)

    def _revert(self, host: ModelHost) -> None:
        self.require_in_place(host)
        placed.remove(host.model, self.digest)

    def in_place(self, host: ModelHost) -> bool:
        """Whether the edit, or part of it after an interrupt, is in place on a host."""
        return self.digest in placed.on(host.model).digests

    def then(self, later: Edit, *, cumulative: bool = False) -> Self:
        """Return a fit that continued this edit as the edit of both: its entries include this one's.

        Raises EditError for an edit of another kind, and for one that is not ``cumulative``.
        """
        if not isinstance(later, type(self)) or not cumulative:
            raise EditError(f"a fit that continues a {self.kind} edit must return one with all its entries")
        return replace(later, provenance=self.joint_provenance(later))
