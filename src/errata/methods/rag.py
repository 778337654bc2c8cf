"""RAG: the passages that are most like a prompt are put before it; the model itself is not changed.

Paper      The baseline that retrieval-augmented generation gives: Lewis et al., "Retrieval-Augmented Generation for
           Knowledge-Intensive NLP Tasks", NeurIPS 2020, arXiv 2005.11401; as an editor's baseline in Mitchell et al.,
           ICML 2022, arXiv 2206.06520 ("retrieve and prompt")
Implements Every request's statement is a passage; the ``passages`` nearest to a prompt are put before it, the best
           last. Nearness is BM25, or the cosine of sentence vectors
Departs    No generator is trained. Nothing but ``threshold`` decides whether a prompt gets passages at all
Needs      Nothing
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


@dataclass(frozen=True)
class Config(Retrieval):
    """Settings of RAG."""

    passages: int = 3
    """How many passages a prompt gets at most."""
    threshold: float | None = None
    """What a passage has to exceed. None: a cosine of -1, a BM25 of 0, so that every prompt that can gets passages."""
    passage: str = "New fact: {text}\n"
    """How a passage is put; ``{text}`` is the statement."""

    def problems(self) -> list[str]:
        """Check ranges."""
        return [*positive(self, "passages"), *missing_slots(self, {"passage": ("{text}",)})]


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> PromptEdit:
    """Return the passages of all requests so far."""
    check_requests("rag", requests)
    earlier: PromptEdit | None = work.after
    texts = [statement(r.text, r.target, host.prompt_format.join) for r in requests]
    router = passage_router(
        host, texts, earlier, config.retriever, threshold=config.threshold, encoder=config.encoder
    )
    contexts = (
        *(earlier.contexts if earlier else ()),
        *(config.passage.replace("{text}", text) for text in texts),
    )
    record = provenance("rag", host, requests, config, work)
    return PromptEdit(contexts, router, record, procedure=Procedure("put", count=config.passages))


METHOD = Method(
    name="rag",
    title="RAG",
    paper="Baseline after Retrieval-Augmented Generation for Knowledge-Intensive NLP Tasks, NeurIPS 2020, "
    "arXiv 2005.11401",
    config=Config,
    fit=fit,
    undo="any",
    gives=PromptEdit,
    batch=True,
    sequential=True,
    cumulative=True,
    random=False,
)
