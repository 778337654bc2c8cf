"""Run a model with some of its states replaced by those of another run: what tracing and patching are made of.

Two runs of rows of one length are recorded: the *base*, in which states are replaced, and the *donor*, which they come
from. A cell is a set of patches; its score is read off the logits at the last token. A cell that touches nothing
below layer l and before token i leaves the states below l and the tokens before i as in the base, so only the rest is
run: from the recorded states on, behind the recorded keys and values (:mod:`errata.host.prefix`). Over a full grid
that is about a quarter of the work. Cells that begin at the same place share a batch.

A patch of a block's output takes the place of what patches of the same block's parts do at that token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from errata.errors import HostError, RequestError
from errata.host import hooks
from errata.host.host import Host
from errata.host.prefix import Prefix, PrefixRunner, can_reuse, no_prefix, plain_prefix
from errata.host.tokens import Batch

Kind = str
"""``hidden``: a block's output; ``mlp``: its feed-forward's output; ``attn``: its attention's output."""
KINDS: tuple[Kind, ...] = ("hidden", "mlp", "attn")
PARTS: dict[Kind, Literal["mlp_out", "attn_out"]] = {"mlp": "mlp_out", "attn": "attn_out"}
BATCH_TOKENS = {"cpu": 2048, "cuda": 65536}
"""Maximum tokens per batch, by device type."""

Read = Callable[[Tensor], Tensor]
"""Maps logits ``[rows, vocab]``, in float32 at least, to numbers ``[rows, m]``."""


@dataclass(frozen=True)
class Patch:
    """States that are replaced: one kind at one layer, at some tokens."""

    kind: Kind
    layer: int
    positions: tuple[int, ...]
    """Indices of tokens in the rows."""
    origin: Literal["donor", "base"] = "donor"
    """Whose states are put there; ``base``: those that the base had, which freezes them against other patches."""

    @property
    def start(self) -> int:
        """The lowest block that has to be run again."""
        return self.layer + 1 if self.kind == "hidden" else self.layer


Cell = tuple[Patch, ...]
"""Patches that are in place together; none: the base as it is."""


@dataclass(eq=False)
class Recording:
    """What the model computed on some rows of one length."""

    batch: Batch
    shift: Tensor | None
    """What was added to the word embeddings ``[rows, length, d]``."""
    logits: Tensor
    """At the last token ``[rows, vocab]``."""
    embeddings: Tensor
    """Output of the word embeddings, shift included ``[rows, length, d]``."""
    outputs: dict[tuple[Kind, int], Tensor] = field(default_factory=dict)
    """By kind and layer ``[rows, length, d]``."""
    key_values: dict[int, Any] = field(default_factory=dict)
    """Attention's keys and values by block, where rows may continue them."""

    @property
    def rows(self) -> int:
        """How many rows."""
        return len(self.logits)

    @property
    def length(self) -> int:
        """Tokens of each row."""
        return self.batch.ids.shape[1]


def require_plain(host: Host, what: str) -> None:
    """Raise HostError for a host that cannot be traced: another kind of model, or routers in place."""
    if host.reads_by_encoder or host.fills or host.tokenizer is None:
        raise HostError(
            f"{what} needs a causal language model; {host.name} is of another kind ({host.family})"
        )
    if not host.shareable:
        raise HostError(
            f"{what} looks at a model whose weights alone decide: a memory or another model's answers are in place, "
            "which act by row; take them off, or look at an edit of weights"
        )


