"""Edits that change no weight and let another model answer the rows that a router accepts (SERAC).

The other model has the host's vocabulary and is part of the edit: all of its weights, or low-rank changes that act
beside the host's while it reads. It reads an accepted row with the entry's text before it, or with those of several,
and its logits take the place of the host's, wherever they are asked for: the host's own hidden states are as they were.
The decision is made once for a row, at the last token of its prompt.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from errata.edits import header as fields
from errata.edits.edit import Provenance
from errata.edits.questions import check_module, check_reader, question
from errata.edits.records import contiguous_copy
from errata.edits.routers import _stored
from errata.edits.routers._router import NONE, Router
from errata.edits.runtime import RuntimeEdit
from errata.errors import EditError, HostError
from errata.host import passes, placed
from errata.host.base import ModelHost
from errata.host.beside import Factors, low_rank_beside
from errata.host.host import Host
from errata.host.kinds import CAUSAL, KINDS
from errata.host.passes import Routing
from errata.host.replica import model_beside
from errata.types.picture import without_marks
from errata.writing import filled

PREFIX = "model."
"""Before the names of the other model's weights in a file."""
OUTER, INNER = "outer.", "inner."
"""Before the paths of maps, of the factors B and A of their changes."""
SLOT = "{texts}"
PADDING = -1


@dataclass(frozen=True, eq=False)
class ModelEdit(RuntimeEdit):
    """Texts that a router finds for a prompt, and the model that answers with them."""

    kind: ClassVar[str] = "model"

    contexts: tuple[str, ...]
    """By entry, the text that the other model reads before the prompt."""
    router: Router
    """Decides by the prompt: its text, its sentence vector, or what a module of the host reads at its last token."""
    config: Mapping[str, Any]
    """What the other model is built from: a transformers configuration as plain data; empty with ``factors``."""
    weights: Mapping[str, Tensor]
    """Its weights ``[...]`` by name; none with ``factors``."""
    provenance: Provenance
    module: str = ""
    """Path of the host's module whose input and output the router reads; empty for a router that reads none."""
    factors: Factors = field(default_factory=dict[str, tuple[Tensor, Tensor]])
    """The other model as a change of the host: B ``[d_out, r]`` and A ``[r, d_in]`` by the path of a linear map."""
    count: int = 1
    """Entries whose texts are put before a prompt at most."""
    template: str = ""
    """What stands before a prompt; ``{texts}`` are those of its entries, one a line, the best first. Empty: the text
    of its one entry."""

    def __post_init__(self) -> None:
        check_module(self.router, self.module)
        # texts alone are put before prompts: whoever asks need not have the pictures of the requests
        object.__setattr__(self, "contexts", tuple(map(without_marks, self.contexts)))
        weights = {name: contiguous_copy(tensor) for name, tensor in self.weights.items()}
        object.__setattr__(self, "weights", weights)
        factors = {path: (contiguous_copy(b), contiguous_copy(a)) for path, (b, a) in self.factors.items()}
        object.__setattr__(self, "factors", factors)
        if factors and weights:
            raise EditError("the other model is one of its own weights or a change of the host, found both")
        if self.count < 1 or (self.count > 1 and SLOT not in self.template):
            raise EditError(f"count: {self.count} texts before a prompt need a template with {SLOT}")

    def parts(self) -> Mapping[str, Tensor]:
        """Return the router's tensors ``[entries, ...]``, the other model's weights ``[...]`` or its factors."""
        return {**_stored.parts_of(self.router), **model_parts(self.weights, self.factors)}

    def body(self) -> Mapping[str, Any]:
        """Return the texts, the router's settings and the other model's configuration."""
        body = {
            "contexts": list(self.contexts),
            "router": _stored.body_of(self.router),
            "config": dict(self.config),
        }
        if self.template:
            body = {**body, "count": self.count, "template": self.template}
        return {**body, "module": self.module} if self.module else body

    @property
    def size(self) -> int:
        """Bytes of all texts and tensors."""
        return super().size + sum(len(text.encode()) for text in self.contexts)

    @classmethod
    def restore(
        cls, parts: Mapping[str, Tensor], body: Mapping[str, Any], provenance: Provenance
    ) -> ModelEdit:
        """Build the edit from its file's tensors ``[...]`` and header. Raises ValueError or KeyError."""
        weights, factors = split_parts(parts)
        contexts = fields.get_texts(body, "contexts", "the header")
        config = fields.get_field(body, "config", dict, "the header")
        module = fields.check_type(body.get("module", ""), str, "module")
        count = fields.check_type(body.get("count", 1), int, "count")
        template = fields.check_type(body.get("template", ""), str, "template")
        router = _stored.restore(parts, body)
        return cls(contexts, router, config, weights, provenance, module, factors, count, template)

    def _check(self, host: ModelHost) -> None:
        if host.kind != CAUSAL or not isinstance(host, Host):
            raise EditError(
                f"{host.name} is one of the {KINDS[host.kind].plural}; edits that answer by another model act on "
                "causal language models"
            )
        for name, tensor in self.parts().items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise EditError(f"{name} of edit {self.digest} holds NaN or infinite numbers; refused")
        check_reader(host, self.router, self.module)
        modules = dict(host.model.named_modules())
        for path, (outer, inner) in self.factors.items():
            weight = getattr(modules.get(path), "weight", None)
            if path not in modules or (
                isinstance(weight, Tensor) and weight.ndim == 2
                and sorted(weight.shape) != sorted((len(outer), inner.shape[1]))
            ):  # fmt: skip
                raise EditError(
                    f"the edit's model changes {path} by a map from {inner.shape[1]} to {len(outer)} numbers, and the "
                    "host has no such map"
                )

    def _attach(self, host: ModelHost, number: int | None) -> None:
        assert isinstance(host, Host)
        placed.substitute(host.model, _OtherModel(self, host, number))

    def other(self, host: Host) -> Host:
        """Build the other model beside a host; with ``factors`` it is the host itself, run in :meth:`acting`.

        Raises EditError where it cannot be built, or has another vocabulary.
        """
        if self.factors:
            return host
        try:
            return model_beside(host, self.config, self.weights, name=f"the model of edit {self.digest}")
        except HostError as error:
            raise EditError(str(error)) from error

    @contextmanager
    def acting(self, other: Host) -> Generator[None, None, None]:
        """Have :meth:`other` be the other model in passes of this thread: nothing that is in place on it acts."""
        with passes.without_interventions(), low_rank_beside(other.model, self.factors):
            yield

    def context(self, entries: Sequence[int]) -> str:
        """Return what the other model reads before a prompt of some entries, the best first."""
        texts = [self.contexts[i] for i in entries]
        return filled(self.template, texts="\n".join(texts)) if self.template else texts[0]

    def summary(self) -> dict[str, Any]:
        """Describe the edit: provenance, how many texts there are, what decides, and the model that answers."""
        own = "the host with low-rank changes" if self.factors else str(self.config.get("model_type", ""))
        return {
            **super().summary(), "entries": len(self.contexts), "router": self.router.name, "model": own,
        }  # fmt: skip


