"""SCR: retrieve facts, let the model select what a prompt needs of them, answer with it in the context.

Paper      Baseline "Selective Contextual Reasoning" of arXiv 2606.00570: retrieve, select, answer in context
Implements The ``passages`` facts that are nearest to the prompt are shown to the model, which writes the one sentence
           that the prompt needs, or "none"; it then answers with that sentence before the prompt, or without it
Departs    Prompts are written here, with two examples for models that follow no instructions; the authors' are not
           published in full. Passages come from ``retriever``; the authors use a dense one
Needs      A model that follows the examples; every prompt costs one more generation
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from errata.config import positive
from errata.edits.procedures import Procedure
from errata.edits.prompt import PromptEdit
from errata.host.host import Host
from errata.methods._method import Method, Workspace, check_requests, provenance
from errata.methods._scope import Retrieval, passage_router
from errata.methods._settings import missing_slots
from errata.types import Request
from errata.writing import statement

SELECT = """Copy the one fact that the question needs, or write none.

Fact: The Holm bridge was built by Ann Reeve.
Fact: Sten Ohm plays the viola.
Question: Sten Ohm plays the
Needed: Sten Ohm plays the viola.

Fact: The Holm bridge was built by Ann Reeve.
Question: The river Lune flows into the
Needed: none

{texts}Question: {prompt}
Needed:"""


@dataclass(frozen=True)
class Config(Retrieval):
    """Settings of SCR."""

    passages: int = 5
    """How many facts the model selects from (authors: 5)."""
    threshold: float | None = None
    """What a fact has to exceed to be shown. None: a cosine of -1, a BM25 of 0."""
    select: str = SELECT
    """What the model is asked; ``{texts}`` are the facts, ``{prompt}`` is the prompt."""
    answer: str = "New fact: {text}\n{prompt}"
    """What it answers to; ``{text}`` is the sentence that it selected."""
    tokens: int = 50
    """Tokens of that sentence at most (authors: 50)."""

    def problems(self) -> list[str]:
        """Check ranges."""
        needed = {"select": ("{texts}", "{prompt}"), "answer": ("{text}", "{prompt}")}
        return [*positive(self, "passages", "tokens"), *missing_slots(self, needed)]


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> PromptEdit:
    """Return the facts of all requests so far, with the two prompts."""
    check_requests("scr", requests)
    earlier: PromptEdit | None = work.after
    texts = [statement(r.text, r.target, host.prompt_format.join) for r in requests]
    router = passage_router(
        host, texts, earlier, config.retriever, threshold=config.threshold, encoder=config.encoder
    )
    contexts = (*(earlier.contexts if earlier else ()), *(f"Fact: {text}\n" for text in texts))
    templates = {"select": config.select, "answer": config.answer}
    procedure = Procedure("select", config.passages, templates, tokens=config.tokens)
    record = provenance("scr", host, requests, config, work)
    return PromptEdit(contexts, router, record, procedure=procedure)


METHOD = Method(
    name="scr",
    title="SCR",
    paper="Selective Contextual Reasoning, baseline, arXiv 2606.00570",
    config=Config,
    fit=fit,
    undo="any",
    gives=PromptEdit,
    batch=True,
    sequential=True,
    cumulative=True,
    random=False,
)
