"""Edits that change no weight: interventions at sites while the model runs, on rows that a router accepts.

A router decides once for each row, at the last token of its prompt; the decision holds for all later tokens of the
row. So a row has the same output alone and in any batch, with a cache and without one. A router may let several entries
act on a row (:attr:`Router.several`): what they add to an output is summed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from errata.edits import attention
from errata.edits import header as fields
from errata.edits.edit import Provenance
from errata.edits.intervention import ACTIVATIONS, ADDING, PARTS, SHARED, Intervention
from errata.edits.memory_active import (
    Acting,
    ActiveIntervention,
    ActiveSide,
    Reader,
    StateReader,
    phrases_of,
)
from errata.edits.records import contiguous_copy
from errata.edits.routers import _stored
from errata.edits.routers._router import Router
from errata.edits.runtime import RuntimeEdit
from errata.errors import EditError
from errata.host import placed
from errata.host.base import ModelHost
from errata.host.kinds import CAUSAL, KINDS

__all__ = ["ACTIVATIONS", "Intervention", "MemoryEdit"]


@dataclass(frozen=True, eq=False)
class MemoryEdit(RuntimeEdit):
    """Interventions whose entries act on the rows that a router assigns to them."""

    kind: ClassVar[str] = "memory"

    interventions: tuple[Intervention, ...]
    router: Router
    """Decides by the input and output of a module: the first intervention's, or ``reads``."""
    provenance: Provenance
    state: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Tensors that a method needs to continue from here; of a router that leads to blocks, ``owners``: the block of
    each request."""
    log: tuple[Mapping[str, Any], ...] = ()
    """The effect of each request on the entries, as plain data: enough to rebuild them without some requests."""
    reads: str = ""
    """Path of the module that the router reads, which runs before those of the interventions; empty: the first
    intervention's own."""

    def __post_init__(self) -> None:
        if not self.interventions:
            raise EditError("a memory edit needs at least one intervention")
        counts = {one.entries for one in self.interventions}
        if len(counts) > 1:
            raise EditError(f"interventions have different numbers of entries: {sorted(counts)}")
        if any(one.positions == "subject" for one in self.interventions):
            phrases_of(self.router)
        replacing = [one.operation for one in self.interventions if one.operation not in ADDING]
        if self.router.several and replacing:
            raise EditError(
                f"a {self.router.name} router lets several entries act on a row, and {replacing[0]} takes one: use "
                f"one of {', '.join(ADDING)}"
            )
        for one in self.interventions:
            if one.operation == "attend":
                operations = [other.operation for other in self.interventions]
                attention.attention_router(self.router, list(operations), len(one.shared["query_bias"]))
        count = self.router.facts().get("entries", self.entries)
        if count != self.entries:
            raise EditError(f"the router has {count} entries, found {self.entries}")
        blocks = self.router.tensors().get("blocks")
        if blocks is not None and blocks.numel() and int(blocks.max()) >= self.entries:
            raise EditError(f"the router leads to entry {int(blocks.max())}, found {self.entries} entries")
        if "vectors" in self.router.reads and self.router.facts().get("encoder") is not None:
            raise EditError("a memory compares states of its own host: leave the router's encoder out")
        object.__setattr__(
            self, "state", {name: contiguous_copy(tensor) for name, tensor in self.state.items()}
        )

    @property
    def entries(self) -> int:
        """Number of entries."""
        return self.interventions[0].entries

    def parts(self) -> Mapping[str, Tensor]:
        """Return payloads ``[entries, ...]``, the router's tensors and the state."""
        tensors = {
            f"{number}.{name}": tensor
            for number, one in enumerate(self.interventions)
            for name, tensor in (*one.payload.items(), *((f"shared.{n}", t) for n, t in one.shared.items()))
        }
        tensors.update(_stored.parts_of(self.router))
        tensors.update({f"{name}.state": tensor for name, tensor in self.state.items()})
        return tensors

    def body(self) -> Mapping[str, Any]:
        """Return the modules of the interventions, the router's settings and the log."""
        return {
            "interventions": [one.description() for one in self.interventions],
            "router": _stored.body_of(self.router),
            "log": [dict(entry) for entry in self.log],
            **({"reads": self.reads} if self.reads else {}),
        }

    @classmethod
    def restore(
        cls, parts: Mapping[str, Tensor], body: Mapping[str, Any], provenance: Provenance
    ) -> MemoryEdit:
        """Build the edit from its file's tensors, payloads ``[entries, ...]``, and header.

        Raises ValueError or KeyError where they do not fit.
        """
        interventions: list[Intervention] = []
        for number, item in enumerate(fields.get_field(body, "interventions", list, "the header")):
            where = f"interventions[{number}]"
            module, operation, positions = (
                fields.get_field(item, name, str, where) for name in ("module", "operation", "positions")
            )
            payload = {name: parts[f"{number}.{name}"] for name in PARTS.get(operation, ())}
            shared = {name: parts[f"{number}.shared.{name}"] for name in SHARED.get(operation, ())}
            activation = fields.check_type(item.get("activation", "relu"), str, where)
            states = fields.get_texts(item, "states", where) if operation == "side" else ()
            heads = fields.get_field(item, "heads", int, where) if operation == "side" else 1
            interventions.append(
                Intervention(module, operation, payload, positions, activation, states, heads, shared)
            )
        router = _stored.restore(parts, body)
        state = {n.removesuffix(".state"): t for n, t in parts.items() if n.endswith(".state")}
        log = tuple(
            fields.check_type(entry, dict, "log")
            for entry in fields.get_field(body, "log", list, "the header")
        )
        reads = fields.check_type(body.get("reads", ""), str, "reads")
        return cls(tuple(interventions), router, provenance, state, log, reads)

    def _attach(self, host: ModelHost, number: int | None) -> None:
        acting = Acting(self.digest, self.order, number, self.router, self.reads, host.tokenizer)
        if self.reads:
            placed.attach(host.model, self.reads, Reader(acting))
        for index, one in enumerate(self.interventions):
            for path in dict.fromkeys(one.states):
                placed.attach(host.model, path, StateReader(acting, path))
            if one.operation == "attend":
                placed.attach(host.model, one.module, self._attention(index, number))
            else:
                active = ActiveSide if one.operation == "side" else ActiveIntervention
                placed.attach(host.model, one.module, active(acting, one, first=index == 0))

    def _attention(self, index: int, number: int | None) -> attention.ActiveAttention:
        one = self.interventions[index]
        assert isinstance(self.router, attention.TopRows)
        return attention.ActiveAttention(
            self.digest, self.order, number, one.module, f"{self.digest}.{index}", self.router,
            {**one.payload, **one.shared},
        )  # fmt: skip

    def _check(self, host: ModelHost) -> None:
        for name, tensor in self.parts().items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise EditError(f"{name} of edit {self.digest} holds NaN or infinite numbers; refused")
        if host.kind != CAUSAL:
            raise EditError(
                f"{host.name} is one of the {KINDS[host.kind].plural}; memory edits act on causal language models"
            )
        paths = {
            **{path: "whose input the edit reads" for one in self.interventions for path in one.states},
            **{one.module: "at which the edit acts" for one in self.interventions},
        }
        for path, purpose in {
            **({self.reads: "which the router reads"} if self.reads else {}),
            **paths,
        }.items():
            try:
                host.model.get_submodule(path)
            except AttributeError as error:
                raise EditError(f"the host has no module {path!r}, {purpose}") from error

    def summary(self) -> dict[str, Any]:
        """Describe the edit: provenance, number of entries, interventions and router."""
        return {
            **super().summary(),
            "entries": self.entries,
            "router": self.router.name,
            "sites": [one.description() for one in self.interventions],
            **({"reads": self.reads} if self.reads else {}),
        }
