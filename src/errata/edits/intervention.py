"""What a memory edit does to a module's output: operations, their tensors, and the tokens they act on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

from torch import Tensor
from torch.nn import functional

from errata.edits import attention
from errata.edits.records import contiguous_copy
from errata.errors import EditError
from errata.linalg import side

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
