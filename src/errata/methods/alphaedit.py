"""AlphaEdit: write only where keys of preserved knowledge hardly reach, and keep earlier edits.

Paper      Fang et al., "AlphaEdit: Null-Space Constrained Knowledge Editing for Language Models",
           ICLR 2025, arXiv 2410.02355
Implements delta = R K^T P (K_p K_p^T P + K K^T P + L2 I)^-1 with P = U U^T the projection onto
           eigenvectors of C with small eigenvalues and K_p the keys of all edits before; values, contexts
           and layers as in MEMIT
Departs    Solved in coordinates of U (an equivalent symmetric system) and there in the dual, with the
           history as columns of keys instead of an m x m sum. The keys that enter the history are those
           the layer saw when it was solved; as a key depends on lower layers alone, they are the keys of
           the final weights that the authors' code computes again.
           An absolute bound on eigenvalues means something else for every model, as they scale with
           keys: by default the protected space is the one that holds a share of the trace of C, and L2 is
           in mean squared norms of keys. The authors' numbers are ``threshold`` and ``ridge``; their file
           of P is ``projection``.
           The clamp depends on the schedule (see there): at 0.75, right for long sequences, every third
           single edit of a small model falls short.
Needs      Second moment of keys at each layer with its eigenvectors; context prefixes
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from errata.config import positive
from errata.edits.weight import WeightEdit
from errata.host.load import Host
from errata.methods._method import Method, Workspace
from errata.methods._spread import Lasting, Plan, SpreadConfig, null_space, settle, spread
from errata.types import Request


@dataclass(frozen=True)
class Config(Lasting, SpreadConfig):
    """Settings of AlphaEdit."""

    energy: float = 0.99
    """Share of the second moment's trace that must stay untouched; what is left is the null space."""
    threshold: float | None = None
    """Eigenvalues of C below this span the null space, instead of ``energy`` (code: 2e-2; paper: 1e-2)."""
    ridge_relative: float = 0.003
    """L2 in mean squared norms of the corpus's keys, where ``ridge`` is open (chosen on the lab)."""
    ridge: float | None = None
    """L2, plain (code: 10; EasyEdit: 1 for Llama 3 and Qwen). None: ``ridge_relative``, or 10 with ``projection``."""
    projection: str | None = None
    """File of the projection P onto the null space, used instead of ``energy`` and ``threshold``: .pt as the authors'
    code writes it (null_space_project.pt, its layers in the order of ``layers``), .npz or .safetensors."""

    def problems(self) -> list[str]:
        """Check ranges."""
        found = [*super().problems(), *positive(self, "threshold", "ridge", "ridge_relative", "energy")]
        if self.energy >= 1:
            found.append(f"energy: expected a share below 1, found {self.energy}")
        return found


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> WeightEdit:
    """Return the edit in the null space of preserved keys."""
    config = settle(host, config, requests, work)
    plan = Plan("alphaedit", null_space(host, config, work), history=True)
    return spread(host, requests, config, plan, work)


METHOD = Method(
    name="alphaedit",
    title="AlphaEdit",
    paper="AlphaEdit: Null-Space Constrained Knowledge Editing, ICLR 2025, arXiv 2410.02355",
    config=Config,
    fit=fit,
    gives=WeightEdit,
    batch=True,
    sequential=True,
    needs=("second_moment", "eigenvectors", "contexts"),
)
