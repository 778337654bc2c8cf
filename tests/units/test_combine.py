"""errata combine: what it writes, what it refuses, and the search over alpha."""

from __future__ import annotations

import json

import pytest
import torch

from errata.edits import Edit, WeightEdit
from errata.edits.edit import Provenance
from errata.errors import ConfigError, EditError
from errata.ledger.interpolating import Point, choose, scan
from errata.ledger.settings import GuardSettings
from errata.linalg.lowrank import LowRank
from errata.types import Request
from tests.program import errata

NAME = "model.layers.1.mlp.down_proj.weight"


def write(folder, seed: int, host: str = "h") -> str:
    draw = torch.Generator().manual_seed(seed)
    thin = LowRank(torch.randn(4, 1, generator=draw), torch.randn(1, 6, generator=draw))
    record = Provenance("rome", (Request("{} lives in", f"Person {seed}", "Esk"),), {}, host)
    return str(WeightEdit({NAME: thin}, frozenset(), record).save(folder / f"{seed}.safetensors"))


def matrix(path) -> torch.Tensor:
    edit = Edit.load(path)
    assert isinstance(edit, WeightEdit)
    delta = edit.deltas[NAME]
    assert isinstance(delta, LowRank)
    return delta.dense()


def test_a_sum_is_written_and_named(tmp_path):
    files = [write(tmp_path, seed) for seed in (1, 2)]
    out = tmp_path / "sum.safetensors"
    done = errata("combine", *files, "--weights", "1,-0.5", "-o", out, "--interference", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["path"] == str(out)
    one, other = (matrix(path) for path in files)
    assert torch.allclose(matrix(out), one - 0.5 * other, atol=1e-6)
    assert document["interference"][0][0] == pytest.approx(1.0)
    assert [r["subject"] for r in document["edit"]["requests"]] == ["Person 1"]
    assert errata("combine", *files, "-o", out).returncode == 2, (
        "an existing file is replaced with --force only"
    )


def test_a_dry_run_and_a_table_alone_write_nothing(tmp_path):
    files = [write(tmp_path, seed) for seed in (1, 2)]
    done = errata(
        "combine", *files, "--how", "ties", "--density", "0.5", "-o", tmp_path / "t.safetensors", "--dry-run"
    )
    assert done.returncode == 0 and "dry run" in done.stdout and "dense" in done.stdout
    assert "cosines" in errata("combine", *files, "--interference").stdout
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "-o"),
        (("-o", "x.safetensors", "--density", "0.5"), "takes no --density"),
        (("-o", "x.safetensors", "--alphas", "0.5"), "for the search"),
        (("-o", "x.safetensors", "--weights", "1,b"), "expected numbers"),
        (("-o", "x.safetensors", "--how", "mean"), "expected one of"),
        (("-o", "x.safetensors", "--how", "paint"), "--model"),
        (("-o", "x.safetensors", "--how", "paint", "--model", "lab", "--most-lost", "2"), "'--most-lost'"),
        (("-o", "x.safetensors", "--how", "dare", "--drop", "1"), "below 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, words, message):
    done = errata("combine", write(tmp_path, 1), *words, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["1.safetensors"]


def test_the_choice_answers_the_most_within_the_bound():
    points = [
        Point(0.2, 0.0, 1.0, 1.0),
        Point(0.4, 0.5, 0.99, 1.0),
        Point(0.6, 1.0, 0.99, 1.0),
        Point(1.0, 1.0, 0.9, 1.1),
    ]
    assert choose(points) == points[2]
    assert choose(points, 0.0) is None, "what answers nothing is no patch"
    better = Point(0.5, 1.0, 1.0, 1.0)
    assert choose([*points, better]) == better
    assert choose(points[:1], 0.5) is None


@pytest.mark.slow
def test_a_scan_measures_each_strength_on_the_unedited_model(lab_host):
    from errata import edit

    one = edit(lab_host, Request("{} was born in", "Ada Brenner", "Tallow"), method="ft", steps=8)
    assert isinstance(one, WeightEdit)
    start = lab_host.weights_hash()
    settings = GuardSettings(statements=2, prompts=4, texts=4)
    points = scan(lab_host, one, alphas=(1.0, 0.01), settings=settings)
    assert [point.alpha for point in points] == [0.01, 1.0]
    assert points[0].answered == 0.0 and points[0].kept == 1.0
    assert points[1].answered == 1.0
    assert lab_host.weights_hash() == start
    with pytest.raises(ConfigError, match="above 0"):
        scan(lab_host, one, alphas=(0.0,))
    bare = WeightEdit(one.deltas, one.transposed, Provenance("import", (), {}, lab_host.fingerprint))
    with pytest.raises(EditError, match="no requests"):
        scan(lab_host, bare)
