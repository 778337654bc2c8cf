"""SAL: takes a concept out of hidden states by projecting off the directions of largest covariance with the labels.

Paper      Shao, Ziser and Cohen, "Gold Doesn't Always Glitter: Spectral Removal of Linear and Nonlinear Guarded
           Attribute Information", EACL 2023, arXiv 2203.07893
Implements Sec. 3: the singular vectors of the cross-covariance of states and one-hot labels; the leading ones are
           projected off
Departs    Projects about the mean of the examples, which then stays where it is (authors' code: about 0, on features
           that the caller standardised). Its kernel version is left out: it gives no map of hidden states.
           Erased layer by layer as LEACE's concept scrubbing does
Needs      A concept: labelled texts of two labels or more
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from errata.edits.memory import MemoryEdit
from errata.host.host import Host
from errata.linalg import erasers
from errata.methods import _erasing
from errata.methods._method import Method, Workspace
from errata.types import Concept


@dataclass(frozen=True)
class Config(_erasing.EraserConfig):
    """Settings of SAL."""

    rank: int | None = None
    """Directions that are projected off at most. None: all with any covariance (paper: 2 for two labels)."""

    def problems(self) -> list[str]:
        """Check ranges."""
        return _erasing.positive_fields(self, *(["rank"] if self.rank is not None else []))


def fit(host: Host, requests: Sequence[Concept], config: Config, work: Workspace) -> MemoryEdit:
    """Return an eraser of the concept at every site."""
    scrubbing = _erasing.start("sal", host, requests, config, work)
    for site in scrubbing.sites:
        states = scrubbing.states(site)
        scrubbing.add(site, states, erasers.sal(states, scrubbing.one_hot, rank=config.rank))
    return scrubbing.edit("sal")


METHOD = Method(
    name="sal",
    title="SAL",
    paper="Gold Doesn't Always Glitter: Spectral Removal of Linear and Nonlinear Guarded Attribute Information, EACL "
    "2023, arXiv 2203.07893",
    config=Config,
    fit=fit,
    gives=MemoryEdit,
    takes="concept",
    batch=False,
    sequential=False,
    random=False,
)
