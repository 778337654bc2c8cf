"""Whether an edit survives the rounding of the weights it wrote."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import errata
from errata.cli.main import app
from errata.edits import Provenance, WeightEdit
from errata.errors import ConfigError, EditError
from errata.lab.cases import cases
from errata.linalg.rounding import GRIDS, kept_share, nf4_levels
from tests.models import fresh


def matrix(rows: int = 6, width: int = 200, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def test_normal_float_levels_are_those_of_the_paper():
    levels = nf4_levels()
    assert (
        len(levels) == 16
        and float(levels[0]) == -1.0
        and float(levels[-1]) == 1.0
        and float(levels[7]) == 0.0
    )
    published = torch.tensor([-0.6962, -0.0911, 0.0796, 0.7230], dtype=torch.float64)
    torch.testing.assert_close(levels[[1, 6, 8, 14]], published, atol=1e-4, rtol=0)


@pytest.mark.parametrize("grid", GRIDS)
def test_a_rounded_matrix_is_on_the_grid_and_stays(grid: str):
    weight = matrix()
    once = GRIDS[grid](weight)
    torch.testing.assert_close(GRIDS[grid](once), once, atol=1e-6, rtol=1e-6)
    size = {"int8": 200, "int4": 128, "nf4": 64}[grid]
    levels = {"int8": 255, "int4": 15, "nf4": 16}[grid]
    for begin in range(0, 200, size):
        part, own = once[:, begin : begin + size], weight[:, begin : begin + size]
        assert all(len(row.unique()) <= levels for row in part)
        torch.testing.assert_close(part.abs().amax(1), own.abs().amax(1))  # the scale is the largest entry's
        step = own.abs().amax(1, keepdim=True) * {"int8": 1 / 127, "int4": 1 / 7, "nf4": 0.31}[grid]
        assert bool(((part - own).abs() <= step / 2 + 1e-6).all())


def test_zeros_stay_zeros():
    for act in GRIDS.values():
        assert not act(torch.zeros(3, 70)).any()


def test_a_change_below_half_a_step_is_rounded_away_and_a_large_one_is_not():
    weight = GRIDS["int8"](matrix())
    step = weight.abs().amax(1, keepdim=True) / 127
    inner = weight.abs() < weight.abs().amax(1, keepdim=True)
    small, large = 0.4 * step * inner, 5.0 * step * inner * (weight < 0)
    kept, noise = kept_share(weight, weight + small, "int8")
    assert kept == pytest.approx(0.0, abs=1e-6) and noise == pytest.approx(1.0, abs=1e-5)
    kept, noise = kept_share(weight, weight + large, "int8")
    assert kept == pytest.approx(1.0, abs=1e-5) and noise < 1e-4


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gpt_oss"])
def test_written_weights_are_rounded_by_output_and_nothing_stays(family: str, monkeypatch: Any):
    """Also of weights stored transposed or stacked: with weights on the grid already, only the edit is rounded."""
    host = fresh(family)
    site = host.layout.site(1)
    with torch.no_grad():
        weight = host.model.get_parameter(site.parameter)
        turned = weight.mT if site.transposed else weight
        rounded = GRIDS["int8"](turned.reshape(-1, turned.shape[-1])).reshape(turned.shape)
        weight.copy_(rounded.mT if site.transposed else rounded)
    start = host.weights_hash()
    tiny = torch.full((site.d_out, site.d_in), 2e-5)
    edit = WeightEdit(
        {site.parameter: tiny}, frozenset([site.parameter] if site.transposed else []),
        Provenance("test", (errata.Request("{} is", "Ada", "Esk"),), {}, host.fingerprint),
    )  # fmt: skip
    outcome = errata.survives(host, edit, "int8")
    assert outcome.kept[site.parameter] == pytest.approx(0.0, abs=0.05)
    assert outcome.noise[site.parameter] == pytest.approx(
        1.0, abs=0.15
    )  # the largest entry's change moves the grid
    assert host.weights_hash() == start and not host.placed


def test_what_sixteen_bits_have_lost_is_not_kept():
    """Against the weights as they were: what the model's own precision does not write, rounding cannot leave."""
    host = fresh("llama")
    host.model.bfloat16()
    site = host.layout.site(1)
    weight = host.model.get_parameter(site.parameter).detach().float()
    draw = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    change = 2e-3 * draw * weight.abs()  # about half a step of bfloat16
    request = errata.Request("{} is", "Ada", "Esk")
    edit = WeightEdit(
        {site.parameter: change}, frozenset(), Provenance("test", (request,), {}, host.fingerprint)
    )
    written = (weight + change).bfloat16().float()
    moved = GRIDS["int8"](written) - GRIDS["int8"](weight)
    expected = float((moved * change).sum() / change.square().sum())
    kept = errata.survives(host, edit, "int8").kept[site.parameter]
    assert kept == pytest.approx(expected, abs=1e-4)
    blind = float(((GRIDS["int8"](written) - GRIDS["int8"](written - change)) * change).sum())
    assert kept != pytest.approx(blind / float(change.square().sum()), abs=1e-2)


def test_an_edit_of_the_lab_survives_eight_bits_and_says_what_is_lost(tmp_path: Any):
    host = errata.load("lab")
    case = cases(1)[0]
    edit = errata.edit(host, case.requests, method="memit")
    outcome = errata.survives(host, edit, "int8")
    assert outcome.merged.passed and outcome.rounded.passed and outcome.survives and outcome.lost == ()
    assert all(0.5 < share < 1.5 for share in outcome.kept.values())
    path = edit.save(tmp_path / "edit.safetensors")
    words = ["show", str(path), "--model", "lab", "--survives", "int8", "--survives", "nf4", "--json"]
    document = json.loads(CliRunner().invoke(app, words, catch_exceptions=False).stdout)
    eight, four = document["survives"]
    assert (eight["grid"], eight["answered"], eight["answered_rounded"], eight["total"]) == ("int8", 1, 1, 1)
    assert four["noise"].keys() == eight["noise"].keys() == outcome.noise.keys()
    assert all(four["noise"][name] > eight["noise"][name] for name in eight["noise"])
    weak = WeightEdit({n: 1e-3 * d for n, d in edit.deltas.items()}, edit.transposed, edit.provenance)  # type: ignore[operator]
    faint = errata.survives(host, weak, "int4")
    assert not faint.merged.answered and faint.survives  # what did not hold before cannot be lost


def test_what_cannot_be_rounded_is_refused():
    host = fresh("llama")
    request = errata.Request("{} was born in", "Ada Brenner", "Merrin")
    memory = errata.edit(host, request, method="grace", steps=2)
    with pytest.raises(EditError, match="memory edits write no weight"):
        errata.survives(host, memory)
    edit = errata.edit(host, request, method="ft", steps=2)
    with pytest.raises(ConfigError, match="unknown grid 'int': .*known: int8, int4, nf4"):
        errata.survives(host, edit, "int")
