"""Prompt edits that ask the model first: retrieval, selection and decomposition against a scripted model."""

from __future__ import annotations

import dataclasses

import pytest

import errata
from errata.edits.procedures import Procedure
from errata.errors import ConfigError, EditError
from errata.methods.mello import EXAMPLES
from errata.methods.scr import SELECT
from tests.models import fresh

SELECTING = Procedure("select", 2, {"select": SELECT, "answer": "{text}\n{prompt}"})
LINES = {
    "examples": EXAMPLES, "question": "Question: {prompt}\n", "subquestion": "Subquestion:",
    "fact": "Retrieved fact:", "answer": "Final answer:",
}  # fmt: skip
SPLITTING = Procedure("decompose", 1, LINES, tokens=64)


class Script:
    """A model that writes what it is told to, and remembers what it was asked."""

    def __init__(self, *texts: str) -> None:
        self.texts, self.asked = list(texts), []

    def __call__(self, text: str, tokens: int) -> str:
        self.asked.append(text)
        return self.texts.pop(0)


def always(text: str) -> bool:
    return True


def test_passages_stand_before_the_prompt_the_best_next_to_it():
    put = Procedure("put", 3)
    found = ["third\n", "second\n", "best\n"]
    assert put.run("prompt", lambda _: found, Script(), always) == "third\nsecond\nbest\nprompt"
    short = put.run("prompt", lambda _: found, Script(), lambda text: len(text) < 22)
    assert short == "second\nbest\nprompt"
    assert put.run("prompt", lambda _: [], Script(), always) == "prompt"


def test_a_template_has_the_texts_and_the_prompt_and_nothing_is_asked():
    fill = Procedure("fill", 2, {"prompt": "{prompt} | {texts}?"})
    found = ["a {prompt}", "b"]
    assert fill.run("q", lambda _: found, Script(), always) == "q | a {prompt}b?"
    assert fill.run("q", lambda _: found, Script(), lambda text: len(text) < 9) == "q | b?"
    for nothing in (fill.run("q", lambda _: [], Script(), always),
                    fill.run("q", lambda _: found, Script(), lambda _: False)):  # fmt: skip
        assert nothing == "q"


def test_the_model_selects_a_sentence_or_none():
    facts = ["Fact: Ada was born in Merrin.\n", "Fact: Bruno {plays} the harp.\n"]
    model = Script(" Ada was born in Merrin.\nFact: and more")
    text = SELECTING.run("Ada was born in", lambda _: facts, model, always)
    assert text == "Ada was born in Merrin.\nAda was born in"
    assert model.asked == [SELECT.replace("{texts}", "".join(facts)).replace("{prompt}", "Ada was born in")]
    for answer in ("none", " None\n", "", "\n"):
        assert SELECTING.run("Ivo sings", lambda _: facts, Script(answer), always) == "Ivo sings"


def test_a_question_is_split_until_its_answer_begins():
    memory = {
        "Who wrote Dusk?": ["Dusk was written by Nora."],
        "Where was Nora born?": ["Pia was born in Esk."],
    }
    model = Script(
        "Subquestion: Who wrote Dusk?\nGenerated answer: Ivo wrote Dusk.\nRetrieved fact: invented",
        "Retrieved fact contradicts to generated answer, so the intermediate answer is: Nora\n"
        "Subquestion: Where was Nora born?\nGenerated answer: Nora was born in Tallow.\n",
        "Retrieved fact does not contradict to generated answer, so the intermediate answer is: Tallow\n"
        "Final answer: Tallow\n\nQuestion: another",
    )
    text = SPLITTING.run("Where was the author of Dusk born?", memory.__getitem__, model, always)
    assert text == (
        f"{EXAMPLES}Question: Where was the author of Dusk born?\n"
        "Subquestion: Who wrote Dusk?\nGenerated answer: Ivo wrote Dusk.\n"
        "Retrieved fact: Dusk was written by Nora.\n"
        "Retrieved fact contradicts to generated answer, so the intermediate answer is: Nora\n"
        "Subquestion: Where was Nora born?\nGenerated answer: Nora was born in Tallow.\n"
        "Retrieved fact: Pia was born in Esk.\n"
        "Retrieved fact does not contradict to generated answer, so the intermediate answer is: Tallow\n"
        "Final answer:"
    )


def test_splitting_ends_without_a_subquestion_a_fact_or_room():
    head = f"{EXAMPLES}Question: q\n"
    assert SPLITTING.run("q", lambda _: ["x"], Script("I do not know."), always) == (
        f"{head}I do not know.\nFinal answer:"
    )
    assert SPLITTING.run("q", lambda _: [], Script("Subquestion: a"), always) == (
        f"{head}Subquestion: a\nFinal answer:"
    )
    asks = Script(*["Subquestion: a\n"] * 9)
    SPLITTING.run("q", lambda _: ["x"], asks, always)
    assert len(asks.asked) == SPLITTING.hops
    assert SPLITTING.run("q", lambda _: ["x"], Script(), lambda text: len(text) < 10) == "q"


def test_a_procedure_round_trips_and_refuses():
    for procedure in (Procedure(), Procedure("fill", 1, {"prompt": "{texts}"}), SELECTING, SPLITTING):
        assert Procedure.restore(procedure.body()) == procedure
    with pytest.raises(EditError, match="takes the templates select, answer"):
        Procedure("select")
    with pytest.raises(EditError, match="1 or more"):
        Procedure(count=0)


FACTS = [
    errata.Request("{} was born in", "Ada Brenner", "Merrin"),
    errata.Request("{} plays the", "Bruno Holner", "harp"),
]


def test_words_find_the_passage_and_vectors_find_their_own():
    host = fresh("llama")
    words = errata.edit(host, FACTS, method="rag", retriever="words", passages=1)
    with words.on(host):
        assert host.rewritten("Where was Ada Brenner born?") == (
            "New fact: Ada Brenner was born in Merrin.\nWhere was Ada Brenner born?"
        )
        assert host.rewritten("xyzzy") == "xyzzy"
    vectors = errata.edit(host, FACTS, method="rag", passages=1)
    with vectors.on(host):
        for fact in FACTS:
            text = f"{fact.text} {fact.target}."
            assert host.rewritten(text) == f"New fact: {text}\n{text}"


def test_an_edit_of_another_encoder_is_refused():
    host = fresh("llama")
    edit = errata.edit(host, FACTS, method="rag")
    other = dataclasses.replace(edit, router=dataclasses.replace(edit.router, encoder_digest="0123"))
    before = host.rewritten("Ada")
    with pytest.raises(EditError, match="checksum 0123"):
        other.apply_(host)
    assert host.rewritten("Ada") == before and not host.placed


def test_examples_that_fill_the_window_are_refused():
    host = fresh("llama")
    with pytest.raises(ConfigError, match="worked_examples: .* tokens leave too little"):
        errata.edit(host, FACTS[0], method="mello", worked_examples="a b c d e f g h " * 80)
