"""Exports are read again before they count: each way in which a file can be wrong is noticed, and nothing is left."""

from __future__ import annotations

import json
import os
import stat
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import errata
from errata.edits.export import _adapter, _folder, checkpoint
from errata.edits.export._exporter import Plan
from errata.errors import EditError
from errata.host import reopen
from tests.exports import ADA, BRUNO, neurons
from tests.models import fresh


@pytest.fixture(scope="module")
def host():
    return fresh("llama")


@pytest.fixture(scope="module")
def edit(host):
    return errata.edit(host, ADA, method="lora", steps=20, scale="published")


def spoil(monkeypatch, owner, name: str, how) -> None:
    """Have what a writer writes changed before it is read again; ``how`` gets the folder."""
    write = getattr(owner, name)

    def wrong(*arguments: object) -> None:
        write(*arguments)
        how(next(one for one in arguments if isinstance(one, Path)))

    monkeypatch.setattr(owner, name, wrong)


def tensors(file: str, change):
    """Change the tensors of a file in a folder."""

    def how(folder: Path) -> None:
        held = load_file(folder / file)
        change(held)
        save_file(held, folder / file, metadata={"format": "pt"})

    return how


def config(file: str, **changes: object):
    """Change settings of a file in a folder; None takes one out."""

    def how(folder: Path) -> None:
        held = json.loads((folder / file).read_text(encoding="utf-8"))
        held.update(changes)
        (folder / file).write_text(
            json.dumps({k: v for k, v in held.items() if v is not None}), encoding="utf-8"
        )

    return how


def first(held: dict[str, torch.Tensor], part: str) -> str:
    return next(name for name in sorted(held) if part in name)


def scaled(held: dict[str, torch.Tensor]) -> None:
    name = first(held, "lora_B")
    held[name] = held[name] * 1.001


def not_finite(held: dict[str, torch.Tensor]) -> None:
    name = first(held, "lora_A")
    held[name] = held[name] * torch.nan


def missing(held: dict[str, torch.Tensor]) -> None:
    del held[first(held, "lora_A")]


def more(held: dict[str, torch.Tensor]) -> None:
    held["base_model.model.lm_head.lora_A.weight"] = torch.ones(2, 32)


@pytest.mark.parametrize(
    "how",
    [
        tensors("adapter_model.safetensors", scaled), tensors("adapter_model.safetensors", not_finite),
        tensors("adapter_model.safetensors", missing), tensors("adapter_model.safetensors", more),
        config("adapter_config.json", lora_alpha=80), config("adapter_config.json", r=None),
        config("adapter_config.json", use_rslora=True),
        lambda folder: (folder / "adapter_config.json").write_text("{"),
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"short"),
    ],
    ids=["scaled", "nan", "missing", "more", "alpha", "rank", "rslora", "no json", "damaged"],
)  # fmt: skip
def test_an_adapter_that_does_something_else_is_noticed(how, host, edit, tmp_path, monkeypatch):
    start = host.weights_hash()
    spoil(monkeypatch, _adapter.Adapter, "write", how)
    with pytest.raises(EditError, match="nothing was put in place"):
        errata.export(edit, tmp_path / "out", to="peft", host=host)
    assert not list(tmp_path.iterdir()) and host.weights_hash() == start and not host.edited
    errata.export(edit, tmp_path / "out", to="peft", host=host, verify=False)
    assert json.loads((tmp_path / "out" / "errata-export.json").read_text())["verified"] is None


def test_without_peft_the_factors_alone_are_compared(host, edit, tmp_path, monkeypatch):
    monkeypatch.setattr(reopen, "find_spec", lambda name: None)
    seen = errata.export(edit, tmp_path / "out", to="peft", host=host).verified
    assert seen["logits"] == "not compared: peft is not installed" and seen["change"] < 1e-6
    spoil(monkeypatch, _adapter.Adapter, "write", tensors("adapter_model.safetensors", scaled))
    with pytest.raises(EditError, match=r"the change of .* was read back"):
        errata.export(edit, tmp_path / "no", to="peft", host=host)


def other_weight(held: dict[str, torch.Tensor]) -> None:
    name = first(held, "layernorm")
    held[name] = held[name] + 1e-6


