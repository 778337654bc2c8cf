"""NONE: no change at all: the floor that every other method is read against.

Paper      None; the rows called "unedited" or "pre-edit" since ROME (Meng et al., NeurIPS 2022, arXiv 2202.05262)
Implements An edit that holds the requests and nothing else, so that it is measured, saved and shipped like any other
Departs    Nowhere
Needs      Nothing
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from errata.edits.prompt import PromptEdit
from errata.edits.routers.lexical import Lexical
from errata.host.host import Host
from errata.host.kinds import TEXT_HOSTS
from errata.methods._method import Baseline, Method, Workspace, check_requests, provenance
from errata.types import Request


@dataclass(frozen=True)
class Config:
    """NONE has no settings."""


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> PromptEdit:
    """Return an edit without a text to put before any prompt."""
    check_requests("none", requests)
    return PromptEdit((), Lexical(()), provenance("none", host, requests, config, work))


METHOD = Method(
    name="none",
    title="None",
    paper="The unedited model, as in Locating and Editing Factual Associations in GPT, NeurIPS 2022, "
    "arXiv 2202.05262",
    config=Config,
    fit=fit,
    gives=PromptEdit,
    batch=True,
    sequential=True,
    cumulative=True,
    changes=False,
    random=False,
    baseline=Baseline(0, "the floor, nothing edited"),
    hosts=TEXT_HOSTS,
)
