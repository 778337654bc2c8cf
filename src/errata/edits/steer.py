"""Edits that steer: fixed changes of states at sites of the residual stream, on every row, at a strength.

They change no weight. Of several in place at one module the oldest acts first, whatever was placed first; vectors add,
so that their order does not matter beyond rounding, and that of other forms does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from errata.edits import header as fields
from errata.edits.edit import Provenance
from errata.edits.records import contiguous_copy
from errata.edits.runtime import RuntimeEdit
from errata.errors import ConfigError, EditError
from errata.host import placed
from errata.host.base import ModelHost
from errata.host.kinds import CAUSAL, KINDS
from errata.host.passes import Routing
from errata.linalg import steering

Form = Literal["vector", "piecewise", "rank", "projection", "rotation", "angle", "features"]
Where = Literal["all", "prompt", "generated", "after", "last", "first", "ends"]
PARTS: Mapping[Form, Mapping[str, tuple[str, ...]]] = {
    "vector": {"values": ("p", "d")},
    "piecewise": {"values": ("1", "d")},
    "rank": {"left": ("d", "r"), "right": ("r", "d"), "bias": ("r",), "drop": ("1",)},
    "projection": {"basis": ("r", "d"), "target": ("r",)},
    "rotation": {"plane": ("2", "d"), "degrees": ("1",)},
    "angle": {"plane": ("2", "d"), "degrees": ("1",)},
    "features": {
        "encoder": ("r", "d"), "bias": ("r",), "threshold": ("r",), "decoder": ("r", "d"), "target": ("r",),
    },
}  # fmt: skip
"""Tensors of each form, with their shapes: d is the width of the site's output, r and p any number."""
ORTHONORMAL = {"projection": "basis", "rotation": "plane", "angle": "plane"}
BOUNDED: tuple[Form, ...] = ("projection", "angle")
"""Forms that have done all they do at strength 1."""


def acts_at(where: Where, count: int, index: Tensor, last: Tensor) -> Tensor:
    """Return which tokens are steered, bool ``[rows, length]``.

    ``index``: each token's in its row, int64 ``[rows, length]``, negative for padding; ``last``: that of each prompt's
    last token ``[rows]``. ``count``: of ``first`` and ``ends``.
    """
    last = last[:, None]
    if where == "first":
        return (index >= 0) & (index < count) & (index <= last)
    if where == "ends":
        return (index >= 0) & (index <= last) & ((index < count) | (index > last - count))
    return {
        "all": lambda: torch.ones_like(index, dtype=torch.bool),
        "prompt": lambda: index <= last,
        "generated": lambda: index > last,
        "after": lambda: index >= last,
        "last": lambda: index == last,
    }[where]()


