"""Statistics of other code: read as their writers meant them, or refused by name; nothing is unpickled."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

import errata
from errata import config as configs
from errata.errors import ConfigError, DataError, EditError
from errata.job import workspace
from errata.methods import REGISTRY
from errata.stats import external
from errata.stats.collect import Corpus
from tests.models import fresh

REQUEST = errata.Request("{} was born in", "Ada Brenner", "Merrin")
TEXT = "Ada Brenner was born in Tallow, and the rain fell on the old road. I saw you, you came."
FAST = {"steps": 3, "layers": [1], "prefixes": ["The old road. "]}


@pytest.fixture(scope="module")
def host():
    return fresh("gpt2")


@pytest.fixture(scope="module")
def site(host):
    return host.layout.site(1)


def second(width: int = 80, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    keys = torch.randn(3 * width, width, generator=draw, dtype=torch.float64)
    return keys.T @ keys / (3 * width)


def onto(width: int = 80, rank: int = 30) -> torch.Tensor:
    basis = torch.linalg.qr(second(width)).Q[:, :rank]
    return basis @ basis.T


# --- what is read ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sums_of_rome_and_memit_become_means(tmp_path, site, dtype):
    wanted = second()
    np.savez(
        tmp_path / "transformer.h.1.mlp.c_proj_float32_mom2_100000.npz",
        **{
            "constructor": "util.runningstats.CombinedStat()", "mom2.constructor": "SecondMoment()",
            "mom2.count": 240, "mom2.mom2": (240 * wanted).numpy().astype(dtype), "sample_size": 100000,
        },
    )  # fmt: skip
    found = external.second_moment(
        str(tmp_path / "transformer.h.{}.mlp.c_proj_float32_mom2_100000.npz"), site
    )
    torch.testing.assert_close(found.matrix, wanted, rtol=1e-6, atol=1e-6)
    assert "mom2_100000.npz@" in found.name


def test_a_matrix_alone_is_a_mean(tmp_path, site):
    np.savez(tmp_path / "c.npz", C=second().numpy())
    save_file({"whatever": second().float()}, tmp_path / "c.safetensors")
    for name in ("c.npz", "c.safetensors"):
        found = external.second_moment(str(tmp_path / name), site)
        torch.testing.assert_close(found.matrix, second(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["transformer.h.1.mlp.c_proj.weight", "transformer.h.1.mlp.c_proj", "1"])
def test_safetensors_name_the_parameter_the_module_or_the_layer(tmp_path, site, name):
    save_file({name: second(), "other": second(seed=1)}, tmp_path / "c.safetensors")
    found = external.second_moment(str(tmp_path / "c.safetensors"), site).matrix
    torch.testing.assert_close(found, second(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_projections_of_alphaedit_are_read_in_the_order_of_layers(tmp_path, site, dtype):
    stack = torch.stack([onto(rank=10), onto(rank=30)]).to(dtype)
    torch.save(stack, tmp_path / "null_space_project.pt")
    save_file({"P": stack}, tmp_path / "p.safetensors")
    np.savez(tmp_path / "p.npz", P=stack.numpy())
    for name in ("null_space_project.pt", "p.safetensors", "p.npz"):
        found = external.projection(str(tmp_path / name), site, (0, 1)).matrix
        torch.testing.assert_close(found, onto(rank=30), rtol=1e-5, atol=1e-5)


# --- what is refused -------------------------------------------------------------------------


class Bomb:
    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self):
        return (Path.touch, (self.place,))


def damaged(kind: str, folder: Path) -> Path:
    place = folder / "c.npz"
    good = second().numpy()
    lopsided, holed = good.copy(), good.copy()
    lopsided[0, 1] += 5
    holed[3, 3] = np.nan
    arrays = {
        "shape": {"C": good[:10]}, "other model": {"C": second(40).numpy()}, "lopsided": {"C": lopsided},
        "not finite": {"C": holed}, "negative": {"C": -good}, "no keys": {"mom2.mom2": good, "mom2.count": 0},
        "several": {"a": good, "b": good}, "objects": {"C": np.array([Bomb(folder / "ran")], dtype=object)},
        "numbers": {"C": np.float64(3)}, "words": {"C": np.array("second moment")},
    }  # fmt: skip
    if kind in arrays:
        np.savez(place, **arrays[kind])
    elif kind == "text":
        place.write_text("not a zip file")
    elif kind == "empty":
        place.write_bytes(b"")
    elif kind == "cut":
        np.savez(place, C=good)
        place.write_bytes(place.read_bytes()[:-2000])
    elif kind == "ending":
        place = folder / "c.bin"
        place.write_bytes(b"x")
    elif kind == "cut safetensors":
        place = folder / "c.safetensors"
        save_file({"1": second()}, place)
        place.write_bytes(place.read_bytes()[:300])
    elif kind == "unnamed":
        place = folder / "c.safetensors"
        save_file({"a": second(), "b": second()}, place)
    elif kind == "flat":
        place = folder / "c.safetensors"
        save_file({"a": second().flatten()}, place)
    return place


KINDS = [
    "shape", "other model", "lopsided", "not finite", "negative", "no keys", "several", "objects", "numbers",
    "words", "text", "empty", "cut", "ending", "cut safetensors", "unnamed", "flat",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_second_moment_is_refused_by_name(tmp_path, site, kind):
    place = damaged(kind, tmp_path)
    with pytest.raises(DataError, match=place.name) as caught:
        external.second_moment(str(place), site)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
    assert not (tmp_path / "ran").exists()


def test_a_missing_file_says_what_stands_for_the_layer(tmp_path, site):
    with pytest.raises(DataError, match="is replaced by the layer's number"):
        external.second_moment(str(tmp_path / "none.npz"), site)
    with pytest.raises(DataError, match=r"none\.1\.npz"):
        external.second_moment(str(tmp_path / "none.{}.npz"), site)


def test_nothing_of_a_torch_file_is_unpickled(tmp_path, site):
    torch.save(torch.stack([onto(), onto()]), tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(tmp_path / "bad.pt", "w") as bad:
        for entry in good.infolist():
            content = good.read(entry)
            if entry.filename.endswith("data.pkl"):
                content = pickle.dumps(Bomb(tmp_path / "ran"))
            bad.writestr(entry.filename, content)
    found = external.projection(str(tmp_path / "bad.pt"), site, (0, 1)).matrix
    torch.testing.assert_close(found, onto(), rtol=1e-6, atol=1e-6)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["layers", "two tensors", "half", "legacy", "no projection", "text"])
def test_a_projection_that_is_none_is_refused(tmp_path, site, kind):
    place = tmp_path / "null_space_project.pt"
    stack = torch.stack([onto(), onto()])
    if kind == "legacy":
        torch.save(stack, place, _use_new_zipfile_serialization=False)
    elif kind == "text":
        place.write_text("P")
    else:
        torch.save(
            {
                "layers": stack[:1].clone(), "two tensors": [stack, second()], "half": stack.half(),
                "no projection": stack * 0.5,
            }[kind],
            place,
        )  # fmt: skip
    with pytest.raises(DataError, match="null_space_project"):
        external.projection(str(place), site, (0, 1))


# --- in an edit ------------------------------------------------------------------------------


def texts() -> Corpus:
    return Corpus("one text", lambda: [TEXT])


@pytest.mark.parametrize("method", ["memit", "rome", "pmet", "emmet", "encore", "nse", "lyaplock", "anyedit"])
def test_own_statistics_written_out_and_read_again_give_the_same_edit(host, site, tmp_path, method):
    work = workspace(host, seed=0, corpus=texts())
    work.costs(host, [site], 10_000)
    ((moments, _),) = [made for key, made in work._cache.items() if key[0] == "moments"]
    save_file({site.parameter: moments.second.contiguous()}, tmp_path / "own.safetensors")
    options = {name: value for name, value in FAST.items() if method != "anyedit" or name != "prefixes"}
    own = errata.edit(host, REQUEST, method=method, corpus=texts(), tokens=10_000, **options)
    read = errata.edit(host, REQUEST, method=method, moments=str(tmp_path / "own.safetensors"), **options)
    one, other = (e.deltas[site.parameter].dense() for e in (own, read))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_a_file_is_read_again_once_it_changed_and_its_records_do_not_join(host, site, tmp_path):
    place = tmp_path / "c.npz"
    np.savez(place, C=second().numpy())
    options = {**FAST, "method": "memit", "moments": str(place), "history": True}
    first = errata.edit(host, REQUEST, **options)
    assert errata.edit(host, REQUEST, **options).digest == first.digest
    np.savez(place, C=second(seed=1).numpy())
    other = errata.edit(host, REQUEST, **options)
    assert other.digest != first.digest
    with pytest.raises(EditError, match="different cost matrices"):
        first.records[site.parameter].join(other.records[site.parameter])


def test_the_ridge_on_c_is_part_of_what_records_are_under(host, site):
    edits = [
        errata.edit(host, REQUEST, method="memit", corpus=texts(), tokens=10_000, cov_ridge=ridge, **FAST)
        for ridge in (1e-5, 1e-2)
    ]
    assert edits[0].digest != edits[1].digest
    assert edits[0].records[site.parameter].cost != edits[1].records[site.parameter].cost


# --- as settings -----------------------------------------------------------------------------


def test_prefixes_and_files_are_settings_that_yaml_keeps():
    given = {
        "prefixes": ["The rain. ", "I saw: "],
        "moments": "stats/{}.npz",
        "stop_loss": "1e-3",
        "cov_ridge": 0,
    }
    made = configs.make(REGISTRY.get("memit").config, given, "memit")
    assert made.prefixes == ("The rain. ", "I saw: ") and made.stop_loss == 1e-3
    again = yaml.safe_load(yaml.safe_dump({"prefixes": list(made.prefixes), "moments": made.moments}))
    assert configs.make(REGISTRY.get("memit").config, again, "memit").moments == "stats/{}.npz"
    told = configs.parse_assignments(['prefixes=["The rain. ", "I saw: "]', "moments=stats/{}.npz"])
    assert configs.make(REGISTRY.get("rome").config, told, "rome").prefixes == made.prefixes


@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("memit", {"prefixes": [1]}), ("memit", {"cov_ridge": -1.0}), ("rome", {"stop_loss": -0.1}),
        ("encore", {"top_count": 0}), ("encore", {"update_norm_lambda": -1.0}), ("rome", {"moments": 3}),
        ("pmet", {"nll_loss_factor": 0.0}), ("nse", {"bounds": "metres"}), ("lora", {"stop_loss": -1.0}),
    ],
)  # fmt: skip
def test_settings_that_mean_nothing_are_refused(method, given):
    with pytest.raises(ConfigError, match=next(iter(given))):
        configs.make(REGISTRY.get(method).config, given, method)


def test_prefixes_are_taken_as_they_stand(host):
    found = workspace(host, seed=0).contexts(host, [(5, 10)], "half_bare", ["I saw: ", "So "])
    assert [(c.prefix, c.weight) for c in found] == [("", 0.5), ("I saw: ", 0.25), ("So ", 0.25)]
    flat = workspace(host, seed=0).contexts(host, [(5, 10)], "flat", ["I saw: "])
    assert [(c.prefix, c.weight) for c in flat] == [("", 0.5), ("I saw: ", 0.5)]
    assert [c.prefix for c in workspace(host, seed=0).contexts(host, [(5, 10)], "flat", [])] == [""]
