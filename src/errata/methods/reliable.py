"""RELIABLE: demonstrations of answers that follow altered passages, then the new passage and the question.

Paper      Si et al., "Prompting GPT-3 To Be Reliable", ICLR 2023, arXiv 2210.09150, Sec. 5: knowledge updating
Implements Every demonstration is an altered passage, a question about it and the altered answer, so that the model
           learns to follow passages against what it knows; then the passage of a request, and the prompt as question
Departs    A passage is a statement, of the request or of an example, in place of an entity-substituted paragraph of
           NQ or SQuAD. Demonstrations come from ``examples``, other edited facts, or from the host's own ``tables``,
           with the answer of another name. The paper gives every question its passage; here ``scope`` says which
           prompts get one. Demonstrations that the window does not hold are left out
Needs      Examples: other facts, unless ``source: tables``
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from errata.config import positive
from errata.edits.procedures import Procedure
from errata.edits.prompt import PromptEdit
from errata.errors import ConfigError
from errata.host.host import Host
from errata.methods._method import Method, Workspace, check_requests, provenance
from errata.methods._scope import Scope, TextScope, requests_of, scope_router
from errata.methods._settings import missing_slots
from errata.stats.tables import AnswerTable, Tables, fill, plain
from errata.types import Case, Request
from errata.writing import filled, statement


@dataclass(frozen=True)
class Config(TextScope):
    """Settings of RELIABLE."""

    demonstrations: int = 8
    """How many demonstrations (paper: 8)."""
    source: Literal["examples", "tables"] = "examples"
    """Where they come from: other edited facts, or the host's own tables."""
    passage: str = "Passage: {fact}\n"
    """How a passage is written; ``{fact}`` is the statement."""
    question: str = "Question: {prompt}\nAnswer:"
    """How a prompt is asked."""
    scope: Scope | None = None
    """Prompts that get a passage: all, those that contain its subject, those of them that ask what it states, or those
    that are similar to it. None: all for one request, as in the paper, by subject for several."""
    encoder: str | None = None
    """Name or folder of the sentence encoder of scope similar. None: the model's own hidden states."""
    room: int = 96
    """Tokens of the window that are reserved for prompt and answer."""

    def problems(self) -> list[str]:
        """Check ranges and slots."""
        complaints = [*positive(self, "room"), *self.scope_problems()]
        if self.demonstrations < 0:
            complaints.append(f"demonstrations: expected 0 or more, found {self.demonstrations}")
        return [*complaints, *missing_slots(self, {"passage": ("{fact}",), "question": ("{prompt}",)})]


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> PromptEdit:
    """Return the passages of all requests so far, with the demonstrations before them."""
    check_requests("reliable", requests)
    earlier: PromptEdit | None = work.after
    together = (*requests_of(earlier), *requests)
    config = replace(config, scope=config.scope or ("always" if len(together) == 1 else "subject"))
    if config.scope == "always" and len(together) > 1:
        raise ConfigError("scope: always puts one passage before every prompt; several need scope: subject")
    facts = [statement(r.text, r.target, host.prompt_format.join) for r in together]
    passages = tuple(filled(config.passage, fact=fact) for fact in facts)
    shown = _that_fit(host, _demonstrations(host, together, config, work), passages, config)
    router, module = scope_router(
        host, together, earlier, config.scope or "subject", config, work, encoder=config.encoder
    )
    asked = "".join(shown) + "{texts}" + config.question
    record = provenance("reliable", host, requests, config, work, demonstrations=len(shown))
    return PromptEdit(passages, router, record, module, procedure=Procedure("fill", 1, {"prompt": asked}))


def _demonstrations(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> list[str]:
    """Return demonstrations about other subjects, drawn by the seed. Raises ConfigError where there are none."""
    if not config.demonstrations:
        return []
    subjects = {request.subject.casefold() for request in requests}
    draw = random.Random(work.seed)  # the global random state is left unchanged
    if config.source == "tables":
        triples = _from_tables(work.tables(host), subjects, draw, config.demonstrations)
    else:
        cases = [case for case in work.examples if case.request.subject.casefold() not in subjects]
        chosen = draw.sample(cases, min(config.demonstrations, len(cases)))
        triples = [(case.request.text, _question(case), case.request.target) for case in chosen]
    if not triples:
        raise ConfigError(
            "reliable needs other facts for its demonstrations: give a dataset or a file of cases (examples=, "
            "--examples), source: tables for a model whose own tables hold facts, or demonstrations: 0"
        )
    join = host.prompt_format.join
    return [
        filled(config.passage, fact=statement(prompt, answer, join))
        + filled(config.question, prompt=question)
        + f" {answer}\n\n"
        for prompt, question, answer in triples
    ]


def _question(case: Case) -> str:
    """Return a case's fact in other words, or in its own where it has no others."""
    others = (probe.prompt for probe in case.probes if probe.kind == "paraphrase")
    return next(others, case.request.text)


def _from_tables(
    tables: Tables, subjects: set[str], draw: random.Random, count: int
) -> list[tuple[str, str, str]]:
    """Return prompts of passages, questions and altered answers: each relation once, then each again."""
    relations = [(table, group) for table in tables.types for group in table.relations]
    draw.shuffle(relations)
    found: list[tuple[str, str, str]] = []
    while len(found) < count:
        before = len(found)
        for table, group in relations[: count - len(found)]:
            altered = _altered(table, group, subjects, {prompt for prompt, _, _ in found}, draw)
            found += [altered] if altered else []
        if len(found) == before:
            break
    return found


def _altered(
    table: AnswerTable, group: Sequence[str], subjects: set[str], used: set[str], draw: random.Random
) -> tuple[str, str, str] | None:
    """Return a name's prompt, its paraphrase where there is one, and the answer of another name; None without one."""
    column = table.column(group[0]) or ()
    names = list(zip(table.names, column, strict=True))
    draw.shuffle(names)
    for name, answer in names:
        prompt = fill(group[0], name)
        others = [one for _, one in names if one and plain(one) != plain(answer)]
        if answer and others and prompt not in used and name.casefold() not in subjects:
            return prompt, fill(group[min(1, len(group) - 1)], name), draw.choice(others)
    return None


def _that_fit(
    host: Host, demonstrations: Sequence[str], passages: Sequence[str], config: Config
) -> Sequence[str]:
    """Return the last demonstrations that the window holds with the longest passage.

    Raises ConfigError where a passage alone exceeds it.
    """
    if host.window is None:
        return demonstrations
    limit = host.window - config.room
    frame = filled(config.question, prompt="")
    longest = max(passages, key=lambda passage: len(host.encode(passage).ids))
    for first in range(len(demonstrations) + 1):
        text = "".join(demonstrations[first:]) + longest + frame
        if len(host.encode(text).ids) <= limit:
            return demonstrations[first:]
    raise ConfigError(
        f"a passage alone has more than {limit} tokens, the window of {host.window} less room={config.room}; "
        "use a smaller room"
    )


METHOD = Method(
    name="reliable",
    title="GPT-3 reliability protocol",
    paper="Prompting GPT-3 To Be Reliable, ICLR 2023, arXiv 2210.09150",
    config=Config,
    fit=fit,
    undo="any",
    gives=PromptEdit,
    batch=True,
    sequential=True,
    cumulative=True,
    needs=("examples",),
)
