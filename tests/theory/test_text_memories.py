"""Memories of texts: what is put before or behind which prompt, and what a model is shown first."""

from __future__ import annotations

import math

import pytest
import torch

import errata
from errata.errors import ConfigError, EditError
from errata.host.preference import preference
from errata.host.prompts import PromptFormat
from errata.methods._method import Workspace
from errata.stats.tables import AnswerTable, Tables
from errata.writing import filled
from tests.models import fresh

ADA = errata.Request("{} was born in", "Ada Brenner", "Merrin")
BRUNO = errata.Request("{} plays the", "Bruno Holner", "harp")
CITY = errata.Request("The capital of {} is", "Arvania", "Esk")


@pytest.fixture(scope="module")
def host():
    return fresh("llama", max_position_embeddings=512)


def test_a_template_is_filled_once():
    assert filled("{a} {b} {c}", a="{b}", b="{}") == "{b} {} {c}"


# --- ice ------------------------------------------------------------------------------------


def test_the_fact_is_an_assumption_before_every_prompt(host):
    edit = errata.edit(host, ADA, method="ice")
    for prompt in (ADA.text, "The rain fell on"):
        assert edit.rewrite(prompt) == f"Imagine that Ada Brenner was born in Merrin.\n{prompt}"


def test_the_wordings_of_paper_and_code_are_settings(host):
    code = errata.edit(host, ADA, method="ice", wording="{fact}\n")
    assert code.rewrite("Ada") == "Ada Brenner was born in Merrin.\nAda"
    mother = errata.Request("The mother of {}", "Ada Brenner", "Lena Ost")
    paper = errata.edit(
        host, mother, method="ice", wording="Imagine that {target} would have been {prompt}. "
    )
    assert paper.rewrite("Ada") == "Imagine that Lena Ost would have been The mother of Ada Brenner. Ada"
    with pytest.raises(ConfigError, match="wording"):
        errata.edit(host, ADA, method="ice", wording="Imagine that.\n")


def test_ice_is_in_prompt_in_other_words(host):
    """The same entries for the same prompts under every scope."""
    for options in ({}, {"most": 2}, {"scope": "subject"}, {"scope": "similar"}):
        ice = errata.edit(host, [ADA, BRUNO, CITY], method="ice", wording="New fact: {fact}\n", **options)
        plain = errata.edit(host, [ADA, BRUNO, CITY], method="in_prompt", **options)
        assert ice.contexts == plain.contexts
        for prompt in (ADA.text, "Bruno Holner likes", "The rain fell on"):
            assert ice.rewrite(prompt, host) == plain.rewrite(prompt, host)


# --- memprompt ------------------------------------------------------------------------------

AGAIN = errata.Request("{} WAS born, in", "Ada Brenner", "Tallow", id="again")
PLAIN = {"method": "memprompt", "worked_examples": ""}


def test_feedback_stands_behind_the_queries_that_are_near(host):
    edit = errata.edit(host, [ADA, BRUNO], **PLAIN)
    asked = "Question: {} | clarification: Ada Brenner was born in Merrin.\nAnswer:"
    for prompt in (ADA.text, "ada brenner was born in the"):
        assert edit.rewrite(prompt) == asked.format(prompt)
    assert edit.rewrite("The rain fell on") == "The rain fell on"
    words = errata.edit(
        host, ADA, **PLAIN, combiner="{prompt} ({feedback})", query="{query} =>", feedback="it is {target}"
    )
    assert words.rewrite(ADA.text) == "Ada Brenner was born in (it is Merrin) =>"


def test_worked_examples_stand_before_the_queries_that_have_feedback(host):
    edit = errata.edit(host, ADA, method="memprompt", worked_examples="Question: a\nAnswer: b\n\n")
    assert edit.rewrite(ADA.text).startswith("Question: a\nAnswer: b\n\nQuestion: Ada")
    assert edit.rewrite("Bruno") == "Bruno"
    with pytest.raises(ConfigError, match="worked_examples: .* tokens leave less"):
        errata.edit(host, ADA, method="memprompt", worked_examples="a b c d e f g h " * 80)


def test_the_codes_rule_counts_edits_whatever_the_length(host):
    near, far = "Ada Brenner was bron in", "Ada Brenner works in"
    for options, accepted in (
        ({"edits": 6}, [near]),
        ({"edits": 12}, [near, far]),
        ({"distance": 0.5}, [near, far]),
    ):
        edit = errata.edit(host, ADA, **PLAIN, **options)
        assert [p for p in (near, far) if edit.rewrite(p) != p] == accepted