def model_parts(weights: Mapping[str, Tensor], factors: Factors) -> dict[str, Tensor]:
    """Return another model's weights ``[...]``, or the factors of its changes, by the names they have in a file."""
    outer = {f"{OUTER}{path}": b for path, (b, _) in factors.items()}
    inner = {f"{INNER}{path}": a for path, (_, a) in factors.items()}
    return {**{f"{PREFIX}{name}": tensor for name, tensor in weights.items()}, **outer, **inner}


def split_parts(parts: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Factors]:
    """Return the weights ``[...]`` and factors among a file's tensors. Raises KeyError for half a pair."""

    def under(prefix: str) -> dict[str, Tensor]:
        return {n.removeprefix(prefix): t for n, t in parts.items() if n.startswith(prefix)}

    outer, inner = under(OUTER), under(INNER)
    return under(PREFIX), {path: (outer[path], inner[path]) for path in {**outer, **inner}}


def behind_context(host: Host, context: str, row: Sequence[int]) -> tuple[tuple[int, ...], int]:
    """Put a text before a row of ids, behind the tokens that begin every text; return ids and tokens inserted.

    What a model's window does not hold of the row is left out, its first tokens first; the number is then less.
    """
    special, first = set(host.tokenizer.all_special_ids), 0
    while first < len(row) and row[first] in special:
        first += 1
    before = (*row[:first], *host.encode(context, special=False).ids)
    excess = 0 if host.window is None else max(0, len(before) + len(row) - first - host.window)
    return (*before, *row[first + excess :]), len(before) - first - excess


def _numbers(whole: Tensor) -> list[int]:
    """Return the numbers of a tensor ``[n]``."""
    return list(map(int, whole))


