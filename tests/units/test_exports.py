"""Exports as folders: what is replaced, what is refused, what is left behind."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import peft
import pytest
import torch

import errata
from errata.edits.export import EXPORTERS
from errata.errors import ConfigError, EditError
from errata.host.host import Host
from tests.exports import ADA, BRUNO, neurons, refused
from tests.images import fresh_images, pairs
from tests.models import fresh
from tests.units.test_packed import Packed, replace


def test_only_an_earlier_export_is_replaced(tmp_path):
    host = fresh("llama")
    first, second = (errata.edit(host, request, method="in_prompt") for request in (ADA, BRUNO))
    out = tmp_path / "out"
    out.mkdir()
    errata.export(first, out, to="prompts")
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(EditError, match="--force"):
        errata.export(second, out, to="prompts")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    adapter = errata.edit(host, ADA, method="lora", steps=2)
    errata.export(adapter, out, to="peft", host=host, force=True)
    assert {p.name for p in out.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "errata-export.json",
        "README.md",
    }
    with pytest.raises(EditError, match="no texts"):
        errata.export(adapter, out, to="prompts", force=True)
    assert (out / "adapter_config.json").exists(), "a refusal replaces nothing"
    (out / "notes.txt").write_text("mine")
    with pytest.raises(EditError, match=r"notes\.txt.*no export wrote"):
        errata.export(first, out, to="prompts", force=True)
    assert (out / "notes.txt").read_text() == "mine" and (out / "adapter_config.json").exists()
    (out / "notes.txt").unlink()
    for damaged in ("{", "[]", '{"files": 1}'):
        (out / "errata-export.json").write_text(damaged)
        with pytest.raises(EditError, match="damaged"):
            errata.export(first, out, to="prompts", force=True)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(EditError, match="it is a file"):
        errata.export(first, tmp_path / "file", to="prompts", force=True)
    with pytest.raises(EditError, match="does not exist"):
        errata.export(first, tmp_path / "no" / "out", to="prompts")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "out"]


@pytest.mark.parametrize(
    "failure", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("temperature")]
)
def test_a_write_that_fails_leaves_the_earlier_export(failure, tmp_path, monkeypatch):
    host = fresh("llama")
    first, second = (errata.edit(host, request, method="ft", steps=1) for request in (ADA, BRUNO))
    errata.export(first, tmp_path / "out", to="checkpoint", host=host)
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}

    def save(self: object, folder: Path, **_: object) -> None:
        (folder / "config.json").write_text("half")
        raise failure

    monkeypatch.setattr(type(host.model), "save_pretrained", save)
    with pytest.raises(KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else EditError):
        errata.export(second, tmp_path / "out", to="checkpoint", host=host, force=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_is_the_working_one_may_be_named_by_a_dot(tmp_path, monkeypatch):
    edit = errata.edit(fresh("llama"), ADA, method="in_prompt")
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    errata.export(edit, ".", to="prompts")
    assert (tmp_path / "out" / "prompts.json").exists()


def test_what_prepares_images_goes_along(tmp_path):
    """An image classifier's folder says how pixels are normalised; its checkpoint has to say the same."""
    host = fresh_images("vit")
    host.model.save_pretrained(tmp_path / "model")
    settings = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.2], "do_normalize": True, "size": 32}
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(settings))
    opened = errata.load(tmp_path / "model", device="cpu")
    edit = errata.edit(opened, pairs(2), method="rewrite", steps=4)
    errata.export(edit, tmp_path / "out", to="checkpoint", host=opened)
    again = errata.load(tmp_path / "out", device="cpu")
    images = pairs(2).changed
    with edit.on(opened):
        torch.testing.assert_close(again.logits(images), opened.logits(images), atol=1e-5, rtol=1e-5)
    assert again.pixels == opened.pixels


def test_a_quantised_model_has_no_checkpoint_with_the_change(tmp_path):
    host = fresh("llama")
    edit = errata.edit(host, ADA, method="lora", steps=2)
    replace(host.model, Packed)
    for to, reason in (("checkpoint", "is quantised"), ("peft", "of a Packed")):
        refused(edit, tmp_path / "out", reason, to=to, host=host, foreign=True)


