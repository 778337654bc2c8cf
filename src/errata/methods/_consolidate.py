"""Records of what a fitted change does at its requests' keys, and one ridge regression over all of them.

A sequence adds one change to another, and each later one moves the outputs at earlier keys a little. Solving once for
all keys and the outputs recorded at them, at the least cost under M, gives those outputs back and drops what no
request needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from errata.edits.records import Record
from errata.edits.weight import Delta, WeightEdit, add_deltas
from errata.errors import ConfigError
from errata.host.layout import Site
from errata.linalg.solve import CostMatrix, update_primal
from errata.methods._closed_form import CostTerms


def record_changes(
    changes: Mapping[Site, Delta], keys: Mapping[Site, Tensor], costs: Mapping[Site, CostMatrix],
    owners: Sequence[int], after: WeightEdit | None, *, gamma: float, exact: bool,
    terms: Mapping[Site, CostTerms],
) -> dict[str, Record]:  # fmt: skip
    """Return the records of fitted changes ``[d_out, d_in]`` at their keys ``[d_in, n]``, by parameter.

    ``owners``: the request of each key. ``terms``: of the cost at each site, or none. Outputs are recorded relative to
    the host without ``after``, the edit that the fit continues. ``exact``: whether nothing but keys and cost determined
    the changes.
    """
    records: dict[str, Record] = {}
    groups = tuple((i,) for i in owners)
    for site, change in changes.items():
        inputs, before = keys[site], after.deltas.get(site.parameter) if after else None
        outputs = change.to(inputs.dtype) @ inputs
        outputs = outputs if before is None else outputs + before.to(inputs.dtype) @ inputs
        solved = costs[site].solve(inputs).to(inputs.dtype)
        record = Record(inputs, outputs, solved, gamma, costs[site].label, groups, is_exact_solution=exact)
        if site in terms:
            own = terms[site]
            record = record.join(record.as_terms(own.keys, costs[site].solve(own.keys), own.requests))
        records[site.parameter] = record.contiguous()
    return records


def is_due(requests: int, after: WeightEdit | None, every: int) -> bool:
    """Whether a multiple of ``every`` requests is reached with some new ones; never for 0."""
    earlier = len(after.provenance.requests) if after else 0
    return every > 0 and (earlier + requests) // every > earlier // every


def consolidate(
    records: Mapping[str, Record], costs: Mapping[Site, CostMatrix], after: WeightEdit | None
) -> dict[Site, Delta]:
    """Return, per site, what is to be added to the change by ``after`` so that the sum solves for all records.

    Raises ConfigError where ``after`` has no records, or the costs are not those of its records.
    """
    changes: dict[Site, Delta] = {}
    for site, cost in costs.items():
        record = records[site.parameter]
        if after is None:
            changes[site] = solve_all(record, cost)
            continue
        earlier, before = after.records.get(site.parameter), after.deltas.get(site.parameter)
        if earlier is None or before is None or earlier.cost != record.cost:
            raise ConfigError(
                f"consolidate needs the records of {len(after.provenance.requests)} earlier requests at {site.name}, "
                "under the same cost matrix; set consolidate=0, or begin the sequence with records=true"
            )
        whole = solve_all(earlier.join(record.shift_requests(len(after.provenance.requests))), cost)
        changes[site] = add_deltas(whole, before * -1.0)
    return changes


def solve_all(record: Record, cost: CostMatrix) -> Delta:
    """Return the change ``[d_out, d_in]`` of least squared error at a record's keys plus gamma times its cost.

    Solved in the smaller of both coordinates, keys or entries of a key.
    """
    width, count = record.keys.shape
    if count <= width or cost.factor is None:
        return record.delta()
    keys, targets, terms = record.split()
    matrix = cost.dense().to(keys.device) + terms.double() @ terms.double().mT
    return update_primal(keys, targets, matrix, gamma=record.gamma).to(keys.dtype)
