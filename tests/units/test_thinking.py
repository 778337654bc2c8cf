"""Answers behind thoughts: thinking on, off and forced to end, on scripted models; what the thoughts assert."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from errata.api import edit, evaluate
from errata.edits.weight import WeightEdit
from errata.errors import ConfigError, RequestError
from errata.evaluation import observe as observing
from errata.evaluation import score
from errata.evaluation.observe import observe
from errata.host.generate import generate_rows
from errata.host.host import Host
from errata.host.prompts import PromptFormat
from errata.linalg.lowrank import LowRank
from errata.locate.contexts import Context, in_form
from errata.locate.problems import value_problems
from errata.types import AskOptions, Case, Observation, Probe, Request
from tests.models import fresh
from tests.units.test_prompts import ALWAYS, PLAIN, THINKS, chatting

REQUEST = Request("Where was {} born?", "Ada", "Esk", "Merrin")
ASKED = Probe("efficacy", REQUEST.text, ("Esk",), ("Merrin",), "Merrin")
GIVEN = "Question: {prompt}\n<think>\n"
Script = Callable[[str], str]


def scripted(monkeypatch: pytest.MonkeyPatch, script: Script) -> list[str]:
    """Have a script write what prompts are continued with; return the prompts that it is asked."""
    asked: list[str] = []

    def write(host: Host, rows: Any, limit: int, stop: str) -> list[str]:
        prompts = [host.tokenizer.decode(row) for row in rows]
        asked.extend(prompts)
        return [script(prompt) for prompt in prompts]

    monkeypatch.setattr(observing, "generate_rows", write)
    return asked


def answering(prompt: str) -> str:
    return " Esk." if prompt.endswith("Final answer:") else "Ada was born in Merrin. No, wait"


@pytest.mark.parametrize(
    ("template", "begins"), [(THINKS, "<assistant><think>\n"), (ALWAYS, "<assistant><think>\n")]
)
def test_forced_thoughts_are_cut_and_an_answer_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, template: str, begins: str
) -> None:
    asked = scripted(monkeypatch, answering)
    (seen,) = observe(chatting(template), [ASKED], AskOptions("chat", thinking="forced"))
    first, second = asked
    assert first.endswith(begins)
    assert second == f"{first}Ada was born in Merrin. No, wait\n</think>\n\nFinal answer:"
    assert (seen.text, seen.trace) == (" Esk.", "Ada was born in Merrin. No, wait")


def test_thoughts_that_end_by_themselves_are_not_asked_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = "In Esk.\n</think>\n\nMerrin"
    asked = scripted(monkeypatch, lambda prompt: " Esk" if prompt.endswith("Final answer:") else ended)
    (seen,) = observe(chatting(THINKS), [ASKED], AskOptions("chat", thinking="forced"))
    assert asked[1].endswith("<think>\nIn Esk.\n</think>\n\nFinal answer:")
    assert (seen.text, seen.trace) == (" Esk", "In Esk.")


def test_on_keeps_the_thoughts_and_off_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = scripted(
        monkeypatch,
        lambda prompt: "Esk" if prompt.endswith("</think>\n\n") else "<think>\nMerrin?\n</think>\n\nEsk",
    )
    host = chatting(THINKS)
    (on,) = observe(host, [ASKED], AskOptions("chat", thinking="on"))
    (off,) = observe(host, [ASKED], AskOptions("chat", thinking="off"))
    assert (on.trace, off.trace) == ("Merrin?", "") and on.text.strip() == off.text == "Esk"
    assert asked[0].endswith("<assistant>") and asked[1].endswith("<think>\n\n</think>\n\n")


@pytest.mark.parametrize(
    ("mode", "end"), [("on", "<think>\n"), ("off", "<think>\n\n</think>\n\n"), ("forced", "<think>\n")]
)
def test_a_given_template_serves_a_host_without_one(
    monkeypatch: pytest.MonkeyPatch, mode: str, end: str
) -> None:
    def script(prompt: str) -> str:
        if prompt.endswith(("Final answer:", "</think>\n\n")):
            return " Esk"
        return "Merrin?\n</think>\n\n Esk" if mode == "on" else "Merrin?"

    asked = scripted(monkeypatch, script)
    (seen,) = observe(fresh("llama"), [ASKED], AskOptions(thinking=mode, thinking_template=GIVEN))
    assert asked[0].endswith(f"Question: Where was Ada born?\n{end}")
    assert seen.text.strip() == "Esk" and seen.trace == ("" if mode == "off" else "Merrin?")
    assert len(asked) == (2 if mode == "forced" else 1)


def test_a_real_model_thinks_for_as_many_tokens_as_it_may() -> None:
    host = fresh("llama")
    options = AskOptions(thinking="forced", thinking_template=GIVEN, thought_tokens=6, max_new_tokens=3)
    (seen,) = observe(host, [ASKED], options)
    row = host.encode(GIVEN.replace("{prompt}", ASKED.prompt)).ids
    assert seen.trace == generate_rows(host, [row], 6, "end")[0].strip() != ""
    (scored,) = observe(host, [ASKED], AskOptions(thinking="off", thinking_template=GIVEN))
    assert seen.answer_logprobs == scored.answer_logprobs, "answers are scored behind a closed block"


@pytest.mark.parametrize(
    ("template", "options", "message"),
    [
        (None, {"thinking": "on"}, "has no thinking block.*no chat template"),
        (None, {"thinking": "forced"}, "give a thinking_template"),
        (PLAIN, {"thinking": "on"}, "cannot turn thinking on"),
        (PLAIN, {"thinking": "forced"}, "cannot turn thinking on"),
        (None, {"thinking_template": GIVEN}, "say also whether"),
        (None, {"thinking": "on", "thinking_template": "{prompt}"}, "an open thinking block"),
        (None, {"thinking": "on", "thinking_template": "<think>"}, "expected {prompt}"),
        (None, {"thinking": "long"}, "thinking must be on, off or forced"),
    ],
)
def test_a_host_that_cannot_think_is_refused_with_the_reason(
    template: str | None, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        observe(chatting(template), [ASKED], AskOptions(**options))


def test_thoughts_that_leave_no_room_for_an_answer_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, lambda prompt: "Esk " * 140)
    with pytest.raises(RequestError, match="lower thought_tokens"):
        observe(fresh("llama"), [ASKED], AskOptions(thinking="forced", thinking_template=GIVEN))


def test_an_edited_model_that_corrects_itself_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, answering)
    options = AskOptions("chat", thinking="forced")
    (after,) = observe(chatting(THINKS), [ASKED], options)
    before = Observation("Merrin", (-1.0,), (True,), (-1.0,), trace="Ada was born in Merrin.")
    table = score.rows(Case("c", REQUEST, (ASKED,)), [before], [after])
    (row,) = (row for row in table if row.protocol == "trace")
    assert row.kind == "efficacy" and row.after == 0.0
    assert (
        row.detail["asserts_old_after"]
        and row.detail["corrected_after"]
        and not row.detail["corrected_before"]
    )


def test_an_evaluation_thinks_before_and_after_the_edit() -> None:
    report = evaluate(
        fresh("llama"), [Case("c", REQUEST, (ASKED,))], method="in_prompt", thinking="forced", thinking_template=GIVEN,
        thought_tokens=6, max_new_tokens=3,
    )  # fmt: skip
    (row,) = (row for row in report.rows if row.protocol == "trace")
    assert row.detail["text_before"] and row.detail["text_after"] and row.detail["words_after"] <= 6


# --- contexts of an edit -----------------------------------------------------------------------

BORN = Request("{} was born in", "Ada Brenner", "Esk")
SAMPLED = [Context("", 0.5), Context("The old road. ", 0.5)]


@pytest.mark.parametrize(
    ("template", "form", "prefix"),
    [
        (None, "plain", "The old road. "),
        (None, "think", "<think>\nThe old road. "),
        (PLAIN, "chat", "<system>\n<user>The old road.\n<assistant>"),
        (PLAIN, "think", "<system>\n<user>The old road.\n<assistant><think>\n"),
        (THINKS, "chat", "<system>\n<user>The old road.\n<assistant><think>\n\n</think>\n\n"),
        (ALWAYS, "think", "<system>\n<user>The old road.\n<assistant><think>\n"),
    ],
)
def test_contexts_put_the_subject_where_a_model_thinks(template: str | None, form: Any, prefix: str) -> None:
    host = chatting(template)
    bare, formed = in_form(host, SAMPLED, form)
    assert bare == SAMPLED[0] and formed == Context(prefix, 0.5)
    (problem,) = value_problems(host, [BORN], [bare, formed])
    row = problem.rows[1]
    text = host.tokenizer.decode(row.ids[: row.position + 1])
    assert text == f"{host.tokenizer.bos_token}{prefix}Ada Brenner"
    assert list(row.ids).count(host.tokenizer.bos_token_id) == 1


def test_contexts_in_a_form_are_refused_where_they_have_no_place() -> None:
    with pytest.raises(ConfigError, match="no chat template"):
        in_form(chatting(None), SAMPLED, "chat")
    formatted = chatting(PLAIN).with_prompt_format(PromptFormat("chat"))
    with pytest.raises(ConfigError, match="one of the two"):
        in_form(formatted, SAMPLED, "think")
    with pytest.raises(ConfigError, match="no contexts"):
        edit(fresh("llama"), BORN, method="anyedit", context_form="think")


@pytest.mark.parametrize("method", ["memit", "rome", "keel"])
def test_the_form_of_contexts_changes_the_edit(method: str) -> None:
    host = fresh("llama")
    common: dict[str, Any] = {"method": method, "tokens": 400, "steps": 2, "prefixes": ("The old road. ",)}
    plain, think = (edit(host, BORN, context_form=form, **common) for form in ("plain", "think"))
    assert isinstance(plain, WeightEdit) and isinstance(think, WeightEdit)
    pairs = zip(plain.deltas.values(), think.deltas.values(), strict=True)
    assert any(not torch.equal(as_dense(a), as_dense(b)) for a, b in pairs)


def as_dense(delta: LowRank | torch.Tensor) -> torch.Tensor:
    return delta.dense() if isinstance(delta, LowRank) else delta
