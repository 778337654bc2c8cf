"""Questions to a ledger that its model has to answer: which edit is to blame, which broke something, what differs.

All of them put edits in place on the ledger's host and leave it as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from errata.edits.weight import WeightEdit
from errata.errors import ConfigError, LedgerError
from errata.evaluation.check import answer_requests, compare_answers
from errata.evaluation.metrics import matching
from errata.evaluation.observe import observe
from errata.host.host import Host
from errata.ledger.guard import ANSWER, Guard
from errata.ledger.state import Recorded, State
from errata.ledger.working import Working, earlier_requests
from errata.linalg.lowrank import LowRank
from errata.training.slots import outputs_of, row_inputs
from errata.types import Probe, Request


@dataclass(frozen=True)
class Suspect:
    """What one edit has to do with an answer."""

    edit: str
    """Its digest."""
    strength: float
    """How far it moves what the model computes for the prompt, a share of what the weights themselves give, largest
    over weights and tokens; infinite for an edit that acts at run time, as only running tells."""
    answer: str | None = None
    """The answer without this edit; None: not asked, as others move the model more."""
    change: float | None = None
    """Log-probability of the answer with all edits minus that without this one, in nats."""
    to_blame: bool = False
    """Whether the answer is another one without it."""


@dataclass(frozen=True)
class Blame:
    """Which edits make a model answer a prompt as it does."""

    prompt: str
    base: str
    """The unedited model's answer."""
    answer: str
    """The answer with all edits in place."""
    suspects: tuple[Suspect, ...]
    """All edits in place, those to blame first, then by how far they move the answer."""

    @property
    def together(self) -> bool:
        """Whether edits changed the answer and no single one of those asked is to blame: several say the same."""
        return self.answer != self.base and not any(one.to_blame for one in self.suspects)


def blame(working: Working, prompt: str, *, most: int = 16) -> Blame:
    """Find which of the edits in place make the model answer a prompt as it does, by leaving out one at a time.

    The ``most`` edits that move the model most at this prompt are left out in turn; how far each moves it is read off
    one pass: ||D x|| / ||W x|| over the tokens x of the prompt.
    """
    working.require_text("blame")
    active = working.ledger.state().active
    with working.showing(()):
        base = _answer(working.host, prompt)
    with working.showing(active):
        answer = _answer(working.host, prompt)
        score = _score(working.host, prompt, answer)
        strengths = _strengths(working, active, prompt)
    order = sorted(range(len(active)), key=lambda i: (-strengths[i], -i))
    suspects: list[Suspect] = []
    for rank, i in enumerate(order):
        working.on_progress("leaving out", rank, min(most, len(order)))
        if rank >= most or strengths[i] == 0:
            suspects.append(Suspect(active[i], strengths[i]))
            continue
        with working.showing([one for one in active if one != active[i]]):
            other = _answer(working.host, prompt)
            change = score - _score(working.host, prompt, answer)
        suspects.append(Suspect(active[i], strengths[i], other, change, other != answer))
    suspects.sort(key=lambda one: (not one.to_blame, one.answer is None, -(one.change or 0.0)))
    return Blame(prompt, base, answer, tuple(suspects))


def _answer(host: Host, prompt: str) -> str:
    return _answers(host, [prompt])[0]


def _score(host: Host, prompt: str, answer: str) -> float:
    """Return the log-probability of an answer behind a prompt; 0 for an empty one."""
    if not answer:
        return 0.0
    (seen,) = observe(host, [Probe("efficacy", prompt, (answer,), ())], ANSWER)
    return sum(seen.answer_logprobs)


def _strengths(working: Working, active: Sequence[str], prompt: str) -> list[float]:
    """Return ||D x|| / ||W x|| of each edit, largest over its weights and the tokens x of a prompt."""
    weights = {d: edit for d in active if isinstance(edit := working.edit(d), WeightEdit)}
    modules = {_module(name) for edit in weights.values() for name in edit.deltas}
    row = working.host.encode_prompt(prompt)
    seen = {module: _inputs_and_outputs(working.host, module, row) for module in modules}
    return [
        max(_share(delta, seen[_module(name)]) for name, delta in weights[digest].deltas.items())
        if digest in weights
        else float("inf")
        for digest in active
    ]


