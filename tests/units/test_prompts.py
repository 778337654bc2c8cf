"""Chat templates, system prompts and thinking: edits, scores and free answers stand behind one and the same text."""

# ruff: noqa: E501 (wide letters count twice)

from __future__ import annotations

import copy

import pytest

import errata
from errata.errors import ConfigError
from errata.evaluation.observe import observe
from errata.host import prompts, tokens
from errata.host.host import Host
from errata.host.prompts import PromptFormat
from errata.locate.contexts import Context
from errata.locate.problems import value_problems
from errata.types import AskOptions, Case, Probe, Request
from tests.models import fresh

PLAIN = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TRIMMED = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% else %}<<{{ m.content }}>>{% endif %}{% endfor %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + PLAIN
DEAF = PLAIN.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
THINKS = PLAIN + (
    "{% if add_generation_prompt and enable_thinking is defined and enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}"
)
ALWAYS = PLAIN + "{% if add_generation_prompt %}<think>\n{% endif %}"
REQUEST = Request("Where was {} born?", "Ada", "Esk", "Merrin")


def chatting(template: str | None) -> Host:
    host = fresh("llama")
    host.tokenizer = copy.deepcopy(host.tokenizer)
    host.tokenizer.chat_template = template
    return host


def put(template: str, **settings) -> Host:
    return chatting(template).with_prompt_format(PromptFormat("chat", **settings))


def read(host: Host, ids) -> str:
    return host.tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("template", "settings", "base"),
    [
        (PLAIN, {}, "<system>\n<user>Where was Ada born?\n<assistant>"),
        (PLAIN, {"system": "Be brief."}, "<system>Be brief.\n<user>Where was Ada born?\n<assistant>"),
        (NO_SYSTEM, {}, "<user>Where was Ada born?\n<assistant>"),
        (TRIMMED, {}, "<<>>[INST] Where was Ada born? [/INST]"),
        (THINKS, {}, "<system>\n<user>Where was Ada born?\n<assistant><think>\n\n</think>\n\n"),
        (
            THINKS,
            {"thinking": True},
            "<system>\n<user>Where was Ada born?\n<assistant><think>\n\n</think>\n\n",
        ),
        (ALWAYS, {}, "<system>\n<user>Where was Ada born?\n<assistant><think>\n\n</think>\n\n"),
    ],
)
def test_answers_stand_behind_the_template_as_it_is(template, settings, base):
    host = put(template, **settings)
    made = host.encode_answer(REQUEST.text, "Esk")
    lead = " " if template == TRIMMED else ""
    begin = host.tokenizer.bos_token
    assert read(host, made.ids) == begin + base + lead + "Esk"
    assert made.ids[: made.start] == host.encode_base(REQUEST.text)
    assert list(made.ids).count(host.tokenizer.bos_token_id) == 1
    if settings.get("thinking") or template == ALWAYS:
        open_end = "<assistant><think>\n" if template == ALWAYS else "<assistant>"
        assert read(host, host.encode_prompt(REQUEST.text)).endswith(open_end), "the model thinks first"
    else:
        assert host.encode_prompt(REQUEST.text) == made.ids[: made.start]


@pytest.mark.parametrize(
    ("template", "settings", "message"),
    [
        (PLAIN, {"thinking": True}, "cannot turn thinking on"), (PLAIN, {"thinking": False}, "cannot turn thinking off"),
        (NO_SYSTEM, {"system": "Be brief."}, "takes no system prompt"), (DEAF, {"system": "Be brief."}, "leaves the system prompt out"),
        (None, {}, "no chat template"),
    ],
)  # fmt: skip
def test_what_a_template_does_not_know_is_refused(template, settings, message):
    with pytest.raises(ConfigError, match=message):
        put(template, **settings).encode_prompt(REQUEST.text)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": "poem"}, "template"),
        ({"join": "both"}, "join"),
        ({"template": "raw", "system": "x"}, "need template"),
    ],
)
def test_settings_that_do_not_belong_together_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        PromptFormat(**settings)
    assert prompts.prompt_format(PromptFormat(), AskOptions(thinking="off")) == PromptFormat(
        "chat", thinking=False
    )
    with pytest.raises(ConfigError, match="on or off, or forced"):
        prompts.prompt_format(PromptFormat(), AskOptions(thinking="maybe"))


@pytest.mark.parametrize(
    ("template", "conversation", "inside"),
    [
        # a conversation written out in a raw prompt: behind the begin token, or at the head of the user's turn
        (None, "<s>Where was {} born?\nAnswer:", "<s>It rains. Where was Ada born?"),
        (PLAIN, "<s><system>Hi\n<user>Where was {} born?\n<assistant>", "<user>It rains. Where was Ada born?"),
        (TRIMMED, "<s>[INST] Where was {} born? [/INST]", "[INST] It rains. Where was Ada born?"),
        (TRIMMED, "<s>[INST] Hi [/INST] Yes</s><s>[INST] Where was {} born? [/INST]", "Yes</s><s>[INST] It rains. Where was Ada"),
        # other special tokens, and nothing that says where the turn begins: left out
        (None, "<s>User: </s>Where was {} born?", "<s>User: </s>Where was Ada born?"),
    ],
)  # fmt: skip
def test_contexts_go_inside_the_turn(template, conversation, inside):
    host = chatting(template)
    begin, end = host.tokenizer.bos_token, host.tokenizer.eos_token
    spelled = [text.replace("<s>", begin).replace("</s>", end) for text in (conversation, inside)]
    request = Request(spelled[0], "Ada", "Esk")
    (problem,) = value_problems(host, [request], [Context("", 0.5), Context("It rains. ", 0.5)])
    bare, line = (read(host, line.ids) for line in problem.rows)
    assert spelled[1] in line
    assert line.startswith(begin) and line.count(begin) == bare.count(begin) == conversation.count("<s>")
    for row in problem.rows:
        assert read(host, row.ids[: row.position + 1]).endswith("Ada")