def without_edit(held: dict[str, torch.Tensor]) -> None:
    for name in held:
        if "down_proj" in name:
            held[name] = held[name] * 0.999


@pytest.mark.parametrize(
    "how",
    [
        tensors("model.safetensors", other_weight), tensors("model.safetensors", without_edit),
        config("config.json", rms_norm_eps=0.1), config("tokenizer.json", normalizer={"type": "Lowercase"}),
        lambda folder: (folder / "model.safetensors").write_bytes(b"short"),
    ],
    ids=["bit", "edit", "settings", "tokenizer", "damaged"],
)  # fmt: skip
def test_a_checkpoint_that_does_something_else_is_noticed(how, host, edit, tmp_path, monkeypatch):
    spoil(monkeypatch, checkpoint, "_write", how)
    try:
        receipt = errata.export(edit, tmp_path / "out", to="checkpoint", host=host)
    except EditError as error:
        assert "nothing was put in place" in str(error) and not list(tmp_path.iterdir())
    else:  # a setting that this tokenizer does not read
        assert (
            receipt.verified["difference"] == 0.0
            and "tokenizer_config" in Path(how.__code__.co_filename).name
        )


def test_neurons_that_were_not_written_are_noticed(tmp_path, monkeypatch):
    host = fresh("gpt2")
    edit = neurons(host, {1: 4}, "gelu_tanh")

    def idle(held: dict[str, torch.Tensor]) -> None:
        name = "transformer.h.1.mlp.c_proj.weight"
        held[name] = torch.cat([held[name][:80], 0 * held[name][80:]])

    spoil(monkeypatch, checkpoint, "_write", tensors("model.safetensors", idle))
    with pytest.raises(EditError, match="logits differ"):
        errata.export(edit, tmp_path / "out", to="checkpoint", host=host)
    assert not list(tmp_path.iterdir())


def test_the_receipt_and_the_record_say_what_was_compared(host, edit, tmp_path):
    for to, words in {"peft": "with the adapter in peft", "checkpoint": "opened by transformers"}.items():
        receipt = errata.export(edit, tmp_path / to, to=to, host=host)
        seen = receipt.verified
        assert words in seen["compared"] and seen["prompts"] == 5
        assert 0 <= seen["difference"] <= seen["bound"] < 1e-4 < seen["effect"]
        record = json.loads((tmp_path / to / "errata-export.json").read_text())
        assert record["verified"] == seen == receipt.to_dict()["verified"]
    assert receipt.verified["weights"] == len(list(host.model.parameters()))
    assert errata.export(edit, tmp_path / "dry", to="peft", host=host, dry_run=True).verified is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrower_numbers_have_a_wider_bound(dtype, host, edit, tmp_path):
    seen = errata.export(edit, tmp_path / "out", to="checkpoint", host=host, dtype=dtype).verified
    assert 1e-6 < seen["difference"] <= seen["bound"] < 0.5
    narrow = fresh("llama")
    narrow.model.to(getattr(torch, dtype))
    for to, options in (("checkpoint", {}), ("checkpoint", {"dtype": "float32"}), ("peft", {})):
        folder = tmp_path / f"{to} {len(options)}"
        assert (
            errata.export(edit, folder, to=to, host=narrow, foreign=True, **options).verified["prompts"] == 5
        )


def test_prompts_are_read_again(tmp_path, monkeypatch):
    from errata.edits.export import EXPORTERS, prompts

    edit = errata.edit(fresh("llama"), [ADA, BRUNO], method="in_prompt", scope="subject")
    assert errata.export(edit, tmp_path / "fine", to="prompts").verified["entries"] == 2
    plan = prompts.plan

    def wrong(*arguments: object) -> Plan:
        made = plan(*arguments)

        def write(folder: Path) -> None:
            made.write(folder)
            lines = (folder / "entries.jsonl").read_text(encoding="utf-8").splitlines()
            (folder / "entries.jsonl").write_text("\n".join(lines[:1]), encoding="utf-8")

        return Plan(made.facts, write, made.verify)

    exporter = EXPORTERS.get("prompts")
    monkeypatch.setattr(prompts, "EXPORTER", type(exporter)(**{**vars(exporter), "plan": wrong}))
    with pytest.raises(EditError, match=r"entries\.jsonl was read back"):
        errata.export(edit, tmp_path / "out", to="prompts")
    assert not (tmp_path / "out").exists()


