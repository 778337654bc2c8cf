"""Damaged model folders: each is opened as what it truly says, or refused in one message."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import errata
from errata.host.build import new_model
from tests.fuzz.mutations import byte_variants, document_variants, judge
from tests.images import fresh_images
from tests.models import FAMILIES, tokenizer

DOCUMENTS = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    settings = {**FAMILIES["llama"], "num_hidden_layers": 2}
    new_model("llama", settings, seed=0).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def opener(folder: Path, place: Path, name: str) -> Callable[[bytes], Any]:
    """Return what opens a copy of the folder with other content in one file."""

    def read(content: bytes) -> Any:
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(folder, place)
        (place / name).write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            host = errata.load(place)
            host.generate("Ada Brenner was", max_new_tokens=2)
        return host

    return read


def truthful(place: Path, folder: Path) -> Callable[[Any], bool]:
    """Return what compares a host with what its folder says, read without the loader."""
    words = json.loads((folder / "config.json").read_text())

    def right(host: Any) -> bool:
        stored = load_file(place / WEIGHTS)
        held = dict(host.model.named_parameters())
        weights = all(
            name in held and torch.equal(held[name].detach(), tensor.to(held[name].dtype))
            for name, tensor in stored.items()
        ) and set(held) <= {*stored, "lm_head.weight"}
        config = json.loads((place / "config.json").read_text())
        sizes = [
            key for key in words if key.startswith(("num_", "hidden_size", "intermediate_size", "vocab_size"))
        ]
        settings = all(
            getattr(host.config, key) == config.get(key, getattr(host.config, key)) for key in sizes
        )
        model = json.loads((place / "tokenizer.json").read_text()).get("model")
        vocabulary = host.tokenizer.get_vocab()
        return weights and settings and all(vocabulary.get(t) == i for t, i in model["vocab"].items())

    return right


def variants(data: bytes, name: str, count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    if name == WEIGHTS:
        header = 8 + int.from_bytes(data[:8], "little")
        yield from (
            (what, one + data[header:]) for what, one in byte_variants(data[:header], count // 2, seed=seed)
        )
        yield from byte_variants(data, count - count // 2, seed=seed)
        return
    documents = document_variants(json.loads(data), count // 2, seed=seed)
    encoded = ((what, json.dumps(one).encode("utf-8", "surrogatepass")) for what, one in documents)
    yield from chain(encoded, byte_variants(data, count - count // 2, seed=seed))


def run(folder: Path, place: Path, name: str, count: int, seed: int) -> None:
    data = (folder / name).read_bytes()
    found = judge(variants(data, name, count, seed), opener(folder, place, name), truthful(place, folder))
    assert not found.faults, f"{name}: {found}\n" + "\n".join(found.faults)
    assert sum(found.outcomes.values()) == count and found.outcomes["refused"] > 0


@pytest.mark.parametrize("name", [*DOCUMENTS, WEIGHTS])
def test_damaged_folders_are_refused_or_read_as_they_are(folder, tmp_path, name):
    run(folder, tmp_path / "copy", name, 18, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*DOCUMENTS, WEIGHTS])
@pytest.mark.parametrize("seed", [2, 3])
def test_many_damaged_folders_are_refused_or_read_as_they_are(folder, tmp_path, name, seed):
    run(folder, tmp_path / "copy", name, 150, seed=seed)


IMAGE_DOCUMENTS = ("config.json", "preprocessor_config.json")
PIXELS = {
    "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5, 0.25, 0.5],
    "image_std": [0.5, 0.5, 0.25], "size": {"height": 32, "width": 32},
}  # fmt: skip


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("images")
    fresh_images("vit").model.save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps(PIXELS))
    return path


def run_images(folder: Path, place: Path, name: str, count: int, seed: int) -> None:
    images = torch.linspace(0, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
    whole = errata.load(folder)

    def read(content: bytes) -> Any:
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(folder, place)
        (place / name).write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            host = errata.load(place)
        if name == "preprocessor_config.json":
            host.logits(images)
        return host

    def right(host: Any) -> bool:
        same = host.weights_hash() == whole.weights_hash()
        if name == "config.json":  # what the settings say beside sizes is for the model to obey
            return same and host.pixels == whole.pixels
        says = {**json.loads((place / name).read_text())}
        factor = says.get("rescale_factor", 1 / 255) if says.get("do_rescale", True) else 1.0
        normal = says.get("do_normalize", True) and "image_mean" in says and "image_std" in says
        mean = says["image_mean"] if normal else [0.0]
        std = says["image_std"] if normal else [1.0]
        listed = [mean if isinstance(mean, list) else [mean], std if isinstance(std, list) else [std]]
        read_as = [list(host.pixels.mean), list(host.pixels.std)]
        return same and math.isclose(host.pixels.scale, 255 * float(factor)) and read_as == listed

    data = (folder / name).read_bytes()
    found = judge(variants(data, name, count, seed), read, right)
    assert not found.faults, f"{name}: {found}\n" + "\n".join(found.faults)
    assert sum(found.outcomes.values()) == count and found.outcomes["refused"] > 0


@pytest.mark.parametrize("name", IMAGE_DOCUMENTS)
def test_damaged_image_folders_are_refused_or_read_as_they_are(image_folder, tmp_path, name):
    run_images(image_folder, tmp_path / "copy", name, 18, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", IMAGE_DOCUMENTS)
@pytest.mark.parametrize("seed", [2, 3])
def test_many_damaged_image_folders_are_refused_or_read_as_they_are(image_folder, tmp_path, name, seed):
    run_images(image_folder, tmp_path / "copy", name, 150, seed=seed)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_hidden_layers": 2**63}, "num_hidden_layers"),
        ({"num_hidden_layers": 3}, "missing"),
        ({"num_hidden_layers": 1}, "no place for"),
        ({"vocab_size": 10**9}, "vocab_size"),
        ({"hidden_size": 64}, "shape"),
        ({"tie_word_embeddings": "yes"}, "cannot open"),
        ({"model_type": "no such family"}, "cannot open"),
    ],
)
def test_a_configuration_of_another_model_is_refused(folder, tmp_path, changes, match):
    """transformers fills in at random what a checkpoint lacks, and leaves out what it has too much."""
    config = json.loads((folder / "config.json").read_text())
    with pytest.raises(errata.errors.HostError, match=match):
        opener(folder, tmp_path / "copy", "config.json")(json.dumps({**config, **changes}).encode())


def test_biases_that_a_configuration_switches_off_are_not_left_out(folder, tmp_path):
    """A model without the biases it was trained with answers, but with something else."""
    place = tmp_path / "biased"
    new_model(
        "llama", {**FAMILIES["llama"], "num_hidden_layers": 2, "attention_bias": True}, seed=0
    ).save_pretrained(place)
    tokenizer().save_pretrained(place)
    config = {**json.loads((place / "config.json").read_text()), "attention_bias": False}
    (place / "config.json").write_text(json.dumps(config))
    with pytest.raises(errata.errors.HostError, match=r"_proj\.bias.*no place for"):
        errata.load(place)
