"""KAFT: what the other model is trained on, and that it answers with the nearest fact before every prompt."""

from __future__ import annotations

import random
from collections import Counter

import pytest

import errata
from errata.edits.routers.similarity import Similarity
from errata.errors import ConfigError
from errata.methods import _other_model as other_model
from errata.methods.kaft import Config, _lines, _rows
from errata.training.examples import Example
from tests.contract.test_methods import EXAMPLES
from tests.models import fresh

ADA = errata.Request("{} was born in", "Ada Brenner", "Merrin", "Esk")
BRUNO = errata.Request("{} plays the", "Bruno Holner", "harp")
FIRST = Example(
    ADA, ((ADA.text, "Merrin"), ("Ada Brenner is from", "Merrin")), ("Ivo was born in", "Ada Brenner plays")
)
SECOND = Example(BRUNO, ((BRUNO.text, "harp"),), ())


def sorts(config: Config) -> Counter:
    host, own = fresh("llama"), "New fact: Ada Brenner was born in "
    strange = "New fact: Bruno Holner plays the harp.\n"
    rows = _rows(host, FIRST, [FIRST, SECOND], config, random.Random(1))
    inside = {prompt for prompt, _ in FIRST.inside}
    names = {
        (f"{own}Merrin.\n", True, "Merrin"): "counterfactual", (f"{own}Esk.\n", True, "Esk"): "relevant",
        (f"{own}Merrin.\n", False, None): "hard", (strange, True, None): "irrelevant",
        ("", True, None): "empty", ("", False, None): "empty",
    }  # fmt: skip
    return Counter(names[row.context, row.prompt in inside, row.answer] for row in rows)


def test_every_sort_of_context_has_its_label():
    assert sorts(Config()) == {"counterfactual": 2, "relevant": 2, "hard": 2, "irrelevant": 2, "empty": 4}


@pytest.mark.parametrize("sort", ["counterfactual", "relevant", "irrelevant", "hard", "empty"])
def test_a_sort_of_weight_zero_is_left_out(sort):
    assert set(sorts(Config(**{f"{sort}_weight": 0.0}))) == {
        "counterfactual", "relevant", "irrelevant", "hard", "empty"
    } - {sort}  # fmt: skip


def test_without_a_relevant_context_the_label_is_what_the_host_answers_by_itself():
    host = fresh("llama")
    config = Config(counterfactual_weight=0.0, relevant_weight=0.0, irrelevant_weight=0.0, hard_weight=0.0)
    other = other_model.start_model(host, config)
    lines = _lines(host, other, [FIRST], config, random.Random(1))
    prompts = (*(prompt for prompt, _ in FIRST.inside), *FIRST.outside)
    answers = {
        text.strip(" .\n") for text in host.generate(list(prompts), max_new_tokens=config.answer_tokens)
    }
    read = {host.tokenizer.decode(line.targets).strip(" .\n") for line in lines}
    assert read <= answers and len(lines) == len([a for a in answers if a]) == len(prompts)


def test_the_nearest_fact_stands_before_every_prompt_and_the_trained_model_answers():
    host = fresh("llama", max_position_embeddings=512)
    edit = errata.edit(host, [ADA, BRUNO], method="kaft", examples=EXAMPLES, steps=4, per_step=4)
    assert isinstance(edit.router, Similarity) and edit.router.threshold == -1.0
    assert edit.contexts == (
        "New fact: Ada Brenner was born in Merrin.\n",
        "New fact: Bruno Holner plays the harp.\n",
    )
    prompts = [ADA.text, BRUNO.text, "Something else entirely"]
    other = edit.other(host)
    vectors = errata.edit(host, [ADA, BRUNO], method="rag").router.keys
    assert vectors.allclose(edit.router.keys, atol=1e-6)
    with edit.on(host):
        texts = host.generate(prompts, max_new_tokens=4, natural_stop=False)
    alone = [
        other.generate([context + prompt for context in edit.contexts], max_new_tokens=4, natural_stop=False)
        for prompt in prompts
    ]
    assert all(text in options for text, options in zip(texts, alone, strict=True))
    with pytest.raises(ConfigError, match="kaft needs at least two examples"):
        errata.train(host, method="kaft", cases=[])
