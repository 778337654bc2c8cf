"""Methods that are trained beforehand, route or answer by another model, with requests beside pictures."""

from __future__ import annotations

import io
from functools import lru_cache
from typing import Any

import pytest
import torch
from PIL import Image

import errata
from errata.edits.model import ModelEdit
from errata.errors import ConfigError, HostError
from errata.host.pictures import FIRST
from errata.job import prepare_training
from errata.training.factors import capture
from errata.types import IMAGE, Case, Corpus, Gallery, Probe, Request, Resources
from tests import pictures
from tests.models import TEXTS, fresh

COLOURS = ("red", "blue", "green", "yellow", "black")
SHOWN = {colour: pictures.picture(colour, 56) for colour in COLOURS}
TOWNS = ("Tallow", "Merrin", "Arvania", "Bruno", "Ada")
PROMPT, WORDS = "Where was this dog born?", "The birth place of this dog is"
REQUEST = Request(IMAGE + PROMPT, IMAGE, "Merrin", image=SHOWN["red"])
METHODS: dict[str, dict[str, Any]] = {
    "mend": {"steps": 4, "rank": 8, "statistics": 4},
    "malmen": {"steps": 3, "rank": 8, "statistics": 4},
    "rledit": {"steps": 2, "length": 2, "reach": 1, "rank": 8, "statistics": 4},
    "wise": {"steps": 4, "texts": 4, "text_tokens": 6},
    "serac": {"steps": 4, "classifier_steps": 200, "classifier_width": 16, "rank": 2, "learning_rate": 0.02},
    "serac, a copy": {"steps": 2, "classifier_steps": 200, "classifier_width": 16, "learning_rate": 0.01},
}


def examples() -> list[Case]:
    """Return cases beside pictures, with other words, other pictures and texts alone."""
    cases = []
    for i, colour in enumerate(COLOURS[1:]):
        image, other = SHOWN[colour], SHOWN[COLOURS[(i + 2) % 5]]
        target, old = TOWNS[i], TOWNS[(i + 1) % 5]
        probes = (
            Probe("paraphrase", WORDS, (target,), (old,), image=image),
            Probe("other_picture", PROMPT, (old,), (old,), image=other),
            Probe("neighbourhood", "Ada Brenner was born in", ("Tallow",), ("Tallow",)),
        )
        request = Request(IMAGE + PROMPT, IMAGE, target, old, colour, image=image)
        cases.append(Case(colour, request, probes))
    return cases


@lru_cache
def opened(family: str = "llava") -> tuple[Any, Any]:
    model, processor = pictures.model(family)
    host = errata.load(model, processor)
    shown = [("<image>Where is it?", picture) for picture in SHOWN.values()]
    host.resources = Resources(Corpus("texts", lambda: TEXTS), gallery=Gallery("five", lambda: shown))
    host.see(SHOWN.values())
    return host, processor


@lru_cache
def edit_of(name: str) -> Any:
    more: dict[str, Any] = {} if name == "wise" else {"examples": examples()}
    return errata.edit(opened()[0], REQUEST, method=name.split(",")[0], **METHODS[name], **more)


def rows(host: Any) -> list[tuple[int, ...]]:
    """Return rows beside the request's picture and others, and without any, of several lengths."""
    texts = [
        REQUEST.text, "Ada Brenner was born in", SHOWN["blue"].mark + PROMPT, f"So: {SHOWN['red'].mark}{WORDS}",
        "the",
    ]  # fmt: skip
    return [host.encode_prompt(text) for text in texts]


def last_logits(host: Any, some: list[tuple[int, ...]], side: str = "right") -> torch.Tensor:
    batch = host.batch(some, side=side)
    at = torch.tensor([len(row) - 1 if side == "right" else batch.ids.shape[1] - 1 for row in some])
    with torch.no_grad():
        return host.forward_at(batch, torch.arange(len(some)), at)


