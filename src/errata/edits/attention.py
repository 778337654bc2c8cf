"""Attention over several entries of a memory beside a module: each row of a batch has those nearest to its query.

With x the module's input at a token, y its output, s the input at all tokens of the row's prompt, and for each entry a
key k (the router's) and a projected key and value K, V:

    q      = W_q pool(s) + b             pool(s) = sum_i softmax_i(w^T tanh(W s_i)) s_i
    rows   = the entries with the largest k . q, once a row of a batch, the same for all its tokens
    a      = softmax over rows of  K . W_x x / sqrt(d_head) + beta_head cos(q, k), for each head
    y'     = y + W_o (sum over rows of a V)

Where there are null logits, the softmax has one more term of that logit whose value is zero.

Source     Cheng et al., "Decouple Knowledge from Parameters for Plug-and-Play Language Modeling", Findings of ACL 2023,
           arXiv 2305.11564
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from errata.edits.routers._router import NONE
from errata.edits.routers.top_rows import TopRows
from errata.errors import ConfigError, EditError
from errata.host.passes import Routing

PARTS = ("keys", "values")
"""K and V ``[entries, heads * d_head]``."""
SHARED = (
    "pool_map", "pool_vector", "query_map", "query_bias", "token_map", "output_map", "betas", "null_logits",
)  # fmt: skip
"""W ``[p, d]``, w ``[p]``, W_q ``[width, d]``, b ``[width]``, W_x ``[heads * d_head, d]``, W_o ``[d_out, heads *
d_head]``, beta ``[heads]``, null logits ``[heads]``, or ``[0]`` for none."""


def pooled(states: Tensor, mask: Tensor, weight: Tensor, vector: Tensor) -> Tensor:
    """Return the attentive pooling ``[rows, d]`` of states ``[rows, length, d]``.

    ``mask``: states that count, bool ``[rows, length]``, one at least in every row. ``weight`` ``[p, d]`` and
    ``vector`` ``[p]`` score a state.
    """
    scores = torch.tanh(states @ weight.mT) @ vector  # [rows, length]
    shares = scores.masked_fill(~mask, -torch.inf).softmax(1)
    return torch.einsum("rl,rld->rd", shares, states)


def attend(
    inputs: Tensor, keys: Tensor, values: Tensor, cosines: Tensor, shared: Mapping[str, Tensor]
) -> Tensor:
    """Return what is added to a module's output ``[rows, length, d_out]``, given its input ``[rows, length, d]``.

    ``keys``, ``values`` ``[rows, n, heads * d_head]`` and ``cosines`` ``[rows, n]`` are those of each row's entries;
    ``shared`` has the tensors of :data:`SHARED` from ``token_map`` on.
    """
    betas, null = shared["betas"], shared["null_logits"]
    (rows, length), count, heads = inputs.shape[:2], keys.shape[1], len(betas)
    queries = (inputs @ shared["token_map"].mT).reshape(
        rows, length, heads, -1
    )  # [rows, length, heads, d_head]
    keys, values = keys.reshape(rows, count, heads, -1), values.reshape(rows, count, heads, -1)
    logits = torch.einsum("rlhd,rnhd->rlhn", queries, keys) / queries.shape[-1] ** 0.5
    logits = logits + betas[:, None] * cosines[:, None, None, :]
    if len(null):
        logits = torch.cat([logits, null[:, None].expand(rows, length, heads, 1)], -1)
    shares = logits.softmax(-1)[..., :count]
    read = torch.einsum("rlhn,rnhd->rlhd", shares, values).reshape(rows, length, -1)
    return read @ shared["output_map"].mT


def check_shapes(parts: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> None:
    """Raise EditError unless an intervention's tensors ``[...]`` have the shapes of :data:`PARTS`, :data:`SHARED`."""
    shapes = {name: tuple(tensor.shape) for name, tensor in (*parts.items(), *shared.items())}
    ranks = {"pool_vector": 1, "query_bias": 1, "betas": 1, "null_logits": 1}
    wrong = [name for name, shape in shapes.items() if len(shape) != ranks.get(name, 2)]
    if not wrong:
        p, d = shapes["pool_map"]
        width, (inner, _), heads = shapes["query_map"][0], shapes["token_map"], shapes["betas"][0]
        expected = {
            "pool_vector": (p,), "query_map": (width, d), "query_bias": (width,), "token_map": (inner, d),
            "output_map": (shapes["output_map"][0], inner), "keys": (shapes["keys"][0], inner),
            "values": (shapes["keys"][0], inner),
        }  # fmt: skip
        wrong = [name for name, shape in expected.items() if shapes[name] != shape]
        if not heads or inner % heads:
            wrong.append("betas")
        if shapes["null_logits"][0] not in (0, heads):
            wrong.append("null_logits")
    if wrong:
        listed = ", ".join(f"{name} {list(shapes[name])}" for name in wrong)
        raise EditError(f"tensors of an attend operation do not fit one another: {listed}")


