"""Pipelines that draw images as hosts: opened by structure, edited, refused where answers in words are asked for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import errata
from errata.cli.main import app
from errata.errors import HostError, RequestError
from errata.evaluation.concepts import distances
from errata.host.cross_attention import discover
from errata.host.text_to_image import TextToImageHost, load_pipeline
from tests.pipelines import (
    WINDOW,
    edited,
    fresh_pipeline,
    pixart,
    stable_diffusion,
    stable_diffusion_3,
    stable_diffusion_xl,
    written,
)

REQUEST = {"prompt": "a painting by {}", "subject": "monet", "target": "an artist"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return written(tmp_path_factory.mktemp("pipelines") / "sd")


@pytest.fixture(scope="module")
def host() -> TextToImageHost:
    return fresh_pipeline()


def call(*words: Any) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


# --- found by structure -----------------------------------------------------------------------


def test_the_maps_of_a_unet_that_read_the_text_are_sites(host):
    names = {name for name, _ in host.model.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))}
    assert {site.name for site in host.layout.cross} == names and len(names) == 8
    for site in host.layout.cross:
        assert (
            site.part == ("cross_key" if site.name.endswith("to_k") else "cross_value") and site.source == ""
        )
        assert host.weight(site).shape == (site.d_out, site.d_in) == (16, 24)
    text = [site.name for site in host.layout.mlp_out if site is not None]
    assert text == [f"text_encoder.encoder.layers.{i}.mlp.fc2" for i in range(3)]
    assert host.kind == "text_to_image" and host.family == "StableDiffusionPipeline" and host.window == WINDOW


def test_a_pass_gives_what_the_pipeline_itself_computes(host):
    """States as the pipeline encodes a prompt, padding included, and the keys and values made of them."""
    pipeline = stable_diffusion()
    states = pipeline.encode_prompt("a red dog", "cpu", 1, False)[0]
    outputs = host.run(host.as_pass(["a red dog"], pad=True)).logits
    torch.testing.assert_close(outputs[..., :24], states, atol=1e-6, rtol=1e-6)
    last = host.layout.cross[-1]
    expected = states @ host.weight(last).mT
    torch.testing.assert_close(outputs[..., -last.d_out :], expected, atol=1e-5, rtol=1e-5)
    (inputs,) = host.inputs(["a red dog"], pad=True).values()
    assert torch.equal(inputs, outputs[..., :24])


def test_two_encoders_are_read_as_the_pipeline_reads_them():
    pipeline = stable_diffusion_xl()
    host = load_pipeline(pipeline)
    assert len(host.layout.cross) == 8 and host.layout.text is None
    states = pipeline.encode_prompt("a red dog", device="cpu", do_classifier_free_guidance=False)[0]
    (inputs,) = host.inputs(["a red dog"], pad=True).values()
    torch.testing.assert_close(inputs, states, atol=1e-6, rtol=1e-6)


def test_what_a_projection_makes_of_the_text_is_found():
    host = load_pipeline(pixart())
    assert len(host.layout.cross) == 4
    assert {site.source for site in host.layout.cross} == {"transformer.caption_projection"}
    (inputs,) = host.inputs(["The rain fell"]).values()
    assert inputs.shape[-1] == host.layout.cross[0].d_in == 16


def test_joint_attention_has_no_maps_of_the_text_alone():
    host = TextToImageHost(stable_diffusion_3(), name="joint")
    assert not host.layout.cross and [site.layer for site in host.layout.sites if site.part == "mlp_out"] == [
        0,
        1,
        2,
    ]
    with pytest.raises(HostError, match="no map of keys or values reads the text alone"):
        edited(host, errata.Request(**REQUEST), method="uce")


def test_memory_that_runs_out_is_not_a_denoiser_of_another_kind():
    def draw(_: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        discover(torch.nn.Linear(2, 2), "unet", torch.zeros(1, 1, 2), draw)


def test_tokens_are_those_of_a_span(host):
    reading = host.read("a painting by monet")
    assert reading.last(14, 19) == len(reading.ids) - 2 and reading.last(2, 10) == 2
    assert host.read("").last(0, 0) == 0
    with pytest.raises(RequestError, match="longer than the text encoder"):
        host.read("words " * WINDOW)


# --- folders ----------------------------------------------------------------------------------


def test_a_folder_is_the_live_pipeline(folder, host):
    opened: Any = errata.load(folder, device="cpu")
    assert isinstance(opened, TextToImageHost) and opened.fingerprint == host.fingerprint
    assert isinstance(errata.load(stable_diffusion()), TextToImageHost)  # type: ignore[arg-type]
    half = load_pipeline(folder, dtype="bfloat16", device="cpu")
    assert {p.dtype for p in half.model.parameters()} == {
        torch.bfloat16
    } and half.fingerprint == host.fingerprint
    with pytest.raises(errata.ErrataError, match="leave it out"):
        errata.load(folder, tokenizer=host.tokenizer)


def broken(folder: Path, to: Path, part: str) -> Path:
    """Copy a folder and damage one part of it."""
    shutil.copytree(folder, to)
    index = json.loads((to / "model_index.json").read_text(encoding="utf-8"))
    if part == "foreign":
        index["unet"] = ["my_code", "MyUNet"]
    elif part == "no encoder":
        index["text_encoder"] = [None, None]
    elif part == "weights":
        (to / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    elif part == "tokenizer":
        del index["tokenizer"]
    (to / "model_index.json").write_text("{" if part == "index" else json.dumps(index), encoding="utf-8")
    return to


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("foreign", "code of a pipeline's own is never run"), ("no encoder", "has no text encoder"),
        ("weights", "pickled weights are never opened"), ("tokenizer", "names no tokenizer"), ("index", "cannot open"),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_refused(folder, tmp_path, part, message):
    with pytest.raises(HostError, match=message):
        load_pipeline(broken(folder, tmp_path / "broken", part))


# --- measured ---------------------------------------------------------------------------------


def test_distances_are_those_of_keys_and_values(host):
    request = errata.Request(**REQUEST)
    edit = edited(
        host, request, method="uce", preserve=("a dog", "a vase"), erase_scale=1e8, preserve_scale=1e8
    )
    start = host.weights_hash()
    found = distances(host, edit, others=("a dog", "a road"))
    assert host.weights_hash() == start
    assert [one.kind for one in found] == ["edited", "preserved", "preserved", "other"]
    assert found[0].left is not None and found[0].left < 1e-3 < found[0].moved and found[0].target is not None
    assert all(one.moved < 1e-3 and one.left is None for one in found[1:3]) and found[3].moved > 1e-3
    weak = distances(host, edited(host, request, method="uce", ridge=1e4), others=())
    assert weak[0].left == pytest.approx(1.0, abs=1e-2)
    (moderated,) = distances(
        host, edited(host, request, method="uce", form="moderate", erase_scale=1e8), others=()
    )
    assert moderated.target == "" and moderated.left is not None and moderated.left < 1e-3
    options: dict[str, Any] = {"form": "debias", "attributes": ("man",), "strengths": (0.5,)}
    (debiased,) = distances(host, edited(host, request, method="uce", **options), others=())
    assert debiased.target is None and debiased.left is None and debiased.moved > 0


def test_an_edit_of_the_encoder_is_measured_where_the_text_ends(host):
    request = errata.Request(**REQUEST)
    options: dict[str, Any] = {"frames": ("{}",), "learning_rate": 0.3, "layer": 0}
    edit = edited(host, request, method="refact", **options)
    (found,) = distances(host, edit, others=())
    texts = ("a painting by monet", "a painting by an artist")
    old, goal = (torch.cat(list(host.keys_and_values(one, -1).values())) for one in texts)
    with edit.on(host):
        now = torch.cat(list(host.keys_and_values(texts[0], -1).values()))
    assert found.left == pytest.approx(float((now - goal).norm() / (old - goal).norm()), rel=1e-4)
    assert found.moved == pytest.approx(float((now - old).norm() / old.norm()), rel=1e-4)


# --- the command line -------------------------------------------------------------------------


def test_an_edit_is_fitted_shown_and_exported(folder, tmp_path):
    facts = tmp_path / "facts.jsonl"
    facts.write_text(json.dumps({**REQUEST, "id": "monet"}) + "\n", encoding="utf-8")
    path, out = tmp_path / "edit.safetensors", tmp_path / "out"
    words = ("edit", facts, "--model", folder, "--method", "uce", "-o", path, "--device", "cpu")
    more = ("--set", 'preserve=["a dog"]', "--set", "erase_scale=1e6")
    assert call(*words, *more, "--dry-run").exit_code == 0 and not path.exists()
    done = call(*words, *more, "--strict")
    assert done.exit_code == 0, done.output
    assert "1 of 1 phrases" in done.stdout and "no image was drawn" in done.stdout and "a dog" in done.stdout
    again = call(*words, *more, "--json")
    document = json.loads(again.stdout)
    assert document["distances"][0]["left"] < 1e-3 and document["missed"] == 0
    shown = call("show", path, "--model", folder, "--device", "cpu")
    assert shown.exit_code == 0 and "attn2.to_k.weight" in shown.stdout and "monet" in shown.stdout
    exported = call(
        "export", path, "-o", out, "--to", "checkpoint", "--model", folder, "--device", "cpu", "--json"
    )
    assert exported.exit_code == 0, exported.output
    assert json.loads(exported.stdout)["verified"]["compared"].endswith("diffusers")
    assert "text-to-image model" in (out / "README.md").read_text(encoding="utf-8")
    edit, host = errata.Edit.load(path), load_pipeline(folder, device="cpu")
    with edit.on(host):
        expected = host.weights_hash()
    assert load_pipeline(out, device="cpu").weights_hash() == expected != host.weights_hash()


def test_a_weak_edit_is_a_miss(folder, tmp_path):
    words = ("edit", "a painting by {}", "--subject", "monet", "--target", "an artist", "--model", folder)
    more = ("--method", "uce", "-o", tmp_path / "edit.safetensors", "--set", "ridge=1e4", "--strict")
    done = call(*words, *more, "--device", "cpu")
    assert done.exit_code == 1 and "0 of 1 phrases" in done.stdout


def test_the_layout_is_shown(folder):
    shown = call("model", folder, "--device", "cpu", "--json")
    assert shown.exit_code == 0, shown.output
    document = json.loads(shown.stdout)
    assert document["family"] == "StableDiffusionPipeline" and document["layers"] == 3
    assert {site["part"] for site in document["sites"]} == {"cross_key", "cross_value", "mlp_out", "attn_out"}
    assert call("model", folder, "--device", "cpu").exit_code == 0


@pytest.mark.parametrize(
    "words",
    [
        ("ask", "--model", "{}", "a dog"), ("eval", "--model", "{}", "--cases", "lab:2", "--method", "rome"),
        ("serve", "--model", "{}"), ("init", "--model", "{}", "--repo", "{}/ledger"), ("stats", "--model", "{}"),
        ("trace", "a dog runs", "--subject", "dog", "--model", "{}"),
    ],
    ids=lambda words: words[0],
)  # fmt: skip
def test_what_a_pipeline_cannot_do_is_refused_with_the_reason(folder, words):
    done = call(*(word.replace("{}", str(folder)) for word in words))
    assert done.exit_code != 0
    assert isinstance(done.exception, HostError) and "draws an image" in str(done.exception), done.output


def test_python_refuses_too(host):
    edit = edited(host, errata.Request(**REQUEST), method="uce")
    same: Any = host
    with pytest.raises(HostError, match="answers in words"):
        errata.check_edit(same, edit)
    with pytest.raises(HostError, match="answers in words"):
        errata.evaluate(same, [], edit=edit)
    with pytest.raises(errata.ErrataError, match="takes no prompts to answer"):
        errata.edit(same, errata.Request(**REQUEST), method="uce", template="chat")
    with pytest.raises(errata.ErrataError, match="given live"):
        errata.export(edit, "nowhere", to="checkpoint", host=same)
