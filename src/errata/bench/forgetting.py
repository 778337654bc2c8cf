"""Boards of unlearning on the lab: what is forgotten, one row a method, and rows beside a model that never knew.

A row keeps the score of every fact, so that a model that was trained without the facts can be compared with rows that
were measured before there was one: nothing is unlearned again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from errata import lab
from errata.bench import muse, runner, unlearning
from errata.errors import ConfigError
from errata.evaluation import likelihood
from errata.evaluation.check import answer_requests, compare_answers
from errata.host.host import Host
from errata.job import prepare, workspace
from errata.linalg.samples import auc, ks_p_value
from errata.progress import OnProgress, ignore
from errata.types import Case, Request

KEEP = 100
"""Facts about other subjects that are asked for."""
DIGITS = 6
"""Decimals of a score that are kept."""
UNEDITED, RETRAINED = "unedited", "retrained"
"""Names of the rows that no method has: the model as it is, and one that was trained without the subjects."""


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

    @property
    def answers(self) -> list[Request]:
        """The requests with what is to be forgotten as their target."""
        return [replace(one, target=one.target_old or "", target_old=None) for one in self.requests]


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


# --- rows -----------------------------------------------------------------------------------


def measure(
    host: Host, task: Task, method: str, *, settings: Mapping[str, Any] | None = None, seed: int = 0,
    neutral: Sequence[str] | None = None, on_progress: OnProgress = ignore,
) -> dict[str, Any]:  # fmt: skip
    """Fit a method and return its row: CPU seconds of the fit, and :func:`look` at the host with the edit.

    The host is left as it was.
    """
    begin = time.process_time()
    job = prepare(
        host, task.requests, method=method, options=dict(settings or {}), seed=seed, on_progress=on_progress
    )
    edit = job.run()
    seconds = time.process_time() - begin
    with edit.on(host):
        found = look(host, task, neutral=neutral, seed=seed)
    return {"method": method, "seconds": round(seconds, 1), **found}


def look(host: Host, task: Task, *, neutral: Sequence[str] | None = None, seed: int = 0) -> dict[str, Any]:
    """Return what a host as it is now gives of a task, as plain data.

    ``forgotten`` and ``reworded``: :class:`errata.bench.unlearning.Recall` of the answers to forget, as the requests
    ask for them and in other words; ``perplexity`` of ``neutral`` texts, by default the host's own; ``verbatim`` and
    ``knowledge``: see :mod:`errata.bench.muse`; ``scores``: see :func:`scores`. What the task has nothing for is left
    out.
    """
    if neutral is None:
        neutral = runner.neutral_texts(host, workspace(host, seed=seed))[: unlearning.TEXTS]
    found: dict[str, Any] = {"requests": len(task.requests)}
    found["forgotten"] = asdict(unlearning.recall(host, task.answers))
    found["perplexity"] = unlearning.perplexity_of(host, neutral)
    if task.reworded:
        found["reworded"] = asdict(unlearning.recall(host, task.reworded))
        found["knowledge"] = muse.knowledge(host, task.reworded)
    if task.texts:
        found["verbatim"] = muse.verbatim(host, task.texts)
    return {**found, "scores": scores(host, task)}


def scores(host: Host, task: Task) -> dict[str, list[Any]]:
    """Return what a host as it is now gives for every item of a task, in the task's order.

    ``answers`` and ``keep``: mean log-probability of the target's tokens, nats; ``answered``: whether what is to be
    kept is answered; ``ratios``: :func:`errata.bench.unlearning.truth_ratios`; ``members`` and ``others``: Min-40 %
    scores of statements that are to be forgotten and of those that nobody was taught, nats.
    """
    members, others = unlearning.membership_texts(task.answers, task.outsiders)
    texts = answer_requests(host, task.keep) if task.keep else []
    kept = compare_answers(task.keep, texts, texts).requests
    numbers = {
        "answers": _log_probabilities(host, task.answers),
        "keep": _log_probabilities(host, task.keep),
        "ratios": unlearning.truth_ratios(host, task.answers),
        "members": muse.membership(host, members) if others else [],
        "others": muse.membership(host, others) if others else [],
    }
    found: dict[str, list[Any]] = {name: [_short(x) for x in own] for name, own in numbers.items()}
    return {**found, "answered": [one.answered for one in kept]}


def _short(value: float) -> float:
    """Round to :data:`DIGITS` significant digits, which a small ratio needs as well."""
    return float(f"{value:.{DIGITS}g}")


def _log_probabilities(host: Host, requests: Sequence[Request]) -> list[float]:
    rows = [host.encode_answer(one.text, one.target) for one in requests]
    return [sum(own) / len(own) for own, _ in likelihood.score(host, rows)] if rows else []


def kept_share(row: Mapping[str, Any], unedited: Mapping[str, Any]) -> float | None:
    """Return the share of what the unedited host answers of what is to be kept that a row still answers.

    None where it answers nothing.
    """
    pairs = zip(row["scores"]["answered"], unedited["scores"]["answered"], strict=True)
    still = [now for now, before in pairs if before]
    return sum(still) / len(still) if still else None


# --- beside a model that never knew ---------------------------------------------------------


def left_out_of(folder: Path) -> tuple[str, ...]:
    """Return the subjects that a lab model's training text left out, by its card.

    Raises ConfigError where there is no such card, or it names none.
    """
    path = folder / "card.json"
    if not path.is_file():
        raise ConfigError(
            f"{folder} has no card.json that says what was left out; a reference is FOLDER/model of errata lab train "
            "FOLDER --without lab:forget:N"
        )
    names = json.loads(path.read_text(encoding="utf-8"))["training"].get("without") or ()
    if not names:
        raise ConfigError(f"{folder} was trained on all subjects, so it is no reference")
    return tuple(names)


def check_left_out(task: Task, left_out: Sequence[str]) -> None:
    """Raise ConfigError where a reference was taught some subject that the task forgets."""
    taught = {one.subject for one in task.requests} - set(left_out)
    if taught:
        raise ConfigError(
            f"the reference was taught {sorted(taught)[0]!r} and {len(taught) - 1} other subjects that are forgotten"
        )


def compare(
    row: Mapping[str, Any], reference: Mapping[str, Any], task: Task, left_out: Sequence[str]
) -> dict[str, float | int | None]:
    """Return a row beside that of a model that was trained without ``left_out``, by their scores alone.

    ``forget_quality``: p-value of a Kolmogorov-Smirnov test between truth ratios; ``distance``: mean absolute
    difference of the forgotten answers' log-probabilities, nats per token; ``kept_distance``: of what is to be kept,
    between subjects that both were taught, ``kept`` of them; ``leakage``: in per cent, see
    :func:`errata.bench.muse.privacy_leakage`. None where there is nothing to compare. The reference may lack more
    subjects than the task forgets: the answers compared are the task's alone.
    """
    own, other, gone = row["scores"], reference["scores"], set(left_out)
    shared = [i for i, one in enumerate(task.keep) if not gone & {one.subject, one.target}]
    every = range(len(task.requests))
    separation = auc(other["others"], other["members"]) if other["others"] else 0.0
    return {
        "forget_quality": ks_p_value(own["ratios"], other["ratios"]) if own["ratios"] else None,
        "distance": _distance(own["answers"], other["answers"], every),
        "kept": len(shared),
        "kept_distance": _distance(own["keep"], other["keep"], shared),
        "leakage": (
            muse.privacy_leakage(auc(own["others"], own["members"]), separation) if separation > 0 else None
        ),
    }  # fmt: skip


def _distance(own: Sequence[float], other: Sequence[float], at: Sequence[int]) -> float | None:
    return sum(abs(own[i] - other[i]) for i in at) / len(at) if at else None