@pytest.mark.parametrize("memory", ["lexical", "semantic"])
def test_a_later_request_with_the_same_query_replaces_the_earlier(host, memory):
    options = {**PLAIN, "memory": memory}
    together = errata.edit(host, [ADA, BRUNO, AGAIN], **options)
    one = errata.edit(host, [ADA, BRUNO], **options)
    both = errata.edit(host, AGAIN, after=one, **options)
    for edit in (together, both):
        assert edit.contexts == ("Bruno Holner plays the harp.", "Ada Brenner WAS born, in Tallow.")
        assert edit.provenance.notes["replaced"] == [ADA.text] and len(edit.router.keys) == 2
        assert "Tallow" in edit.rewrite(AGAIN.text, host) and "Merrin" not in edit.rewrite(ADA.text, host)
        assert edit.provenance.requests == (ADA, BRUNO, AGAIN)
    assert one.provenance.notes["replaced"] == []


def test_sentence_vectors_of_the_queries_are_compared(host):
    edit = errata.edit(host, [ADA, BRUNO], **PLAIN, memory="semantic", cosine=0.999)
    for request in (ADA, BRUNO):
        assert f"clarification: {request.text}" in edit.rewrite(request.text, host)
    assert edit.rewrite("The rain fell on", host) == "The rain fell on"


def test_the_growing_prompt_has_the_newest_examples_that_fit(host):
    requests = [errata.Request("{} lives in", f"Person {i}", "Esk") for i in range(30)]
    options = {**PLAIN, "memory": "growing", "query": "{query}:", "combiner": "{prompt} {feedback}"}

    def shown(edit) -> list[int]:
        blocks = edit.rewrite("Ada").split("\n\n")
        assert blocks[-1] == "Ada:"
        return [int(block.split()[1]) for block in blocks[:-1]]

    roomy = fresh("llama", max_position_embeddings=4096)
    whole = errata.edit(roomy, requests, **options)
    assert shown(whole) == list(range(10, 30))
    assert whole.rewrite("Ada").startswith("Person 10 lives in Person 10 lives in Esk.: Esk\n\n")
    assert shown(errata.edit(roomy, requests, **options, most=3)) == [27, 28, 29]
    words = 10  # of an example
    assert shown(errata.edit(roomy, requests, **options, words=2 * words + 1)) == [28, 29]
    first = errata.edit(roomy, requests[:15], **options)
    assert errata.edit(roomy, requests[15:], after=first, **options).contexts == whole.contexts
    small = errata.edit(fresh("llama"), requests, **options, room=32)
    assert 0 < len(shown(small)) < 20 and shown(small)[-1] == 29
    with pytest.raises(ConfigError, match="one example and the worked ones exceed"):
        errata.edit(roomy, requests, **options, words=3)


# --- reliable -------------------------------------------------------------------------------

EXAMPLES = [
    errata.Case(
        f"e{i}",
        errata.Request("{} lives in", f"Person {i}", "Esk" if i % 2 else "Merrin", "Tallow"),
        (errata.Probe("paraphrase", f"The town of Person {i} is", ("Esk",), ("Tallow",)),) * (i % 3 > 0),
    )
    for i in range(20)
]
TABLE = AnswerTable(
    ("Ada Brenner", "Ivo Marn", "Pia Holt"),
    ("{} lives in", "The town of {} is", "{} plays the"),
    (("Esk", "Esk", "Merrin"), ("Esk", "Esk", "Merrin"), ("harp", "lute", "harp")),
)
TABLES = Tables((TABLE,), "made up", 0, 0, 0)
ASK = "Question: {}\nAnswer:"


@pytest.fixture(scope="module")
def roomy():
    return fresh("llama", max_position_embeddings=2048)


def test_demonstrations_answer_what_their_altered_passages_say(roomy):
    edit = errata.edit(roomy, ADA, method="reliable", examples=EXAMPLES)
    *shown, end = edit.rewrite("Where was Ada born?").split("\n\n")
    assert end == "Passage: Ada Brenner was born in Merrin.\n" + ASK.format("Where was Ada born?")
    assert len(shown) == 8 == edit.provenance.notes["demonstrations"]
    by_passage = {f"Passage: {c.request.text} {c.request.target}.": c for c in EXAMPLES}
    for text in shown:
        passage, question, answer = text.split("\n")
        case = by_passage.pop(passage)  # none is shown twice
        prompt = case.probes[0].prompt if case.probes else case.request.text
        assert f"{question}\n{answer}" == f"{ASK.format(prompt)} {case.request.target}"