def attention_router(router: object, operations: list[str], width: int) -> TopRows:
    """Return the router of an edit whose interventions attend, given the width of their queries.

    Raises EditError for another router, keys of another width, or further operations in the same edit.
    """
    if set(operations) != {"attend"}:
        others = ", ".join(sorted(set(operations) - {"attend"}))
        raise EditError(f"attend decides at each of its modules, so an edit cannot also have {others}")
    if not isinstance(router, TopRows):
        raise EditError(f"attend takes several entries for each row: expected a {TopRows.name} router")
    if router.keys.shape[1] != width:
        raise EditError(f"keys have width {router.keys.shape[1]}, queries {width}")
    return router


@dataclass(eq=False)
class ActiveAttention:
    """An attend operation of an edit in place; called by the module's hook."""

    digest: str
    order: tuple[str, str]
    number: int | None
    module: str
    name: str
    """Under which its decisions are kept: several modules of one edit decide each for itself."""
    router: TopRows
    tensors: Mapping[str, Tensor]
    """:data:`PARTS` and :data:`SHARED`."""
    ready: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """They on the device and in the precision of the last call."""

    def __call__(self, inputs: Tensor, output: Tensor, routing: Routing) -> Tensor:
        """Return the output ``[rows, length, d_out]`` with what the rows' entries add at all their tokens."""
        if inputs.ndim != 3:
            raise ConfigError(
                f"{self.module} gets inputs of shape {list(inputs.shape)}, expected [rows, tokens, d_in]: "
                "a memory needs to tell rows apart; choose another site"
            )
        if not len(self.router.keys):
            return output
        wide = torch.promote_types(output.dtype, torch.float32)
        with torch.autocast(output.device.type, enabled=False):
            x = inputs.to(output.device, wide)
            entries, cosines = self._decision(x, routing)
            selected = entries[:, 0] != NONE
            members = routing.members(self.number, len(x))
            if members is not None:
                selected = selected & members.to(selected.device)
            rows = selected.nonzero()[:, 0]
            if not len(rows):
                return output
            keys, values = (functional.embedding(entries[rows], self._tensor(n, x)) for n in PARTS)
            shared = {name: self._tensor(name, x) for name in SHARED}
            added = attend(x[rows], keys, values, cosines[rows].to(wide), shared)
            after = output.clone()
            after[rows] = (output[rows].to(wide) + added).to(output.dtype)
        return after

    def _decision(self, inputs: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        """Return each row's entries, int64 ``[rows, n]``, :data:`NONE` where undecided, and cosines ``[rows, n]``."""
        decided: list[tuple[Tensor, Tensor]] = []

        def decide() -> tuple[Tensor, Tensor]:
            if not decided:
                decided.append(self._decide(inputs, routing))
            return decided[0]

        entries = routing.decision(self.name, lambda: decide()[0])
        cosines = routing.decision(f"{self.name}.cosines", lambda: decide()[1])
        return entries.to(inputs.device), cosines.to(inputs.device)

    def _decide(self, inputs: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        rows, length = inputs.shape[:2]
        ends = routing.ends(rows, length)
        count = min(self.router.count, len(self.router.keys))
        entries = torch.full((rows, count), NONE, device=inputs.device)
        cosines = torch.zeros(rows, count, device=inputs.device)
        here = [row for row in range(rows) if int(ends[row]) >= 0]
        if here:
            mask = torch.zeros(len(here), length, dtype=torch.bool, device=inputs.device)
            for line, row in enumerate(here):
                end = int(ends[row])
                tokens = len(routing.prompt(row, end)) or end + 1  # without ids nothing tells padding apart
                mask[line, end + 1 - tokens : end + 1] = True
            states = inputs[here].detach()
            own = pooled(states, mask, self._tensor("pool_map", states), self._tensor("pool_vector", states))
            queries = own @ self._tensor("query_map", own).mT + self._tensor("query_bias", own)
            entries[here], cosines[here] = self.router.top(queries)
        return entries, cosines

    def _tensor(self, name: str, like: Tensor) -> Tensor:
        cached = self.ready.get(name)
        if cached is None or (cached.device, cached.dtype) != (like.device, like.dtype):
            cached = self.ready[name] = self.tensors[name].to(like.device, like.dtype)
        return cached
