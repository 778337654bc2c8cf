"""Run one workload and measure it: seconds by phase, operations, peak memory, the machine's rate.

Each workload runs in a process of its own, since peak memory is a process's and never comes down.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from benchmarks import floors, naive, scene
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import errata
from errata.bench import machine
from errata.errors import ErrataError
from errata.host.host import Host
from errata.methods import REGISTRY
from errata.methods._method import Workspace
from errata.stats.collect import Corpus, second_moments
from errata.types import Request

QUIET_RATE = 1e-3
"""Adam's rate in timed searches: so small that the loss stays where it was and no search stops early."""
WARM_STEPS = 2

Reader = Callable[[], float]

PHASES: tuple[tuple[str, str, str], ...] = (
    ("errata/locate/sweep.py", "", "keys"),
    ("errata/locate/keys.py", "", "keys"),
    ("errata/locate/contexts.py", "", "contexts"),
    ("errata/locate/gradients.py", "", "gradients"),
    ("errata/training/low_rank.py", "", "descent"),
    ("errata/locate/", "", "values"),
    ("errata/linalg/", "", "solve"),
    ("errata/stats/", "", "statistics"),
    ("errata/edits/", "", "weights"),
    ("benchmarks/naive.py", "find_value", "values"),
    ("benchmarks/naive.py", "keys_at", "keys"),
    ("benchmarks/naive.py", "current", "keys"),
    ("benchmarks/naive.py", "ridge", "solve"),
    ("benchmarks/naive.py", "whitened", "solve"),
)
"""Which phase a function belongs to: part of its file's path, its name ("" for any), the phase."""