class Patcher:
    """Records runs of a host and runs cells on them. Wants a host that :func:`require_plain` passes."""

    def __init__(self, host: Host, *, longest: int) -> None:
        """``longest``: tokens of the longest row."""
        host.check_window(longest)
        self.host, self.runner = host, PrefixRunner(host)
        self.reuse = can_reuse(host, longest)
        """Whether tokens before the first that a cell touches need not be run again."""
        self.depth = len(self.runner.blocks)
        self._embedding: nn.Module = host.model.get_input_embeddings()
        self._modules: dict[tuple[Kind, int], nn.Module] = {}

    def module(self, kind: Kind, layer: int) -> nn.Module:
        """Return the module whose output a kind is. Raises HostError where a block has no such part."""
        if (kind, layer) not in self._modules:
            if kind == "hidden":
                self._modules[kind, layer] = self.runner.blocks[layer]
            else:
                site = self.host.layout.site(layer, PARTS[kind])
                self._modules[kind, layer] = self.host.model.get_submodule(site.name)
        return self._modules[kind, layer]

    # --- recording -------------------------------------------------------------------------

    @torch.no_grad()
    def record(
        self, rows: Sequence[Sequence[int]], *, shift: Tensor | None = None, kinds: Iterable[Kind] = KINDS
    ) -> Recording:
        """Run rows of one length and keep what they give; block outputs always, other ``kinds`` as asked for.

        ``shift`` ``[rows, length, d]`` is added to the word embeddings. Raises RequestError for rows of unequal length.
        """
        if len({len(row) for row in rows}) != 1:
            raise RequestError("rows that are patched into one another must have the same number of tokens")
        self.reuse = self.reuse and not self.host.codec.show_pictures(rows)
        batch = self.host.batch(rows)
        count, length = batch.ids.shape
        outputs: dict[tuple[Kind, int], Tensor] = {}
        embeddings: list[Tensor] = []

        def keep(key: tuple[Kind, int]) -> Callable[[Tensor], None]:
            def store(tensor: Tensor) -> None:
                outputs[key] = tensor.detach().reshape(count, length, -1).clone()

            return store

        before = no_prefix(self.host, count) if self.reuse else plain_prefix()
        with hooks.frozen(self.host.model), contextlib.ExitStack() as stack:
            stack.enter_context(self._shifted(shift))
            stack.enter_context(
                hooks.on_output(self._embedding, lambda t: embeddings.append(t.detach().clone()))
            )
            for kind in set(kinds) - {"hidden"}:
                for layer in range(self.depth):
                    stack.enter_context(hooks.on_output(self.module(kind, layer), keep((kind, layer))))
            ran = self.runner.run(
                batch, before, at=_last(batch), keep=range(self.depth),
                remember=range(self.depth) if self.reuse else (),
            )  # fmt: skip
        assert ran.logits is not None
        outputs |= {("hidden", layer): states for layer, states in ran.states.items()}
        return Recording(batch, shift, _wide(ran.logits), embeddings[0], outputs, ran.key_values)

    @contextlib.contextmanager
    def _shifted(self, shift: Tensor | None):
        """Add to the word embeddings inside the block."""
        if shift is None:
            yield
            return
        with hooks.on_output(self._embedding, lambda tensor: tensor + shift.to(tensor)):
            yield

    # --- cells -----------------------------------------------------------------------------

    @torch.no_grad()
    def run(self, base: Recording, donor: Recording, cells: Sequence[Cell], read: Read) -> Tensor:
        """Return what is read of every cell on every row of the base, float32 ``[cells, rows, m]``, on the CPU.

        ``donor`` has one row, for all, or as many as the base. Scores do not depend on which cells share a call.
        """
        scores: dict[int, Tensor] = {}
        groups: dict[tuple[int, int], list[int]] = {}
        for number, cell in enumerate(cells):
            if not any(patch.positions for patch in cell):
                scores[number] = read(base.logits).cpu()
                continue
            first = min(at for patch in cell for at in patch.positions) if self.reuse else 0
            groups.setdefault((min(patch.start for patch in cell), first), []).append(number)
        budget = BATCH_TOKENS.get(self.host.device.type, BATCH_TOKENS["cpu"])
        with hooks.frozen(self.host.model):
            for (start, first), members in groups.items():
                per = max(1, budget // (base.rows * (base.length - first)))
                for begin in range(0, len(members), per):
                    part = members[begin : begin + per]
                    logits = self._group(base, donor, [cells[i] for i in part], start, first)
                    values = read(_wide(logits)).cpu()
                    scores |= dict(zip(part, values.reshape(len(part), base.rows, -1), strict=True))
        return torch.stack([scores[i] for i in range(len(cells))])

    def _group(
        self, base: Recording, donor: Recording, cells: Sequence[Cell], start: int, first: int
    ) -> Tensor:
        """Run cells that begin at one block and one token; logits ``[cells * rows, vocab]``."""
        rows = torch.arange(base.rows, device=base.batch.ids.device).repeat(len(cells))
        batch = base.batch.select(rows)
        prefix = plain_prefix()
        if first:
            whole = no_prefix(self.host, base.rows).followed_by(base.key_values, base.batch, first)
            prefix, batch = whole.share(rows), batch.columns(first)
        patches = [
            (number, patch) for number, cell in enumerate(cells) for patch in cell
            if patch.positions and not (patch.kind == "hidden" and patch.layer == start - 1)
        ]  # fmt: skip
        with contextlib.ExitStack() as stack:
            states = None
            if start:
                states = self._states(base, donor, cells, start, first, rows)
            elif base.shift is not None:
                shift = base.shift[:, first:].repeat(len(cells), 1, 1)
                stack.enter_context(self._shifted(shift))
            for kind, layer in dict.fromkeys((patch.kind, patch.layer) for _, patch in patches):
                here = [(n, p) for n, p in patches if (p.kind, p.layer) == (kind, layer)]
                act = _replacing(base, donor, here, first, len(cells))
                stack.enter_context(hooks.on_output(self.module(kind, layer), act))
            ran = self.runner.run(batch, prefix.at_depth(start, states), at=_last(batch))
        assert ran.logits is not None
        return ran.logits

    def _states(
        self, base: Recording, donor: Recording, cells: Sequence[Cell], start: int, first: int, rows: Tensor
    ) -> Tensor:  # fmt: skip
        """Return the output of the block below, with the patches that it has ``[cells * rows, length, d]``."""
        below = base.outputs["hidden", start - 1]
        states = below[rows.to(below.device)][:, first:]
        lowest = [
            (number, patch) for number, cell in enumerate(cells) for patch in cell
            if patch.kind == "hidden" and patch.layer == start - 1
        ]  # fmt: skip
        return _replacing(base, donor, lowest, first, len(cells))(states) if lowest else states

    def prefix(self, recording: Recording, columns: int) -> Prefix:
        """Return the first tokens of a recording's rows, to be continued. Wants :attr:`reuse`."""
        return no_prefix(self.host, recording.rows).followed_by(
            recording.key_values, recording.batch, columns
        )


def _replacing(
    base: Recording, donor: Recording, patches: Sequence[tuple[int, Patch]], first: int, cells: int
) -> Callable[[Tensor], Tensor]:
    """Return what writes patches of one kind and layer, each in the rows of its cell, into an output.

    The output is ``[cells * rows, length - first, d]``.
    """
    lines, columns, values = [], [], []
    for number, patch in patches:
        origin = base if patch.origin == "base" else donor
        recorded = origin.outputs[patch.kind, patch.layer]
        states = recorded[:, list(patch.positions)].expand(base.rows, -1, -1)
        at = torch.tensor([position - first for position in patch.positions])
        row = torch.arange(base.rows) + number * base.rows
        lines.append(row.repeat_interleave(len(at)))
        columns.append(at.repeat(base.rows))
        values.append(states.reshape(-1, states.shape[-1]))
    line, column, new = torch.cat(lines), torch.cat(columns), torch.cat(values)

    def act(output: Tensor) -> Tensor:
        shaped = output.reshape(cells * base.rows, -1, output.shape[-1]).clone()
        place = line.to(output.device), column.to(output.device)
        return shaped.index_put_(place, new.to(output)).reshape(output.shape)

    return act


def _last(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the place of every row's last token; rows are of one length."""
    rows = torch.arange(len(batch.ids), device=batch.ids.device)
    return rows, torch.full_like(rows, batch.ids.shape[1] - 1)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def window(layer: int, width: int, depth: int) -> range:
    """Return the layers of a window of some width around a layer, clipped to a model of ``depth`` layers.

    As in ROME's code: of an even width one more lies below than above. Width 0: none.
    """
    return range(max(0, layer - width // 2), min(depth, layer - (-width // 2)))
