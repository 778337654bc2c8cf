"""Memory edits while the model runs: a router decides once for each prompt, and interventions act on its tokens."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from errata.edits.intervention import ACTIVATIONS, Intervention
from errata.edits.routers._router import NONE, Question, Router
from errata.errors import ConfigError, EditError
from errata.host.passes import Routing
from errata.linalg import side
from errata.writing import find_name, folded


@dataclass(frozen=True, eq=False)
class Acting:
    """What the interventions of an edit in place have in common."""

    digest: str
    """Of the edit."""
    order: tuple[str, str]
    """Sort key of edits that are in place together."""
    number: int | None
    """The edit set whose rows it acts on; None: all rows."""
    router: Router
    reads: str
    """Path of the module that the router reads; empty: the first intervention's own."""
    tokenizer: Any


def phrases_of(router: Router) -> tuple[str, ...]:
    """Return the name that each entry of a router needs. Raises EditError for a router without names."""
    phrases = router.facts().get("phrases")
    if not isinstance(phrases, tuple):
        raise EditError(f"a {router.name} router knows no names, so that no position is a subject's")
    return tuple(str(phrase) for phrase in cast("tuple[Any, ...]", phrases))


def name_end(tokenizer: Any, ids: Sequence[int], phrase: str) -> int | None:
    """Return the index of the token with which a text first names a phrase in full; None where it does not."""
    wanted = folded(phrase)

    def beginning(count: int) -> str:
        return folded(str(tokenizer.decode(ids[:count], skip_special_tokens=True)))

    text = beginning(len(ids))
    begin = find_name(text, wanted)
    if begin < 0:
        return None
    upto = text[: begin + len(wanted)]
    # a beginning that has the name is followed by such only: found by halves, not by decoding every one
    return bisect_left(range(1, len(ids) + 1), True, key=lambda count: beginning(count).startswith(upto))


class _Decider:
    """Has an edit's router decide about the rows of a pass, once for each prompt."""

    def __init__(self, acting: Acting) -> None:
        self.digest, self.router, self.tokenizer = acting.digest, acting.router, acting.tokenizer

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


class Reader:
    """Shows an edit's router what a module reads and gives, where that is not the module it acts at."""

    def __init__(self, acting: Acting) -> None:
        self.number, self.digest, self.order = acting.number, acting.digest, acting.order
        self.module, self.decider = acting.reads, _Decider(acting)

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


class ActiveIntervention:
    """An intervention of an edit in place; called by the module's hook."""

    def __init__(self, acting: Acting, intervention: Intervention, *, first: bool) -> None:
        """Take an intervention of an edit; ``first``: whether it is the one by which the router decides."""
        self.number = acting.number
        self.digest, self.router, self.reads = acting.digest, acting.router, acting.reads
        self.decider = _Decider(acting) if first and not acting.reads else None
        self.order = acting.order
        self.intervention = intervention
        self.tokenizer = acting.tokenizer
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
        if self.digest not in routing.decided:
            where = (
                f"{self.reads}, which" if self.reads else "the module of the edit's first intervention, where"
            )
            raise EditError(
                f"{self.intervention.module} ran before {where} the edit's router reads; let it read a module of a "
                "lower layer"
            )
        return routing.decided[self.digest]

    def _subjects(
        self, selected: Tensor, entry: Tensor, ends: Tensor, length: int, routing: Routing
    ) -> Tensor:
        """Return the column of the name of each row's entry, bool ``[rows, length]``; none behind the prompt."""
        columns = torch.zeros(len(ends), length, dtype=torch.bool)
        phrases = phrases_of(self.router)
        for row in (selected.cpu() & (ends >= 0).cpu()).nonzero()[:, 0]:
            end = int(ends[row])
            ids = routing.prompt(int(row), end)
            key = phrases[int(entry[row])], tuple(ids)
            if key not in routing.names:
                routing.names[key] = name_end(self.tokenizer, ids, key[0])
            at = routing.names[key]
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


class StateReader:
    """Shows a side network what a module gets."""

    reads_blocks = True

    def __init__(self, acting: Acting, module: str) -> None:
        self.number, self.digest, self.order = acting.number, acting.digest, acting.order
        self.module = module

    def __call__(self, inputs: Tensor, output: Tensor, routing: Routing) -> Tensor:
        """Return the output ``[rows, length, d_out]`` as it is."""
        _check_rows(inputs, self.module)
        routing.passing[f"{self.digest} {self.module}"] = inputs
        return output


class ActiveSide(ActiveIntervention):
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