def test_the_record_has_the_checksums_of_all_files(tmp_path):
    host = fresh("llama")
    edit = errata.edit(host, ADA, method="rome", tokens=400)
    errata.export(edit, tmp_path / "out", to="checkpoint", host=host)
    record = json.loads((tmp_path / "out" / "errata-export.json").read_text(encoding="utf-8"))
    files = {p.name: p for p in (tmp_path / "out").iterdir() if p.name != "errata-export.json"}
    assert record["edit"] == edit.digest and record["method"] == "rome" and record["exporter"] == "checkpoint"
    assert record["files"] == {name: hashlib.sha256(p.read_bytes()).hexdigest() for name, p in files.items()}


def test_a_dry_run_writes_nothing_and_refuses_the_same(tmp_path):
    host = fresh("gpt2")
    edit = neurons(host, {1: 4}, "gelu_tanh")
    receipt = errata.export(edit, tmp_path / "out", to="checkpoint", host=host, dry_run=True)
    assert receipt.files == () and receipt.facts["width"] == {"before": 80, "after": 128}
    refused(
        neurons(host, {1: 4}, "silu"),
        tmp_path / "out",
        "applies gelu_tanh",
        to="checkpoint",
        host=host,
        dry_run=True,
    )
    assert not list(tmp_path.iterdir())


def test_another_host_and_edits_in_place_are_refused(tmp_path):
    host, other = fresh("llama"), fresh("llama", seed=1)
    edit, second = (errata.edit(host, request, method="ft", steps=2) for request in (ADA, BRUNO))
    refused(edit, tmp_path / "out", "edit made for host", to="checkpoint", host=other)
    receipt = errata.export(edit, tmp_path / "other", to="checkpoint", host=other, foreign=True)
    assert receipt.overrides and receipt.to_dict()["overrides"] == list(receipt.overrides)
    with second.on(host), pytest.raises(EditError, match="edits are in place"):
        errata.export(edit, tmp_path / "out", to="checkpoint", host=host)
    assert not (tmp_path / "out").exists()


def test_a_model_that_transformers_does_not_open_is_refused(tmp_path):
    host = fresh("llama")
    edit = errata.edit(host, ADA, method="lora", steps=2)

    class Own(type(host.model)):
        pass

    host.model.__class__ = Own
    refused(edit, tmp_path / "out", "does not open by itself", to="checkpoint", host=host)


def test_a_model_with_an_adapter_is_refused(tmp_path):
    plain = fresh("llama")
    peft.get_peft_model(plain.model, peft.LoraConfig(target_modules=["up_proj"], r=2))
    host = Host(plain.model, plain.tokenizer, name="adapted")
    edit = errata.edit(host, ADA, method="rome", tokens=400)
    for to in ("checkpoint", "peft"):
        refused(edit, tmp_path / "out", "has PEFT adapters", to=to, host=host)


def test_options_that_an_export_does_not_take_are_refused(tmp_path):
    host = fresh("llama")
    edit = errata.edit(host, ADA, method="ft", steps=1)
    cases = [
        ({"to": "prompts", "host": host}, "needs no model"), ({"to": "checkpoint"}, "needs the model"),
        ({"to": "checkpoint", "host": host, "rank": 2}, "takes no rank"),
        ({"to": "peft", "host": host, "dtype": "float16"}, "takes no dtype"),
        ({"to": "peft", "host": host, "pad_to": 8}, "takes no pad_to"),
        ({"to": "prompts", "foreign": True}, "takes no foreign"),
        ({"to": "checkpoint", "host": host, "dtype": "int8"}, "unknown dtype"),
        ({"to": "peft", "host": host, "rank": 0}, "1 or more"),
        ({"to": "chekpoint", "host": host}, "did you mean 'checkpoint'"),
    ]  # fmt: skip
    for options, match in cases:
        with pytest.raises(ConfigError, match=match):
            errata.export(edit, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_every_exporter_says_what_it_takes():
    assert {"checkpoint", "peft", "prompts"} <= set(EXPORTERS)
    for name in EXPORTERS:
        exporter = EXPORTERS.get(name)
        assert exporter.name == name and exporter.title and all(exporter.takes)
