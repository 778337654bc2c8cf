"""ENTAILER: answers that are proved from beliefs; an edit is a belief, and answers that rest on it change with it.

Paper      Tafjord et al., "Entailer: Answering Questions with Faithful and Truthful Chains of Reasoning", EMNLP 2022,
           arXiv 2210.12217; its users' overrides of beliefs as an editor
Implements Every request's statement is a belief. For a prompt the model's own answer, and those it gives with a belief
           before the prompt, are options; each makes a statement. A statement's score is s_d, how far the model
           calls it true, or s_r = s_e s(p_1) ... s(p_n) of the best proof: premises that the model writes, freely or
           with a belief as the first, and that entail it by s_e. Premises are proved in turn, to ``depth``; those
           disbelieved, and proofs that repeat what they prove, are left out. s_d of a belief is 1; those near a
           statement stand in the context in which the model is asked to verify it
Departs    The paper trains a T5 for the angles; here an unchanged causal model is asked in words, with examples
           written here. Premises are continued greedily, once freely and once for each belief, not sampled. Multiple
           choice is not needed. The answer is what the model continues, with the text that its option rests on
Needs      A model that follows the examples; every prompt costs tens of generations
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from errata.config import positive
from errata.edits.procedures import Procedure
from errata.edits.prompt import PromptEdit
from errata.host.host import Host
from errata.methods._method import Method, Workspace, check_requests, provenance
from errata.methods._scope import Retrieval, check_room, passage_router
from errata.methods._settings import missing_slots, same_answers
from errata.types import Request
from errata.writing import statement

PREMISES = """Give facts from which the statement follows.

Statement: Ann Reeve lives in Norway.
Facts:
- Ann Reeve lives in Oslo.
- Oslo is in Norway.

Statement: {text}
Facts:"""
VERIFY = """Is the statement true or false?

Known:
- Sten Ohm plays the viola.
Statement: Sten Ohm plays the harp.
Answer: false

Known:
- Sten Ohm plays the viola.
Statement: Sten Ohm plays an instrument.
Answer: true

Known:
{texts}Statement: {text}
Answer:"""
ENTAILS = """Does the statement follow from the facts, true or false?

Facts:
- Ann Reeve lives in Oslo.
- Oslo is in Norway.
Statement: Ann Reeve lives in Norway.
Answer: true

Facts:
- Ann Reeve lives in Oslo.
- Bergen is in Norway.
Statement: Ann Reeve lives in Sweden.
Answer: false

Facts:
{texts}Statement: {text}
Answer:"""


@dataclass(frozen=True)
class Config(Retrieval):
    """Settings of ENTAILER."""

    beliefs: int = 2
    """Beliefs that are found for a prompt or a statement at most."""
    threshold: float | None = None
    """What a belief has to exceed to be found. None: a cosine of 0.5, a BM25 of 0."""
    depth: int = 3
    """Steps of a proof at most (paper: 3)."""
    least: float = 0.5
    """Belief below which a statement is no premise, 0 to 1."""
    tokens: int = 50
    """Tokens of an answer or of premises at most."""
    premises: str = PREMISES
    """What the model is asked for premises, each on a line after "-"; ``{text}`` is the statement."""
    verify: str = VERIFY
    """What it is asked for s_d; ``{texts}`` are the beliefs found, ``{text}`` is the statement."""
    entails: str = ENTAILS
    """What it is asked for s_e; ``{texts}`` are the premises, ``{text}`` is the statement."""
    answer: str = "{texts}\n{prompt}"
    """How a prompt is put with a belief, ``{texts}``."""
    yes: str = "true"
    """Its answer to ``verify`` and ``entails`` that a statement is true or follows."""
    no: str = "false"
    """Its answer that it is not or does not."""

    def problems(self) -> list[str]:
        """Check ranges and slots."""
        complaints = positive(self, "beliefs", "depth", "tokens")
        if not 0 <= self.least <= 1:
            complaints.append(f"least: expected 0 to 1, found {self.least}")
        both = ("{texts}", "{text}")
        needed = {"premises": ("{text}",), "verify": both, "entails": both, "answer": ("{texts}", "{prompt}")}
        return [*complaints, *missing_slots(self, needed), *same_answers(self)]


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> PromptEdit:
    """Return the beliefs of all requests so far, with what the model is asked."""
    check_requests("entailer", requests)
    for name in ("premises", "verify", "entails"):
        check_room(host, name, getattr(config, name))
    earlier: PromptEdit | None = work.after
    texts = [statement(r.text, r.target, host.prompt_format.join) for r in requests]
    default = 0.5 if config.retriever == "vectors" else 0.0
    threshold = default if config.threshold is None else config.threshold
    router = passage_router(
        host, texts, earlier, config.retriever, threshold=threshold, encoder=config.encoder
    )
    templates = {
        name: getattr(config, name) for name in ("premises", "verify", "entails", "answer", "yes", "no")
    }
    procedure = Procedure("prove", config.beliefs, templates, config.tokens, config.depth, config.least)
    contexts = (*(earlier.contexts if earlier else ()), *texts)
    record = provenance("entailer", host, requests, config, work)
    return PromptEdit(contexts, router, record, procedure=procedure)


METHOD = Method(
    name="entailer",
    title="Entailer",
    paper="Entailer: Answering Questions with Faithful and Truthful Chains of Reasoning, EMNLP 2022, arXiv 2210.12217",
    config=Config,
    fit=fit,
    undo="any",
    gives=PromptEdit,
    batch=True,
    sequential=True,
    cumulative=True,
    random=False,
)