@dataclass(frozen=True, eq=False)
class Steering:
    """What is done to a module's output h ``[d]`` at the tokens that are steered, with the tensors of the payload.

    vector      h + s values, of ``[p, d]`` the one of the token's index where p is more than 1
    piecewise   h + s sign(h.values) values
    rank        h + s (left (right h + bias) - drop h)
    projection  h + s basis^T (target - basis h), orthonormal rows
    rotation    h rotated by s degrees in a plane of two orthonormal rows
    angle       h turned in the plane a share s of the way to an angle from the first row, its length there kept
    features    h + s (target - a(h)) decoder, a(h) the activations of some features of a dictionary
    """

    module: str
    """Path of the module in the model."""
    form: Form
    payload: Mapping[str, Tensor]
    positions: Where = "all"
    """Tokens: ``all``; ``prompt``; ``generated``: behind the prompt; ``after``: the prompt's last one and all later
    ones; ``last``: the prompt's last one; ``first``: its first ``count``; ``ends``: its first and last ``count``."""
    count: int = 1
    """Of ``first`` and ``ends``."""
    aligned: bool = False
    """Of ``rotation`` and ``angle``: whether states are left alone whose product with the first row is not positive."""
    keep_norm: bool = False
    """Whether states get the norm back that they had."""

    def __post_init__(self) -> None:
        for what, value, options in (
            ("form", self.form, get_args(Form)), ("positions", self.positions, get_args(Where)),
        ):  # fmt: skip
            if value not in options:
                raise EditError(f"{what} {value!r}, expected one of {', '.join(options)}")
        if set(self.payload) != set(PARTS[self.form]):
            raise EditError(
                f"{self.form} takes {', '.join(PARTS[self.form])}, found {', '.join(sorted(self.payload)) or 'none'}"
            )
        object.__setattr__(
            self, "payload", {name: contiguous_copy(tensor) for name, tensor in self.payload.items()}
        )
        self._check_shapes()
        if self.count < 1:
            raise EditError(f"count: expected 1 or more, found {self.count}")
        if self.form == "vector" and len(self.payload["values"]) > 1 and self.positions != "first":
            raise EditError(
                f"{len(self.payload['values'])} vectors, one a token, act at the first ones, found positions "
                f"{self.positions!r}"
            )
        if self.aligned and self.form not in ("rotation", "angle"):
            raise EditError(f"aligned is of rotation and angle, found {self.form}")

    def _check_shapes(self) -> None:
        sizes: dict[str, int] = {}
        for name, axes in PARTS[self.form].items():
            shape = tuple(self.payload[name].shape)
            fits = len(shape) == len(axes) and all(
                size == (int(axis) if axis.isdigit() else sizes.setdefault(axis, size))
                for axis, size in zip(axes, shape, strict=True)
            )
            if not fits:
                known = [str(sizes.get(axis, axis)) for axis in axes]
                raise EditError(f"{self.form}: {name} is {list(shape)}, expected [{', '.join(known)}]")
        rows = ORTHONORMAL.get(self.form)
        if rows is not None:
            basis = self.payload[rows].double()
            error = float((basis @ basis.mT - torch.eye(len(basis), dtype=basis.dtype)).abs().max())
            if not error < 1e-3:
                raise EditError(
                    f"{self.form}: the rows of {rows} are not orthonormal, they differ by {error:.2g}"
                )

    @property
    def width(self) -> int:
        """Width d of the module's output."""
        part, axes = next((n, a) for n, a in PARTS[self.form].items() if "d" in a)
        return self.payload[part].shape[axes.index("d")]

    def change(self, h: Tensor, part: Mapping[str, Tensor], strength: float, index: Tensor) -> Tensor:
        """Return other states ``[n, d]`` of tokens with an index ``[n]``; ``part``: the payload in their precision."""
        new = self._act(h, part, strength, index)
        if self.aligned:
            new = torch.where((h @ part["plane"][0] > 0)[:, None], new, h)
        return steering.with_norms_of(new, h) if self.keep_norm else new

    def _act(self, h: Tensor, part: Mapping[str, Tensor], strength: float, index: Tensor) -> Tensor:
        if self.form == "vector":
            values = part["values"]
            if len(values) == 1:
                return steering.along(h, values[0], strength)
            own = index < len(values)
            each = values[index.clamp(0, len(values) - 1)] * own[:, None].to(values)
            return steering.along(h, each, strength)
        if self.form == "piecewise":
            return steering.piecewise(h, part["values"][0], strength)
        if self.form == "rank":
            return steering.low_rank(h, part["left"], part["right"], part["bias"], part["drop"], strength)
        if self.form == "projection":
            return steering.project(h, part["basis"], part["target"], strength)
        if self.form == "rotation":
            return steering.rotate(h, part["plane"], strength * part["degrees"])
        if self.form == "angle":
            return steering.turn_to(h, part["plane"], part["degrees"], strength)
        names = ("encoder", "bias", "threshold", "decoder", "target")
        encoder, bias, threshold, decoder, target = (part[name] for name in names)
        return steering.clamp_features(h, encoder, bias, threshold, decoder, target, strength)

    def description(self) -> dict[str, Any]:
        """Return everything but the payload, as plain data."""
        plain: dict[str, Any] = {
            "module": self.module, "operation": self.form, "positions": self.positions, "count": self.count,
        }  # fmt: skip
        flags = {"aligned": self.aligned, "keep_norm": self.keep_norm}
        return {**plain, **{name: True for name, value in flags.items() if value}}


