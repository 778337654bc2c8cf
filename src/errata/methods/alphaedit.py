"""AlphaEdit: restrict changes to the null space of preserved keys, and preserve earlier edits.

Paper      Fang et al., "AlphaEdit: Null-Space Constrained Knowledge Editing for Language Models",
           ICLR 2025, arXiv 2410.02355
Implements delta = R K^T P (K_p K_p^T P + K K^T P + L2 I)^-1 with P = U U^T the projection onto
           eigenvectors of C with small eigenvalues and K_p the keys of all earlier edits; values, contexts
           and layers as in MEMIT
Departs    Solved in coordinates of U (an equivalent symmetric system) and there in the dual, with the
           history as columns of keys instead of an m x m sum. The history holds the keys that
           each layer had when it was solved; as a key depends on lower layers only, they equal the keys of
           the final weights that the authors' code recomputes.
           An absolute bound on eigenvalues does not transfer between models, as they scale with
           keys: by default the protected space has a given share of the trace of C, and L2 is
           in mean squared norms of keys. ``threshold`` and ``ridge`` set the authors' numbers,
           ``projection`` their file of P.
           ``anchors`` and ``mates`` add keys of the model's own statements to K_p K_p^T; 0, the default, none. An
           anchor's key at the subject's last token is the edit's, so its weight is a penalty on the edit too.
           The clamp depends on the schedule (see there): 0.75 suits long sequences, but with it every third
           single edit of a small model fails.
Needs      Second moment of keys at each layer with its eigenvectors; context prefixes; for own statements,
           tables that the model writes once
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from errata.edits.weight import WeightEdit
from errata.host.host import Host
from errata.methods import _closed_form as closed_form
from errata.methods._closed_form import MEMIT_SETTINGS
from errata.methods._method import Method, Published, Workspace
from errata.methods._settings import NullSpaceConfig, SequentialDefaults, StatementTerms
from errata.methods._statements import statement_terms
from errata.types import Request


@dataclass(frozen=True)
class Config(SequentialDefaults, NullSpaceConfig, StatementTerms):
    """Settings of AlphaEdit."""

    anchors: float = 0.0
    """Weight beside K K^T, in the unit of one request's key, of the mean outer product of keys of other own
    statements about the subject."""
    mates: float = 0.0
    """Weight beside K K^T, in the unit of one request's key, of the mean outer product of keys of the request's own
    statement about other subjects of its type."""

    def problems(self) -> list[str]:
        """Check ranges."""
        return [*super().problems(), *self.own_problems()]


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> WeightEdit:
    """Return the edit in the null space of preserved keys."""
    clamp = closed_form.sequential_clamp(requests, work)
    config = closed_form.resolve_config(host, config, METHOD.published_for(host), clamp=clamp)
    task = closed_form.start_task("alphaedit", host, requests, config, work)
    costs = closed_form.null_space_costs(task)
    sweep = closed_form.start_sweep(task, closed_form.make_problems(task), costs)
    values = closed_form.find_target_values(task, sweep.problems)
    statements = statement_terms(task)
    edit = closed_form.start_edit(task, values)
    for layer in closed_form.sweep_layers(task, sweep, values, edit):
        edit.add(
            closed_form.solve_layer(
                task, layer, costs[layer.site], layer.even_share, history=True,
                terms=statements.at(layer.site, edit),
            )
        )  # fmt: skip
    return edit.build()


PUBLISHED: Published = {
    shape: {name: value for name, value in row.items() if name != "cov_weight"}
    for shape, row in MEMIT_SETTINGS.items()
}
"""MEMIT's layers and value search; there is no lambda."""

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
    published=PUBLISHED,
)
