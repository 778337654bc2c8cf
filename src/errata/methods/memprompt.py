"""MEMPROMPT: feedback on earlier questions is kept, and appended to questions that are like them.

Paper      Madaan et al., "Memory-assisted prompt editing to improve GPT-3 after deployment", EMNLP 2022, arXiv
           2201.06009
Implements Sec. 3: a memory from the query of each request to feedback, a text; the query nearest to a prompt by edit
           distance (``lexical``) or by sentence vectors (``semantic``); its feedback behind the prompt,
           "<prompt> | clarification: <feedback>", after worked examples with and without a clarification. The
           baseline ``growing``, without retrieval: the newest corrected examples before every prompt. A later request
           with the same query takes the earlier one's place; ``notes["replaced"]`` names those that lost it
Departs    The feedback is the request's statement, in place of a user's words on how to read a question. Distances are
           shares of the longer text, as 6 edits mean little for long ones; ``edits: 6`` is the authors' rule. Vectors
           are not trained on pairs of questions. The worked examples are written here, and answer at once: the paper's
           first say how the question is understood. A prompt without feedback is put as it is, without examples, but
           with ``growing``. The authors' code counts words only until a prompt is too long once; here they always bound
Needs      A model that follows the examples
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from errata.config import positive
from errata.edits.procedures import Procedure
from errata.edits.prompt import PromptEdit
from errata.edits.routers._router import Router
from errata.edits.routers.always import Always
from errata.edits.routers.edit_distance import EditDistance, query_key
from errata.edits.routers.similarity import Similarity
from errata.errors import ConfigError
from errata.host.embedding import embed, encoder_digest
from errata.host.host import Host
from errata.methods._method import Method, Workspace, check_requests, provenance
from errata.methods._scope import requests_of
from errata.methods._settings import missing_slots
from errata.types import Request
from errata.writing import filled, statement

EXAMPLES = """Question: The Holm bridge was built by
Answer: Ann Reeve

Question: Sten Ohm plays the | clarification: Sten Ohm plays the viola.
Answer: viola

Question: Which town is the Lune fair held in? | clarification: The Lune fair is held in Vey.
Answer: Vey

"""


@dataclass(frozen=True)
class Config:
    """Settings of MEMPROMPT."""

    memory: Literal["lexical", "semantic", "growing"] = "lexical"
    """How feedback is found: by edit distance, by sentence vectors, or not at all: the newest examples for all."""
    distance: float = 0.2
    """Edits below which a query is near, as a share of the longer text's characters; chosen on the lab, seed 1."""
    edits: int | None = None
    """Edits below which a query is near, whatever its length (authors' code: 6). None: ``distance``."""
    cosine: float = 0.9
    """Cosine of sentence vectors above which a query is near (authors' code: 0.9)."""
    encoder: str | None = None
    """Name or folder of the sentence encoder. None: the model's own hidden states."""
    feedback: str = "{fact}"
    """The feedback; ``{fact}`` is the request's statement, ``{prompt}``, ``{subject}`` and ``{target}`` its parts."""
    combiner: str = "{prompt} | clarification: {feedback}"
    """How a prompt and feedback are joined (paper: so)."""
    query: str = "Question: {query}\nAnswer:"
    """How the result is asked, and the examples of ``growing``."""
    worked_examples: str = EXAMPLES
    """Worked examples before the question; may be empty (paper: its own, for each task)."""
    most: int = 20
    """Corrected examples at most with ``growing`` (authors' code: 20)."""
    words: int = 1300
    """Words before the question at most with ``growing`` (authors' code: 1300)."""
    room: int = 96
    """Tokens of the window that ``growing`` reserves for prompt and answer."""

    def problems(self) -> list[str]:
        """Check ranges and slots."""
        complaints = positive(self, "most", "words", "room")
        if not 0 < self.distance <= 1:
            complaints.append(f"distance: expected above 0 and at most 1, found {self.distance}")
        if self.edits is not None and self.edits < 1:
            complaints.append(f"edits: expected 1 or more, found {self.edits}")
        if not -1 <= self.cosine < 1:
            complaints.append(f"cosine: expected from -1 to below 1, found {self.cosine}")
        return [
            *complaints,
            *missing_slots(self, {"combiner": ("{prompt}", "{feedback}"), "query": ("{query}",)}),
        ]


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> PromptEdit:
    """Return the feedback of all requests so far by their queries, or the newest of them as examples."""
    check_requests("memprompt", requests)
    earlier: PromptEdit | None = work.after
    entries, replaced = _entries((*requests_of(earlier), *requests))
    record = provenance("memprompt", host, requests, config, work, entries=len(entries), replaced=replaced)
    if config.memory == "growing":
        text = _growing(host, list(entries.values()), config)
        asked = "{texts}" + filled(config.query, query="{prompt}")
        return PromptEdit((text,), Always(), record, procedure=Procedure("fill", 1, {"prompt": asked}))
    length = len(host.encode(config.worked_examples).ids)
    if host.window is not None and length > host.window - config.room:
        raise ConfigError(
            f"worked_examples: {length} tokens leave less than room={config.room} of the window of {host.window}; "
            "give shorter ones"
        )
    joined = filled(config.combiner, prompt="{prompt}", feedback="{texts}")
    asked = config.worked_examples + filled(config.query, query=joined)
    contexts = tuple(_feedback(host, request, config) for request in entries.values())
    router = _router(host, entries, earlier, config)
    return PromptEdit(contexts, router, record, procedure=Procedure("fill", 1, {"prompt": asked}))


