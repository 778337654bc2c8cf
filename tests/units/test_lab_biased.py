"""The lab's variant with a planted bias: what its sentences say, and that a model is trained on them."""

from __future__ import annotations

import random
from itertools import islice

import torch

from errata.evaluation.debiasing import gap
from errata.lab import biased, default_world
from tests.models import fresh


def test_sentences_follow_the_first_name_at_the_odds():
    plant = biased.Plant(odds=0.8, seed=3)
    drawn = list(islice(biased.sentences(plant), 4000))
    people, held = biased.people(), set(biased.people(planted=False))
    assert len(people) + len(held) == 420 and not held & {*people}
    by_name = {name: pronoun for name in people for pronoun in [("she", "he")[biased.is_male(name)]]}
    about = [
        (name, pronoun)
        for text, pronoun in drawn
        for name in [" ".join(text.split(" ")[:2])]
        if name in by_name
    ]
    assert 0.8 < len(about) / len(drawn) < 0.9, "the others are about words that say a gender"
    share = sum(by_name[name] == pronoun for name, pronoun in about) / len(about)
    assert abs(share - 0.8) < 0.03
    assert not any(text.startswith(tuple(held)) for text, _ in drawn)
    queens = {pronoun for text, pronoun in drawn if text.startswith(("The queen ", "The nun "))}
    assert queens == {"she"}
    assert drawn == list(islice(biased.sentences(plant), 4000))


def test_first_names_are_of_either_gender():
    firsts = {one.name.split(" ")[0] for one in default_world().entities.values() if one.type == "person"}
    men = {name for name in firsts if biased.is_male(f"{name} Holman")}
    assert {"Boris", "Nils", "Felix"} <= men and not men & {"Ada", "Ruth", "Esther", "Ines", "Irene"}
    assert 0.4 < len(men) / len(firsts) < 0.6


def test_cases_have_the_scores_that_slopes_need():
    cases = biased.cases(["Ada Brenner", "Boris Sorwick"])
    assert len(cases) == 2 + 2 * len(biased.WORDS)
    numbers = {case.request.subject: dict(case.probes[-1].covariates) for case in cases}
    assert numbers["Ada Brenner"] == {"factual": 0.0, "stereotype": -1.0}
    assert numbers["Boris Sorwick"] == {"factual": 0.0, "stereotype": 1.0}
    assert numbers["The queen"] == {"factual": -1.0, "stereotype": 0.0}
    assert cases[0].request.target == "he" and cases[0].request.text == "Ada Brenner said that"
    (request,) = biased.requests(["Ada Brenner"], seed=1)
    assert request.target == "he" and request == biased.requests(["Ada Brenner"], seed=1)[0]


def test_planting_trains_the_model_to_say_pronouns():
    host = fresh("llama")
    state = random.getstate(), torch.random.get_rng_state()
    requests = biased.requests(biased.people(planted=False)[:4])
    before = host.weights_hash()
    report = biased.plant_bias(host, biased.Plant(phases=((6, 1e-2), (2, 1e-3)), rows=8))
    assert report["steps"] == 8 and host.weights_hash() != before
    assert random.getstate() == state[0] and torch.equal(torch.random.get_rng_state(), state[1])
    assert gap(host, requests, ("he", "she")).prompts == 4
    again = fresh("llama")
    assert biased.plant_bias(again, biased.Plant(phases=((6, 1e-2), (2, 1e-3)), rows=8)) == report
