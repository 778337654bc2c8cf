"""Edits that change no weight: interventions at sites while the model runs, on rows that a router accepts.

A router decides once for each row, at the last token of its prompt; the decision holds for all later tokens of the
row. So a row has the same output alone and in any batch, with a cache and without one. A router may let several entries
act on a row (:attr:`Router.several`): what they add to an output is summed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal, cast, get_args

import torch
from torch import Tensor
from torch.nn import functional

from errata.edits import attention
from errata.edits import header as fields
from errata.edits.edit import Provenance
from errata.edits.records import contiguous_copy
from errata.edits.routers import _stored
from errata.edits.routers._router import NONE, Question, Router
from errata.edits.runtime import RuntimeEdit
from errata.errors import ConfigError, EditError
from errata.host import placed
from errata.host.base import ModelHost
from errata.host.kinds import CAUSAL, KINDS
from errata.host.passes import Routing
from errata.linalg import side
from errata.writing import folded, names

Operation = Literal[
    "add", "replace", "lowrank", "dense", "slots", "swap", "affine", "erase", "side", "attend"
]
Positions = Literal["last", "prompt", "after", "all", "subject"]
PARTS: dict[Operation, tuple[str, ...]] = {
    "add": ("values",),
    "replace": ("values",),
    "lowrank": ("left", "right"),
    "dense": ("changes",),
    "slots": ("keys", "biases", "values"),
    "swap": ("weights",),
    "affine": ("weights", "biases"),
    "erase": ("left", "right", "mean"),
    "side": side.PARTS,
    "attend": attention.PARTS,
}
"""Tensors of each operation's payload; the first axis is that of the entries."""
SHARED: Mapping[Operation, tuple[str, ...]] = {"attend": attention.SHARED}
"""Tensors that all entries of an operation have in common; none for the others."""
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "silu": functional.silu,
}
"""What slots may apply to their keys' products; ``gelu_tanh`` is GPT-2's, called gelu_new there."""
ADDING: tuple[Operation, ...] = ("add", "lowrank", "dense", "slots", "side")
"""Operations that add to an output, so that several entries can act on one row."""


