"""Requests about pictures: how they are written, read from files, refused, edited and kept."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

import errata
from errata.cli.common import read_what
from errata.data.pictures import read_picture, subject_in
from errata.data.requests import read_cases, read_requests, write_cases
from errata.edits.prompt import PromptEdit
from errata.errors import HostError, RequestError
from errata.evaluation.observe import observe
from errata.types import IMAGE, Case, Picture, Probe, Request
from errata.types.text import plain_case
from tests import pictures, program
from tests.models import fresh

RED, BLUE = pictures.picture("red", 56), pictures.picture("blue", 56)
REQUEST = Request("Where was this dog born?", "this dog", "Merrin", "Tallow", "dog", image=RED)


@pytest.fixture(scope="module")
def host():
    model, processor = pictures.model("llava")
    return errata.load(model, processor)


# --- records --------------------------------------------------------------------------------


def test_the_mark_stands_where_the_prompt_says_so_or_before_it():
    assert REQUEST.text == f"{RED.mark}Where was this dog born?"
    inside = Request("Look at <image>: {} was born in", "Ada", "Merrin", image=RED)
    assert inside.text == f"Look at {RED.mark}: Ada was born in"
    shown = Request("was born in", IMAGE, "Merrin", image=RED)
    assert shown.text == f"{RED.mark}was born in" and shown.subject == RED.mark
    assert shown.text[slice(*shown.span)] == RED.mark
    assert Request(REQUEST.prompt, "this dog", "Merrin", image=RED).text == REQUEST.text  # written once


def test_records_name_a_picture_by_its_hash_and_keep_no_bytes():
    record = REQUEST.to_dict()
    assert record["prompt"] == "<image>Where was this dog born?"
    assert record["image"] == {"sha256": RED.sha256, "name": "red.png"}
    assert Picture.restore(record["image"]) == RED
    probe = Probe("efficacy", "What is this?", ("dog",), (), image=RED)
    plain = plain_case(Case("dog", REQUEST, (probe, Probe("other", "a b", ("c",), ()))))
    assert plain["request"]["image"] == plain["probes"][0]["image"] == RED.sha256
    assert "image" not in plain["probes"][1]  # identities without pictures are what they were
    with pytest.raises(ValueError, match="sha256"):
        Picture.restore({"sha256": "x"})


@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        ("What is this?", "this"), ("Where was this dog born?", "this dog"), ("Who made it?", IMAGE),
        ("What does this show?", "this"), ("That building stands in", "That building"),
    ],
)  # fmt: skip
def test_the_subject_is_what_the_prompt_calls_the_picture(prompt, subject):
    assert subject_in(prompt) == subject


def test_several_pictures_stand_in_their_order_and_the_subject_may_be_one():
    two = {"image": RED, "more_images": (BLUE,)}
    before = Request("Which is older?", "Which", "the dog", **two)
    assert before.text == f"{RED.mark}{BLUE.mark}Which is older?" and before.pictures == (RED, BLUE)
    inside = Request("Is <image> or <image> older?", IMAGE, "the dog", **two)
    assert inside.text == f"Is {RED.mark} or {BLUE.mark} older?" and inside.subject == RED.mark
    slot = Request("Is <image> or {} older?", IMAGE, "the dog", **two)
    assert slot.text == inside.text and slot.subject == BLUE.mark
    assert slot.text[slice(*slot.span)] == BLUE.mark
    for one in (before, inside, slot):
        assert replace(one, target="the cat").text == one.text  # written once
        record = one.to_dict()
        assert record["image"] == [{"sha256": p.sha256, "name": p.name} for p in (RED, BLUE)]
        again = Request(record["prompt"], record["subject"], record["target"], **two)
        assert again == one
    assert Request("{} was born in", IMAGE, "Merrin", image=RED).text == f"{RED.mark}was born in".replace(
        "was", " was"
    )
    with pytest.raises(RequestError, match="1 places <image> for 2 pictures"):
        Request("Is <image> older?", "older", "yes", **two)
    with pytest.raises(RequestError, match="more_images"):
        Request("Is it older?", "it", "yes", more_images=(BLUE,))
    plain = plain_case(Case("a", inside, (Probe("efficacy", inside.text, ("x",), (), **two),)))
    assert plain["request"]["more_images"] == plain["probes"][0]["more_images"] == (BLUE.sha256,)
    assert "more_images" not in plain_case(Case("dog", REQUEST, ()))["request"]


def test_files_list_several_pictures_and_cases_come_back(tmp_path):
    for picture in (RED, BLUE):
        (tmp_path / picture.name).write_bytes(picture.data)
    record = {
        "prompt": "Is <image> or <image> older?", "subject": IMAGE, "target": "the dog",
        "image": ["red.png", "blue.png"],
        "probes": [{"kind": "question", "prompt": "Which?", "answers": ["the dog"], "image": ["blue.png", "red.png"]}],
    }  # fmt: skip
    path = tmp_path / "cases.jsonl"
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    (case,) = read_cases(path)
    assert case.request.pictures == (RED, BLUE) and case.request.subject == RED.mark
    efficacy, question = case.probes
    assert efficacy.pictures == (RED, BLUE) and question.pictures == (BLUE, RED)
    assert write_cases(tmp_path / "out.jsonl", [case]) == 1
    assert read_cases(tmp_path / "out.jsonl") == [case]
    for wrong in ({"prompt": "Is <image> older?", "subject": "older"}, {"image": ["red.png", "away.png"]}):
        path.write_text(json.dumps({**record, **wrong}) + "\n", encoding="utf-8")
        with pytest.raises(RequestError, match=r"1 places <image> for 2 pictures|no image file"):
            read_cases(path)
    record["probes"][0]["prompt"] = "Which <image>?"
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    with pytest.raises(RequestError, match="line 1, probe 1: .*1 places"):
        read_cases(path)


# --- files ----------------------------------------------------------------------------------


def test_paths_are_relative_to_the_file_and_cases_come_back(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "red.png").write_bytes(RED.data)
    record = {**REQUEST.to_dict(), "prompt": "Where was this dog born?", "image": "red.png"}
    record["probes"] = [{"kind": "question", "prompt": "Where?", "answers": ["Merrin"], "image": "red.png"}]
    path = tmp_path / "in" / "cases.jsonl"
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    (read,) = read_requests(path)
    assert read == REQUEST and read.image is not None and read.image.data == RED.data
    (case,) = read_cases(path)
    assert [probe.image for probe in case.probes] == [RED, RED]
    assert case.probes[0].prompt == REQUEST.text
    assert write_cases(tmp_path / "out.jsonl", [case]) == 1
    assert read_cases(tmp_path / "out.jsonl") == [case]
    assert [file.read_bytes() for file in (tmp_path / "out-pictures").iterdir()] == [RED.data]


def test_every_missing_picture_is_named(tmp_path):
    path = tmp_path / "cases.jsonl"
    base = {"prompt": "Where was this dog born?", "subject": "this dog", "target": "Merrin"}
    (tmp_path / "empty.png").write_bytes(b"")
    lines = [
        {**base, "image": "no.png"}, {**base, "image": 7}, {**base, "image": "empty.png"},
        {**base, "probes": [{"kind": "q", "prompt": "Where?", "answers": ["x"], "image": "away.png"}]},
    ]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    with pytest.raises(RequestError) as error:
        read_cases(path)
    text = str(error.value)
    assert f"line 1: image: there is no image file {tmp_path / 'no.png'}" in text
    assert "line 2: image must be the path of an image file, found int 7" in text
    assert "line 3" in text and "0 bytes" in text
    assert "line 4, probe 1: image: there is no image file" in text


# --- hosts ----------------------------------------------------------------------------------


def test_what_is_no_picture_and_who_sees_none_is_said(host, tmp_path):
    with pytest.raises(HostError, match="reads no pictures"):
        errata.edit(fresh("llama"), REQUEST, method="ft")
    (tmp_path / "text.png").write_text("no picture", encoding="utf-8")
    torn = Request(
        "Where was this dog born?", "this dog", "Merrin", image=read_picture(tmp_path / "text.png")
    )
    with pytest.raises(RequestError, match=r"text\.png cannot be read as an image"):
        errata.edit(host, torn, method="ft")
    away = Request("Where was this dog born?", "this dog", "Merrin", image=Picture("0" * 64, "away.png"))
    with pytest.raises(RequestError, match=r"the bytes of away\.png are not at hand"):
        errata.edit(host, away, method="ft")
    with pytest.raises(RequestError, match="was not given"):
        host.encode(f"{Picture('1' * 64).mark}Where?")
    host.see([RED])
    with pytest.raises(RequestError, match="write <image> only where the picture stands"):
        host.encode(f"{RED.mark}<image>Where?")


def test_a_place_for_a_picture_without_one_is_refused(host):
    """The token alone would be read as a word, and the edit fitted to that."""
    bare = Request("Where does {} stand?", IMAGE, "Merrin")
    for reader in (host, errata.load(host.model, host.tokenizer)):  # also opened for text alone
        with pytest.raises(RequestError, match="says <image>, and no picture was given"):
            errata.edit(reader, bare, method="ft", steps=1)
        with pytest.raises(RequestError, match="no picture was given"):
            observe(reader, [Probe("question", "Is <image> old?", ("yes",), ())])
        reader.see([Request("Ada lives in", "Ada", "Esk"), Probe("question", "Is it old?", ("yes",), ())])
    assert errata.edit(fresh("llama"), bare, method="ft", steps=1).digest  # plain text for others


def test_empty_lists_of_pictures_are_none(tmp_path):
    path = tmp_path / "requests.jsonl"
    path.write_text(
        json.dumps({**REQUEST.to_dict(), "prompt": "Is this dog old?", "image": []}), encoding="utf-8"
    )
    (read,) = read_requests(path)
    assert read.image is None and read.prompt == "Is this dog old?"
    path.write_text(
        json.dumps({**REQUEST.to_dict(), "image": "~nobody-of-that-name/a.png"}), encoding="utf-8"
    )
    with pytest.raises(
        RequestError, match=r"line 1: image: cannot read the image file|there is no image file"
    ):
        read_requests(path)


def test_text_rows_are_as_without_a_processor(host):
    plain = errata.load(host.model, host.tokenizer)
    for text in ("Ada Brenner was born in", "", " the", "a <image> b"):
        assert host.encode(text) == plain.encode(text)
    host.see([RED])
    assert host.encode_answer("Ada was born in", "Tallow") == plain.encode_answer("Ada was born in", "Tallow")


def test_a_saved_model_opens_with_its_processor(host, tmp_path):
    model, processor = pictures.model("llava")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = errata.load(tmp_path)
    again.see([RED])
    host.see([RED])
    row = again.encode_prompt(REQUEST.text)
    with torch.no_grad():
        assert torch.allclose(again.forward(again.batch([row])), host.forward(host.batch([row])), atol=1e-5)
    for name in ("preprocessor_config.json", "processor_config.json"):
        (tmp_path / name).unlink(missing_ok=True)
    with pytest.raises(HostError, match="no processor beside it"):
        errata.load(tmp_path).see([RED])


@pytest.mark.parametrize("method", ["grace", "memit"])
def test_an_edit_about_two_pictures_is_seen_saved_and_loaded(host, method, tmp_path):
    request = Request("Is <image> or {} older?", IMAGE, "Merrin", image=RED, more_images=(BLUE,))
    more: dict[str, Any] = {"tokens": 300, "steps": 3} if method == "memit" else {}
    edit = errata.edit(host, request, method=method, **more)
    edit.save(tmp_path / "edit.safetensors")
    again = errata.Edit.load(tmp_path / "edit.safetensors")
    (read,) = again.provenance.requests
    assert again.digest == edit.digest and isinstance(read, Request) and read.pictures == (RED, BLUE)
    assert read.text == request.text and read.subject == BLUE.mark
    row = host.encode_prompt(request.text)
    with torch.no_grad():
        before = host.forward(host.batch([row]))[0, -1]
        with again.on(host):
            assert not torch.equal(host.forward(host.batch([row]))[0, -1], before)
        assert torch.equal(host.forward(host.batch([row]))[0, -1], before)


@pytest.mark.parametrize("method", ["ft", "grace", "memit", "in_prompt"])
@pytest.mark.parametrize("subject", ["this dog", IMAGE])
def test_edits_about_a_picture_are_seen_kept_and_taken_off(host, method, subject, tmp_path):
    request = Request("<image>Where was this dog born?", subject, "Merrin", image=RED)
    more: dict[str, Any] = {"tokens": 300, "steps": 3} if method == "memit" else {}
    start = host.weights_hash()
    edit = errata.edit(host, request, method=method, **more)
    assert edit.provenance.requests == (request,)
    edit.save(tmp_path / "edit.safetensors")
    again = errata.Edit.load(tmp_path / "edit.safetensors")
    (read,) = again.provenance.requests
    assert again.digest == edit.digest and isinstance(read, Request) and read.image == RED

    def logits():
        row = host.encode_prompt(request.text)
        with torch.no_grad():
            return host.forward(host.batch([row]))[0, -1]

    before = logits()
    with again.on(host):
        after = logits()
    assert not torch.equal(before, after)
    assert torch.equal(before, logits()) and host.weights_hash() == start


def test_prompts_are_rewritten_with_texts_alone(host):
    edit = errata.edit(host, REQUEST, method="in_prompt")
    assert isinstance(edit, PromptEdit)
    assert RED.mark not in "".join(edit.contexts)
    assert "Merrin" in edit.contexts[0]
    assert edit.rewrite(REQUEST.text).endswith(REQUEST.text)


# --- command line ---------------------------------------------------------------------------


def test_image_is_repeated_for_several_pictures(tmp_path):
    paths = [tmp_path / picture.name for picture in (RED, BLUE)]
    for path, picture in zip(paths, (RED, BLUE), strict=True):
        path.write_bytes(picture.data or b"")
    (request,) = read_what("Is <image> or <image> older?", None, "the dog", images=paths)
    assert request.pictures == (RED, BLUE) and request.subject == RED.mark
    (request,) = read_what("Is <image> or {} older?", IMAGE, "the dog", images=paths)
    assert request.subject == BLUE.mark
    with pytest.raises(RequestError, match="1 places"):
        read_what("Is <image> older?", "older", "the dog", images=paths)


def test_a_picture_is_edited_from_the_command_line(tmp_path):
    model, processor = pictures.model("llava")
    model.save_pretrained(tmp_path / "vlm")
    processor.save_pretrained(tmp_path / "vlm")
    (tmp_path / "red.png").write_bytes(RED.data)
    out = tmp_path / "edit.safetensors"
    command = [
        "edit", "What is this?", "--image", str(tmp_path / "red.png"), "--target", "dog", "--model",
        str(tmp_path / "vlm"), "--method", "ft", "-o", str(out), "--json",
    ]  # fmt: skip
    finished = program.errata(*command)
    assert finished.returncode == 0, finished.stderr
    (request,) = errata.Edit.load(out).provenance.requests
    assert isinstance(request, Request) and request.image == RED and request.subject == "this"
    (answer,) = json.loads(finished.stdout)["answers"]
    assert (answer["prompt"], answer["image"]) == ("<image>What is this?", [str(tmp_path / "red.png")])
    own = [word for name in answer["image"] for word in ("--image", name)]
    asked = program.errata(
        "ask",
        "--model",
        str(tmp_path / "vlm"),
        "--edit",
        str(out),
        *own,
        answer["prompt"],
        "Is it?",
        "--json",
    )
    assert asked.returncode == 0, asked.stderr
    first, second = json.loads(asked.stdout)["answers"]
    assert (first["prompt"], second["prompt"]) == ("<image>What is this?", "Is it?")
    assert first["with"].strip()[:12] == answer["after"].strip()[:12] != first["without"].strip()[:12]
    blind = program.errata("ask", "--model", str(tmp_path / "vlm"), answer["prompt"])
    assert blind.returncode == 2 and "no picture was given" in blind.stderr
    missing = program.errata(*command[:3], tmp_path / "away.png", *command[4:])
    assert missing.returncode != 0 and "there is no image file" in missing.stderr