def test_a_subjects_own_examples_are_not_shown_and_few_are_all_shown(roomy):
    own = errata.Case("own", errata.Request("{} lives in", "ada brenner", "Esk"), ())
    edit = errata.edit(roomy, ADA, method="reliable", examples=[own, *EXAMPLES[:3]])
    assert edit.provenance.notes["demonstrations"] == 3 and "ada brenner" not in edit.rewrite("x")
    with pytest.raises(ConfigError, match="needs other facts"):
        errata.edit(roomy, ADA, method="reliable", examples=[own])
    bare = errata.edit(roomy, ADA, method="reliable", demonstrations=0)
    assert bare.rewrite("x") == "Passage: Ada Brenner was born in Merrin.\n" + ASK.format("x")


def test_tables_alter_an_answer_to_that_of_another_name(roomy, monkeypatch):
    monkeypatch.setattr(Workspace, "tables", lambda self, host: TABLES)
    edit = errata.edit(roomy, ADA, method="reliable", source="tables")
    *shown, _ = edit.rewrite("x").split("\n\n")
    true = {name: dict(zip(TABLE.names, column, strict=True)) for name, column in zip(
        TABLE.templates, TABLE.answers, strict=True)}  # fmt: skip
    assert len(shown) == 4 == len(set(shown)), "two names of two relations, Ada left out"
    for text in shown:
        passage, question, answer = text.split("\n")
        answer = answer.removeprefix("Answer: ")
        (name,) = (name for name in TABLE.names if name in passage)
        lives = "lives" in passage
        relation = "{} lives in" if lives else "{} plays the"
        assert passage == f"Passage: {relation.format(name)} {answer}."
        other = "The town of {} is" if lives else relation
        assert question == f"Question: {other.format(name)}"
        assert name != "Ada Brenner" and answer != true[relation][name]
        assert answer in true[relation].values()


def test_what_the_window_does_not_hold_is_left_out(roomy):
    small = errata.edit(
        fresh("llama", max_position_embeddings=320), ADA, method="reliable", examples=EXAMPLES
    )
    whole = errata.edit(roomy, ADA, method="reliable", examples=EXAMPLES)
    assert 0 < small.provenance.notes["demonstrations"] < 8
    assert whole.rewrite("x").endswith(small.rewrite("x"))
    with pytest.raises(ConfigError, match="a passage alone"):
        errata.edit(fresh("llama"), ADA, method="reliable", examples=EXAMPLES, room=120)


def test_several_passages_stand_where_their_subject_is_named(roomy):
    options = {"method": "reliable", "examples": EXAMPLES, "demonstrations": 2}
    one = errata.edit(roomy, ADA, **options)
    both, grown = errata.edit(roomy, [ADA, BRUNO], **options), errata.edit(roomy, BRUNO, after=one, **options)
    for edit in (both, grown):
        assert edit.rewrite("The rain fell on") == "The rain fell on"
        asked = edit.rewrite("Bruno Holner likes")
        assert "Passage: Bruno Holner plays the harp.\n" in asked and "Ada" not in asked
    with pytest.raises(ConfigError, match="need scope: subject"):
        errata.edit(roomy, [ADA, BRUNO], scope="always", **options)


# --- patches --------------------------------------------------------------------------------

SHORT = {"method": "patches", "question": "{condition}? {prompt}:"}


