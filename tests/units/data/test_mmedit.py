"""Records of MMEdit, VLKEB and MMKE-Bench: hand-written, in the published fields; every question with its picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from errata.data import reading
from errata.types import IMAGE
from tests import pictures

COLOURS = {"val2014/a.png": "red", "rephrase/b.png": "orange", "val2014/c.png": "blue"}
RECORD: dict[str, Any] = {
    "src": "What is the man riding?", "rephrase": "Which animal carries the man?", "pred": "horse", "alt": "camel",
    "image": "val2014/a.png", "image_rephrase": "rephrase/b.png", "loc": "nq question: who wrote the Iliad",
    "loc_ans": "Homer", "m_loc": "val2014/c.png", "m_loc_q": "What holds the roof?", "m_loc_a": "pillars",
}  # fmt: skip
PORT = {
    "port_new": [
        {"port_type": "1-hop", "Q&A": {"Question": "Where does this animal live?", "Answer": "deserts"}},
        {"port_type": "2-hop", "Q&A": {"Question": "What covers it there?", "Answer": "sand"}},
    ]
}


def write(folder: Path, *records: dict[str, Any]) -> Path:
    for name, colour in COLOURS.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        data = pictures.picture(colour).data
        assert data is not None
        path.write_bytes(data)
    path = folder / "vqa_eval.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def test_each_question_goes_with_its_picture(tmp_path):
    path = write(tmp_path, RECORD, {**RECORD, **PORT, "src": "Where was this church built?", "pred": "Rome"})
    (first, second), check = (read := reading.read(path)).cases, read.check
    assert check.dataset == "mmedit"
    image, view, other = (pictures.picture(COLOURS[name]) for name in COLOURS)
    request = first.request
    assert (request.image, request.subject, request.target, request.target_old) == (
        image,
        image.mark,
        "camel",
        "horse",
    )
    assert request.text == f"{image.mark}What is the man riding?"
    found = {probe.kind: probe for probe in first.probes}
    assert {kind: probe.image for kind, probe in found.items()} == {
        "efficacy": image, "paraphrase": image, "other_view": view, "locality": None, "picture_locality": other,
        "no_picture": None,
    }  # fmt: skip
    assert found["efficacy"].prompt == request.text and found["efficacy"].rival == "horse"
    assert found["paraphrase"].prompt == f"{image.mark}Which animal carries the man?"
    assert found["other_view"].prompt == f"{view.mark}What is the man riding?"
    assert (found["no_picture"].prompt, found["no_picture"].answers) == (
        "What is the man riding?",
        ("horse",),
    )
    assert found["no_picture"].rival == "camel"
    assert not found["locality"].changes and found["locality"].answers == ("Homer",)
    assert found["picture_locality"].answers == found["picture_locality"].before == ("pillars",)
    assert second.request.subject == "this church"
    asked = [(probe.prompt.replace(image.mark, IMAGE), probe.answers) for probe in second.probes
             if probe.kind == "portability"]  # fmt: skip
    assert asked == [
        (f"{IMAGE}Where does this animal live?", ("deserts",)), (f"{IMAGE}What covers it there?", ("sand",)),
    ]  # fmt: skip


def test_what_cannot_be_used_is_counted_with_the_reason(tmp_path):
    path = write(tmp_path, RECORD, {**RECORD, "alt": ""}, {**RECORD, "image": "val2014/none.png"})
    read = reading.read(path)
    assert len(read.cases) == 1
    reasons = json.dumps(read.check.to_dict())
    assert "no new answer" in reasons and "there is no image file" in reasons


def mmke(**more: Any) -> dict[str, Any]:
    return {**RECORD, **PORT, "src": "Describe the animal.", "alt": "A camel. It eats thorns.", **more}


def test_mmke_asks_about_parts_of_a_text_alone_and_beside_both_pictures(tmp_path):
    numbered = {
        f"{name}{key}": f"{name} {part} {i}"
        for i in (1, 2)
        for name in ("rel", "m_rel")
        for key, part in ((f"_{i}", "question"), (f"_ans_{i}" if i == 1 else f"_{i}_ans", "answer"))
    }
    single = {"rel": "What is it?", "rel_ans": "a camel", "m_rel": "What does it eat?", "m_rel_ans": "thorns"}
    path = write(
        tmp_path,
        mmke(knowledge_type="entity_level", **numbered),
        mmke(
            knowledge_type="visual_knowledge",
            one_hop_img="val2014/c.png",
            image_rephrase_question="And this one?",
            **single,
        ),
    )
    entity, meaning = reading.read(path).cases
    image, view, other = (pictures.picture(COLOURS[name]) for name in COLOURS)

    def asked(case: Any, kind: str) -> list[tuple[str, tuple[str, ...], Any]]:
        return [(probe.prompt, probe.answers, probe.image) for probe in case.probes if probe.kind == kind]

    assert entity.request.target == "A camel. It eats thorns."
    assert asked(entity, "sub_question.alone") == [
        ("rel question 1", ("rel answer 1",), None), ("rel question 2", ("rel answer 2",), None),
    ]  # fmt: skip
    for kind, picture in (("sub_question.beside", image), ("sub_question.other_view", view)):
        assert asked(entity, kind) == [
            (f"{picture.mark}m_rel question {i}", (f"m_rel answer {i}",), picture) for i in (1, 2)
        ]
    assert [picture for _, _, picture in asked(entity, "portability")] == [image, image]
    assert asked(meaning, "sub_question.alone") == [("What is it?", ("a camel",), None)]
    assert asked(meaning, "sub_question.beside") == [(f"{image.mark}What does it eat?", ("thorns",), image)]
    assert asked(meaning, "sub_question.other_view") == [(f"{view.mark}And this one?", ("thorns",), view)]
    assert [picture for _, _, picture in asked(meaning, "portability")] == [other, other]
    assert not asked(entity, "sub_question.beside")[0][0].startswith(IMAGE)