@pytest.mark.parametrize("name", METHODS)
def test_an_edit_is_fitted_seen_saved_loaded_and_taken_off(name, tmp_path):
    host, _ = opened()
    start = host.weights_hash()
    edit = edit_of(name)
    assert host.weights_hash() == start and not host.edited
    edit.save(tmp_path / "edit.safetensors")
    again = errata.Edit.load(tmp_path / "edit.safetensors")
    assert again.digest == edit.digest
    some = rows(host)
    before = last_logits(host, some)
    with edit.on(host):
        after = last_logits(host, some)
    with again.on(host):
        assert torch.equal(last_logits(host, some), after)
    assert not torch.equal(after[0], before[0])
    assert torch.equal(last_logits(host, some), before) and host.weights_hash() == start


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_half_in_scope_is_its_single_rows(name):
    host, _ = opened()
    some = rows(host)
    before = last_logits(host, some)
    with edit_of(name).on(host):
        alone = torch.cat([last_logits(host, [row]) for row in some])
        for side in ("right", "left"):
            torch.testing.assert_close(last_logits(host, some, side), alone, atol=2e-5, rtol=1e-4)
        texts = [host.generate(text, max_new_tokens=3, natural_stop=False) for text in (REQUEST.text, "the")]
        assert texts == host.generate([REQUEST.text, "the"], max_new_tokens=3, natural_stop=False)
    if name in ("wise", "serac", "serac, a copy"):  # they route: what no entry takes is as it was
        changed = (alone - before).abs().amax(1) > 1e-4
        assert changed[0] and not changed.all()


def test_factors_are_the_models_own_gradient_behind_a_picture():
    host, processor = opened()
    answer = host.encode_answer(REQUEST.text, "Merrin")
    name = host.layout.site(0).name
    (factors,) = capture(host, [answer], [name], tokens="all", rows=4).values()
    data = SHOWN["red"].data
    assert data is not None
    image = Image.open(io.BytesIO(data)).convert("RGB")
    pixels = processor(images=[image], text=[host.codec.form], return_tensors="pt")["pixel_values"]
    ids = torch.tensor([[host.codec.placeholder if token >= FIRST else token for token in answer.ids]])
    weight = host.model.get_submodule(name).weight.requires_grad_(True)
    logits = host.model(input_ids=ids, pixel_values=pixels).logits[0].log_softmax(-1)
    at = torch.arange(answer.start, ids.shape[1])
    (wanted,) = torch.autograd.grad(-logits[at - 1, ids[0, at]].sum(), [weight])
    weight.requires_grad_(False)
    torch.testing.assert_close(factors.gradients.mT @ factors.keys, wanted, atol=1e-5, rtol=1e-4)
    assert len(factors.keys) > sum(
        token >= FIRST for token in answer.ids
    )  # the picture's tokens are among them


def test_an_editor_is_trained_on_cases_beside_pictures_and_used(tmp_path):
    host, _ = opened()
    job = prepare_training(host, method="mend", options=METHODS["mend"], cases=examples())
    artefact = job.run()
    assert artefact.card["examples"] == 4
    artefact.save(tmp_path / "mend.safetensors")
    edit = errata.edit(host, REQUEST, method="mend", editor=str(tmp_path / "mend.safetensors"))
    assert edit.provenance.notes["editor"] == artefact.digest
    with pytest.raises(HostError, match="reads no pictures"):
        prepare_training(fresh("llama"), method="mend", options=METHODS["mend"], cases=examples()).run()


def test_prompts_about_another_edits_picture_are_not_out_of_scope():
    from errata.training.editing import items_apart, items_of
    from errata.training.examples import examples_of

    host, _ = opened()
    items = items_of(host, examples_of(examples()), {})
    assert [len(item.outside) for item in items] == [2, 2, 2, 2]
    # red's picture alone belongs to no example; each other "other picture" is another example's subject
    assert [len(item.outside) for item in items_apart(host, items)] == [1, 1, 1, 2]


def test_serac_keeps_texts_alone_and_refuses_what_reads_texts_alone():
    host, _ = opened()
    for name in ("serac", "serac, a copy"):
        edit = edit_of(name)
        assert isinstance(edit, ModelEdit) and SHOWN["red"].mark not in edit.contexts[0]
        assert "Merrin" in edit.contexts[0]
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"scope": "subject"}, "scope"), ({"classifier": "cross"}, "scope"), ({"encoder": "some"}, "encoder"),
        ({"counterfactual": "lab"}, "counterfactual"),
    )  # fmt: skip
    for options, message in wrong:
        with pytest.raises(ConfigError, match=message):
            errata.edit(host, REQUEST, method="serac", examples=examples(), **options)
    for method in ("lte", "kaft", "kformer", "pluglm", "ke", "slag"):
        with pytest.raises(ConfigError, match="takes no requests about pictures"):
            errata.edit(host, REQUEST, method=method)
        with pytest.raises(ConfigError, match="takes no requests about pictures"):
            prepare_training(host, method=method, cases=examples())


def test_a_rows_text_has_the_marks_of_its_pictures():
    for family in ("llava", "idefics3"):
        host, _ = opened(family)
        for text in (REQUEST.text, f"So: {SHOWN['red'].mark}{WORDS} {SHOWN['blue'].mark}", "Ada was born"):
            assert host.codec.prompt_text(host.encode(text).ids) == text
