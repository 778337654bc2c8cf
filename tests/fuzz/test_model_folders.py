"""Damaged model folders: each is opened as what it truly says, or refused in one message."""

from __future__ import annotations

import json
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
