"""What memories at a site share: where they are, and the neurons of an earlier edit."""

from __future__ import annotations

from torch import Tensor

from errata.edits.memory import MemoryEdit
from errata.errors import ConfigError
from errata.host.host import Host
from errata.training.slots import Slots


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
    (intervention,) = after.interventions
    if intervention.module != module:
        raise ConfigError(
            f"the earlier neurons are at {intervention.module}, not at {module}; use the same layer"
        )
    keys, biases, values = (intervention.payload[name][0] for name in ("keys", "biases", "values"))
    return Slots(keys, biases, values), after.state["owners"].tolist()


def slot_edit(slots: Slots) -> dict[str, Tensor]:
    """Return neurons as the payload of one entry: keys and values ``[1, s, d]``, biases ``[1, s]``."""
    return {"keys": slots.keys[None], "biases": slots.biases[None], "values": slots.values[None]}