def _module(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _inputs_and_outputs(host: Host, module: str, row: Sequence[int]) -> tuple[Tensor, Tensor] | None:
    """Return what a module reads ``[tokens, d_in]`` and gives ``[tokens, d_out]``; None where rows share them."""
    try:
        return row_inputs(host, module, [row])[0], outputs_of(host, module, [row])[0]
    except ConfigError:
        return None


def _share(delta: LowRank | Tensor, seen: tuple[Tensor, Tensor] | None) -> float:
    """Return max over tokens of ||D x|| / ||W x||; 1 where a weight is no product with its module's inputs."""
    if seen is None or delta.shape[-1] != seen[0].shape[-1] or len(delta.shape) != 2:
        return 1.0
    inputs, outputs = seen[0].to(torch.float64), seen[1].to(torch.float64)
    moved = delta.to(torch.float64) @ inputs.mT
    return float((moved.norm(dim=0) / outputs.norm(dim=1).clamp_min(1e-12)).max())


@dataclass(frozen=True)
class Bisection:
    """Which edit broke what a check asks for."""

    edit: str | None
    """Digest of the first edit with which the check fails; None: it fails without edits, or passes with all."""
    base_passes: bool
    now_passes: bool
    failing: tuple[str, ...]
    """Names of the requests that fail with that edit, or now."""
    asked: int
    """How many states were asked."""


def bisect(working: Working, requests: Sequence[Request]) -> Bisection:
    """Find the first edit, in the order in place, with which the model no longer gives all requests' targets.

    By halving: some log2(edits) states are asked. Raises LedgerError where no edit is in place.
    """
    working.require_text("bisect")
    active = working.ledger.state().active
    if not active:
        raise LedgerError("no edit is in place, so none can have broken anything")
    failures: dict[int, tuple[str, ...]] = {}

    def failing(count: int) -> tuple[str, ...]:
        if count not in failures:
            with working.showing(active[:count]):
                texts = answer_requests(working.host, requests)
            missed = compare_answers(requests, texts, texts).missed
            failures[count] = tuple(one.name for one in missed)
            working.on_progress("asking", len(failures), len(active).bit_length() + 2)
        return failures[count]

    if failing(0):
        return Bisection(
            None, False, not failing(len(active)), failing(len(active)) or failing(0), len(failures)
        )
    if not failing(len(active)):
        return Bisection(None, True, True, (), len(failures))
    good, bad = 0, len(active)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (good, middle) if failing(middle) else (middle, bad)
    return Bisection(active[bad - 1], True, False, failing(bad), len(failures))


@dataclass(frozen=True)
class Difference:
    """An answer that differs between two revisions."""

    prompt: str
    first: str
    second: str
    kind: str
    """``request``: of an edit in one of the two; ``canary`` or ``subject``: recorded by the guard."""
    edit: str
    """Digest of the edit that the prompt was recorded with."""

    def to_dict(self) -> dict[str, Any]:
        """Return the difference as plain data."""
        return asdict(self)


def diff(working: Working, first: Sequence[str], second: Sequence[str]) -> tuple[list[Difference], int]:
    """Ask two revisions all recorded prompts; return the answers that differ, and how many prompts were asked.

    Prompts: the requests of all edits in either, and those whose answers a guard saw change.
    """
    working.require_text("diff")
    state = working.ledger.state()
    prompts = recorded_prompts(state, [*first, *[one for one in second if one not in first]])
    answers: list[list[str]] = []
    for digests in (first, second):
        with working.showing(digests):
            answers.append(_answers(working.host, [one.prompt for one in prompts]))
    rows = zip(prompts, *answers, strict=True)
    return [Difference(p.prompt, a, b, p.kind, p.edit) for p, a, b in rows if a != b], len(prompts)


@dataclass(frozen=True)
class Recalled:
    """A prompt that a ledger knows of."""

    prompt: str
    kind: str
    edit: str


def recorded_prompts(state: State, digests: Sequence[str]) -> list[Recalled]:
    """Return the prompts recorded with some edits, each once: their requests, and what guards saw change."""
    found: dict[str, Recalled] = {}
    for digest in digests:
        one = state.edits[digest]
        for request in one.requests:
            if "prompt" in request:
                prompt = Request(**request).text
                found.setdefault(prompt, Recalled(prompt, "request", digest))
        for row in guard_rows(one):
            found.setdefault(row["prompt"], Recalled(row["prompt"], row["kind"], digest))
    return list(found.values())


def guard_rows(one: Recorded) -> list[dict[str, str]]:
    """Return the answers that an edit's guard saw change, as it recorded them."""
    if one.verified is None:
        return []
    return list(one.verified.body.get("measured", {}).get("changed", ()))


@dataclass(frozen=True)
class Check:
    """A ledger's regression suite, asked once."""

    requests: int
    """Requests of edits in place."""
    canaries: int
    """Canary prompts."""
    given: int
    """Requests of the file that was given."""
    failures: tuple[dict[str, str], ...]
    """What is not as it should be: kind, prompt, expected, found, edit."""

    @property
    def passed(self) -> bool:
        """Whether all is as it should be."""
        return not self.failures


def check(working: Working, given: Sequence[Request], guard: Guard | None) -> Check:
    """Ask the model as the ledger has it: requests of edits in place, canary prompts, and requests that are given.

    A request has to be answered with its target; a canary of the ledger's settings as without edits, and of the others
    the share that its bound names. Files, hashes and host are checked before.
    """
    working.require_text("a check")
    assert guard is not None
    state = working.ledger.state()
    edits = working.edits(state.active)  # reads and checks every file
    owner = {
        r.text: edit.digest for edit in edits for r in edit.provenance.requests if isinstance(r, Request)
    }
    own = earlier_requests(working, state.active)
    canaries = guard.canaries_beside({request.subject for request in own})
    with working.showing(()):
        before = _answers(working.host, canaries)
    with working.showing(state.active):
        after = _answers(working.host, canaries)
        texts = [answer_requests(working.host, group) if group else [] for group in (own, given)]
    failures: list[dict[str, str]] = []
    for kind, group, answers in (("request", own, texts[0]), ("given", given, texts[1])):
        for one in compare_answers(group, answers, answers).missed:
            edit = owner.get(one.request.text, "")
            failures.append(_failure(kind, one.request.text, one.request.target, one.after, edit))
    changed = [row for row in zip(canaries, before, after, strict=True) if row[1] != row[2]]
    enough = not canaries or 1 - len(changed) / len(canaries) >= guard.settings.bounds.canaries
    failures += [
        _failure("canary", *row) for row in changed if not enough or row[0] in guard.settings.canaries
    ]
    return Check(len(own), len(canaries), len(given), tuple(failures))


def _failure(kind: str, prompt: str, expected: str, found: str, edit: str = "") -> dict[str, str]:
    return {"kind": kind, "prompt": prompt, "expected": expected, "found": found, "edit": edit}


def _answers(host: Host, prompts: Sequence[str]) -> list[str]:
    seen = observe(host, [Probe("efficacy", prompt, (), ()) for prompt in prompts], ANSWER)
    return [matching.first_answer(one.text) for one in seen]
