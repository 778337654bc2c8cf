"""The lab's vision-language model: its pictures, its training, its cases, and edits about what a picture shows."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy
import pytest
import torch

import errata
from errata import lab
from errata.bench import sources
from errata.errors import ConfigError, EditError
from errata.lab import pictures, shown
from errata.lab.check import Question, ask, share
from errata.lab.train import logged
from errata.lab.vision import VisionConfig, assemble
from errata.lab.vision_training import train
from errata.types import Probe
from tests import program

WORLD = lab.world()
TINY = VisionConfig(
    width=16, inner=16, layers=1, heads=2, aligned=3, cooled=5, steps=6, pictures=4, rows=2, warmup=1
)


@lru_cache
def host() -> Any:
    return errata.load("lab-vl")


# --- pictures -------------------------------------------------------------------------------


def test_no_two_entities_have_one_emblem_and_pictures_of_one_differ():
    names = pictures.pictured(WORLD)
    assert len({pictures.emblem(WORLD, name) for name in names}) == len(names) > 200
    first, again, second = (numpy.asarray(pictures.picture(WORLD, names[0], n)) for n in (0, 0, 1))
    assert (first == again).all() and (first != second).any()
    assert first.shape == (pictures.SIDE, pictures.SIDE, 3)
    others = [name for name in WORLD.by_subject if name not in names]
    with pytest.raises(ConfigError, match="entity with a picture"):
        pictures.emblem(WORLD, others[0])


def test_every_part_of_an_emblem_is_to_be_seen():
    import random

    base = pictures.Emblem.of(0)
    changes = [
        replace(base, ground=pictures.GROUNDS[4]), replace(base, shape="star"), replace(base, colour="#1d6fd6"),
        *(replace(base, glyph=glyph) for glyph in pictures.GLYPHS[1:]),
    ]  # fmt: skip
    drawn = [numpy.asarray(pictures.draw(one, random.Random(0)), dtype=int) for one in (base, *changes)]
    for i, one in enumerate(drawn):
        for other in drawn[:i]:
            assert abs(one - other).max() > 60
    assert len({pictures.Emblem.of(code) for code in range(pictures.CODES)}) == pictures.CODES


# --- training -------------------------------------------------------------------------------


def test_training_goes_on_where_it_stopped_and_gives_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "PICTURED", 0.02)
    monkeypatch.setattr("errata.lab.vision_training.BANK", 2)
    from errata.lab import vision_training

    vision_training._bank.cache_clear()
    whole = train(tmp_path / "whole", TINY, checkpoint_every=2)

    class Stopped(Exception):
        pass

    def stop(at: Any) -> None:
        if at.step == 5:
            raise Stopped

    with pytest.raises(Stopped):
        train(tmp_path / "parts", TINY, checkpoint_every=2, on_step=stop)
    parts = train(tmp_path / "parts", TINY, checkpoint_every=2)
    vision_training._bank.cache_clear()
    for name in ("vision.safetensors", "vision.json"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()
    assert set(logged(tmp_path / "whole")) == {6}
    model, _ = assemble(whole, lab.load(dtype="float32"))
    assert torch.equal(model.get_decoder().layers[0].mlp.down_proj.weight.cpu(),
                       errata.load("lab").model.model.layers[0].mlp.down_proj.weight)  # fmt: skip
    with pytest.raises(ConfigError, match="other settings"):
        train(tmp_path / "parts", replace(TINY, seed=1))


def test_options_of_other_models_are_refused(tmp_path):
    finished = program.errata(
        "lab", "train", tmp_path / "out", "--shape", "llava", "--without", "Ada Brenner"
    )
    assert finished.returncode == 2 and "--without" in finished.stderr


# --- the shipped model ----------------------------------------------------------------------


def test_text_is_answered_as_by_the_decoder_alone():
    plain = errata.load("lab")
    row = plain.encode_prompt("Ada Brenner was born in")
    assert host().encode_prompt("Ada Brenner was born in") == row
    with torch.no_grad():
        assert torch.allclose(
            host().forward(host().batch([row])), plain.forward(plain.batch([row])), atol=1e-4
        )


def test_it_knows_what_pictures_show_and_not_without_them():
    facts = shown.facts(WORLD)[::37]
    beside, without = [], []
    for fact in facts:
        relation, kind = WORLD.relations[fact.relation], WORLD.entities[fact.subject].type
        prompt = "<image>" + shown.deixis(relation.phrasings[0], kind)
        probe = Probe(
            "efficacy", prompt, WORLD.names(fact.object), (), image=shown.shown(WORLD.seed, fact.subject, 2)
        )
        host().see([probe])
        beside.append(Question(probe.prompt, probe.answers))
        without.append(Question(prompt.replace("<image>", ""), probe.answers))
    known, blind = (share(ask(host(), group, "", lambda *_: None)) for group in (beside, without))
    assert known > 0.5 > 0.3 > blind
    assert known >= lab.card("lab-vl")["check"]["cloze"] - 0.2


def test_its_card_is_of_these_weights():
    card = lab.card("lab-vl")
    assert card["fingerprint"] == host().fingerprint
    settings = json.loads((lab.folder("lab-vl") / "vision.json").read_text(encoding="utf-8"))
    assert card["training"] == settings


# --- cases ----------------------------------------------------------------------------------


def test_cases_ask_beside_pictures_and_are_drawn_again_alike():
    cases, facts = sources.read("lab-vl:6:1")
    again, more = sources.read("lab-vl:6:1")
    assert cases == again and facts["sha256"] == more["sha256"] and facts["cases"] == 6
    assert sources.read("lab-vl:3:1")[0] == cases[:3]
    for case in cases:
        kinds = [probe.kind for probe in case.probes]
        assert {
            "efficacy",
            "other_view",
            "paraphrase",
            "question",
            "by_name",
            "no_picture",
            "neighbourhood",
        } <= {*kinds}
        probes = {probe.kind: probe for probe in case.probes}
        assert case.request.image is not None and probes["efficacy"].prompt == case.request.text
        assert probes["other_view"].image not in (None, case.request.image)
        assert all((probe.image is None) == (probe.kind in ("by_name", "no_picture", "neighbourhood"))
                   for probe in case.probes)  # fmt: skip
        for probe in case.probes:  # the truth of the world
            assert probe.answers[0] == case.request.target if probe.changes else probe.answers == probe.before
    for wrong in ("lab-vl:0", "lab-vl:x", "lab-vl:5:1:1", "lab-vl:100000"):
        with pytest.raises(ConfigError):
            sources.read(wrong)
    with pytest.raises(ConfigError, match="one at a time"):
        sources.read("lab-vl:5", together=True)


def test_an_edit_about_a_picture_holds_for_another_picture_of_the_same_thing():
    case = sources.read("lab-vl:1")[0][0]
    assert case.request.image is not None and case.request.subject == case.request.image.mark
    edit = errata.edit(host(), case.request, method="memit")
    (check,) = errata.check_edit(host(), edit).requests
    assert check.answered and check.before != check.after
    view = next(probe for probe in case.probes if probe.kind == "other_view")
    host().see([view])
    with edit.on(host()):
        assert case.request.target in host().generate(view.prompt, max_new_tokens=6)
    assert case.request.target not in host().generate(view.prompt, max_new_tokens=6)


@pytest.mark.parametrize("method", ["keel_memory", "remedi"])
def test_a_memory_of_names_refuses_a_subject_that_is_a_picture(method):
    request = sources.read("lab-vl:1")[0][0].request
    with pytest.raises(EditError, match="the subject of request .* is its picture; name it in the prompt"):
        errata.edit(host(), request, method=method)
