"""Exports for other programs: differences, vLLM's and llama.cpp's adapters do what the edit does, or are refused."""

from __future__ import annotations

import dataclasses
import json
import subprocess

import pytest
import torch
from safetensors.torch import load_file

import errata
from errata.edits.weight import WeightEdit
from errata.errors import EditError
from errata.host.engines import VLLM_RANKS, gguf_rows
from errata.host.host import Host
from errata.linalg.lowrank import LowRank
from tests.exports import ADA, BRUNO, neurons, open_delta, open_gguf, open_vllm, refused
from tests.models import fresh
from tests.theory.test_export import agree


@pytest.fixture(scope="module")
def record():
    return errata.edit(fresh("llama"), ADA, method="in_prompt").provenance


def random_edit(
    host: Host, record, rank: int, modules: tuple[str, ...], *, strength: float = 0.2
) -> WeightEdit:
    """Random factors at some modules of every block."""
    generator = torch.Generator().manual_seed(rank)
    deltas, transposed = {}, set()
    for name, module in host.model.named_modules():
        if name.endswith(modules):
            out, into = module.weight.shape
            if type(module).__name__ == "Conv1D":
                out, into = into, out
                transposed.add(f"{name}.weight")
            b, a = torch.randn(out, rank, generator=generator), torch.randn(rank, into, generator=generator)
            deltas[f"{name}.weight"] = LowRank(strength * b, strength * a)
    record = dataclasses.replace(record, host=host.fingerprint)
    return WeightEdit(deltas, frozenset(transposed), record)


# --- differences ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_differences_are_the_edit_of_any_rank(family, tmp_path):
    host = fresh(family)
    start = host.weights_hash()
    edit = errata.edit(host, ADA, method="ft", steps=4)
    receipt = errata.export(edit, tmp_path / "out", to="delta", host=host)
    assert host.weights_hash() == start and receipt.verified["weights"] == len(edit.deltas)
    changed = open_delta(tmp_path / "out", host)
    agree(edit, host, changed)
    with edit.on(host):
        own = dict(host.model.named_parameters())
        assert all(torch.equal(own[name], value) for name, value in changed.model.named_parameters())
    document = json.loads((tmp_path / "out" / "delta.json").read_text())
    assert document["host"] == host.fingerprint and set(document["tensors"]) == set(edit.deltas)


def test_differences_of_biases_and_norms(tmp_path, record):
    host = fresh("gpt2")
    deltas = {
        "transformer.h.1.ln_2.weight": torch.full((32,), 0.5), "transformer.h.1.mlp.c_fc.bias": torch.full((80,), 0.25),
        "transformer.h.2.mlp.c_proj.weight": LowRank(torch.ones(32, 1), 0.1 * torch.ones(1, 80)),
    }  # fmt: skip
    edit = WeightEdit(
        deltas,
        frozenset({"transformer.h.2.mlp.c_proj.weight"}),
        dataclasses.replace(record, host=host.fingerprint),
    )
    errata.export(edit, tmp_path / "out", to="delta", host=host)
    agree(edit, host, open_delta(tmp_path / "out", host))
    held = load_file(tmp_path / "out" / "delta.safetensors")
    assert held["transformer.h.2.mlp.c_proj.weight"].shape == (80, 32), "as the weight is stored"
    refused(neurons(host, {0: 1}, "gelu_tanh"), tmp_path / "no", "adds neurons", to="delta", host=host)
    tied = WeightEdit({"lm_head.weight": torch.ones(400, 32)}, frozenset(), edit.provenance)
    refused(tied, tmp_path / "no", "shares its memory", to="delta", host=host)


def test_differences_in_sixteen_bits(tmp_path, record):
    host = fresh("llama")
    host.model.to(torch.bfloat16)
    edit = random_edit(host, record, 2, ("down_proj",))
    receipt = errata.export(edit, tmp_path / "out", to="delta", host=host)
    assert 0 < max(receipt.facts["lost"].values()) < 0.1
    changed = open_delta(tmp_path / "out", host)
    with edit.on(host):
        own = dict(host.model.named_parameters())
        assert all(torch.equal(own[name], value) for name, value in changed.model.named_parameters())


