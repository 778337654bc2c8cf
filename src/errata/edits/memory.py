"""Edits that leave all weights as they are and act at sites while the model runs, on rows that a router takes.

A router decides once for each row, at the last token of its prompt; the decision holds for all later tokens of the
row. So a row says the same alone and in any batch, with a cache and without one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from errata.edits import header as fields
from errata.edits.edit import Edit, Outside, Placement, Provenance
from errata.edits.records import contiguous_copy
from errata.edits.routers import _stored
from errata.edits.routers._router import NONE, Question, Router
from errata.errors import ConfigError, EditError
from errata.host import locking, placed
from errata.host.base import ModelHost
from errata.host.kinds import CAUSAL, KINDS
from errata.host.passes import Routing

Operation = Literal["add", "replace", "lowrank", "slots", "swap"]
Positions = Literal["last", "prompt", "after", "all"]
PARTS: dict[Operation, tuple[str, ...]] = {
    "add": ("values",),
    "replace": ("values",),
    "lowrank": ("left", "right"),
    "slots": ("keys", "biases", "values"),
    "swap": ("weights",),
}
"""Tensors of each operation's payload; each begins with an axis for the entries."""


@dataclass(frozen=True, eq=False)
class Intervention:
    """What entries do to a module's output y ``[d_out]``, computed from its input x ``[d_in]``.

    With the tensors of the payload, one per entry:

    add      y + values                               values ``[entries, d_out]``
    replace  values
    lowrank  y + left @ (right @ x)                   left ``[entries, d_out, r]``, right ``[entries, r, d_in]``
    slots    y + values^T relu(keys @ x + biases)     keys ``[entries, s, d_in]``, biases ``[entries, s]``,
                                                      values ``[entries, s, d_out]``
    swap     weights @ x                              weights ``[entries, d_out, d_in]``
    """

    module: str
    """Path of the module in the model."""
    operation: Operation
    payload: Mapping[str, Tensor]
    positions: Positions = "last"
    """Tokens it acts on: the prompt's last one, all of the prompt, the prompt's last one and all that follow, all."""

    def __post_init__(self) -> None:
        wrong = [
            f"{what} {value!r}, expected one of {', '.join(known)}"
            for what, value, known in (
                ("operation", self.operation, get_args(Operation)),
                ("positions", self.positions, get_args(Positions)),
            )
            if value not in known
        ]
        if wrong:
            raise EditError("; ".join(wrong))
        if set(self.payload) != set(PARTS[self.operation]):
            raise EditError(
                f"{self.operation} takes {', '.join(PARTS[self.operation])}, found {', '.join(sorted(self.payload))}"
            )
        payload = {name: contiguous_copy(tensor) for name, tensor in self.payload.items()}
        object.__setattr__(self, "payload", payload)

    @property
    def entries(self) -> int:
        """Number of entries."""
        return len(next(iter(self.payload.values())))


