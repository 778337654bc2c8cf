"""PATCHES: corrections in natural language, each with a condition that the model itself checks for every input.

Paper      Murty et al., "Fixing Model Bugs with Natural Language Patches", EMNLP 2022, arXiv 2211.03318
Implements A patch is a condition c and a consequent q. The gate g(x, c) is the probability that c holds for an input x,
           by a question to the model that is answered yes or no; of several patches only the one with the highest gate
           is applied, above 0.5. Interpreters: ``feature``, q before the input; ``override``, the answer is the label
Departs    The paper trains a T5 to gate and to interpret on synthetic patches, which are not available; here an
           unchanged causal model is asked in words, with examples. Without a distribution of labels to replace, an
           override shows the input with the target as its answer, and then the input again. The paper mixes,
           g I(x, q) + (1 - g) f(x); here the gate decides. Condition and consequent are made of the request. ``gate``
           may be another router
Needs      A model that answers yes or no; every prompt costs a forward pass for each patch
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from errata.edits.procedures import Procedure
from errata.edits.prompt import PromptEdit
from errata.edits.routers._router import Router
from errata.edits.routers.judged import Judged
from errata.host.host import Host
from errata.methods._method import Method, Workspace, check_requests, provenance
from errata.methods._scope import TextScope, check_room, requests_of, scope_router
from errata.methods._settings import missing_slots, same_answers
from errata.types import Request
from errata.writing import filled, statement

QUESTION = """Does the condition hold for the text?

Condition: the text asks what follows: The Holm bridge was built by
Text: Who built the Holm bridge?
Holds: yes

Condition: the text asks what follows: The Holm bridge was built by
Text: Sten Ohm plays the
Holds: no

Condition: {condition}
Text: {prompt}
Holds:"""


@dataclass(frozen=True)
class Config(TextScope):
    """Settings of PATCHES."""

    interpreter: Literal["feature", "override"] = "feature"
    """How a patch is applied: the consequent is put before the input, or the input is shown with the target."""
    gate: Literal["model", "subject", "statement", "similar"] = "model"
    """What decides whether a patch applies: the model, asked; or the name of the subject, the name and a linear gate on
    the model's state, or sentence vectors."""
    threshold: float | None = None
    """Least probability of yes with gate model (None: 0.5, as in the paper); least value of the gate with statement
    (None: -0.1); least cosine with similar (None: 0.5)."""
    condition: str = "the text asks what follows: {prompt}"
    """The condition; ``{prompt}``, ``{subject}``, ``{target}`` and ``{fact}``, its statement, are of the request."""
    consequent: str = "{fact}"
    """The consequent of a feature patch, with the same slots."""
    question: str = QUESTION
    """What the model is asked; ``{condition}`` and ``{prompt}`` are filled in."""
    yes: str = "yes"
    """Its answer that the condition holds."""
    no: str = "no"
    """Its answer that it does not."""
    feature: str = "{patch}\n{prompt}"
    """The input with a feature patch; ``{patch}`` is the consequent (paper: "patch: {patch}. Input: {prompt}")."""
    override: str = "{prompt} {patch}\n{prompt}"
    """The input with an override; ``{patch}`` is the target."""
    encoder: str | None = None
    """Name or folder of the sentence encoder of gate similar. None: the model's own hidden states."""

    def problems(self) -> list[str]:
        """Check ranges and slots."""
        patched = ("{patch}", "{prompt}")
        needed = {"question": ("{condition}", "{prompt}"), "feature": patched, "override": patched}
        return [*self.scope_problems(), *missing_slots(self, needed), *same_answers(self)]


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> PromptEdit:
    """Return the patches of all requests so far."""
    check_requests("patches", requests)
    earlier: PromptEdit | None = work.after
    together = (*requests_of(earlier), *requests)
    feature = config.interpreter == "feature"
    text, template = (config.consequent, config.feature) if feature else ("{target}", config.override)
    patches = tuple(_filled(host, text, request) for request in together)
    router, module = _gate(host, together, earlier, config, work)
    whole = filled(template, patch="{texts}", prompt="{prompt}")
    record = provenance("patches", host, requests, config, work)
    return PromptEdit(patches, router, record, module, procedure=Procedure("fill", 1, {"prompt": whole}))


def _gate(
    host: Host, requests: Sequence[Request], earlier: PromptEdit | None, config: Config, work: Workspace
) -> tuple[Router, str]:
    """Return the router that gates, and the module that it reads. Raises ConfigError for a question without room."""
    if config.gate != "model":
        return scope_router(host, requests, earlier, config.gate, config, work, encoder=config.encoder)
    check_room(host, "question", config.question)
    conditions = tuple(_filled(host, config.condition, request) for request in requests)
    threshold = 0.5 if config.threshold is None else config.threshold
    return Judged(conditions, config.question, config.yes, config.no, threshold), ""


def _filled(host: Host, text: str, request: Request) -> str:
    fact = statement(request.text, request.target, host.prompt_format.join)
    return filled(text, fact=fact, prompt=request.text, subject=request.subject, target=request.target)


METHOD = Method(
    name="patches",
    title="Language patches",
    paper="Fixing Model Bugs with Natural Language Patches, EMNLP 2022, arXiv 2211.03318",
    config=Config,
    fit=fit,
    undo="any",
    gives=PromptEdit,
    batch=True,
    sequential=True,
    cumulative=True,
    random=False,
)
