"""GRACE: a codebook at one layer, whose entries replace the layer's output for inputs near their keys.

Paper      Hartvigsen et al., "Aging with GRACE: Lifelong Model Editing with Discrete Key-Value Adaptors",
           NeurIPS 2023, arXiv 2211.11031
Implements Sec. 3.2 and Algorithm 1: a key is the layer's input at the prompt's last token, a value its output;
           an edit adds an entry, expands one with the same target, or splits one with another target; the
           value of the edit's entry is trained by Adam on the likelihood of the target
Departs    Targets are compared token by token (authors' code: by the mean of their ids, which different targets
           may share). The router decides once, at the prompt's last token, for the whole generated
           answer; the authors' code uses each new token as a key where generation has a cache.
           ``positions: last`` is what later work uses for decoders (EasyEdit); the authors' code also offers all
           tokens up to the last one, ``prompt``, and all tokens, ``all``. Only the edit's own value is trained.
Needs      Only the model
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from errata.config import positive
from errata.edits.memory import Intervention, MemoryEdit
from errata.edits.routers.radius import Radius
from errata.errors import ConfigError
from errata.host import hooks
from errata.host.host import Host
from errata.host.layout import Site
from errata.host.memory import in_batches
from errata.methods._memory import editable_layer
from errata.methods._method import Method, Workspace, check_requests, notes, provenance, without
from errata.progress import OnCount
from errata.training.rows import descend_each
from errata.training.slots import last_activations
from errata.training.tune import Line, Stop, lay_out, seeded
from errata.training.upper import Change, UpperRows, rows_at_once
from errata.types import Request

BORDER = 1e-5
"""How much the radius of the older of two split entries is below half their distance (authors' code)."""


@dataclass(frozen=True)
class Config:
    """Settings of GRACE."""

    layer: int | None = None
    """Layer whose feed-forward output is replaced. None: at three quarters of the depth (authors: 35 of 48 for
    GPT-2 XL; EasyEdit: 27 of 32 for Llama 2 7B)."""
    radius: float = 1.0
    """Radius of a new entry: a distance between inputs of the layer, plain (authors' code: 1.0)."""
    steps: int = 100
    """Adam steps for a value (authors' code: 100)."""
    learning_rate: float = 1.0
    """Adam's rate (authors' code: 1.0)."""
    stop_loss: float | None = None
    """Loss in nats per target token below which the training of a value ends. None: never (authors' code)."""
    start: Literal["cold", "warm"] = "cold"
    """Initial value: uniform between 0 and 1 (authors' code), or the layer's own output."""
    positions: Literal["last", "prompt", "all"] = "last"
    """Tokens whose output is replaced: the prompt's last one, the whole prompt, or all."""
    moving_average: bool = False
    """Whether an expanded entry moves its key half way to the new one (authors' code: an option, off)."""

    def problems(self) -> list[str]:
        """Check ranges."""
        return positive(self, "radius", "steps", "learning_rate", "stop_loss")


@dataclass
class _Codebook:
    """Keys, values, radii and targets of the entries so far."""

    keys: list[Tensor]
    values: list[Tensor]
    radii: list[float]
    targets: list[tuple[int, ...]]
    log: list[dict[str, Any]]

    def assign(self, number: int, key: Tensor, target: tuple[int, ...], radius: float, average: bool) -> int:
        """Assign a request's key ``[d_in]`` to an entry, existing or new; return the entry's index."""
        nearest, distance = self._nearest(key)
        new = len(self.keys)
        entry: dict[str, Any] = {"request": number, "entry": new, "distance": distance}
        if nearest is None or distance > radius + self.radii[nearest]:
            self._add(key, target, radius)
            self.log.append({**entry, "action": "add"})
            return new
        if self.targets[nearest] == target:
            self.log.append({**entry, "entry": nearest, "action": "expand", "radius": self.radii[nearest]})
            self.radii[nearest] = max(self.radii[nearest], distance)
            if average:
                self.keys[nearest] = (self.keys[nearest] + key) / 2
            return nearest
        self.log.append({**entry, "action": "split", "other": nearest, "radius": self.radii[nearest]})
        self.radii[nearest] = distance / 2 - BORDER
        self._add(key, target, distance / 2)
        return new

    def _nearest(self, key: Tensor) -> tuple[int | None, float]:
        if not self.keys:
            return None, float("inf")
        distances = (torch.stack(self.keys) - key).norm(dim=1)
        nearest = int(distances.argmin())
        return nearest, float(distances[nearest])

    def _add(self, key: Tensor, target: tuple[int, ...], radius: float) -> None:
        self.keys.append(key)
        self.targets.append(target)
        self.radii.append(radius)


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> MemoryEdit:
    """Return the codebook of all requests so far: each is assigned to an entry in order, then values are trained."""
    check_requests("grace", requests)
    site = host.layout.site(editable_layer(host, config.layer, 0.75))
    config = replace(config, layer=site.layer)
    book = _load_codebook(work.after, site)
    first = len(work.after.provenance.requests) if work.after else 0
    largest_loss = 0.0
    with without(work.after, host), hooks.frozen(host.model), seeded(host, work.seed + first):
        lines = [lay_out(host, request, "target") for request in requests]
        keys, outputs = last_activations(host, site.name, [line.ids[: line.at[0] + 1] for line in lines])
        entries = []
        for i, line in enumerate(lines):  # no key depends on a value
            entries.append(
                book.assign(first + i, keys[i], line.targets, config.radius, config.moving_average)
            )
            if entries[i] == len(book.values):
                book.values.append(_start(outputs[i], config))
        for numbers, tick in _rounds(entries, work):
            starts = torch.stack([book.values[entries[i]] for i in numbers])
            values, final = _train(host, site, [lines[i] for i in numbers], starts, config, work, tick)
            for i, value in zip(numbers, values, strict=True):
                book.values[entries[i]] = value
            largest_loss = max(largest_loss, *final)
    record = provenance(
        "grace", host, requests, config, work, **notes({"loss": largest_loss, "entries": len(book.keys)})
    )
    return _edit(book, site, config, record)


def _rounds(entries: Sequence[int], work: Workspace) -> Iterator[tuple[list[int], OnCount]]:
    """Group requests by how many before them have the same entry: each goes on from the value of the last.

    Yields a function for progress with each group.
    """
    seen, earlier = Counter[int](), list[int]()
    for entry in entries:
        earlier.append(seen[entry])
        seen[entry] += 1
    for number in range(max(earlier, default=-1) + 1):
        members = [i for i, count in enumerate(earlier) if count == number]
        before = sum(count < number for count in earlier)
        yield members, lambda n, _, before=before: work.on_progress("values", before + n, len(entries))


def _load_codebook(after: MemoryEdit | None, site: Site) -> _Codebook:
    """Return the codebook of an earlier edit, or an empty one."""
    if after is None:
        return _Codebook([], [], [], [], [])
    (intervention,), router = after.interventions, after.router
    if intervention.module != site.name or not isinstance(router, Radius):
        raise ConfigError(
            f"the earlier codebook is at {intervention.module}, not at {site.name}; use the same layer"
        )
    targets = [tuple(t for t in row if t >= 0) for row in after.state["targets"].tolist()]
    return _Codebook(
        list(router.keys),
        list(intervention.payload["values"]),
        router.radii.tolist(),
        targets,
        [dict(e) for e in after.log],
    )


def _start(output: Tensor, config: Config) -> Tensor:
    return output.clone() if config.start == "warm" else torch.rand(output.shape)


def _train(
    host: Host, site: Site, lines: Sequence[Line], starts: Tensor, config: Config, work: Workspace, tick: OnCount
) -> tuple[list[Tensor], list[float]]:  # fmt: skip
    """Train a value for each request from ``starts`` ``[n, d_out]``; return values ``[d_out]`` and nats per token."""
    whole = config.positions != "last"
    longest = max(len(line.ids) if whole else len(line.at) for line in lines)
    size = work.batch_size or rows_at_once(host, site.layer, longest)
    finished = 0

    def run(numbers: Sequence[int]) -> list[tuple[Tensor, float]]:
        nonlocal finished
        rows = UpperRows(host, [lines[i] for i in numbers], site.name, site.layer, whole=whole)
        values = nn.Parameter(starts[list(numbers)].to(host.device_of(site)))

        def losses(index: Sequence[int]) -> Tensor:
            return rows.losses(index, rows.logits(index, _replacing(values[list(index)], config.positions)))

        final = descend_each(
            values, losses, steps=config.steps, rate=config.learning_rate, stop=Stop(config.stop_loss)
        )
        finished += len(numbers)
        tick(finished, len(lines))
        return list(zip(values.detach().cpu(), final.tolist(), strict=True))

    trained = in_batches(range(len(lines)), size, run)
    return [value for value, _ in trained], [loss for _, loss in trained]


def _replacing(values: Tensor, positions: Literal["last", "prompt", "all"]) -> Change:
    """Put each row's value ``[n, d_out]`` in place of the output at its positions."""

    def change(_: Tensor, output: Tensor, distance: Tensor) -> Tensor:
        acting = {"last": distance == 0, "prompt": distance <= 0, "all": distance == distance}[positions]
        return torch.where(acting.to(output.device)[..., None], values[:, None].to(output), output)

    return change


def _edit(book: _Codebook, site: Site, config: Config, record: Any) -> MemoryEdit:
    longest = max(len(target) for target in book.targets)
    targets = torch.tensor([[*target, *[-1] * (longest - len(target))] for target in book.targets])
    values = {"values": torch.stack(book.values)}
    return MemoryEdit(
        (Intervention(site.name, "replace", values, config.positions),),
        Radius(torch.stack(book.keys), torch.tensor(book.radii, dtype=torch.float32)),
        record,
        {"targets": targets},
        tuple(book.log),
    )


METHOD = Method(
    name="grace",
    title="GRACE",
    paper="Aging with GRACE: Lifelong Model Editing with Discrete Key-Value Adaptors, NeurIPS 2023, arXiv 2211.11031",
    config=Config,
    fit=fit,
    undo="latest",
    gives=MemoryEdit,
    batch=True,
    sequential=True,
    cumulative=True,
)