@dataclass(frozen=True, eq=False)
class MemoryEdit(Edit):
    """Interventions whose entries speak for the rows that a router takes."""

    kind: ClassVar[str] = "memory"

    interventions: tuple[Intervention, ...]
    router: Router
    """Decides by what it sees at the first intervention's module."""
    provenance: Provenance
    state: Mapping[str, Tensor] = field(default_factory=dict)
    """What a method needs to go on from here."""
    log: tuple[Mapping[str, Any], ...] = ()
    """What each request did to the entries, as plain data: enough to build them again without some requests."""

    def __post_init__(self) -> None:
        if not self.interventions:
            raise EditError("a memory edit needs at least one intervention")
        counts = {one.entries for one in self.interventions}
        if len(counts) > 1:
            raise EditError(f"interventions have different numbers of entries: {sorted(counts)}")
        object.__setattr__(
            self, "state", {name: contiguous_copy(tensor) for name, tensor in self.state.items()}
        )

    @property
    def entries(self) -> int:
        """Number of entries."""
        return self.interventions[0].entries

    def parts(self) -> Mapping[str, Tensor]:
        """Return payloads, the router's tensors and the state."""
        tensors = {
            f"{number}.{name}": tensor
            for number, one in enumerate(self.interventions)
            for name, tensor in one.payload.items()
        }
        tensors.update(_stored.parts_of(self.router))
        tensors.update({f"{name}.state": tensor for name, tensor in self.state.items()})
        return tensors

    def body(self) -> Mapping[str, Any]:
        """Return where the interventions act, the router's settings and the log."""
        return {
            "interventions": [
                {"module": one.module, "operation": one.operation, "positions": one.positions}
                for one in self.interventions
            ],
            "router": _stored.body_of(self.router),
            "log": [dict(entry) for entry in self.log],
        }

    @classmethod
    def restore(
        cls, parts: Mapping[str, Tensor], body: Mapping[str, Any], provenance: Provenance
    ) -> MemoryEdit:
        """Build the edit from its file's tensors and header. Raises ValueError or KeyError where they do not fit."""
        interventions = []
        for number, item in enumerate(fields.take(body, "interventions", list, "the header")):
            where = f"interventions[{number}]"
            module, operation, positions = (
                fields.take(item, name, str, where) for name in ("module", "operation", "positions")
            )
            payload = {name: parts[f"{number}.{name}"] for name in PARTS.get(operation, ())}  # type: ignore[arg-type]
            interventions.append(Intervention(module, operation, payload, positions))  # type: ignore[arg-type]
        router = _stored.restore(parts, body)
        state = {n.removesuffix(".state"): t for n, t in parts.items() if n.endswith(".state")}
        log = tuple(
            fields.typed(entry, dict, "log") for entry in fields.take(body, "log", list, "the header")
        )
        return cls(tuple(interventions), router, provenance, state, log)

    def place(
        self, host: ModelHost, *, foreign: bool = False, merge: bool | None = None, rows: str | None = None
    ) -> Placement:
        """Put the interventions in place; weights stay as they are, so ``merge=True`` is refused.

        Raises EditError, with nothing changed, for another host, one that has no such module, an edit that is in
        place already or holds numbers that are not finite.
        """
        return locking.alone(host, self._place, host, foreign, merge, rows)

    def _place(self, host: ModelHost, foreign: bool, merge: bool | None, rows: str | None) -> Placement:
        if merge:
            raise EditError(f"a {self.kind} edit acts while the model runs and cannot be merged into weights")
        overrides = self.overruled(host, foreign=foreign)
        if self.in_place(host):
            raise EditError(f"edit {self.digest} is active on this host already")
        self._check(host)
        member = placed.set_number(host.model, rows)
        try:
            for number, one in enumerate(self.interventions):
                placed.attach(host.model, one.module, _Act(self, number, host, member))
            return Placement(self.digest, host.fingerprint, overrides=overrides, rows=rows)
        except BaseException:  # an interrupt, too, must leave nothing half done
            placed.remove(host.model, self.digest)
            raise

    def _check(self, host: ModelHost) -> None:
        for name, tensor in self.parts().items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise EditError(f"{name} of edit {self.digest} holds NaN or infinite numbers; refused")
        if host.kind != CAUSAL:
            raise EditError(
                f"{host.name} is one of the {KINDS[host.kind].plural}; memory edits act on causal language models"
            )
        for one in self.interventions:
            try:
                host.model.get_submodule(one.module)
            except AttributeError as error:
                raise EditError(f"the host has no module {one.module!r}, at which the edit acts") from error

    def revert_(self, host: ModelHost, *, outside: Outside = "refuse") -> None:
        """Take the interventions off; ``outside`` does not matter, since no weight was changed.

        Raises EditError if the edit is not in place.
        """
        locking.alone(host, self._revert, host)

    def _revert(self, host: ModelHost) -> None:
        if not self.in_place(host):
            raise EditError(f"edit {self.digest} is not active on this host; nothing to take back")
        placed.remove(host.model, self.digest)

    def in_place(self, host: ModelHost) -> bool:
        """Whether an intervention of the edit is in place on a host."""
        return self.digest in placed.on(host.model).digests

    def then(self, later: Edit, *, cumulative: bool = False) -> MemoryEdit:
        """Return a fit that went on from this edit as the edit of both: its entries hold this one's already.

        Raises EditError where they do not.
        """
        if not isinstance(later, MemoryEdit) or not cumulative:
            raise EditError(f"a fit that goes on from a {self.kind} edit must give one with all its entries")
        provenance = replace(
            later.provenance,
            requests=(*self.provenance.requests, *later.provenance.requests),
            parents=(self.digest,),
        )
        return replace(later, provenance=provenance)

    def summary(self) -> dict[str, Any]:
        """Describe the edit: provenance, entries, where they act and what decides."""
        return {
            **super().summary(),
            "entries": self.entries,
            "router": self.router.name,
            "sites": [
                {"module": one.module, "operation": one.operation, "positions": one.positions}
                for one in self.interventions
            ],
        }