@dataclass(frozen=True, eq=False)
class Intervention:
    """What entries do to a module's output y ``[d_out]``, computed from its input x ``[d_in]``.

    With the tensors of the payload, one per entry:

    add      y + values                               values ``[entries, d_out]``
    replace  values
    lowrank  y + left @ (right @ x)                   left ``[entries, d_out, r]``, right ``[entries, r, d_in]``
    dense    y + changes @ x                          changes ``[entries, d_out, d_in]``
    slots    y + values^T act(keys @ x + biases)      keys ``[entries, s, d_in]``, biases ``[entries, s]``,
                                                      values ``[entries, s, d_out]``
    swap     weights @ x                              weights ``[entries, d_out, d_in]``
    affine   weights @ x + biases                     weights ``[entries, d_out, d_in]``, biases ``[entries, d_out]``
    erase    y - left @ (right @ (y - mean))          left ``[entries, d_out, r]``, right ``[entries, r, d_out]``,
                                                      mean ``[entries, d_out]``
    side     y + what a side network adds             see :func:`errata.linalg.side.side_shapes`, an axis of entries
                                                      before those
    attend   y + attention over several entries       keys, values ``[entries, heads * d_head]``; see
                                                      :mod:`errata.edits.attention`
    """

    module: str
    """Path of the module in the model."""
    operation: Operation
    payload: Mapping[str, Tensor]
    positions: Positions = "last"
    """Tokens it acts on. ``last``: the prompt's last one; ``prompt``: all of the prompt; ``after``: the prompt's last
    one and all later ones; ``all``; ``subject``: the last token of the name that a router of names found, where the
    prompt first has it."""
    activation: str = "relu"
    """Of ``slots``, one of :data:`ACTIVATIONS`."""
    states: tuple[str, ...] = ()
    """Of ``side``: paths of the modules whose inputs its blocks read, which run before this one or are it."""
    heads: int = 1
    """Of ``side``: attention heads of its transformer layers."""
    shared: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Of ``attend``, tensors that its entries have in common, see :data:`SHARED`."""

    def __post_init__(self) -> None:
        wrong = [
            f"{what} {value!r}, expected one of {', '.join(options)}"
            for what, value, options in (
                ("operation", self.operation, get_args(Operation)),
                ("positions", self.positions, get_args(Positions)),
                ("activation", self.activation, tuple(ACTIVATIONS)),
            )
            if value not in options
        ]
        if wrong:
            raise EditError("; ".join(wrong))
        for held, parts in (
            (self.payload, PARTS[self.operation]),
            (self.shared, SHARED.get(self.operation, ())),
        ):
            if set(held) != set(parts):
                raise EditError(
                    f"{self.operation} takes {', '.join(parts) or 'none'}, found {', '.join(sorted(held)) or 'none'}"
                )
        for name in ("payload", "shared"):
            copies = {part: contiguous_copy(tensor) for part, tensor in vars(self)[name].items()}
            object.__setattr__(self, name, copies)
        if self.operation == "side":
            self._check_side()
        elif self.states:
            raise EditError(
                f"{self.operation} has states {list(self.states)}: they are what side networks read"
            )
        if self.operation == "attend":
            attention.check_shapes(self.payload, self.shared)
            if self.positions != "all":
                raise EditError(f"attend acts at all tokens, found positions {self.positions!r}")

    def _check_side(self) -> None:
        """Raise EditError for a side network whose settings do not fit its tensors."""
        blocks, width = self.payload["down"].shape[1], self.payload["attention"].shape[-1]
        if self.positions != "all" or len(self.states) != blocks or self.heads < 1 or width % self.heads:
            raise EditError(
                f"side: expected positions all, {blocks} states for as many blocks and heads that divide {width}; "
                f"found {self.positions}, {len(self.states)} states and {self.heads} heads"
            )

    @property
    def entries(self) -> int:
        """Number of entries."""
        return len(next(iter(self.payload.values())))

    def description(self) -> dict[str, Any]:
        """Return everything but the payload, as plain data."""
        described = {"module": self.module, "operation": self.operation, "positions": self.positions}
        if self.operation == "side":
            return {**described, "states": list(self.states), "heads": self.heads}
        return described if self.activation == "relu" else {**described, "activation": self.activation}


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
        if self.reads:
            placed.attach(host.model, self.reads, _Reader(self, host, number))
        for index, one in enumerate(self.interventions):
            for path in dict.fromkeys(one.states):
                placed.attach(host.model, path, _StateReader(self, path, number))
            if one.operation == "attend":
                placed.attach(host.model, one.module, self._attention(index, number))
            else:
                active = _ActiveSide if one.operation == "side" else _ActiveIntervention
                placed.attach(host.model, one.module, active(self, index, host, number))

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


def phrases_of(router: Router) -> tuple[str, ...]:
    """Return the name that each entry of a router needs. Raises EditError for a router without names."""
    phrases = router.facts().get("phrases")
    if not isinstance(phrases, tuple):
        raise EditError(f"a {router.name} router knows no names, so that no position is a subject's")
    return tuple(str(phrase) for phrase in cast("tuple[Any, ...]", phrases))


def name_end(tokenizer: Any, ids: Sequence[int], phrase: str) -> int | None:
    """Return the index of the token with which a text first names a phrase in full; None where it does not."""
    wanted = folded(phrase)
    for at in range(len(ids)):
        text = folded(str(tokenizer.decode(ids[: at + 1], skip_special_tokens=True)))
        if names(text, wanted):
            following = folded(str(tokenizer.decode(ids[: at + 2], skip_special_tokens=True)))
            if names(following, wanted):  # else the name goes on in the next token, as Ada in Adam
                return at
    return None


class _Decider:
    """Has an edit's router decide about the rows of a pass, once for each prompt."""

    def __init__(self, edit: MemoryEdit, host: ModelHost) -> None:
        self.digest, self.router, self.tokenizer = edit.digest, edit.router, host.tokenizer

    def entries(self, inputs: Tensor, output: Tensor, routing: Routing) -> Tensor:
        """Return each row's entry, int64 ``[rows]``, by what the module reads and gives ``[rows, length, d]``.

        ``[rows, k]`` by a router that lets several act on a row.
        """
        return routing.decision(self.digest, lambda: self._decide(inputs, output, routing))

    def _decide(self, inputs: Tensor, output: Tensor, routing: Routing) -> Tensor:
        ends = routing.ends(*inputs.shape[:2]).to(inputs.device)
        here = (ends >= 0).nonzero()[:, 0]
        entries = torch.full((len(ends),), NONE, device=inputs.device)
        if inputs.ndim == 2:  # ids, which an embedding reads
            inputs = inputs[..., None]
        if len(here):
            at = ends[here]
            lines, columns = list(map(int, here.cpu())), list(map(int, at.cpu()))
            question = Question(
                inputs[here, at].detach().float(),
                output[here.to(output.device), at.to(output.device)].detach().float(),
                lambda: self._texts(routing, lines, columns),
                lambda: _means(output, routing, lines, columns),
            )
            decided = self.router.decide(question).to(entries.device)
            entries = entries.new_full((len(ends), *decided.shape[1:]), NONE)
            entries[here] = decided
        return entries

    def _texts(self, routing: Routing, rows: Sequence[int], ends: Sequence[int]) -> list[str]:
        prompts = [routing.prompt(row, end) for row, end in zip(rows, ends, strict=True)]
        return list(self.tokenizer.batch_decode(prompts, skip_special_tokens=True))


