"""IN_PROMPT: put the new facts before prompts and leave the model as it is: what retrieval could reach at best.

Paper      The baseline of Zheng et al., "Can We Edit Factual Knowledge by In-Context Learning?", EMNLP 2023, arXiv
           2305.12740, without demonstrations
Implements Each fact as a line, "New fact: <prompt> <target>.", and then the prompt; with ``since`` also when it began
           to hold, as METO states it (arXiv 2312.05497)
Departs    With many facts, or on top of an earlier edit, a prompt gets the facts about the subject it names, and
           one that names none is put as it is (``scope``)
Needs      Nothing
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from errata.edits.prompt import PromptEdit
from errata.host.host import Host
from errata.methods._method import Baseline, Method, Workspace
from errata.methods._scope import FactScope, facts_before_prompts
from errata.methods._settings import missing_slots
from errata.types import Request
from errata.writing import statement


@dataclass(frozen=True)
class Config(FactScope):
    """Settings of IN_PROMPT."""

    since: str = ""
    """What is put behind "New fact" for a request with a date, as ", since {date}"; empty: no date is told."""

    def problems(self) -> list[str]:
        """Check that there is a place for the date."""
        return [*super().problems(), *(missing_slots(self, {"since": ("{date}",)}) if self.since else [])]


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> PromptEdit:
    """Return the facts as texts, one entry for all of them or one for each subject."""

    def line(request: Request) -> str:
        date = request.valid_from
        since = config.since.replace("{date}", date) if date is not None else ""
        return f"New fact{since}: {statement(request.text, request.target, host.prompt_format.join)}\n"

    return facts_before_prompts("in_prompt", host, requests, config, work, line)


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