class _Act:
    """An intervention of an edit that is in place; what the hook runs."""

    def __init__(self, edit: MemoryEdit, number: int, host: ModelHost, member: int | None) -> None:
        self.number = member
        self.digest, self.router, self.first = edit.digest, edit.router, number == 0
        self.order = (edit.provenance.created, edit.digest)
        self.intervention = edit.interventions[number]
        self.tokenizer = host.tokenizer
        self.ready: dict[str, Tensor] = {}

    def __call__(self, inputs: Tensor, output: Tensor, routing: Routing) -> Tensor:
        """Return the output ``[rows, length, d_out]`` with what the entries that speak make of it."""
        if inputs.ndim != 3:
            raise ConfigError(
                f"{self.intervention.module} is handed {list(inputs.shape)}, not [rows, tokens, entries]: a memory "
                "cannot tell rows apart there; name another site"
            )
        rows, length = inputs.shape[:2]
        ends = routing.ends(rows, length).to(inputs.device)
        entry = routing.decision(self.digest, lambda: self._decide(inputs, output, ends, routing))
        entry = entry.to(output.device)
        spoken = entry != NONE
        members = routing.members(self.number, rows)
        if members is not None:
            spoken = spoken & members.to(spoken.device)
        acting = spoken[:, None] & self._columns(ends, length).to(output.device)  # [rows, length]
        if not bool(acting.any()):
            return output
        row = acting.nonzero()[:, 0]
        wide = torch.promote_types(output.dtype, torch.float32)
        given, before = inputs[acting.to(inputs.device)].to(output.device, wide), output[acting].to(wide)
        with torch.autocast(output.device.type, enabled=False):
            after = self._apply(given, before, entry[row])
        return output.masked_scatter(acting[..., None], after.to(output.dtype))

    def _decide(self, inputs: Tensor, output: Tensor, ends: Tensor, routing: Routing) -> Tensor:
        here = (ends >= 0).nonzero()[:, 0]
        decided = torch.full((len(ends),), NONE, device=inputs.device)
        if self.first and len(here):
            at = ends[here]
            question = Question(
                inputs[here, at].float(),
                output[here.to(output.device), at.to(output.device)].float(),
                lambda: self._texts(routing, here.tolist(), at.tolist()),
            )
            decided[here] = self.router.decide(question).to(decided.device)
        return decided

    def _texts(self, routing: Routing, rows: Sequence[int], ends: Sequence[int]) -> list[str]:
        prompts = [routing.prompt(row, end) for row, end in zip(rows, ends, strict=True)]
        return list(self.tokenizer.batch_decode(prompts, skip_special_tokens=True))

    def _columns(self, ends: Tensor, length: int) -> Tensor:
        """Return which columns of each row are acted on, bool ``[rows, length]``."""
        column = torch.arange(length, device=ends.device)[None]
        last = ends[:, None]
        return {
            "last": lambda: column == last,
            "prompt": lambda: column <= last,
            "after": lambda: column >= last,
            "all": lambda: torch.ones_like(column == last),
        }[self.intervention.positions]()

    def _apply(self, inputs: Tensor, output: Tensor, entry: Tensor) -> Tensor:
        """Return outputs ``[n, d_out]`` of tokens, each by its entry."""
        part = {name: self._part(name, output)[entry] for name in self.intervention.payload}
        operation = self.intervention.operation
        if operation == "replace":
            return part["values"]
        if operation == "add":
            return output + part["values"]
        if operation == "swap":
            return torch.einsum("noi,ni->no", part["weights"], inputs)
        if operation == "lowrank":
            return output + torch.einsum("nor,nri,ni->no", part["left"], part["right"], inputs)
        active = functional.relu(torch.einsum("nsi,ni->ns", part["keys"], inputs) + part["biases"])
        return output + torch.einsum("nso,ns->no", part["values"], active)

    def _part(self, name: str, like: Tensor) -> Tensor:
        held = self.ready.get(name)
        if held is None or (held.device, held.dtype) != (like.device, like.dtype):
            held = self.ready[name] = self.intervention.payload[name].to(like.device, like.dtype)
        return held