@pytest.mark.parametrize("template", [PLAIN, TRIMMED, THINKS, ALWAYS, NO_SYSTEM])
def test_contexts_go_inside_the_turn_of_a_template(template):
    host = put(template)
    (problem,) = value_problems(host, [REQUEST], [Context("", 0.5), Context("It rains. ", 0.5)])
    for row, text in zip(problem.rows, ("Where was Ada", "It rains. Where was Ada"), strict=True):
        before = read(host, row.ids[: row.position + 1])
        assert before.endswith(("<user>" if template != TRIMMED else "[INST] ") + text)
        assert before.startswith(host.tokenizer.bos_token) and before.count(host.tokenizer.bos_token) == 1
        assert row.ids[row.position + 1 :], "the template goes on behind the subject"


def test_no_space_behind_a_generation_marker_that_is_typed_out():
    host = chatting(TRIMMED)
    begin = host.tokenizer.bos_token
    made = host.encode_answer(f"{begin}[INST] Where? [/INST]", "Esk")
    assert read(host, made.ids) == f"{begin}[INST] Where? [/INST] Esk", "the template writes one"
    host = chatting(PLAIN)
    made = host.encode_answer(f"{begin}<user>Where?\n<assistant>", "Esk")
    assert read(host, made.ids) == f"{begin}<user>Where?\n<assistant>Esk"
    made = host.encode_answer(f"Where?{host.tokenizer.eos_token}", "Esk")
    assert read(host, made.ids).endswith(f"{host.tokenizer.eos_token}Esk"), "a special token"


def test_prompts_keep_their_own_tokens_whatever_is_joined():
    """A token that prompt and answer would share in running text is not what a model continues."""
    host = fresh("llama")
    for prompt, answer in (("the old ro", "ad"), ("Ada Bren", "ner"), ("l'", "Italie"), ("(", "oui")):
        made = tokens.encode_answer(host.tokenizer, prompt, answer, join="none")
        assert made.ids[: made.start] == host.encode_prompt(prompt)
        assert host.tokenizer.decode(made.target) == answer


def test_what_is_edited_is_what_is_asked():
    host = chatting(THINKS)
    edit = errata.edit(host, REQUEST, method="ft", template="chat", system="Be brief.", seed=0)
    assert edit.provenance.prompt_format == {
        "template": "chat", "system": "Be brief.", "thinking": None, "join": "auto",
    }  # fmt: skip
    case = Case("c", REQUEST, (Probe("efficacy", REQUEST.text, ("Esk",), ("Merrin",), "Merrin"),))
    asked = errata.evaluate(host, [case], edit=edit)
    assert asked.meta["asking"]["template"] == "chat" and asked.meta["asking"]["system"] == "Be brief."
    fitted = errata.evaluate(host, [case], method="ft", template="chat", system="Be brief.", seed=0)
    scores = [row.detail for row in asked.rows if row.protocol == "probability"]
    assert scores and scores == [row.detail for row in fitted.rows if row.protocol == "probability"]
    raw = errata.evaluate(host, [case], edit=edit, template="raw")
    (elsewhere,) = (row.detail for row in raw.rows if row.protocol == "probability")
    gains = [one["answer_after"] - one["answer_before"] for one in (scores[0], elsewhere)]
    assert gains[0] > gains[1] and gains[0] > 0, "the edit pushes behind the text that is asked"
    with pytest.raises(ConfigError, match="continue from"):
        errata.edit(
            host, REQUEST, method="memit", after=errata.edit(host, REQUEST, method="memit"), template="chat"
        )


def test_a_view_shares_the_model_and_leaves_the_host_as_it_is():
    host = chatting(PLAIN)
    view = host.with_prompt_format(PromptFormat("chat"))
    assert view.model is host.model and view.fingerprint == host.fingerprint
    assert host.prompt_format == PromptFormat() and host.with_prompt_format(PromptFormat()) is host
    assert host.encode_prompt("Ada") != view.encode_prompt("Ada")


def test_thoughts_are_no_answer(monkeypatch):
    host = put(ALWAYS)
    monkeypatch.setattr("errata.host.host.generate_rows", lambda *_: ["I think.\n</think>\n\nEsk"])
    assert str(host.generate("Where?")).strip() == "Esk"
    monkeypatch.setattr("errata.host.host.generate_rows", lambda *_: ["I think. Esk"])
    assert host.generate("Where?") == "<think>I think. Esk", "thoughts without an end are marked"
    (seen,) = observe(
        host, [Probe("efficacy", "Where?", ("Esk",), ())], AskOptions(max_new_tokens=2, thought_tokens=3)
    )
    assert "<think>" in seen.text or "</think>" not in seen.text