def _means(output: Tensor, routing: Routing, rows: Sequence[int], ends: Sequence[int]) -> Tensor:
    """Return the mean output over each row's prompt, of unit length ``[n, d]``."""
    means: list[Tensor] = []
    for row, end in zip(rows, ends, strict=True):
        length = len(routing.prompt(row, end)) or end + 1  # without ids nothing tells padding apart
        means.append(output[row, end + 1 - length : end + 1].detach().float().mean(0))
    return functional.normalize(torch.stack(means), dim=1)


class _Reader:
    """Shows an edit's router what a module reads and gives, where that is not the module it acts at."""

    def __init__(self, edit: MemoryEdit, host: ModelHost, number: int | None) -> None:
        self.number, self.digest, self.order = number, edit.digest, edit.order
        self.module, self.decider = edit.reads, _Decider(edit, host)

    def __call__(self, inputs: Tensor, output: Tensor, routing: Routing) -> Tensor:
        """Return the output ``[rows, length, d_out]`` as it is."""
        _check_rows(output, self.module)
        self.decider.entries(inputs, output, routing)
        return output


def _check_rows(states: Tensor, module: str) -> None:
    if states.ndim != 3:
        raise ConfigError(
            f"{module} has states of shape {list(states.shape)}, expected [rows, tokens, d]: "
            "a memory needs to tell rows apart; choose another site"
        )