# --- folders that last ------------------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="modes of POSIX")
def test_modes_are_those_of_the_mask(host, edit, tmp_path):
    before = os.umask(0o022)
    try:
        for to in ("peft", "checkpoint"):
            errata.export(edit, tmp_path / to, to=to, host=host)
    finally:
        os.umask(before)
    modes = {p.suffix: stat.S_IMODE(p.stat().st_mode) for p in tmp_path.rglob("*") if p.is_file()}
    assert modes[".safetensors"] == 0o644 and set(modes.values()) == {0o644}
    assert stat.S_IMODE((tmp_path / "peft").stat().st_mode) == 0o755


def test_everything_is_on_the_disk_before_it_is_put_in_place(tmp_path, monkeypatch):
    edit = errata.edit(fresh("llama"), ADA, method="in_prompt")
    synced: list[str] = []
    sync = _folder.files.sync
    replace = _folder._replace
    monkeypatch.setattr(_folder.files, "sync", lambda path: (synced.append(path.name), sync(path)))
    monkeypatch.setattr(_folder, "_replace", lambda *args: (synced.append("replaced"), replace(*args)))
    errata.export(edit, tmp_path / "out", to="prompts")
    place = synced.index("replaced")
    assert {"prompts.json", "entries.jsonl", "errata-export.json"} < set(synced[:place])
    assert synced[place + 1 :] == [tmp_path.name]


def kill_at(moment: str) -> None:
    """Have this process killed by its next export, when the folder is staged, gives way, or is in place."""

    def stop(*_: object, **__: object) -> None:
        os.kill(os.getpid(), 9)

    if moment == "staged":
        _folder._replace = stop
    elif moment == "replaced":
        _folder.shutil.rmtree = stop
    else:
        rename = Path.rename
        _folder._exchange = lambda one, other: False
        Path.rename = lambda self, to: (rename(self, to), stop())


@pytest.mark.skipif(os.name == "nt", reason="kill -9")
@pytest.mark.parametrize("moment", ["staged", "between", "replaced"])
def test_a_killed_export_leaves_an_export_and_is_swept(moment, tmp_path):
    edit = errata.edit(fresh("llama"), ADA, method="in_prompt")
    errata.export(edit, tmp_path / "out", to="prompts")
    newer = errata.edit(fresh("llama"), BRUNO, method="in_prompt")
    child = os.fork()
    if child == 0:
        kill_at(moment)
        errata.export(newer, tmp_path / "out", to="prompts", force=True)
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == 9
    left = [p.name for p in tmp_path.iterdir() if p.name != "out"]
    assert left, "a killed process leaves what it staged"
    assert (tmp_path / "out").exists() is (moment != "between")
    with pytest.raises(EditError, match="--force"):  # the next export sweeps, even where it is refused
        errata.export(edit, tmp_path / "out", to="prompts")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    held = json.loads((tmp_path / "out" / "entries.jsonl").read_text())["context"]
    assert ("Bruno" in held) is (moment == "replaced")
    errata.export(edit, tmp_path / "out", to="prompts", force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_a_living_process_stages_is_left_alone(tmp_path):
    edit = errata.edit(fresh("llama"), ADA, method="in_prompt")
    own = tmp_path / f"out.{os.getpid()}.1.part"
    other = tmp_path / f"out.{2**22 + 1}.1.part"
    reused = tmp_path / f"out.{os.getpid()}.2.part"
    names = (own, other, reused, tmp_path / "out.part", tmp_path / "output.99.1.part")
    for path in names:
        path.mkdir()
    errata.export(edit, tmp_path / "out", to="prompts")
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in names if p != other} | {"out"}
    assert not _folder.files.abandoned(own, os.getpid())
    assert time.time() - own.stat().st_mtime < 3600


def test_an_exchange_is_one_step_where_the_system_has_it(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not _folder._exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("no renameat2 here")
    assert (tmp_path / "a" / "b").exists() and (tmp_path / "b" / "a").exists()
