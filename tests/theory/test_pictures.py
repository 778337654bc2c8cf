"""Where pictures are in a row: the processor's own rows, the subject behind them, what differs between pictures."""

from __future__ import annotations

import io
from functools import lru_cache
from typing import Any

import pytest
import torch
from PIL import Image

import errata
from errata.errors import HostError
from errata.host.pictures import FIRST
from errata.types import Picture, Request
from tests import pictures

RED, BLUE = pictures.picture("red", 56), pictures.picture("blue", 56)
FAMILIES = list(pictures.FAMILIES)


@lru_cache
def opened(family: str) -> tuple[Any, Any]:
    model, processor = pictures.model(family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "projection_weight" in name:  # zero in a new Gemma: no picture would be seen
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    host = errata.load(model, processor)
    host.see([RED, BLUE])
    return host, processor


def shown(picture: Picture) -> Any:
    """Return a picture as Pillow opens it."""
    assert picture.data is not None
    return Image.open(io.BytesIO(picture.data)).convert("RGB")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_is_the_processors_with_the_pictures_number_in_its_places(family):
    host, processor = opened(family)
    text = "Ada Brenner saw {} in Tallow"
    row = host.encode(text.format(RED.mark)).ids
    whole = processor(images=[shown(RED)], text=[text.format(host.codec.form)])["input_ids"][0]
    assert [host.codec.placeholder if token >= FIRST else token for token in row] == list(whole)
    assert {token for token in row if token >= FIRST} == {FIRST}
    assert sum(token >= FIRST for token in row) == whole.count(host.codec.placeholder) > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_places_and_logits_of_two_pictures_are_the_processors_and_the_models_own(family):
    host, processor = opened(family)
    request = Request(
        "<image>Ada saw <image> beside Bruno in", "Bruno", "Tallow", image=RED, more_images=(BLUE,)
    )
    host.see([request])
    row = host.encode(request.text).ids
    text = f"{host.codec.form}Ada saw {host.codec.form} beside Bruno in"
    inputs = processor(images=[shown(RED), shown(BLUE)], text=[text], return_tensors="pt")
    assert [host.codec.placeholder if token >= FIRST else token for token in row] == inputs["input_ids"][
        0
    ].tolist()
    numbers = list(dict.fromkeys(token for token in row if token >= FIRST))
    assert len(numbers) == 2 and numbers == [  # in order, each with all of its places
        next(iter(dict.fromkeys(t for t in host.encode(p.mark).ids if t >= FIRST))) for p in (RED, BLUE)
    ]  # fmt: skip
    positions = host.codec.resolve(host.as_pass(host.batch([row]))).positions
    if host.codec.counts_axes:
        known = {name: inputs[name] for name in ("image_grid_thw", "mm_token_type_ids") if name in inputs}
        own = host.model.model.get_rope_index(
            inputs["input_ids"], attention_mask=inputs["attention_mask"], **known
        )
        assert torch.equal(positions, own[0])
    else:
        assert positions.tolist() == [list(range(len(row)))]
    with torch.no_grad():
        wanted = host.model(**inputs).logits[0]
        found = host.forward(host.batch([row]))[0]
        swapped = host.forward(
            host.batch([host.encode(f"{BLUE.mark}Ada saw {RED.mark} beside Bruno in").ids])
        )[0]
    assert torch.allclose(found, wanted, atol=1e-5)
    assert not torch.allclose(found[-1], swapped[-1], atol=1e-4)
    place = host.encode(request.text).last_of(*request.span)
    assert host.tokenizer.decode(row[place : place + 1]).strip() in "Bruno"


def test_a_processor_that_writes_several_pictures_otherwise_is_refused(monkeypatch):
    model, processor = pictures.model("llava")
    host = errata.load(model, processor)
    host.see([RED, BLUE])
    codec: Any = host.codec
    process = codec._process

    def fewer(images, texts, **options):
        output = dict(process(images, texts, **options))
        if len(images) > 1:
            output["input_ids"] = [row[:-1] for row in output["input_ids"]]
        return output

    monkeypatch.setattr(host.codec, "_process", fewer)
    assert host.encode(f"{RED.mark}Where?").ids
    with pytest.raises(HostError, match="give one picture a prompt"):
        host.encode(f"{RED.mark} and {BLUE.mark}")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_token_found_for_a_subject_behind_a_picture_is_its_last(family):
    host, _ = opened(family)
    for text in (f"{RED.mark}Where was Bruno born?", f"The dog {RED.mark} and {BLUE.mark} Bruno lives"):
        encoded = host.encode(text)
        start = text.index("Bruno")
        place = encoded.last_of(start, start + 5)
        assert "".join(host.tokenizer.decode(encoded.ids[place])).strip() == host.tokenizer.decode(
            host.tokenizer("Bruno", add_special_tokens=False)["input_ids"][-1]
        )
        assert text[slice(*encoded.spans[place])] == "Bruno"[-len(text[slice(*encoded.spans[place])]) :]
        assert encoded.spans[-1][1] == len(text)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_place_of_a_subject_in_the_picture_is_the_last_that_is_written_for_it(family):
    host, _ = opened(family)
    request = Request("was born in", "<image>", "Tallow", image=RED)
    encoded = host.encode(request.text)
    place = encoded.last_of(*request.span)
    behind = len(host.encode("was born in", special=False).ids)
    assert place == len(encoded.ids) - behind - 1
    assert all(token < FIRST for token in encoded.ids[place + 1 :])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_with_several_pictures_and_none_is_its_single_rows(family):
    host, _ = opened(family)
    texts = [
        f"{RED.mark}Ada was born",
        "Ada was born in",
        f"Ada {BLUE.mark} lives",
        f"{BLUE.mark}Ada was born",
    ]
    rows = [host.encode(text).ids for text in texts]
    with torch.no_grad():
        together = host.forward(host.batch(rows))
        alone = [host.forward(host.batch([row]))[0] for row in rows]
    for i, logits in enumerate(alone):
        assert torch.allclose(together[i, : len(logits)], logits, atol=1e-5)
    assert not torch.allclose(alone[0][-1], alone[3][-1], atol=1e-4)  # the picture is seen


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_model_on_what_the_processor_makes(family):
    host, processor = opened(family)
    text = "{}Where was Ada born?"
    inputs = processor(images=[shown(BLUE)], text=[text.format(host.codec.form)], return_tensors="pt")
    with torch.no_grad():
        wanted = host.model(**inputs).logits[0]
        found = host.forward(host.batch([host.encode(text.format(BLUE.mark)).ids]))[0]
    assert torch.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_the_argmax_of_whole_rows(family):
    host, _ = opened(family)
    prompt = f"{RED.mark}Where was Ada born?"
    text = host.generate(prompt, max_new_tokens=3, natural_stop=False)
    row = list(host.encode_prompt(prompt))
    new = []
    with torch.no_grad():
        for _ in range(3):
            new.append(int(host.forward(host.batch([row]))[0, -1].argmax()))
            row.append(new[-1])
    assert text == host.decode([new])[0]