class _ActiveIntervention:
    """An intervention of an edit in place; called by the module's hook."""

    def __init__(self, edit: MemoryEdit, index: int, host: ModelHost, number: int | None) -> None:
        """Take an edit's intervention by its index; ``number``: the edit set whose rows it acts on, None all rows."""
        self.number = number
        self.digest, self.router, self.reads = edit.digest, edit.router, edit.reads
        self.decider = _Decider(edit, host) if index == 0 and not edit.reads else None
        self.order = edit.order
        self.intervention = edit.interventions[index]
        self.tokenizer = host.tokenizer
        self.ready: dict[str, Tensor] = {}

    def __call__(self, inputs: Tensor, output: Tensor, routing: Routing) -> Tensor:
        """Return the output ``[rows, length, d_out]``, changed at the tokens that the chosen entries act on."""
        _check_rows(inputs, self.intervention.module)
        rows, length = inputs.shape[:2]
        ends = routing.ends(rows, length).to(inputs.device)
        entry = self._entries(inputs, output, routing).to(output.device).reshape(rows, -1)  # [rows, k]
        selected = (entry != NONE).any(1)
        members = routing.members(self.number, rows)
        if members is not None:
            selected = selected & members.to(selected.device)
        columns = self._columns(ends, length)
        if columns is None:
            columns = self._subjects(selected, entry[:, 0], ends, length, routing)
        acting = selected[:, None] & columns.to(output.device)  # [rows, length]
        if not bool(acting.any()):
            return output
        row = acting.nonzero()[:, 0]
        wide = torch.promote_types(output.dtype, torch.float32)
        x, y = inputs[acting.to(inputs.device)].to(output.device, wide), output[acting].to(wide)
        with torch.autocast(output.device.type, enabled=False):
            for one in entry[row].unbind(1):  # of each token [n]
                own = one != NONE
                y = y.masked_scatter(own[:, None], self._apply(x[own], y[own], one[own]))
        return output.masked_scatter(acting[..., None], y.to(output.dtype))

    def _entries(self, inputs: Tensor, output: Tensor, routing: Routing) -> Tensor:
        if self.decider is not None:
            return self.decider.entries(inputs, output, routing)
        if self.reads and self.digest not in routing.decided:
            raise EditError(
                f"{self.intervention.module} ran before {self.reads}, which the edit's router reads; let it read a "
                "module of a lower layer"
            )
        return routing.decision(self.digest, lambda: torch.full((len(inputs),), NONE))

    def _subjects(
        self, selected: Tensor, entry: Tensor, ends: Tensor, length: int, routing: Routing
    ) -> Tensor:
        """Return the column of the name of each row's entry, bool ``[rows, length]``; none behind the prompt."""
        columns = torch.zeros(len(ends), length, dtype=torch.bool)
        phrases = phrases_of(self.router)
        for row in (selected.cpu() & (ends >= 0).cpu()).nonzero()[:, 0]:
            end = int(ends[row])
            ids = routing.prompt(int(row), end)
            at = name_end(self.tokenizer, ids, phrases[int(entry[row])])
            if at is not None:
                columns[row, end + 1 - len(ids) + at] = True
        return columns

    def _columns(self, ends: Tensor, length: int) -> Tensor | None:
        """Return which columns of each row are acted on, bool ``[rows, length]``; None where that is a name's."""
        if self.intervention.positions == "subject":
            return None
        column = torch.arange(length, device=ends.device)[None]
        last = ends[:, None]
        return {
            "last": lambda: column == last,
            "prompt": lambda: column <= last,
            "after": lambda: column >= last,
            "all": lambda: torch.ones_like(column == last),
        }[self.intervention.positions]()

    def _apply(self, inputs: Tensor, output: Tensor, entry: Tensor) -> Tensor:
        """Return outputs ``[n, d_out]`` of tokens, each by its entry ``[n]``."""
        operation = self.intervention.operation
        part = {name: self._part(name, output) for name in self.intervention.payload}
        if operation == "replace":
            return part["values"][entry]
        if operation == "add":
            return output + part["values"][entry]
        if operation == "lowrank":
            return output + torch.einsum("nor,nri,ni->no", part["left"][entry], part["right"][entry], inputs)
        # entries of whole matrices: one product for all tokens of an entry, rather than a matrix for each token
        after = output.clone()
        for one in sorted(set(map(int, entry))):
            own = entry == one
            after[own] = self._apply_one({n: t[one] for n, t in part.items()}, inputs[own], output[own])
        return after

    def _apply_one(self, part: Mapping[str, Tensor], inputs: Tensor, output: Tensor) -> Tensor:
        """Return outputs ``[n, d_out]`` of tokens of one entry, with its part of the payload."""
        if self.intervention.operation == "dense":
            return output + inputs @ part["changes"].mT
        if self.intervention.operation == "swap":
            return inputs @ part["weights"].mT
        if self.intervention.operation == "affine":
            return inputs @ part["weights"].mT + part["biases"]
        if self.intervention.operation == "erase":
            return output - ((output - part["mean"]) @ part["right"].mT) @ part["left"].mT
        act = ACTIVATIONS[self.intervention.activation]
        return output + act(inputs @ part["keys"].mT + part["biases"]) @ part["values"]

    def _part(self, name: str, like: Tensor) -> Tensor:
        """Return a tensor of the payload ``[entries, ...]`` where another one is, in its precision."""
        cached = self.ready.get(name)
        if cached is None or (cached.device, cached.dtype) != (like.device, like.dtype):
            cached = self.ready[name] = self.intervention.payload[name].to(like.device, like.dtype)
        return cached