class _OtherModel:
    """The other model of an edit in place; called by the model's hook."""

    def __init__(self, edit: ModelEdit, host: Host, number: int | None) -> None:
        self.edit, self.host, self.number = edit, host, number
        self.digest, self.order = edit.digest, edit.order
        self.history = f"{edit.digest} ids"
        """Name under which a routing keeps the ids that rows had in earlier passes."""
        self.other = edit.other(host)

    def __deepcopy__(self, memo: dict[int, Any]) -> _OtherModel:
        return self  # frozen; a copy of the host is answered for by the same model

    def __call__(self, reading: placed.Reading, logits: Tensor, routing: Routing) -> Tensor:
        """Return logits ``[n, vocab]``, those of the other model at the places of rows that an entry acts on."""
        ids = self._ids(reading, routing)
        rows = len(ids)
        entries = routing.decision(self.digest, lambda: self._decide(ids, reading, routing)).cpu()
        acting = entries[:, 0] != NONE
        members = routing.members(self.number, rows)
        if members is not None:
            acting = acting & members.cpu()
        column = reading.before + reading.column
        chosen = (acting[reading.row] & (ids[reading.row, column] != PADDING)).nonzero()[:, 0]
        if not len(chosen):
            return logits
        places = list(zip(_numbers(reading.row[chosen]), _numbers(column[chosen]), strict=True))
        used = sorted({row for row, _ in places})
        texts: list[tuple[int, ...]] = []
        inserted: dict[int, int] = {}
        for row in used:
            own = _numbers(ids[row][ids[row] != PADDING])
            text, inserted[row] = self._behind(_numbers(entries[row][entries[row] != NONE]), own)
            texts.append(text)
        index = (ids != PADDING).cumsum(1) - 1  # [rows, columns]: of each token in its own text
        at = torch.tensor([max(0, int(index[row, one]) + inserted[row]) for row, one in places])
        line = torch.tensor([used.index(row) for row, _ in places])
        sets = routing.decided.get(
            passes.SETS
        )  # with factors the other model is the host, whose weights have edits
        own = {} if sets is None else {passes.SETS: sets[torch.tensor(used)]}
        with self.edit.acting(self.other):
            answers = self.other.forward_at(self.other.batch(texts), line, at, routes=own)
        return logits.index_put((chosen.to(logits.device),), answers.to(logits))

    def _behind(self, entries: list[int], row: Sequence[int]) -> tuple[tuple[int, ...], int]:
        """Put the texts of a row's entries before it, without the last ones where the window does not hold them."""
        room = None if self.other.window is None else self.other.window - len(row)
        while room is not None and len(entries) > 1:
            if len(self.other.encode(self.edit.context(entries), special=False).ids) <= room:
                break
            entries = entries[:-1]
        return behind_context(self.other, self.edit.context(entries), row)

    def _ids(self, reading: placed.Reading, routing: Routing) -> Tensor:
        """Return the ids of all columns so far, int64 ``[rows, columns]``; padding also where they are not known."""
        own = torch.where(reading.mask, reading.ids, PADDING).cpu()
        if not reading.before:
            whole = own
        else:
            earlier = routing.decided.get(self.history)
            if earlier is None or earlier.shape[1] < reading.before:
                earlier = own.new_full((len(own), reading.before), PADDING)
            whole = torch.cat([earlier[:, : reading.before], own], 1)
        routing.decided[self.history] = whole
        return whole

    def _decide(self, ids: Tensor, reading: placed.Reading, routing: Routing) -> Tensor:
        rows, length = reading.ids.shape
        ends = routing.ends(rows, length).cpu()
        decisions = torch.full((rows, self.edit.count), NONE)
        for row in _numbers((ends >= 0).nonzero()[:, 0]):
            prompt = ids[row, : reading.before + int(ends[row]) + 1]
            own = _numbers(prompt[prompt != PADDING])
            sets = routing.decided.get(passes.SETS)
            with passes.belonging([] if sets is None else _numbers(sets[row].reshape(-1))):
                found = self._entries_of(own)
            decisions[row, : len(found)] = found
        return decisions

    def _entries_of(self, row: Sequence[int]) -> Tensor:
        """Return the entries that act on a row of ids, the best first, int64 ``[n]``."""
        text = self.host.codec.prompt_text(row)
        asked = question(self.host, self.edit.router, text, row, self.edit.module)
        if self.edit.count == 1:
            return torch.tensor([int(self.edit.router.decide(asked))])
        scores = self.edit.router.scores(asked)[0].cpu()
        best = scores.topk(min(self.edit.count, len(scores)))
        return best.indices[best.values > 0]
