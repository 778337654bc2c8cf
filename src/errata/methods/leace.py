"""LEACE: takes a concept out of hidden states by the affine map that changes them least.

Paper      Belrose et al., "LEACE: Perfect Linear Concept Erasure in Closed Form", NeurIPS 2023, arXiv 2306.03819
Implements Theorem 4.3 at every site, in float64; concept scrubbing (Sec. 6): from the lowest site upwards, each fitted
           with the lower erasers in place. The oracle of Theorem 4.2, which needs the labels of what it erases, is
           computed beside it as the least that any erasing changes, and noted as ``moved_oracle``
Departs    Directions are dropped by their canonical correlation, not by the authors' absolute 0.01, which loses rare
           labels. The authors' constraint on the trace is left out: for this map the trace cannot grow. An
           eraser acts on every token of every text, as at training; the mean is that of the labelled tokens
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
    """Settings of LEACE."""

    shrink: bool = False
    """Whether the covariance is shrunk by the optimal linear rule, for fewer examples than the states have entries
    (authors' code: true). It erases as exactly, and changes more."""
    tolerance: float = 0.0
    """Canonical correlations with the labels, from 0 to 1, that may stay; 0 erases all."""

    def problems(self) -> list[str]:
        """Check ranges."""
        wrong = (
            [] if 0 <= self.tolerance < 1 else [f"tolerance: expected 0 to below 1, found {self.tolerance}"]
        )
        return [*super().problems(), *wrong]


def fit(host: Host, requests: Sequence[Concept], config: Config, work: Workspace) -> MemoryEdit:
    """Return an eraser of the concept at every site."""
    scrubbing = _erasing.start("leace", host, requests, config, work)
    for site in scrubbing.sites:
        states = scrubbing.states(site)
        eraser = erasers.leace(states, scrubbing.one_hot, shrink=config.shrink, tolerance=config.tolerance)
        knowing = erasers.oracle(states, scrubbing.one_hot)(states, scrubbing.one_hot)
        variance = erasers.mean_square(states - states.mean(0))
        least = erasers.mean_square(knowing - states) / variance if variance else 0.0
        scrubbing.add(site, states, eraser, moved_oracle=least)
    return scrubbing.edit("leace")


METHOD = Method(
    name="leace",
    title="LEACE",
    paper="LEACE: Perfect Linear Concept Erasure in Closed Form, NeurIPS 2023, arXiv 2306.03819",
    config=Config,
    fit=fit,
    gives=MemoryEdit,
    takes="concept",
    batch=False,
    sequential=False,
    random=False,
)