def _entries(requests: Sequence[Request]) -> tuple[dict[str, Request], list[str]]:
    """Return the newest request of each key, in the order of the newest, and the names of those replaced."""
    entries: dict[str, Request] = {}
    replaced: list[str] = []
    for request in requests:
        key = query_key(request.text)
        if key in entries:
            before = entries.pop(key)
            replaced.append(before.id or before.text)
        entries[key] = request
    return entries, replaced


def _router(host: Host, entries: dict[str, Request], earlier: PromptEdit | None, config: Config) -> Router:
    """Return the router over the entries' queries; sentence vectors of an earlier edit are taken from it."""
    if config.memory == "lexical":
        if config.edits is not None:
            return EditDistance(tuple(entries), -float(config.edits), absolute=True)
        return EditDistance(tuple(entries), 1 - config.distance)
    texts = [request.text for request in entries.values()]
    known: dict[str, torch.Tensor] = {}
    before = None if earlier is None else earlier.router
    if isinstance(before, Similarity) and before.encoder == config.encoder:
        queries = (request.text for request in _entries(requests_of(earlier))[0].values())
        known = dict(zip(queries, before.keys, strict=True))
    new = [text for text in texts if text not in known]
    if new:
        known |= dict(zip(new, embed(host, new, encoder=config.encoder), strict=True))
    keys = torch.stack([known[text] for text in texts])
    return Similarity(keys, config.cosine, config.encoder, encoder_digest(host, config.encoder))


def _feedback(host: Host, request: Request, config: Config) -> str:
    fact = statement(request.text, request.target, host.prompt_format.join)
    return filled(
        config.feedback, fact=fact, prompt=request.text, subject=request.subject, target=request.target
    )


def _growing(host: Host, requests: Sequence[Request], config: Config) -> str:
    """Return the worked examples and the newest corrected ones that their number, words and the window allow.

    Raises ConfigError where not one fits.
    """
    limit = None if host.window is None else host.window - config.room
    text = ""
    for request in reversed(requests[-config.most :]):
        feedback = _feedback(host, request, config)
        query = filled(config.query, query=filled(config.combiner, prompt=request.text, feedback=feedback))
        longer = f"{query} {request.target}\n\n{text}"
        whole = config.worked_examples + longer
        tokens = 0 if limit is None else len(host.encode(whole).ids)
        if len(whole.split()) > config.words or (limit is not None and tokens > limit):
            break
        text = longer
    if not text:
        raise ConfigError(
            f"one example and the worked ones exceed words={config.words}, or the window less room={config.room}; "
            "give shorter worked_examples"
        )
    return config.worked_examples + text


METHOD = Method(
    name="memprompt",
    title="MemPrompt",
    paper="Memory-assisted prompt editing to improve GPT-3 after deployment, EMNLP 2022, arXiv 2201.06009",
    config=Config,
    fit=fit,
    undo="any",
    gives=PromptEdit,
    batch=True,
    sequential=True,
    cumulative=True,
    random=False,
)
