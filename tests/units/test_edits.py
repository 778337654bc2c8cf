"""Edits: files that are refused, hosts that are refused, what is never lost."""

from __future__ import annotations

import json
import stat
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from safetensors.torch import save, save_file

import errata
from errata.checksum import checksum
from errata.edits import Provenance, WeightEdit
from errata.edits import format as file_format
from errata.errors import EditError
from errata.linalg.lowrank import LowRank
from tests.models import fresh


def make(host, seed: int = 0, scale: float = 0.1, dense: bool = False) -> WeightEdit:
    site = host.layout.site(1)
    g = torch.Generator().manual_seed(seed)
    delta = LowRank(torch.randn(site.d_out, 2, generator=g) * scale, torch.randn(2, site.d_in, generator=g))
    record = Provenance("test", (errata.Request("{} is", "Ada", "Esk"),), {}, host.fingerprint)
    return WeightEdit(
        {site.parameter: delta.dense() if dense else delta},
        frozenset({site.parameter} if site.transposed else ()),
        record,
    )


@pytest.fixture
def host():
    return fresh("gpt2")


def test_weight_is_base_plus_sum_whatever_the_order(host):
    start = host.weights_hash()
    edits = [make(host, seed) for seed in range(3)]
    hashes = set()
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        for i in order:
            edits[i].apply_(host)
        hashes.add(host.weights_hash())
        for i in (1, 0, 2):
            edits[i].revert_(host)
        assert host.weights_hash() == start
    assert len(hashes) == 1
    assert list(host.placed) == []


def test_two_hosts_of_one_model_agree(host):
    twin = errata.Host(host.model, host.tokenizer, name="twin")
    edit = make(host)
    edit.apply_(host)
    with pytest.raises(EditError, match="active"):
        make(host).apply_(twin)
    edit.revert_(twin)
    with pytest.raises(EditError, match="not active"):
        edit.revert_(host)


def test_dense_and_thin_deltas_do_the_same(host):
    thin, dense = make(host), make(host, dense=True)
    weight = host.model.get_parameter(next(iter(thin.deltas)))
    with thin.on(host):
        one = weight.detach().clone()
    with dense.on(host):
        torch.testing.assert_close(weight.detach(), one)


def test_foreign_host_is_refused_with_both_names_and_can_be_overruled(host, tmp_path):
    edit = errata.Edit.load(make(host).save(tmp_path / "e.safetensors"))
    other = fresh("gpt2", seed=9)
    start = other.weights_hash()
    with pytest.raises(EditError) as caught:
        edit.apply_(other)
    assert host.fingerprint in str(caught.value) and other.fingerprint in str(caught.value)
    assert other.weights_hash() == start
    before = edit.save(tmp_path / "before.safetensors").read_bytes()
    with edit.on(other, foreign=True) as placement:
        assert other.weights_hash() != start
    assert other.fingerprint in placement.overrides[0]
    assert edit.save(tmp_path / "after.safetensors").read_bytes() == before, "being placed changes no edit"


def test_fingerprint_is_of_the_unedited_model_and_of_its_content(host):
    edit = make(host)
    name = host.fingerprint
    edit.apply_(host)
    assert host.fingerprint == name
    edit.revert_(host)
    assert fresh("gpt2").fingerprint == name
    assert fresh("gpt2", seed=1).fingerprint != name
    half = fresh("gpt2")
    half.model.bfloat16()
    assert half.fingerprint == name, "one checkpoint in two precisions is one host"


def test_an_edit_lost_to_rounding_is_refused_not_silent(host):
    host.model.bfloat16()
    start = host.weights_hash()
    with pytest.raises(EditError, match="rounding"):
        make(host, scale=1e-9).apply_(host)
    assert host.weights_hash() == start and list(host.placed) == []


def test_shape_and_name_are_checked_before_anything_changes(host):
    edit = make(host)
    ((name, delta),) = edit.deltas.items()
    start = host.weights_hash()
    wrong = WeightEdit({name: LowRank(delta.B[:5], delta.A)}, edit.transposed, edit.provenance)
    with pytest.raises(EditError, match="expects"):
        wrong.apply_(host)
    with pytest.raises(EditError, match="no weight"):
        WeightEdit({name: delta, "nowhere.weight": delta}, edit.transposed, edit.provenance).apply_(host)
    assert host.weights_hash() == start


@pytest.mark.parametrize("cut", [3, 40, 700, -5])
def test_truncated_files_are_refused(host, tmp_path, cut):
    path = make(host).save(tmp_path / "e.safetensors")
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(EditError, match="truncated|not an edit"):
        errata.Edit.load(path)


def test_changed_numbers_are_noticed(host, tmp_path):
    path = make(host).save(tmp_path / "e.safetensors")
    data = bytearray(path.read_bytes())
    data[-3] ^= 0x40
    path.write_bytes(bytes(data))
    with pytest.raises(EditError, match="recorded"):
        errata.Edit.load(path)


