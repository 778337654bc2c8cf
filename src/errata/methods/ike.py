"""IKE: edit in context, by demonstrations of which answers a new fact changes and which it preserves.

Paper      Zheng et al., "Can We Edit Factual Knowledge by In-Context Learning?", EMNLP 2023, arXiv 2305.12740
Implements Sec. 3: demonstrations of three kinds - copy, update, retain - built from the other facts that
           are most similar to the new one by a sentence encoder, the most similar last; then the new fact, then
           the prompt
Departs    Where all demonstrations exceed the window, the least similar are left out. Without ``encoder`` facts
           are compared by the model's own hidden states (paper: all-MiniLM-L6-v2). The paper edits one fact at a
           time and puts it before every prompt; with several, each prompt gets the fact whose subject it contains,
           and a prompt without any of the subjects is unchanged (``scope``; ``statement`` also looks at the relation).
Needs      Examples: other facts with paraphrases and neighbours
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Literal

from errata.config import positive
from errata.edits.prompt import PromptEdit
from errata.errors import ConfigError
from errata.host.embedding import embed
from errata.host.host import Host
from errata.methods._method import Method, Workspace, notes, provenance
from errata.methods._scope import Scope, TextScope, requests_of, scope_router
from errata.types import Case, Probe, Request
from errata.writing import joint

Kind = Literal["copy", "update", "retain"]


@dataclass(frozen=True)
class Config(TextScope):
    """Settings of IKE."""

    demonstrations: int = 32
    """How many demonstrations (paper: 32)."""
    copy: int = 1
    """Share of demonstrations that repeat their fact, in parts (paper: 1 of 8)."""
    update: int = 3
    """Share that ask for their fact in a paraphrase, in parts (paper: 3 of 8)."""
    retain: int = 4
    """Share that ask for another fact, whose answer is unchanged, in parts (paper: 4 of 8)."""
    scope: Scope | None = None
    """Prompts that get the fact: all, those that contain its subject, those of them that ask what it states, or those
    that are similar to it. None: all for one request, as in the paper, by subject for several."""
    encoder: str | None = None
    """Name or folder of the sentence encoder that compares facts. None: the model's own hidden states (paper:
    all-MiniLM-L6-v2, which the extra ``encoder`` brings under that name)."""
    room: int = 96
    """Tokens of the window that are reserved for prompt and answer."""

    def problems(self) -> list[str]:
        """Check ranges."""
        complaints = [*positive(self, "room"), *self.scope_problems()]
        if min(self.demonstrations, self.copy, self.update, self.retain) < 0:
            complaints.append("demonstrations, copy, update, retain: expected 0 or more")
        if self.demonstrations and not self.copy + self.update + self.retain:
            complaints.append("copy, update, retain: expected at least one above 0")
        return complaints


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> PromptEdit:
    """Return the edit that puts the demonstrations and the fact of a request before prompts."""
    earlier: PromptEdit | None = work.after
    earlier_requests = requests_of(earlier)
    single = len(requests) + len(earlier_requests) == 1
    config = replace(config, scope=config.scope or ("always" if single else "subject"))
    if config.scope == "always" and not single:
        raise ConfigError("scope: always puts one fact before every prompt; several need scope: subject")
    examples = _usable(work.examples, (*earlier_requests, *requests)) if config.demonstrations else []
    if config.demonstrations and not examples:
        raise ConfigError(
            "ike needs examples for its demonstrations: give a dataset or a file of cases with "
            "paraphrases and neighbours (examples=, --examples), or demonstrations: 0"
        )
    vectors = (
        embed(host, [_fact(host, c.request) for c in examples], encoder=config.encoder) if examples else None
    )
    contexts = []
    counts = []
    for number, request in enumerate(requests):
        neighbours: list[Case] = []
        if vectors is not None:
            similarities = vectors @ embed(host, [_fact(host, request)], encoder=config.encoder)[0]
            order = similarities.argsort(descending=True)[: config.demonstrations].tolist()
            neighbours = [examples[i] for i in order]
        text, count = _context(
            host, request, neighbours, config, f"{work.seed} {len(earlier_requests) + number}"
        )
        contexts.append(text)
        counts.append(count)
        work.on_progress("demonstrations", number + 1, len(requests))
    router, module = scope_router(
        host,
        (*earlier_requests, *requests),
        earlier,
        config.scope or "subject",
        config,
        work,
        encoder=config.encoder,
    )
    record = provenance("ike", host, requests, config, work, **notes({"demonstrations": min(counts)}))
    return PromptEdit((*(earlier.contexts if earlier else ()), *contexts), router, record, module)


def _usable(examples: Sequence[Case], requests: Sequence[Request]) -> list[Case]:
    """Return the examples about other subjects that have a paraphrase and a neighbour with its answer."""
    subjects = {request.subject.casefold() for request in requests}
    return [
        case
        for case in examples
        if case.request.subject.casefold() not in subjects
        and _probe(case, "paraphrase") is not None
        and _probe(case, "neighbourhood") is not None
    ]


def _probe(case: Case, kind: str) -> Probe | None:
    probes = (probe for probe in case.probes if probe.kind == kind)
    return next((probe for probe in probes if kind == "paraphrase" or probe.before), None)


def _fact(host: Host, request: Request) -> str:
    return f"New Fact: {joint(request.text, request.target, host.prompt_format.join)[0]}"


def _context(
    host: Host, request: Request, neighbours: Sequence[Case], config: Config, seed: str
) -> tuple[str, int]:
    """Return the context before a prompt, the most similar demonstrations last, and their number.

    Raises ConfigError where the fact alone exceeds the window.
    """
    kinds = _kinds(len(neighbours), config)
    random.Random(seed).shuffle(kinds)  # the global random state is left unchanged
    demonstrations = [
        _demonstration(host, case, kind) for case, kind in zip(reversed(neighbours), kinds, strict=True)
    ]
    fact = _fact(host, request)
    statement = joint(request.text, request.target, host.prompt_format.join)[0]
    end = f"{fact}\nPrompt: {statement}\n\n{fact}\nPrompt: "
    limit = None if host.window is None else host.window - config.room
    first = 0
    while limit is not None and len(host.encode("".join(demonstrations[first:]) + end).ids) > limit:
        if first == len(demonstrations):
            raise ConfigError(
                f"the fact alone has more than {limit} tokens, the window of {host.window} less room={config.room}; "
                "use a smaller room"
            )
        first += 1
    return "".join(demonstrations[first:]) + end, len(demonstrations) - first


def _kinds(count: int, config: Config) -> list[Kind]:
    """Return the kinds of ``count`` demonstrations, in proportion to the configured parts."""
    total = config.copy + config.update + config.retain
    shares: dict[Kind, int] = {"copy": config.copy, "update": config.update, "retain": config.retain}
    kinds: list[Kind] = []
    largest: Kind = "copy"
    for kind, part in shares.items():
        kinds.extend(repeat(kind, round(count * part / total)))
        largest = kind if part > shares[largest] else largest
    kinds.extend(repeat(largest, count - len(kinds)))
    return kinds[:count]


def _demonstration(host: Host, case: Case, kind: Kind) -> str:
    request = case.request
    prompt, answer = request.text, request.target
    if kind == "update":
        paraphrase = _probe(case, "paraphrase")
        assert paraphrase is not None
        prompt = paraphrase.prompt
    elif kind == "retain":
        neighbour = _probe(case, "neighbourhood")
        assert neighbour is not None
        prompt, answer = neighbour.prompt, neighbour.before[0]
    text = joint(prompt, answer, host.prompt_format.join)[0]
    return f"{_fact(host, request)}\nPrompt: {text}\n\n"


METHOD = Method(
    name="ike",
    title="IKE",
    paper="Can We Edit Factual Knowledge by In-Context Learning?, EMNLP 2023, arXiv 2305.12740",
    config=Config,
    fit=fit,
    undo="latest",
    gives=PromptEdit,
    batch=True,
    sequential=True,
    cumulative=True,
    needs=("examples",),
)
