"""Several edits that are in place together."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from errata.edits.edit import Edit, Placement
from errata.host.base import ModelHost


@dataclass(frozen=True)
class EditGroup:
    """Edits that are put in place in order, and reverted in reverse order."""

    edits: tuple[Edit, ...]

    @property
    def method(self) -> str:
        """The names of their methods, in order."""
        return " + ".join(edit.provenance.method for edit in self.edits)

    @contextmanager
    def on(
        self, host: ModelHost, *, foreign: bool = False, merge: bool | None = None
    ) -> Generator[tuple[Placement, ...], None, None]:
        """Put all of them in place inside the block, or none; options as of :meth:`Edit.place`."""
        with ExitStack() as stack:
            yield tuple(
                [stack.enter_context(edit.on(host, foreign=foreign, merge=merge)) for edit in self.edits]
            )


def group(edits: Edit | Sequence[Edit] | None) -> EditGroup | None:
    """Return one or several edits as a group; None if there are none."""
    if edits is None:
        return None
    members = tuple(edits) if isinstance(edits, Sequence) else (edits,)
    return EditGroup(members) if members else None