class _StateReader:
    """Shows a side network what a module gets."""

    reads_blocks = True

    def __init__(self, edit: MemoryEdit, module: str, number: int | None) -> None:
        self.number, self.digest, self.order, self.module = number, edit.digest, edit.order, module

    def __call__(self, inputs: Tensor, output: Tensor, routing: Routing) -> Tensor:
        """Return the output ``[rows, length, d_out]`` as it is."""
        _check_rows(inputs, self.module)
        routing.passing[f"{self.digest} {self.module}"] = inputs
        return output


class _ActiveSide(_ActiveIntervention):
    """Side networks of an edit in place. What they computed of earlier tokens is kept by the routing of the rows."""

    def __call__(self, inputs: Tensor, output: Tensor, routing: Routing) -> Tensor:
        """Return the output ``[rows, length, d_out]`` with what the entries of each row add."""
        _check_rows(inputs, self.intervention.module)
        rows, length = inputs.shape[:2]
        entry = self._entries(inputs, output, routing).to(output.device).reshape(rows, -1)  # [rows, k]
        members = routing.members(self.number, rows)
        if members is not None:
            entry = torch.where(members.to(entry.device)[:, None], entry, NONE)
        if bool((entry == NONE).all()):
            return output
        wide = torch.promote_types(output.dtype, torch.float32)
        last, before = output.to(wide), routing.before(length)
        states = [
            routing.passing[f"{self.digest} {path}"].to(last.device, wide)
            for path in self.intervention.states
        ]
        if before is None and f"{self.digest} tokens" not in routing.decided:
            before = (
                0 if bool((routing.ends(rows, length) >= 0).all()) else None
            )  # a loop's first pass, or not
        tokens = self._earlier(routing, "tokens", before)
        own = routing.tokens(rows, length).to(last.device)
        tokens = own if tokens is None else torch.cat([tokens.to(last.device), own], 1)
        routing.decided[f"{self.digest} tokens"] = tokens
        total = last
        with torch.autocast(output.device.type, enabled=False):
            for number, one in enumerate(entry.unbind(1)):
                earlier = self._earlier(routing, str(number), before)
                change, kept = self._changes(states, last, tokens, one, earlier)
                total = total + change
                routing.decided[f"{self.digest} {number}"] = kept.detach()
        return total.to(output.dtype)

    def _earlier(self, routing: Routing, name: str, before: int | None) -> Tensor | None:
        """Return what was kept of the columns before this pass ``[rows, before, ...]``; None where there are none.

        Raises EditError where rows go on that were not read with this edit in place.
        """
        if before == 0:
            return None
        kept = routing.decided.get(f"{self.digest} {name}")
        if kept is None or kept.shape[1] < (before or 0):
            raise EditError(
                f"a pass goes on with rows of which the side network of edit {self.digest} has not read the earlier "
                "tokens: run them whole while it is in place"
            )
        return kept[:, :before]

    def _changes(
        self, states: Sequence[Tensor], last: Tensor, tokens: Tensor, entry: Tensor, earlier: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return what each row's entry ``[rows]`` adds to it, and what is kept of all columns so far."""
        change, kept = torch.zeros_like(last), None
        for one in sorted(set(map(int, entry)) - {NONE}):
            part = {name: self._part(name, last)[one] for name in self.intervention.payload}
            own = entry == one
            added, new = side.side_change(
                part, [state[own] for state in states], last[own], tokens[own], heads=self.intervention.heads,
                earlier=None if earlier is None else earlier.to(last)[own],
            )  # fmt: skip
            change = change.masked_scatter(own[:, None, None], added)
            kept = new.new_zeros(len(last), *new.shape[1:]) if kept is None else kept
            kept = kept.index_put((own,), new)
        return change, last.new_zeros(len(last), tokens.shape[1]) if kept is None else kept
