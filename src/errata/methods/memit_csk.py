"""MEMIT_CSK: MEMIT at another part of the sentence: subject, verb or object, first or last token.

Paper      Gupta et al., "Editing Common Sense in Transformers", EMNLP 2023, arXiv 2305.14956
Implements MEMIT with the edited token chosen among the words of a plain statement, and its layers chosen
           for that token (Sec. 4)
Departs    The statement's parts are read off the prompt: the subject is the request's, the verb the first
           word after it, the object the rest up to closing punctuation, which is the form of the paper's
           data. The divergence row names the edited words. Judging by " True" and " False" is the
           request's target, as for any other.
Needs      Second moment of keys at each layer; context prefixes written by the model
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from errata.edits.weight import WeightEdit
from errata.errors import RequestError
from errata.host.load import Host
from errata.methods import _closed_form as closed_form
from errata.methods._closed_form import MEMIT_SETTINGS
from errata.methods._method import Method, Workspace
from errata.methods._settings import CovarianceConfig
from errata.types import Request

Place = Literal["subject_last", "subject_first", "verb_last", "verb_first", "object_last", "object_first"]


@dataclass(frozen=True)
class Config(CovarianceConfig):
    """Settings of MEMIT_CSK."""

    place: Place = "subject_last"
    """Token to edit (paper: subject_last for GPT-2 large, verb_last for GPT-2 XL)."""


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> WeightEdit:
    """Return the edit at the chosen words. Raises RequestError where a prompt has no such words."""
    config = closed_form.resolve_covariance_config(host, config, METHOD.published_for(host))
    part, _, end = config.place.partition("_")
    for request in requests:
        part_span(request, part)
    task = closed_form.start_task("memit_csk", host, requests, config, work)
    problems = closed_form.make_problems(
        task, span=lambda request: part_span(request, part), token="first" if end == "first" else "last"
    )
    costs = closed_form.covariance_costs(task)
    sweep = closed_form.start_sweep(task, problems, costs)
    values = closed_form.find_target_values(task, problems)
    edit = closed_form.start_edit(task, values)
    for layer in closed_form.sweep_layers(task, sweep, values, edit):
        edit.add(closed_form.solve_layer(task, layer, costs[layer.site], layer.even_share))
    return edit.build()


def part_span(request: Request, part: str) -> tuple[int, int]:
    """Return where subject, verb or object are in a request's text, in characters."""
    if part == "subject":
        return request.span
    after = request.span[1]
    verb = re.compile(r"\S+").search(request.text, after)
    if verb is None:
        raise RequestError(f"{request.text!r} has no words after its subject; expected verb and object")
    end = len(request.text.rstrip().rstrip(".:,;?!").rstrip())
    word = (verb.start(), min(verb.end(), end))
    rest = re.compile(r"\S").search(request.text, word[1])
    if part == "verb" and word[0] < word[1]:
        return word
    if rest is None or rest.start() >= end:
        raise RequestError(
            f"{request.text!r} has no {part} after its subject; place: subject_last needs none"
        )
    return rest.start(), end


METHOD = Method(
    name="memit_csk",
    title="MEMIT_CSK",
    paper="Editing Common Sense in Transformers, EMNLP 2023, arXiv 2305.14956",
    config=Config,
    fit=fit,
    gives=WeightEdit,
    batch=True,
    sequential=True,
    needs=("second_moment", "contexts"),
    published=MEMIT_SETTINGS,
)
