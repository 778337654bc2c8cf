"""ICE: in-context editing, the new fact as an assumption before prompts; the model itself is not changed.

Paper      Cohen et al., "Evaluating the Ripple Effects of Knowledge Editing in Language Models", TACL 2024, arXiv
           2307.12976, its in-context baseline
Implements The fact alone, without demonstrations, before every prompt of its test: "Imagine that <fact>." The prompt
           follows on a line of its own
Departs    The paper words the assumption for each of its relations by hand; here it is the request's statement put
           into ``wording``. The authors' code puts the statement alone: ``wording: "{fact}\\n"``. With many facts, or
           on top of an earlier edit, a prompt gets the facts about the subject it names (``scope``)
Needs      Nothing
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from errata.edits.prompt import PromptEdit
from errata.host.host import Host
from errata.methods._method import Method, Workspace
from errata.methods._scope import FactScope, facts_before_prompts
from errata.types import Request
from errata.writing import filled, statement


@dataclass(frozen=True)
class Config(FactScope):
    """Settings of ICE."""

    wording: str = "Imagine that {fact}\n"
    """What is put before a prompt; ``{fact}`` is the request's statement, ``{prompt}`` and ``{target}`` are its parts,
    as in "Imagine that {target} would have been {prompt}." for prompts that name a relation."""

    def problems(self) -> list[str]:
        """Check ranges and slots."""
        slots = "{fact}" in self.wording or "{target}" in self.wording
        return [*super().problems(), *([] if slots else ["wording: expected {fact} or {target} in it"])]


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> PromptEdit:
    """Return the facts in the configured wording, one entry for all of them or one for each subject."""

    def line(request: Request) -> str:
        fact = statement(request.text, request.target, host.prompt_format.join)
        return filled(config.wording, fact=fact, prompt=request.text, target=request.target)

    return facts_before_prompts("ice", host, requests, config, work, line)


METHOD = Method(
    name="ice",
    title="ICE",
    paper="In-context baseline of Evaluating the Ripple Effects of Knowledge Editing in Language Models, TACL 2024, "
    "arXiv 2307.12976",
    config=Config,
    fit=fit,
    undo="any",
    gives=PromptEdit,
    batch=True,
    sequential=True,
    cumulative=True,
    random=False,
)