@dataclass(frozen=True)
class Task:
    """One workload."""

    name: str
    kind: str
    """``edit``: a registered method; ``naive``: the plain baseline; ``statistics``: second moments."""
    shape: str
    device: str = "cpu"
    method: str = ""
    count: int = 1
    """How many requests, or tokens."""
    batch: int = 1
    """Requests in one fit."""
    sequential: bool = False
    """Whether each fit goes on from the one before."""
    steps: int = 0
    """Steps of the value search; 0 where a method has none, or is to have its own number."""
    timed: int = 0
    """Steps the plain way is timed at, its search's time then scaled up to ``steps``; 0: all of them."""
    layers: tuple[int, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Further settings of the method."""
    early: bool = False
    """Whether searches may stop early, as they do in use: the method's own settings, and no floor."""
    repeats: int = 1
    tokens: int = 1024
    """Token budget of the statistics that an edit needs, which is no part of its time."""


class Missing(ErrataError):
    """What a workload needs is not in this installation."""


# --- instruments ----------------------------------------------------------------------------


def clock(device: str) -> Reader:
    """Return the clock of a device: the process's CPU seconds, or seconds of a synchronised GPU."""
    if torch.device(device).type == "cpu":
        return time.process_time

    def read() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return read


class Phases:
    """Attribute what a reader counts to the phases that code runs in, outermost first.

    Watches calls of functions listed in :data:`PHASES`; one inside another counts for the outer.
    """

    def __init__(self, read: Reader) -> None:
        self.read = read
        self.spent: dict[str, float] = {}
        """By phase; ``other`` for what none of them holds."""
        self.marks: list[dict[str, float]] = []
        """What was spent up to each call of :meth:`mark`."""
        self._known: dict[CodeType, str | None] = {}
        self._inside: FrameType | None = None
        self._began = 0.0

    def __enter__(self) -> Phases:
        self._start = self.read()
        sys.setprofile(self._event)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        self.spent = self._so_far()

    def mark(self) -> None:
        """Note what has been spent so far; to be called from outside of all phases."""
        self.marks.append(self._so_far())

    def _so_far(self) -> dict[str, float]:
        total = self.read() - self._start
        return {**self.spent, "other": total - sum(self.spent.values())}

    def _event(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and self._inside is None:
            code = frame.f_code
            if code not in self._known:
                self._known[code] = phase_of(code)
            if self._known[code] is not None:
                self._inside, self._began = frame, self.read()
        elif event == "return" and frame is self._inside:
            phase = self._known[frame.f_code] or "other"
            self.spent[phase] = self.spent.get(phase, 0.0) + self.read() - self._began
            self._inside = None


def phase_of(code: CodeType) -> str | None:
    """Return the phase of a function, or None."""
    path = Path(code.co_filename).as_posix()
    for part, name, phase in PHASES:
        if part in path and name in ("", code.co_name):
            return phase
    return None


@contextlib.contextmanager
def counting() -> Iterator[Reader]:
    """Count operations of matrix products, attention kernels and dense solvers inside the block."""
    aten = torch.ops.aten
    extra = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: (
            sdpa_backward_flop_count(g, q, k, v)
        ),
        aten._linalg_solve_ex: lambda a, b, **_: 2 * a[-1] ** 3 // 3 + 2 * a[-1] ** 2 * _columns(b),
        aten.linalg_cholesky_ex: lambda a, **_: a[-1] ** 3 // 3,
        aten.cholesky_solve: lambda b, a, *_, **__: 2 * a[-1] ** 2 * _columns(b),
        aten._cholesky_solve_helper: lambda b, a, *_, **__: 2 * a[-1] ** 2 * _columns(b),
        aten.linalg_solve_triangular: lambda a, b, **_: a[-1] ** 2 * _columns(b),
        aten._linalg_eigh: lambda a, *_, **__: 9 * a[-1] ** 3,
    }
    with FlopCounterMode(display=False, custom_mapping=extra) as counter:
        yield lambda: float(counter.get_total_flops())


def _columns(shape: Sequence[int]) -> int:
    return shape[-1] if len(shape) > 1 else 1


def matrix_rate(host: Host) -> float:
    """Measure the machine: operations a second of products of the host's own shape and dtype, the best of some."""
    site = next(site for site in host.layout.mlp_out if site is not None)
    rows = 512 if host.device.type == "cpu" else 8192
    options = {"device": host.device, "dtype": host.dtype}
    generator = torch.Generator(device=host.device).manual_seed(0)
    left = torch.randn(rows, site.d_out, generator=generator, **options)
    right = torch.randn(site.d_out, site.d_in, generator=generator, **options)
    read, best = clock(str(host.device)), float("inf")
    for _ in range(8):
        start = read()
        for _ in range(4):
            torch.mm(left, right)
        best = min(best, read() - start)
    return 2.0 * rows * site.d_out * site.d_in * 4 / best


def peak_bytes(device: str) -> int:
    """Return the most memory held so far: the process's, or what was allocated on the GPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(machine.peak_memory_mb() * 2**20)


# --- workloads ------------------------------------------------------------------------------


def run(task: Task) -> dict[str, Any]:
    """Run a workload; returns plain numbers, or ``missing`` with the reason why it could not run."""
    try:
        if task.kind == "edit" and task.method not in REGISTRY:
            raise Missing(f"there is no method {task.method!r} in this installation")
        if torch.device(task.device).type == "cuda" and not torch.cuda.is_available():
            raise Missing(f"no CUDA device is to be seen, {task.device!r} was asked for; use --device cpu")
        host = scene.host(task.shape, task.device)
        result = {"edit": _edit, "naive": _naive, "statistics": _statistics}[task.kind](host, task)
    except Missing as missing:
        return {"task": dataclasses.asdict(task), "missing": str(missing)}
    weights = sum(p.numel() * p.element_size() for p in host.model.parameters())
    result["rate"] = max(result["rate"], matrix_rate(host))
    return {
        "task": dataclasses.asdict(task),
        "model_bytes": weights,
        "versions": {"errata": errata.__version__, "torch": torch.__version__},
        **result,
    }


def _edit(host: Host, task: Task) -> dict[str, Any]:
    method = REGISTRY.get(task.method)
    requests = scene.requests(host, task.count)
    corpus = Corpus("generated words", lambda: scene.texts(host, 2 * task.tokens))
    work = Workspace(seed=0, corpus=corpus, tokens=task.tokens, folder=None)
    read = clock(task.device)
    rate = matrix_rate(host)

    def fit(steps: int, count: int, phases: Phases) -> tuple[list[float], Any]:
        config = _config(method.config, task, steps)
        seconds: list[float] = []
        edit: Any = None
        with phases:
            for first in range(0, count, task.batch):
                part, start = requests[first : first + task.batch], read()
                edit = method.run(host, part, config, work, after=edit if task.sequential else None)
                seconds.append(read() - start)
                phases.mark()
        return seconds, edit

    start = read()
    extra = scene.requests(host, 2, seed=1)
    method.run(host, extra[: 1 if not method.batch else 2], _config(method.config, task, WARM_STEPS), work)
    prepared = read() - start
    times, shares = [], []
    edit: Any = None
    for _ in range(task.repeats):
        phases = Phases(read)
        seconds, edit = fit(task.steps, task.count, phases)
        times.append(_per_edit(seconds, task))
        shares.append({name: spent / task.count for name, spent in phases.spent.items()})
    notes = dict(edit.provenance.notes)
    if not task.early:
        _check_no_early_stop(notes, task)
    best = sorted(range(task.repeats), key=times.__getitem__)[task.repeats // 2]
    return {
        "rate": rate,
        "prepare_seconds": prepared,
        "seconds": times[best],
        "phases": shares[best],
        "peak_bytes": peak_bytes(task.device),
        "notes": {name: value for name, value in notes.items() if isinstance(value, (int, float))},
        "forward": floors.forward(host, requests) / task.count,
        "executed": _executed(fit, task),
        "floor": None if task.early else _floor(host, task, requests, edit, work),
    }


def _config(config: type, task: Task, steps: int) -> Any:
    """Return a method's settings for a task, those left out that the method does not have."""
    from errata.config import make

    names = {f.name for f in dataclasses.fields(config)}
    wanted: dict[str, Any] = {"layers": list(task.layers), "steps": steps}
    if not task.early:
        wanted["learning_rate"] = QUIET_RATE
    given = {name: value for name, value in wanted.items() if name in names and value}
    if missing := set(task.settings) - names:
        raise Missing(f"{task.method} has no setting {sorted(missing)[0]!r} in this installation")
    return make(config, {**given, **task.settings}, task.method)


def _per_edit(seconds: list[float], task: Task) -> float:
    """Return seconds an edit: the median of fits alike, or all of a sequence, whose fits grow."""
    if task.sequential:
        return sum(seconds) / task.count
    return statistics.median(seconds) / task.batch


def _check_no_early_stop(notes: Mapping[str, Any], task: Task) -> None:
    """Raise Missing when a timed search ended before its last step: then steps are not what is compared."""
    if not task.steps or "steps" not in notes:
        return
    unstopped = task.settings.get("stop_loss") == 0  # a low loss then ends nothing
    if notes["steps"] < task.steps - 1 or (notes.get("loss", 1.0) < 0.5 and not unstopped):
        raise Missing(
            f"{task.name}: a search stopped after {notes['steps']} of {task.steps} steps at a loss of "
            f"{notes.get('loss')}; expected none to stop, so the time is not comparable"
        )


def _executed(fit: Callable[[int, int, Phases], tuple[list[float], Any]], task: Task) -> dict[str, float]:
    """Count the operations of one fit, per edit and phase.

    Where nothing stops early they grow by the same amount with every step from the second on, so two
    short searches tell the count of a long one; else the fit is run as it is. Of a sequence the second
    fit is counted: the first has no history.
    """
    batches = 2 if task.sequential and task.count > task.batch else 1

    def count(steps: int) -> dict[str, float]:
        with counting() as read:
            phases = Phases(read)
            fit(steps, batches * task.batch, phases)
        before = phases.marks[-2] if batches > 1 else {}
        return {name: value - before.get(name, 0.0) for name, value in phases.marks[-1].items()}

    some = count(WARM_STEPS if task.steps else 0)
    if task.steps <= WARM_STEPS:
        return {name: value / task.batch for name, value in some.items()}
    more = count(WARM_STEPS + 1)
    return {
        name: (value + (task.steps - WARM_STEPS) * (more[name] - value)) / task.batch
        for name, value in some.items()
    }


def _floor(
    host: Host, task: Task, requests: Sequence[Request], edit: Any, work: Workspace
) -> dict[str, float] | None:
    """Return the unavoidable operations per edit, by phase, over fits as large as the task's."""
    groups = [requests[i : i + task.batch] for i in range(0, task.count, task.batch)]
    lowest = min(
        i
        for i, block in enumerate(host.layout.blocks)
        if any(name.startswith(f"{block}.") for name in edit.deltas)
    )
    if not task.steps:
        found = [floors.gradients(host, group, lowest=lowest) for group in groups]
    elif task.method == "keel":
        found = [floors.descent(host, group, lowest=lowest, steps=task.steps) for group in groups]
    else:
        prefixes = _prefixes(host, task, work)
        found = [floors.edit(host, group, prefixes, layers=task.layers, steps=task.steps) for group in groups]
    return {name: sum(part[name] for part in found) / task.count for name in found[0]}


def _prefixes(host: Host, task: Task, work: Workspace) -> list[tuple[str, float]]:
    """Return the context prefixes a method has by default."""
    config = _config(REGISTRY.get(task.method).config, task, task.steps)
    counts, lengths = config.contexts, config.context_tokens
    flat = isinstance(counts, tuple)
    groups = list(zip(counts, lengths, strict=True)) if flat else [(counts, lengths)]
    found = work.contexts(host, groups, "flat" if flat else "half_bare")
    return [(context.prefix, context.weight) for context in found]


def _naive(host: Host, task: Task) -> dict[str, Any]:
    """Run the plain baseline of ROME or MEMIT, per edit; its solve is counted once a batch."""
    requests = scene.requests(host, task.count)
    prefixes = _prefixes(host, task, Workspace(seed=0, folder=None))
    sites = [host.layout.site(layer) for layer in task.layers]
    moments = {s.layer: torch.eye(s.d_in, dtype=torch.float64, device=host.device) for s in sites}
    read, rate = clock(task.device), matrix_rate(host)

    def fit(steps: int, phases: Phases) -> None:
        search = naive.Search(steps, QUIET_RATE, 1.5, 0.5, 0.0625, unit="stream")
        with phases:
            if task.method == "rome":
                for request in requests:
                    naive.rome(
                        host, request, prefixes, moments[sites[0].layer], layer=sites[0].layer, search=search
                    )
            else:
                naive.memit(host, requests, prefixes, moments, search=search, cov_weight=1.0)

    phases, timed = Phases(read), task.timed or task.steps
    fit(timed, phases)
    # of n steps n run forwards and n - 1 backwards, so scaling up flatters the plain way a little
    spent = {**phases.spent, "values": phases.spent["values"] * task.steps / timed}
    peak = peak_bytes(task.device)
    counts: list[dict[str, float]] = []
    for steps in (1, 2):
        with counting() as counted:
            fit(steps, one := Phases(counted))
        counts.append(one.spent)
    executed = {
        name: (value + (task.steps - 1) * (counts[1][name] - value)) / task.count
        for name, value in counts[0].items()
    }
    least = floors.edit(host, requests, prefixes, layers=task.layers, steps=task.steps)
    return {
        "rate": rate,
        "seconds": sum(spent.values()) / task.count,
        "phases": {name: part / task.count for name, part in spent.items()},
        "executed": executed,
        "floor": {name: operations / task.count for name, operations in least.items()},
        "peak_bytes": peak,
    }


def _statistics(host: Host, task: Task) -> dict[str, Any]:
    """Time second moments: all layers in one pass, one a pass, and by plain passes of the whole model."""
    sites = [host.layout.site(layer) for layer in task.layers]
    corpus = Corpus("generated words", lambda: scene.texts(host, 2 * task.count))
    read, rate = clock(task.device), matrix_rate(host)
    second_moments(host, sites[:1], corpus, tokens=64)  # first use of everything

    def seconds(*chosen: Any) -> float:
        start = read()
        found = second_moments(host, chosen, corpus, tokens=task.count)
        return (read() - start) / next(iter(found.values())).count

    together = statistics.median(seconds(*sites) for _ in range(task.repeats))
    peak = peak_bytes(task.device)
    apart = sum(seconds(site) for site in sites) if task.repeats > 1 else None
    rows = [host.encode(text).ids for text in scene.texts(host, task.count // 8)]
    start = read()
    naive.second_moment(host, rows, sites[0])
    plain = (read() - start) / sum(len(row) - 1 for row in rows)
    with counting() as counted:
        few = next(iter(second_moments(host, sites, corpus, tokens=task.count // 8).values())).count
        executed = counted() / few
    return {
        "rate": rate,
        "seconds": together,
        "apart_seconds": apart,
        "naive_seconds": plain * len(sites),
        "executed": {"statistics": executed},
        "floor": {"statistics": floors.statistics(host, task.layers)},
        "peak_bytes": peak,
    }
