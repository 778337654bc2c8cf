"""INLP: takes a concept out of hidden states by projecting off one linear classifier after another.

Paper      Ravfogel et al., "Null It Out: Guarding Protected Attributes by Iterative Nullspace Projection", ACL 2020,
           arXiv 2004.07667
Implements Algorithm 1: fit a linear classifier, project the states onto its null space, repeat until it is no better
           than the largest label
Departs    Classifiers are logistic regressions. What is projected off is the span of all of them, about the mean of
           the examples, which then stays where it is (authors' code: about 0). Erased layer by layer as LEACE's
           concept scrubbing does
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
    """Settings of INLP."""

    rounds: int = 20
    """Classifiers at most (authors' experiments: 15 to 35)."""
    margin: float = 0.02
    """Accuracy above the largest label's share at which a classifier still counts."""
    ridge: float = 1e-3
    """Weight of the classifiers' squared coefficients, on standardised states."""

    def problems(self) -> list[str]:
        """Check ranges."""
        wrong = [] if 0 <= self.margin < 1 else [f"margin: expected 0 to below 1, found {self.margin}"]
        return [*_erasing.positive_fields(self, "rounds", "ridge"), *wrong]


def fit(host: Host, requests: Sequence[Concept], config: Config, work: Workspace) -> MemoryEdit:
    """Return an eraser of the concept at every site."""
    scrubbing = _erasing.start("inlp", host, requests, config, work)
    for site in scrubbing.sites:
        states = scrubbing.states(site)
        eraser = erasers.inlp(
            states,
            scrubbing.labels,
            scrubbing.classes,
            rounds=config.rounds,
            margin=config.margin,
            ridge=config.ridge,
        )
        scrubbing.add(site, states, eraser)
    return scrubbing.edit("inlp")


METHOD = Method(
    name="inlp",
    title="INLP",
    paper="Null It Out: Guarding Protected Attributes by Iterative Nullspace Projection, ACL 2020, arXiv 2004.07667",
    config=Config,
    fit=fit,
    gives=MemoryEdit,
    takes="concept",
    batch=False,
    sequential=False,
    random=False,
)
