"""How probes are put is said once and reaches the host."""

from __future__ import annotations

import pytest

import errata
from errata.errors import ConfigError
from errata.evaluation import observe
from errata.evaluation.metrics import matching
from errata.types import AskOptions, Case, Probe
from tests.models import fresh

REQUEST = errata.Request("{} was born in", "Ada", "Esk", "Merrin")
CASE = Case("c", REQUEST, (
    Probe("efficacy", REQUEST.text, ("Esk",), ("Merrin",)),
    Probe("question", "Where was Ada born?", ("Esk",), ("Merrin",)),
))  # fmt: skip


def texts(report, side: str) -> list[str]:
    return [row.detail[f"text_{side}"] for row in report.rows if row.protocol == "generate"]


@pytest.mark.parametrize("template", ["raw", "question"])
def test_template_and_length_reach_both_sides(template):
    host = fresh("llama")
    edit = errata.edit(host, REQUEST, method="ft")
    report = errata.evaluate(host, [CASE], edit=edit, template=template, max_new_tokens=3)
    assert report.meta["asking"] == {"template": template, "max_new_tokens": 3}
    for side in ("before", "after"):
        if side == "after":
            edit.apply_(host)
        said = observe.observe(host, CASE.probes, AskOptions(template=template, max_new_tokens=3))
        assert texts(report, side) == [matching.first_answer(observation.text) for observation in said]


def test_an_unknown_template_is_refused():
    host = fresh("llama")
    edit = errata.edit(host, REQUEST, method="ft")
    with pytest.raises(ConfigError, match="template"):
        errata.evaluate(host, [CASE], edit=edit, template="poem")


def test_every_request_of_a_case_is_checked():
    host = fresh("llama")
    long = errata.Request("{} was born in", "Ada", " ".join(["Esk"] * 4000))
    with pytest.raises(errata.ErrataError, match="window"):
        errata.evaluate(host, [Case("c", REQUEST, CASE.probes, also=(long,))], method="ft")
