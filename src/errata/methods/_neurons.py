"""Columns of down-projections: the values of feed-forward neurons, and changes of some of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from errata.host.host import Host
from errata.host.layout import Site
from errata.linalg.lowrank import LowRank
from errata.locate.neurons import Neuron


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor ``[...]`` on the CPU in float32, or wider where it is."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32)).cpu()


def erasures(host: Host, neurons: Iterable[Neuron]) -> dict[Neuron, Tensor]:
    """Return what makes the column of each neuron zero, its change ``[d_out]``: as if it were never active."""
    return {one: -wide(host.weight(host.layout.site(one.layer))[:, one.index]) for one in neurons}


def deltas(host: Host, changes: Mapping[Neuron, Tensor]) -> tuple[dict[str, LowRank], frozenset[str]]:
    """Return the change of each weight by its path, and which of them are stored ``[d_in, d_out]``.

    Thin factors: the changed columns ``[d_out, r]`` times one-hot rows ``[r, d_in]``, so no other column changes.
    """
    sites = [host.layout.site(layer) for layer in sorted({neuron.layer for neuron in changes})]
    by_path = {site.parameter: _delta(site, changes) for site in sites}
    return by_path, frozenset(site.parameter for site in sites if site.transposed)


def _delta(site: Site, changes: Mapping[Neuron, Tensor]) -> LowRank:
    columns = sorted(neuron.index for neuron in changes if neuron.layer == site.layer)
    b = torch.stack([changes[Neuron(site.layer, index)] for index in columns], dim=1)  # [d_out, r]
    a = torch.zeros(len(columns), site.d_in, dtype=b.dtype)
    a[torch.arange(len(columns)), columns] = 1.0
    return LowRank(b, a)
