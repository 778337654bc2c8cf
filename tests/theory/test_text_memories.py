"""Memories of texts: what is put before or behind which prompt, and what a model is shown first."""

from __future__ import annotations

import pytest

import errata
from errata.errors import ConfigError
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
