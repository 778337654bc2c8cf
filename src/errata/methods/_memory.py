"""What memories at sites share: where they are, and the neurons or low-rank blocks of an earlier edit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from errata.edits.memory import Intervention, MemoryEdit
from errata.errors import ConfigError
from errata.host.host import Host
from errata.linalg.lowrank import LowRank
from errata.locate.gradients import named_maps
from errata.training.slots import Slots

Block = Mapping[str, LowRank]
"""Low-rank changes of several linear maps, by path."""


def editable_layer(host: Host, layer: int | None, share: float) -> int:
    """Return a layer whose feed-forward can be edited: the given one, else the nearest to a share of the depth.

    Raises HostError for a layer that cannot be edited, or where none can.
    """
    depth = len(host.layout.blocks)
    editable = [i for i, site in enumerate(host.layout.mlp_out) if site is not None]
    if layer is None and editable:
        middle = min(depth - 1, round(share * depth))
        layer = min(editable, key=lambda i: (abs(i - middle), i))
    layer = 0 if layer is None else layer + depth if layer < 0 else layer
    return host.layout.site(layer).layer


def earlier_slots(after: MemoryEdit | None, module: str, width: int) -> tuple[Slots, list[int]]:
    """Return the neurons of an earlier edit at a module, and each one's request; none without an edit.

    Raises ConfigError for an edit at another module.
    """
    if after is None:
        return Slots.none(width, width), []
    return slots_of(after, module), after.state["owners"].tolist()


def slots_of(edit: MemoryEdit, module: str) -> Slots:
    """Return the neurons of an edit. Raises ConfigError where they are at another module."""
    (intervention,) = edit.interventions
    if intervention.module != module:
        raise ConfigError(
            f"the earlier neurons are at {intervention.module}, not at {module}; use the same layer"
        )
    return Slots(*(intervention.payload[name][0] for name in ("keys", "biases", "values")))


def slot_edit(slots: Slots) -> dict[str, Tensor]:
    """Return neurons as the payload of one entry: keys and values ``[1, s, d]``, biases ``[1, s]``."""
    return {"keys": slots.keys[None], "biases": slots.biases[None], "values": slots.values[None]}


def block_maps(host: Host, layers: Sequence[int], names: Sequence[str]) -> list[str]:
    """Return the paths of the linear maps of some layers that names select; see :func:`named_maps`.

    Raises ConfigError for a layer that is not there and a name that selects none.
    """
    blocks = host.layout.blocks
    missing = [layer for layer in layers if not 0 <= layer < len(blocks)]
    if missing or not layers:
        raise ConfigError(f"layers {list(layers)}: expected some of 0 to {len(blocks) - 1}")
    inside = [(layer, path) for layer in layers for name in names for path in named_maps(host, layer, name)]
    return list(dict.fromkeys(f"{blocks[layer]}.{path}" for layer, path in inside))


def earlier_blocks(after: MemoryEdit | None, maps: Sequence[str], reads: str) -> list[Block]:
    """Return the blocks of an earlier edit. Raises ConfigError for one of other maps or with another query."""
    if after is None:
        return []
    found = [one.module for one in after.interventions]
    if found != list(maps) or after.reads != reads:
        raise ConfigError(
            f"the earlier edit changes {', '.join(found)} and reads {after.reads}, found {', '.join(maps)} and "
            f"{reads}; use the same layers and maps"
        )
    return [
        {one.module: LowRank(one.payload["left"][i], one.payload["right"][i]) for one in after.interventions}
        for i in range(after.entries)
    ]


def block_interventions(maps: Sequence[str], blocks: Sequence[Block]) -> tuple[Intervention, ...]:
    """Return blocks as interventions, an entry for each block; smaller ranks are filled with zeros."""
    return tuple(
        Intervention(path, "lowrank", stack_low_rank([block[path] for block in blocks]), "all")
        for path in maps
    )


def stack_low_rank(changes: Sequence[LowRank]) -> dict[str, Tensor]:
    """Return factors ``[entries, d_out, r]`` and ``[entries, r, d_in]``, smaller ranks filled with zeros."""
    rank = max(change.rank for change in changes)
    left = [functional.pad(change.B, (0, rank - change.rank)) for change in changes]
    right = [functional.pad(change.A, (0, 0, 0, rank - change.rank)) for change in changes]
    return {"left": torch.stack(left).float(), "right": torch.stack(right).float()}