def test_a_preference_is_that_of_two_answers_in_all_their_tokens(host):
    prompts = ["Ada was born in", "Bruno Holner plays the cello (or the", "The"]
    first, second = "Merrin and Esk", "harp"
    expected = []
    for prompt in prompts:
        logprobs = []
        for answer in (first, second):
            row = host.encode_answer(prompt, answer)
            with torch.no_grad():
                steps = host.model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
            places = range(row.start, len(row.ids))
            assert answer == second or len(places) > 1
            logprobs.append(sum(float(steps[at - 1, row.ids[at]]) for at in places))
        expected.append(1 / (1 + math.exp(logprobs[1] - logprobs[0])))
    found = preference(host, prompts, first, second)
    assert found.tolist() == pytest.approx(expected, abs=1e-5)
    assert (found + preference(host, prompts, second, first)).tolist() == pytest.approx([1, 1, 1], abs=1e-6)
    asked = host.with_prompt_format(PromptFormat("question"))
    assert torch.equal(preference(asked, ["Who?"], first, second), preference(host, ["Who?"], first, second))
    assert preference(host, ["a b c d " * 200], first, second).tolist() == [0.0]
    with errata.edit(host, ADA, method="ice").on(host):
        assert torch.equal(preference(host, prompts, first, second), found)


def scripted(monkeypatch, *holding: str) -> None:
    """Let the model find that the condition holds for a question with one of some texts."""

    def prefer(host, prompts, first, second):
        return torch.tensor([0.9 if any(text in p for text in holding) else 0.1 for p in prompts])

    monkeypatch.setattr("errata.edits.questions.preference", prefer)


def test_a_patch_is_applied_where_the_model_says_that_its_condition_holds(host, monkeypatch, tmp_path):
    scripted(monkeypatch, "was born in? Where was Ada", "plays the? He")
    edit = errata.edit(host, [ADA, BRUNO], **SHORT, condition="{prompt}")
    loaded = errata.Edit.load(edit.save(tmp_path / "edit.safetensors"))
    for one in (edit, loaded):
        with one.on(host):
            assert host.rewritten("Where was Ada born?") == (
                "Ada Brenner was born in Merrin.\nWhere was Ada born?"
            )
            assert host.rewritten("He plays") == "Bruno Holner plays the harp.\nHe plays"
            assert host.rewritten("The rain") == "The rain"
    with pytest.raises(EditError, match="asks the model"):
        edit.rewrite("He plays")


def test_the_interpreters_put_the_consequent_or_show_the_input_with_its_label(host, monkeypatch):
    scripted(monkeypatch, "Where")
    for options, expected in (
        ({}, "Ada Brenner was born in Merrin.\nWhere?"),
        ({"consequent": "{subject}: {target}"}, "Ada Brenner: Merrin\nWhere?"),
        (
            {"feature": "patch: {patch} Input: {prompt}"},
            "patch: Ada Brenner was born in Merrin. Input: Where?",
        ),
        ({"interpreter": "override"}, "Where? Merrin\nWhere?"),
        ({"interpreter": "override", "override": "{prompt} ({patch})"}, "Where? (Merrin)"),
    ):
        edit = errata.edit(host, ADA, **SHORT, **options)
        assert edit.rewrite("Where?", host) == expected and edit.rewrite("Who?", host) == "Who?"


@pytest.mark.filterwarnings("ignore:requests .* have one prompt")
def test_only_the_best_gate_is_applied_and_a_later_patch_wins_a_tie(host, monkeypatch):
    scripted(monkeypatch, "Where")
    again = errata.Request("{} was born in", "Ada Brenner", "Tallow")
    one = errata.edit(host, ADA, **SHORT)
    for edit in (errata.edit(host, [ADA, again], **SHORT), errata.edit(host, again, after=one, **SHORT)):
        assert edit.rewrite("Where?", host) == "Ada Brenner was born in Tallow.\nWhere?"


def test_the_gate_may_be_another_router(host):
    edit = errata.edit(host, [ADA, BRUNO], method="patches", gate="subject")
    assert edit.rewrite("Bruno Holner likes") == "Bruno Holner plays the harp.\nBruno Holner likes"
    similar = errata.edit(host, [ADA, BRUNO], method="patches", gate="similar", threshold=0.99)
    fact = "Ada Brenner was born in Merrin."
    assert similar.rewrite(fact, host) == f"{fact}\n{fact}" and similar.rewrite("The", host) == "The"


def test_questions_and_answers_are_checked(host):
    for options, complaint in (
        ({"yes": "no"}, "yes, no: expected two different"),
        ({"question": "{prompt}?"}, "question: expected {condition}"),
        ({"question": "{condition}{prompt}" + "a b c d " * 80}, "question: .* tokens leave too little"),
        ({"feature": "{prompt}"}, "feature: expected {patch}"),
        ({"override": "{patch}"}, "override: expected {prompt}"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=complaint):
            errata.edit(host, ADA, method="patches", **options)