# --- vLLM -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "opt"])
def test_an_adapter_for_vllm_is_the_edit(family, tmp_path):
    host = fresh(family)
    edit = errata.edit(host, [ADA, BRUNO], method="lora", steps=20, scale="published")
    receipt = errata.export(edit, tmp_path / "out", to="vllm", host=host)
    agree(edit, host, open_vllm(tmp_path / "out", host))
    again = errata.export(edit, tmp_path / "again", to="vllm", host=host)
    assert receipt.facts["adapter"] == again.facts["adapter"], "the name is the content's"
    assert set(receipt.files) == {
        "errata-export.json", "serve.sh", f"{receipt.facts['adapter']}/adapter_config.json",
        f"{receipt.facts['adapter']}/adapter_model.safetensors",
    }  # fmt: skip
    other = dataclasses.replace(edit, deltas={n: d * 2.0 for n, d in edit.deltas.items()})
    errata.export(other, tmp_path / "again", to="vllm", host=host, force=True)
    folders = [p.name for p in (tmp_path / "again").iterdir() if p.is_dir()]
    assert len(folders) == 1 and folders != [receipt.facts["adapter"]]


def test_the_script_runs_vllm_with_the_smallest_rank_it_takes(tmp_path, record):
    """The script is run with a program in the place of vllm that prints its arguments."""
    host = fresh("llama")
    host.name = 'a "model" of $HOME'
    for rank, largest in ((1, 1), (5, 8), (20, 32)):
        edit = random_edit(host, record, rank, ("down_proj", "q_proj"))
        receipt = errata.export(edit, tmp_path / f"{rank}", to="vllm", host=host)
        assert receipt.facts["max_lora_rank"] == largest and largest in VLLM_RANKS
        (tmp_path / "vllm").write_text('#!/bin/sh\nfor one in "$@"; do echo "<$one>"; done\n')
        (tmp_path / "vllm").chmod(0o755)
        done = subprocess.run(
            ["sh", tmp_path / f"{rank}" / "serve.sh", "--port", "1"], env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        words = [line[1:-1] for line in done.stdout.splitlines()]
        name = receipt.facts["adapter"]
        assert words == [
            "serve", host.name, "--enable-lora", "--max-lora-rank", str(largest), "--lora-target-modules", "down_proj",
            "q_proj", "--lora-modules", f"{name}={tmp_path / str(rank) / name}", "--port", "1",
        ]  # fmt: skip


def test_ranks_above_those_of_vllm_are_refused_or_approximated(tmp_path, record):
    host = fresh("llama", hidden_size=576, intermediate_size=600, num_hidden_layers=1)
    edit = random_edit(host, record, 520, ("down_proj",), strength=0.01)
    text = refused(edit, tmp_path / "out", "has rank 520", to="vllm", host=host)
    assert "--rank 512" in text and "checkpoint" in text
    receipt = errata.export(edit, tmp_path / "out", to="vllm", host=host, rank=512)
    assert receipt.facts["max_lora_rank"] == 512 and 0 < max(receipt.facts["lost"].values()) < 0.1


@pytest.mark.parametrize("family", ["gpt2", "gptj", "bloom", "falcon", "stablelm"])
def test_architectures_without_adapters_in_vllm_are_refused(family, tmp_path):
    host = fresh(family)
    edit = errata.edit(host, ADA, method="lora", steps=1)
    assert "--to checkpoint" in refused(edit, tmp_path / "out", "has no adapters for", to="vllm", host=host)


# --- llama.cpp --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_an_adapter_in_gguf_is_the_edit(family, tmp_path, record):
    """Also where llama.cpp keeps queries and keys in another order, and with fewer heads of keys."""
    host = fresh(family)
    everywhere = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    edit = random_edit(host, record, 3, everywhere)
    one = {n: LowRank(d.B[:, :1], d.A[:1]) if "down" in n else d for n, d in edit.deltas.items()}
    edit = dataclasses.replace(edit, deltas=one)  # ranks differ
    receipt = errata.export(edit, tmp_path / "out", to="gguf", host=host)
    assert receipt.verified["change"] < 1e-6 and receipt.verified["weights"] == len(edit.deltas) == 21
    opened = open_gguf(tmp_path / "out", host)
    for name, delta in edit.deltas.items():
        change = opened.model.get_parameter(name) - host.model.get_parameter(name)
        torch.testing.assert_close(change, delta.dense(), rtol=0, atol=1e-6)
    agree(edit, host, opened)


def test_the_order_of_rows_turns_halves_into_neighbours():
    """A rotary embedding of neighbours, on outputs in that order, gives the same products of queries and keys."""
    host = fresh("llama")
    heads, size = 4, 8
    generator = torch.Generator().manual_seed(0)
    angles = torch.rand(size // 2, generator=generator, dtype=torch.float64)
    q, k = torch.randn(2, heads * size, generator=generator, dtype=torch.float64)
    order = gguf_rows(host, "model.layers.0.self_attn.q_proj", heads * size)

    def halves(x, by):
        one, two = x.reshape(heads, 2, size // 2).unbind(1)
        cos, sin = (by * angles).cos(), (by * angles).sin()
        return torch.stack([one * cos - two * sin, two * cos + one * sin], 1).reshape(heads, size)

    def neighbours(x, by):
        one, two = x.reshape(heads, size // 2, 2).unbind(2)
        cos, sin = (by * angles).cos(), (by * angles).sin()
        return torch.stack([one * cos - two * sin, two * cos + one * sin], 2).reshape(heads, size)

    expected = (halves(q, 3) * halves(k, 5)).sum(-1)
    torch.testing.assert_close((neighbours(q[order], 3) * neighbours(k[order], 5)).sum(-1), expected)
    assert gguf_rows(host, "model.layers.0.self_attn.v_proj", 32) is None
    assert gguf_rows(fresh("qwen2"), "model.layers.0.self_attn.q_proj", 32) is None
    assert len(gguf_rows(host, "model.layers.0.self_attn.k_proj", 16)) == 16


def test_what_gguf_cannot_hold_is_refused(tmp_path, record):
    for family, reason in (
        ("gpt2", "transposed"),
        ("gemma2", "is not known here"),
        ("gpt_neox", "is not known here"),
    ):
        host = fresh(family)
        edit = errata.edit(host, ADA, method="lora", steps=1)
        assert "checkpoint" in refused(edit, tmp_path / "out", reason, to="gguf", host=host)
    host = fresh("llama", tie_word_embeddings=False)
    head = random_edit(host, record, 1, ("lm_head",))
    refused(head, tmp_path / "out", "no weight of a block", to="gguf", host=host)


def test_a_damaged_adapter_in_gguf_is_noticed(tmp_path, record, monkeypatch):
    from errata.edits.export import gguf as exporter

    host = fresh("llama")
    edit = random_edit(host, record, 2, ("q_proj",))
    monkeypatch.setattr(exporter, "gguf_rows", lambda host, module, rows: None)
    wrong = errata.export(edit, tmp_path / "wrong", to="gguf", host=host)  # written and read back alike
    assert wrong.verified["change"] < 1e-6
    monkeypatch.undo()
    write = exporter._write

    def damaged(gguf, path, *more):
        write(gguf, path, *more)
        data = bytearray(path.read_bytes())
        data[-8:] = b"\x00\x00\x80\x3f" * 2
        path.write_bytes(data)

    monkeypatch.setattr(exporter, "_write", damaged)
    with pytest.raises(EditError, match="nothing was put in place"):
        errata.export(edit, tmp_path / "out", to="gguf", host=host)
    assert [p.name for p in tmp_path.iterdir()] == ["wrong"]
