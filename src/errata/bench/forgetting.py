"""Boards of unlearning on the lab: what is forgotten, and one row a method."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from errata import lab
from errata.bench import muse, unlearning
from errata.host.host import Host
from errata.job import prepare
from errata.progress import OnProgress, ignore
from errata.types import Case, Request

KEEP = 100
"""Facts about other subjects that are asked for."""


@dataclass(frozen=True)
class Task:
    """What is to be forgotten, and what it is measured by; no method sees more than the requests."""

    requests: tuple[Request, ...]
    """To forget: each one's old target."""
    reworded: tuple[Request, ...] = ()
    """For the same answers, now targets, in other words."""
    keep: tuple[Request, ...] = ()
    """To be answered with their target as before."""
    outsiders: tuple[Request, ...] = ()
    """What nobody was taught, target included."""
    texts: tuple[str, ...] = ()
    """Texts that state what is to be forgotten."""


def lab_task(subjects: int, *, keep: int = KEEP) -> Task:
    """Return the task to forget all facts about the first so many subjects of the lab.

    Raises ConfigError for more subjects than there are.
    """
    cases = lab.cases_to_forget(subjects)
    requests = tuple(case.request for case in cases)
    outsiders = tuple(
        replace(one, target=one.target_old or "", target_old=None) for _, one in lab.strangers(requests)
    )
    kept = lab.requests_to_keep(keep, forgotten=max(subjects, lab.MOST_FORGOTTEN))
    texts = lab.biographies(lab.subjects_to_forget(subjects))
    return Task(requests, tuple(reworded(cases)), tuple(kept), outsiders, tuple(texts))


def reworded(cases: Sequence[Case]) -> list[Request]:
    """Return a request for each case's old target in the words of its first paraphrase; cases without are left out."""
    found: list[Request] = []
    for case in cases:
        probe = next((one for one in case.probes if one.kind == "paraphrase"), None)
        old = case.request.target_old
        if probe is not None and isinstance(old, str):
            found.append(Request(probe.prompt, case.request.subject, old))
    return found


def measure(
    host: Host, task: Task, method: str, *, settings: Mapping[str, Any] | None = None, reference: Host | None = None,
    seed: int = 0, on_progress: OnProgress = ignore,
) -> dict[str, Any]:  # fmt: skip
    """Fit a method and return its row: seconds of the fit, :class:`errata.bench.unlearning.Audit`, memorisation.

    ``verbatim`` and ``knowledge`` are pairs, without and with the edit, see :mod:`errata.bench.muse`; the latter asks
    in other words. ``leakage`` is there with a reference alone.
    """
    begin = time.process_time()
    job = prepare(
        host, task.requests, method=method, options=dict(settings or {}), seed=seed, on_progress=on_progress
    )
    edit = job.run()
    seconds = time.process_time() - begin
    audit = unlearning.audit(
        host, edit, keep=task.keep, reference=reference, outsiders=task.outsiders, reworded=task.reworded,
        seed=seed, on_progress=on_progress,
    )  # fmt: skip
    before = memorisation(host, task)
    with edit.on(host):
        after = memorisation(host, task)
    found = {
        key: value for key, value in asdict(audit).items() if key not in ("answers", "rounded", "relearned")
    }
    pairs = {key: (before[key], after[key]) for key in before}
    return {"method": method, "requests": len(task.requests), "seconds": round(seconds, 1), **found, **pairs}


def measure_reference(reference: Host, task: Task) -> dict[str, Any]:
    """Return what a model that was trained without the answers gives of them, in the terms of :func:`measure`."""
    answers = [replace(one, target=one.target_old or "", target_old=None) for one in task.requests]
    found: dict[str, Any] = {"recall": asdict(unlearning.recall(reference, answers))}
    if task.reworded:
        found["reworded"] = asdict(unlearning.recall(reference, task.reworded))
    return {**found, **memorisation(reference, task)}


def memorisation(host: Host, task: Task) -> dict[str, float]:
    """Return verbatim and knowledge memorisation of a host as it is now, of those that the task has texts for."""
    found: dict[str, float] = {}
    if task.texts:
        found["verbatim"] = muse.verbatim(host, task.texts)
    if task.reworded:
        found["knowledge"] = muse.knowledge(host, task.reworded)
    return found