@dataclass(frozen=True, eq=False)
class SteerEdit(RuntimeEdit):
    """Changes of states at sites, each at most once a module, at one strength; they act on every row."""

    kind: ClassVar[str] = "steer"

    sites: tuple[Steering, ...]
    provenance: Provenance
    strength: float = 1.0
    """Multiplies every change; 0 changes nothing, bit by bit."""

    def __post_init__(self) -> None:
        if not self.sites:
            raise EditError("an edit that steers needs at least one site")
        if not math.isfinite(self.strength):
            raise EditError(f"strength: expected a finite number, found {self.strength}")
        modules = [one.module for one in self.sites]
        twice = next((module for module in modules if modules.count(module) > 1), None)
        if twice is not None:
            raise EditError(f"{twice} is steered twice by one edit; compose two edits")

    def with_strength(self, strength: float, **notes: Any) -> SteerEdit:
        """Return the same edit at another strength, with this one as its parent; ``notes`` join its record."""
        record = replace(self.provenance, notes={**self.provenance.notes, **notes}, parents=(self.digest,))
        return replace(self, strength=float(strength), provenance=record)

    @property
    def bounded(self) -> bool:
        """Whether every form has done all it does at strength 1."""
        return all(one.form in BOUNDED for one in self.sites)

    def parts(self) -> Mapping[str, Tensor]:
        """Return the payloads ``[...]``, by site and name."""
        return {
            f"{i}.{name}": tensor for i, one in enumerate(self.sites) for name, tensor in one.payload.items()
        }

    def body(self) -> Mapping[str, Any]:
        """Return the sites without their tensors, and the strength."""
        return {"sites": [one.description() for one in self.sites], "strength": self.strength}

    @classmethod
    def restore(
        cls, parts: Mapping[str, Tensor], body: Mapping[str, Any], provenance: Provenance
    ) -> SteerEdit:
        """Build the edit from its file's tensors ``[...]`` and header. Raises ValueError or KeyError."""
        sites: list[Steering] = []
        for i, item in enumerate(fields.get_field(body, "sites", list, "the header")):
            where = f"sites[{i}]"
            module, positions = (fields.get_field(item, name, str, where) for name in ("module", "positions"))
            form: Any = fields.get_field(item, "operation", str, where)
            payload = {name: parts[f"{i}.{name}"] for name in PARTS.get(form, ())}
            count = fields.get_field(item, "count", int, where)
            aligned, keep_norm = (
                fields.check_type(item.get(name, False), bool, where) for name in ("aligned", "keep_norm")
            )
            sites.append(Steering(module, form, payload, positions, count, aligned, keep_norm))
        strength = fields.get_field(body, "strength", float, "the header")
        return cls(tuple(sites), provenance, strength)

    def _attach(self, host: ModelHost, number: int | None) -> None:
        for index, one in enumerate(self.sites):
            placed.attach(host.model, one.module, _Active(self, index, number))

    def _check(self, host: ModelHost) -> None:
        for name, tensor in self.parts().items():
            if not bool(torch.isfinite(tensor).all()):
                raise EditError(f"{name} of edit {self.digest} holds NaN or infinite numbers; refused")
        if host.kind != CAUSAL:
            raise EditError(
                f"{host.name} is one of the {KINDS[host.kind].plural}; steering acts on causal language models"
            )
        for one in self.sites:
            try:
                host.model.get_submodule(one.module)
            except AttributeError as error:
                raise EditError(f"the host has no module {one.module!r}, at which the edit acts") from error
            if one.width != host.layout.width:
                raise EditError(
                    f"{one.module} is steered in {one.width} entries, and the host's states have {host.layout.width}"
                )

    def summary(self) -> dict[str, Any]:
        """Describe the edit: provenance, strength and sites."""
        return {
            **super().summary(),
            "strength": self.strength,
            "sites": [one.description() for one in self.sites],
        }


class _Active:
    """One site of an edit in place; called by the module's hook."""

    def __init__(self, edit: SteerEdit, index: int, number: int | None) -> None:
        """Take an edit's site by its index; ``number``: the edit set whose rows it acts on, None all rows."""
        self.number, self.digest, self.order = number, edit.digest, edit.order
        self.strength, self.site = edit.strength, edit.sites[index]
        self.ready: dict[str, Tensor] = {}

    def __call__(self, inputs: Tensor, output: Tensor, routing: Routing) -> Tensor:
        """Return the output ``[rows, length, d]``, changed at the tokens that are steered."""
        if output.ndim != 3:
            raise ConfigError(
                f"{self.site.module} has states of shape {list(output.shape)}, expected [rows, tokens, d]: steering "
                "needs to tell rows apart; choose another site"
            )
        if self.strength == 0:
            return output
        acting, index = self._tokens(routing, *output.shape[:2])
        if not bool(acting.any()):
            return output
        here = acting.to(output.device)
        wide = torch.promote_types(output.dtype, torch.float32)
        with torch.autocast(output.device.type, enabled=False):
            h = output[here].to(wide)
            part = {name: self._part(name, h) for name in self.site.payload}
            new = self.site.change(h, part, self.strength, index[acting].to(h.device))
        return output.masked_scatter(here[..., None], new.to(output.dtype))

    def _tokens(self, routing: Routing, rows: int, length: int) -> tuple[Tensor, Tensor]:
        """Return which tokens are steered, bool ``[rows, length]``, and each one's index in its row, on the CPU."""
        ends = routing.ends(rows, length).cpu()  # a column, -1 where the prompt ended before
        if self.site.positions in ("first", "ends"):
            index = routing.indices(rows, length).cpu()
            last = index.gather(1, ends.clamp(0, length - 1)[:, None])[:, 0]
            last = torch.where(ends >= 0, last, -1)
        else:
            index, last = torch.arange(length).expand(rows, -1), ends
        acting: Tensor = acts_at(self.site.positions, self.site.count, index, last)
        members = routing.members(self.number, rows)
        return (acting if members is None else acting & members.cpu()[:, None]), index

    def _part(self, name: str, like: Tensor) -> Tensor:
        """Return a tensor of the payload where another one is, in its precision."""
        cached = self.ready.get(name)
        if cached is None or (cached.device, cached.dtype) != (like.device, like.dtype):
            cached = self.ready[name] = self.site.payload[name].to(like.device, like.dtype)
        return cached