def test_pickles_and_foreign_files_are_refused(host, tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "a.pt")
    import pickle

    (tmp_path / "b.pkl").write_bytes(pickle.dumps({"a": 1}))
    for name in ("a.pt", "b.pkl"):
        with pytest.raises(EditError, match="pickle"):
            errata.Edit.load(tmp_path / name)
    save_file({"x": torch.zeros(2)}, tmp_path / "c.safetensors")
    with pytest.raises(EditError, match="not an edit"):
        errata.Edit.load(tmp_path / "c.safetensors")
    save_file(
        {"x": torch.zeros(2)}, tmp_path / "d.safetensors", metadata={"errata": json.dumps({"format": 99})}
    )
    with pytest.raises(EditError, match="format 99"):
        errata.Edit.load(tmp_path / "d.safetensors")
    with pytest.raises(EditError, match="does not exist"):
        errata.Edit.load(tmp_path / "nothing.safetensors")


def test_unwritable_paths_leave_nothing_behind(host, tmp_path):
    edit = make(host)
    for path in (tmp_path, tmp_path / "no" / "folder.safetensors"):
        with pytest.raises(EditError, match="cannot write"):
            edit.save(path)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_keeps_the_old_file(host, tmp_path, monkeypatch):
    path = make(host).save(tmp_path / "e.safetensors")
    old = path.read_bytes()
    from pathlib import Path

    def fail(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(EditError, match="No space"):
        make(host, seed=5).save(path)
    assert path.read_bytes() == old
    assert stat.S_ISREG(path.stat().st_mode) and len(list(tmp_path.iterdir())) == 1


def test_edits_that_disagree_on_how_a_delta_is_laid_out_still_add_up():
    """A square Conv1D weight: one edit dense as the mathematics has it, one as the weight is stored."""
    host = fresh("gpt2", n_inner=32)
    site = host.layout.site(1)
    start, base = host.weights_hash(), host.weight(site)
    assert site.transposed and site.d_in == site.d_out
    one = make(host, 0, dense=True)
    (delta,) = one.deltas.values()
    other = WeightEdit({site.parameter: 2 * delta.mT}, frozenset(), one.provenance)  # stored [d_in, d_out]
    for first, second in ((one, other), (other, one)):
        first.apply_(host)
        second.apply_(host)
        torch.testing.assert_close(host.weight(site), base + 3 * delta)
        first.revert_(host)
        second.revert_(host)
        assert host.weights_hash() == start


def test_an_interrupt_while_applying_leaves_nothing_half_done(host, monkeypatch):
    from errata.edits import weight as room

    ((name, delta),) = make(host).deltas.items()
    names = [name, host.layout.site(2).parameter]
    edit = WeightEdit(dict.fromkeys(names, delta), frozenset(names), make(host).provenance)
    start, written = host.weights_hash(), []
    write = room._write

    def interrupted(*args):
        write(*args)
        written.append(args[-1])
        if len(written) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(room, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        edit.apply_(host)
    assert written[:2] == names and host.weights_hash() == start and list(host.placed) == []


def test_what_merging_lost_stands_in_the_receipt_and_never_in_the_edit(host, tmp_path):
    host.model.bfloat16()
    edit = make(host)
    digest, described = edit.digest, edit.summary()
    with edit.on(host) as placement:
        (loss,) = placement.lost.values()
        assert 0 < loss < 0.5 and placement.digest == digest
    loaded = errata.Edit.load(edit.save(tmp_path / "e.safetensors"))
    assert loaded.digest == digest and edit.summary() == loaded.summary() == described


def test_an_edit_is_frozen_and_its_digest_covers_all_that_it_says(host):
    edit = make(host)
    with pytest.raises(FrozenInstanceError):
        edit.provenance = edit.provenance  # type: ignore[misc]
    made = edit.provenance
    for changed in (
        replace(made, method="another"),
        replace(made, seed=made.seed + 1),
        replace(made, config={**made.config, "steps": 99}),
        replace(made, host="0" * 16),
        replace(made, requests=()),
        replace(made, parents=("1" * 16,)),
        replace(made, notes={"loss": 1.0}),
    ):
        assert replace(edit, provenance=changed).digest != edit.digest
    assert replace(edit, transposed=frozenset()).digest != edit.digest or not edit.transposed
    assert replace(edit, provenance=replace(made, created="2030-01-01T00:00:00+00:00")).digest == edit.digest


@pytest.mark.parametrize("version", [1, 2])
def test_files_of_earlier_versions_load(host, tmp_path, version):
    """Their digest was of tensors alone, and their provenance recorded what they had been applied against."""
    edit = make(host)
    content = {
        "kind": "weight",
        "digest": file_format.tensor_digest(edit.parts()),
        "provenance": {k: v for k, v in edit.provenance.to_dict().items() if k not in ("parents", "created")}
        | {"overrides": ["made for another host"]},
        **edit.body(),
        "format": version,
    }
    if version > 1:
        content["protection"] = file_format.PROTECTION
    content = json.loads(json.dumps(content))
    if version > 1:
        content["sha256"] = checksum(content, edit.parts())
    path = tmp_path / "old.safetensors"
    path.write_bytes(save(dict(edit.parts()), metadata={file_format.KEY: json.dumps(content)}))
    loaded = errata.Edit.load(path)
    assert loaded.provenance.requests == edit.provenance.requests and not loaded.provenance.parents
    assert loaded.provenance.notes["overrides"] == ["made for another host"]
    assert all(torch.equal(one, edit.parts()[name]) for name, one in loaded.parts().items())
    again = errata.Edit.load(loaded.save(tmp_path / "new.safetensors"))
    assert again.digest == loaded.digest
