"""MELLO: the model splits a question into parts, checks each answer against the edited facts, and goes on from there.

Paper      Zhong et al., "MQuAKE: Assessing Knowledge Editing in Language Models via Multi-Hop Questions", EMNLP 2023,
           arXiv 2305.14795
Implements Sec. 5: edited facts as sentences in a memory, the nearest one retrieved for each subquestion by a dense
           retriever (inner product, no threshold); the model, shown worked examples, writes a subquestion and an
           answer, is given the fact, says whether it contradicts, and goes on, at most ``hops`` times; the last line
           is the final answer
Departs    The worked examples are written here. A prompt that is itself a single question or cloze goes through the
           same loop. The final answer is what the model continues, so it is generated and scored like any answer. The
           retriever compares unit vectors; the authors' Contriever is ``encoder``. Where the window does not hold
           the examples and a question, the prompt is put as it is
Needs      A model that follows the examples; every prompt costs up to ``hops`` generations
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
from errata.types import Request
from errata.writing import statement

EXAMPLES = """Question: In which country was the author of The Glass Orchard born?
Subquestion: Who is the author of The Glass Orchard?
Generated answer: The author of The Glass Orchard is Tomas Vey.
Retrieved fact: The author of The Glass Orchard is Nora Lind.
Retrieved fact contradicts to generated answer, so the intermediate answer is: Nora Lind
Subquestion: In which country was Nora Lind born?
Generated answer: Nora Lind was born in Norway.
Retrieved fact: The capital of Peru is Lima.
Retrieved fact does not contradict to generated answer, so the intermediate answer is: Norway
Final answer: Norway

Question: Which language is spoken in the city where Karl Osk works?
Subquestion: In which city does Karl Osk work?
Generated answer: Karl Osk works in Vienna.
Retrieved fact: Karl Osk works in Lisbon.
Retrieved fact contradicts to generated answer, so the intermediate answer is: Lisbon
Subquestion: Which language is spoken in Lisbon?
Generated answer: The language spoken in Lisbon is Portuguese.
Retrieved fact: Karl Osk works in Lisbon.
Retrieved fact does not contradict to generated answer, so the intermediate answer is: Portuguese
Final answer: Portuguese

"""


@dataclass(frozen=True)
class Config(Retrieval):
    """Settings of MELLO."""

    hops: int = 4
    """Subquestions at most (authors' code: 4)."""
    tokens: int = 256
    """Tokens of a generation at most (authors' code: 256)."""
    worked_examples: str = EXAMPLES
    """Worked examples before the question (authors' code: 4 of its own)."""

    def problems(self) -> list[str]:
        """Check ranges."""
        return positive(self, "hops", "tokens")


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> PromptEdit:
    """Return the facts of all requests so far, with the examples and the loop's lines."""
    check_requests("mello", requests)
    check_room(host, "worked_examples", config.worked_examples)
    earlier: PromptEdit | None = work.after
    texts = [statement(r.text, r.target, host.prompt_format.join) for r in requests]
    router = passage_router(host, texts, earlier, config.retriever, encoder=config.encoder)
    templates = {
        "examples": config.worked_examples, "question": "Question: {prompt}\n", "subquestion": "Subquestion:",
        "fact": "Retrieved fact:", "answer": "Final answer:",
    }  # fmt: skip
    procedure = Procedure("decompose", 1, templates, config.tokens, config.hops)
    contexts = (*(earlier.contexts if earlier else ()), *texts)
    return PromptEdit(
        contexts, router, provenance("mello", host, requests, config, work), procedure=procedure
    )


METHOD = Method(
    name="mello",
    title="MeLLo",
    paper="MQuAKE: Assessing Knowledge Editing in Language Models via Multi-Hop Questions, EMNLP 2023, "
    "arXiv 2305.14795",
    config=Config,
    fit=fit,
    undo="any",
    gives=PromptEdit,
    batch=True,
    sequential=True,
    cumulative=True,
    random=False,
)
