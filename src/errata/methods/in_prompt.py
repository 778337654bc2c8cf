"""IN_PROMPT: put the new facts before prompts and leave the model as it is: what retrieval could reach at best.

Paper      The baseline of Zheng et al., "Can We Edit Factual Knowledge by In-Context Learning?", EMNLP 2023, arXiv
           2305.12740, without demonstrations; of Cohen et al., TACL 2024, arXiv 2307.12976 as "in-context editing"
Implements Each fact as a line, "New fact: <prompt> <target>.", and then the prompt
Departs    With many facts, or on top of an earlier edit, a prompt gets the facts about the subject it names, and
           one that names none is put as it is (``scope``)
Needs      Nothing
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from errata.config import positive
from errata.edits.prompt import PromptEdit
from errata.edits.routers._router import Router
from errata.edits.routers.always import Always
from errata.edits.routers.lexical import Lexical
from errata.host.host import Host
from errata.methods._method import Baseline, Method, Workspace, check_requests, provenance
from errata.methods._scope import Scope, TextScope, scope_router
from errata.types import Request
from errata.writing import statement


@dataclass(frozen=True)
class Config(TextScope):
    """Settings of IN_PROMPT."""

    scope: Scope | None = None
    """Prompts that get facts: all of them get all facts, or each gets those about the subject it names; the one fact
    that states what it asks about its subject (``statement``); or the one that it is similar to. None: all facts for up
    to ``most`` requests without an earlier edit, else by subject."""
    encoder: str | None = None
    """Name or folder of the sentence encoder of scope similar. None: the model's own hidden states."""
    most: int = 4
    """Facts up to which all are put before every prompt where ``scope`` is open."""

    def problems(self) -> list[str]:
        """Check ranges."""
        return [*positive(self, "most"), *self.scope_problems()]


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> PromptEdit:
    """Return the facts as texts, one entry for all of them or one for each subject."""
    check_requests("in_prompt", requests)
    earlier: PromptEdit | None = work.after
    earlier_requests = (
        tuple(r for r in earlier.provenance.requests if isinstance(r, Request)) if earlier else ()
    )
    few = not earlier_requests and len(requests) <= config.most
    config = replace(config, scope=config.scope or ("always" if few else "subject"))
    record = provenance("in_prompt", host, requests, config, work)
    if config.scope in ("statement", "similar"):
        together = (*earlier_requests, *requests)
        router, module = scope_router(
            host, together, earlier, config.scope, config, work, encoder=config.encoder
        )
        lines = tuple(_line(host, request) for request in together)
        return PromptEdit(lines, router, record, module)
    by_subject: dict[str, str] = {}
    for request in (*earlier_requests, *requests):
        subject = "" if config.scope == "always" else request.subject
        by_subject[subject] = by_subject.get(subject, "") + _line(host, request)
    subjects: Router = Always() if config.scope == "always" else Lexical(tuple(by_subject))
    return PromptEdit(tuple(by_subject.values()), subjects, record)


def _line(host: Host, request: Request) -> str:
    return f"New fact: {statement(request.text, request.target, host.prompt_format.join)}\n"


METHOD = Method(
    name="in_prompt",
    title="In prompt",
    paper="In-context baseline of Can We Edit Factual Knowledge by In-Context Learning?, EMNLP 2023, "
    "arXiv 2305.12740",
    config=Config,
    fit=fit,
    undo="any",
    gives=PromptEdit,
    batch=True,
    sequential=True,
    cumulative=True,
    random=False,
    baseline=Baseline(1, "the oracle, the fact before every prompt"),
)
