"""Imports: adapters and checkpoints become edits that do what they did, or are refused with the reason."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import errata
from errata.edits.weight import WeightEdit
from errata.errors import EditError
from errata.host.host import Host
from errata.linalg.lowrank import LowRank
from tests.exports import ADA, BRUNO, open_adapter, open_checkpoint
from tests.models import fresh
from tests.program import errata as program
from tests.theory.test_export import agree
from tests.units.bench.small import write_model


def trained(host: Host, folder: Path, **options) -> None:
    """Have peft write an adapter with random factors."""
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["down_proj", "q_proj"], **options}
    model = peft.get_peft_model(copy.deepcopy(host.model), peft.LoraConfig(task_type="CAUSAL_LM", **options))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)


CASES = {
    "plain": {}, "alpha": {"lora_alpha": 1}, "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 7}, "alpha_pattern": {"down_proj": 9}},
    "regex": {"target_modules": r".*\.(1|2)\..*(up|down)_proj"}, "all": {"target_modules": "all-linear"},
    "layers": {"layers_to_transform": [1]}, "gaussian": {"init_lora_weights": "gaussian"},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_of_peft_is_an_edit(case, tmp_path):
    host = fresh("llama")
    start = host.weights_hash()
    trained(host, tmp_path / "adapter", **CASES[case])
    edit = errata.import_edit(tmp_path / "adapter", host)
    assert host.weights_hash() == start and edit.provenance.method == "import"
    agree(edit, host, open_adapter(tmp_path / "adapter", host))
    loaded = errata.Edit.load(edit.save(tmp_path / "edit.safetensors"))
    assert loaded.digest == edit.digest
    loaded.apply_(host)
    loaded.revert_(host)
    assert host.weights_hash() == start
    errata.export(edit, tmp_path / "again", to="peft", host=host)
    agree(edit, host, open_adapter(tmp_path / "again", host))


def test_an_adapter_beside_transposed_weights(tmp_path):
    host = fresh("gpt2")
    trained(host, tmp_path / "adapter", target_modules=["c_proj", "c_attn"], fan_in_fan_out=True)
    edit = errata.import_edit(tmp_path / "adapter", host)
    assert edit.transposed == frozenset(edit.deltas)
    agree(edit, host, open_adapter(tmp_path / "adapter", host))


def test_what_was_exported_comes_back(tmp_path):
    for family in ("gpt2", "llama", "gpt_neox"):
        host = fresh(family)
        edit = errata.edit(host, [ADA, BRUNO], method="lora", steps=10, scale="published")
        for to in ("peft", "checkpoint"):
            folder = tmp_path / f"{family} {to}"
            errata.export(edit, folder, to=to, host=host)
            again = errata.import_edit(folder, host)
            assert again.deltas.keys() == edit.deltas.keys() and again.transposed == edit.transposed
            for name, delta in edit.deltas.items():
                other = again.deltas[name]
                assert isinstance(other, LowRank)
                torch.testing.assert_close(other.dense(), delta.dense(), rtol=0, atol=1e-6)
            assert again.provenance.notes["exported_from"] == edit.digest


def test_a_checkpoint_is_thin_where_it_can_be_and_whole_elsewhere(tmp_path):
    host = fresh("llama")
    record = errata.edit(host, ADA, method="in_prompt").provenance
    generator = torch.Generator().manual_seed(0)
    names = [host.layout.site(layer).parameter for layer in range(2)]
    thin = LowRank(torch.randn(32, 2, generator=generator), 0.1 * torch.randn(2, 80, generator=generator))
    deltas = {
        names[0]: thin, names[1]: 0.1 * torch.randn(32, 80, generator=generator),
        "model.layers.2.input_layernorm.weight": torch.full((32,), 0.5),
    }  # fmt: skip
    edit = WeightEdit(deltas, frozenset(), record)
    errata.export(edit, tmp_path / "out", to="checkpoint", host=host)
    again = errata.import_edit(tmp_path / "out", host)
    assert again.deltas.keys() == deltas.keys() and again.provenance.config["thin"] == 1
    assert isinstance(again.deltas[names[0]], LowRank) and again.deltas[names[0]].rank == 2
    agree(again, host, open_checkpoint(tmp_path / "out", host))
    again.apply_(host)
    again.revert_(host)
    errata.export(edit, tmp_path / "narrow", to="checkpoint", host=host, dtype="bfloat16")
    (tmp_path / "narrow" / "errata-export.json").unlink()
    rounded = errata.import_edit(tmp_path / "narrow", host)
    assert rounded.deltas.keys() == deltas.keys(), "what rounding the other weights did is no change"


def changed(folder: Path, file: str, change) -> None:
    """Change an adapter's settings or tensors."""
    path = folder / file
    if file.endswith(".json"):
        held = json.loads(path.read_text())
        change(held)
        path.write_text(json.dumps(held))
    else:
        held = load_file(path)
        change(held)
        save_file(held, path)


CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
ODD = "base_model.model.x.lora_{}"
KEY = "base_model.model.model.layers.0.mlp.down_proj.lora_{}.weight"


def setting(**values):
    return CONFIG, lambda held: held.update(values)


FAULTS = {
    "dora": (*setting(use_dora=True), "DoRA"), "bias": (*setting(bias="all"), "biases of the model"),
    "lora bias": (*setting(lora_bias=True), "have biases"),
    "saved": (*setting(modules_to_save=["lm_head"]), "whole modules"),
    "pissa": (*setting(init_lora_weights="pissa"), "changes the base model's weights"),
    "type": (*setting(peft_type="IA3"), "only LoRA"), "unknown": (*setting(use_qalora=True), "use_qalora"),
    "rank": (*setting(r=5), "has rank 5, and its factors have 4"), "alpha": (*setting(lora_alpha=-1), "positive"),
    "words": (*setting(lora_alpha="16"), "positive"), "regex": (*setting(target_modules="("), "no regular expression"),
    "targets": (*setting(target_modules=["down_proj"]), "does not name"),
    "more targets": (*setting(target_modules=["down_proj", "q_proj", "k_proj"]), "no factors of"),
    "no targets": (*setting(target_modules=7), "no list of names"),
    "missing": (TENSORS, lambda held: held.pop(KEY.format("A")), "or one is missing"),
    "nan": (TENSORS, lambda held: held.update({KEY.format("A"): held[KEY.format("A")] * torch.nan}), "NaN"),
    "shape": (TENSORS, lambda held: held.update({KEY.format("A"): torch.ones(4, 81)}), "of another model"),
    "magnitude": (TENSORS, lambda held: held.update({ODD.format("magnitude_vector"): torch.ones(2)}), "DoRA"),
    "embedding": (TENSORS, lambda held: held.update({ODD.format("embedding_A"): torch.ones(2)}), "embeddings"),
    "head": (
        TENSORS,
        lambda held: held.update({f"base_model.model.nothing.q_proj.lora_{p}.weight": torch.ones(4, 4) for p in "AB"}),
        "does not have",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    trained(fresh("llama"), folder)
    return folder


@pytest.mark.parametrize("fault", FAULTS)
def test_an_adapter_that_is_more_or_less_is_refused(fault, adapter, tmp_path):
    host = fresh("llama")
    start = host.weights_hash()
    shutil.copytree(adapter, tmp_path / "adapter")
    file, change, reason = FAULTS[fault]
    changed(tmp_path / "adapter", file, change)
    with pytest.raises(EditError, match=reason):
        errata.import_edit(tmp_path / "adapter", host)
    assert host.weights_hash() == start


def test_pickled_and_damaged_files_are_not_opened(adapter, tmp_path):
    host = fresh("llama")
    shutil.copytree(adapter, tmp_path / "adapter")
    path = tmp_path / "adapter" / TENSORS
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(EditError, match="damaged"):
        errata.import_edit(tmp_path / "adapter", host)
    path.rename(path.with_name("adapter_model.bin"))
    with pytest.raises(EditError, match="pickled weights are never opened"):
        errata.import_edit(tmp_path / "adapter", host)
    (tmp_path / "empty").mkdir()
    with pytest.raises(EditError, match="nothing to import"):
        errata.import_edit(tmp_path / "empty", host)
    with pytest.raises(EditError, match="no such folder"):
        errata.import_edit(tmp_path / "none", host)
    host.model.save_pretrained(tmp_path / "same")
    with pytest.raises(EditError, match="no edit in it"):
        errata.import_edit(tmp_path / "same", host)
    (tmp_path / "same" / "model.safetensors").rename(tmp_path / "same" / "pytorch_model.bin")
    with pytest.raises(EditError, match="never opened"):
        errata.import_edit(tmp_path / "same", host)


def test_checkpoints_that_compute_something_else_are_refused(tmp_path):
    host = fresh("llama")
    other = fresh("llama", seed=1)
    other.model.config.rms_norm_eps = 0.1
    other.model.save_pretrained(tmp_path / "settings")
    with pytest.raises(EditError, match=r"config\.json"):
        errata.import_edit(tmp_path / "settings", host)
    fresh("llama", vocab_size=410).model.save_pretrained(tmp_path / "larger")
    with pytest.raises(EditError, match="is \\[410, 32\\]"):
        errata.import_edit(tmp_path / "larger", host)
    fresh("gpt2").model.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(EditError, match="of type 'gpt2'"):
        errata.import_edit(tmp_path / "gpt2", host)


def test_exports_of_errata_are_checked_against_their_record(tmp_path):
    host, other = fresh("llama"), fresh("llama", seed=1)
    edit = errata.edit(host, ADA, method="lora", steps=2)
    errata.export(edit, tmp_path / "out", to="peft", host=host)
    with pytest.raises(EditError, match="was exported for host"):
        errata.import_edit(tmp_path / "out", other)
    assert errata.import_edit(tmp_path / "out", other, foreign=True).provenance.host == other.fingerprint
    changed(tmp_path / "out", CONFIG, lambda held: held.update(lora_alpha=80))
    with pytest.raises(EditError, match="not what the export wrote"):
        errata.import_edit(tmp_path / "out", host)


def test_the_verb_writes_a_file_or_asks_the_guard(tmp_path):
    (tmp_path / "model").mkdir()
    write_model(tmp_path / "model")
    host = errata.load(str(tmp_path / "model"), device="cpu")
    modules = ["c_proj"]
    trained(host, tmp_path / "strong", target_modules=modules, fan_in_fan_out=True)
    shutil.copytree(tmp_path / "strong", tmp_path / "weak")
    changed(tmp_path / "weak", TENSORS, lambda held: held.update({n: 1e-3 * t for n, t in held.items()}))
    made = program("import", "weak", "--model", "model", "-o", "edit.safetensors", cwd=tmp_path)
    assert made.returncode == 0 and "edit written to" in made.stdout, made.stderr
    edit = errata.Edit.load(tmp_path / "edit.safetensors")
    agree_weakly(edit, host, open_adapter(tmp_path / "weak", host))
    assert program("init", "--model", "model", cwd=tmp_path).returncode == 0
    done = program("import", "weak", "-m", "from outside", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["applied"] and document["measured"]["answered"] is None
    assert document["measured"]["perplexity"] == pytest.approx(1, abs=0.01)
    refused = program("import", "strong", cwd=tmp_path)
    assert refused.returncode == 5 and "out of bounds" in refused.stdout
    again = program("import", "weak", cwd=tmp_path)
    assert again.returncode != 0 and "in place already" in again.stderr
    status = json.loads(program("status", "--json", cwd=tmp_path).stdout)
    assert json.dumps(status).count(document["edit"]["digest"]) >= 1
    words = program("import", "weak", "-o", "edit.safetensors", "--model", "model", cwd=tmp_path)
    assert words.returncode == 2 and "exists" in words.stderr


def agree_weakly(edit: errata.Edit, host: Host, adapted: Host) -> None:
    batch = host.batch([host.encode_prompt(ADA.text)])
    with torch.no_grad(), edit.on(host):
        torch.testing.assert_close(adapted.forward(batch), host.forward(batch), atol=1e-5, rtol=1e-5)
