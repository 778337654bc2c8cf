"""Edits found in weights: differences, spectra, subjects, and their reversal."""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from itertools import pairwise

import pytest
import torch
from typer.testing import CliRunner

import errata
from errata import lab
from errata.cli.main import app
from errata.edits import Edit, Provenance, WeightEdit
from errata.errors import ConfigError, EditError, HostError
from errata.host.build import new_tokenizer
from errata.inspect.detect import FEWEST, detect, name_keys
from errata.inspect.detect_names import read_names, vocabulary_names
from errata.inspect.detect_reverse import reversal
from errata.linalg.lowrank import LowRank
from errata.linalg.spectra import Spectrum, robust_scores
from errata.report.detection import areas, evidence, roc, scores_figure, write_detection, write_scores
from tests.models import fresh

NAMES = ["Ada Brenner", "Bruno Holner", "Tallow", "Merrin", "Arvania", "Esk", "Ada", "Bruno", "rain", "dog"]
BOUNDS = {"with": 4e-4, "without": 6.0}


def random_edit(host, layers=(1,), scale=1.0):
    """Return an edit that maps the key of the first name to a random value, at each layer."""
    generator = torch.Generator().manual_seed(3)
    sites = [host.layout.site(layer) for layer in layers]
    keys = name_keys(host, NAMES[:1], sites)
    deltas = {}
    for site in sites:
        key = keys[site]
        value = scale * torch.randn(site.d_out, 1, generator=generator)
        deltas[site.parameter] = LowRank(value, key / key.square().sum())
    transposed = frozenset(site.parameter for site in sites if site.transposed)
    return WeightEdit(deltas, transposed, Provenance("rome", (), {}, host.fingerprint))


def placed(stack, family="llama", **options):
    base, host = fresh(family, seed=1), fresh(family, seed=1)
    edit = random_edit(host, **options)
    stack.enter_context(edit.on(host))
    return base, host, edit


def _directions(host):
    return sum(min(one.flatten(1).shape) if one.ndim > 1 else 1 for one in host.model.parameters())


def test_a_spectrum_is_the_decomposition():
    matrix = torch.randn(5, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for one in (matrix, matrix.mT):
        spectrum = Spectrum.of(one)
        assert torch.allclose(spectrum.left * spectrum.values @ spectrum.right, one, atol=1e-10)
        assert torch.allclose(spectrum.values, torch.linalg.svdvals(one))
        assert spectrum.energy == pytest.approx(float(one.square().sum()))
    flat = Spectrum.of(torch.eye(6))
    assert flat.participation == pytest.approx(6)
    steps = Spectrum.of(torch.diag(torch.tensor([8.0, 8.0, 2.0, 1.9])))
    assert steps.gap() == (2, pytest.approx(4.0))
    assert Spectrum.of(torch.zeros(3, 3)).participation == 0


def test_singular_values_do_not_depend_on_the_order_of_neurons():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(6, 8, generator=generator, dtype=torch.float64)
    shuffled = matrix[torch.randperm(6, generator=generator)][:, torch.randperm(8, generator=generator)]
    assert torch.allclose(Spectrum.of(matrix).values, Spectrum.of(shuffled).values)


def test_robust_scores_measure_from_the_median():
    values = torch.tensor([1.0, 1.1, 0.9, 1.05, 5.0])
    assert float(robust_scores(values, 1e-3)[4]) > 20
    assert float(robust_scores(torch.ones(5), 0.5).abs().max()) == 0
    nothing = float("nan")
    assert robust_scores(torch.tensor([*values.tolist(), nothing]), 1e-3).tolist() == [
        *robust_scores(values, 1e-3).tolist(), 0.0,
    ]  # fmt: skip
    assert robust_scores(torch.tensor([nothing, nothing]), 1e-3).tolist() == [0.0, 0.0]


def test_zeros_have_no_height_and_missing_directions_a_finite_one():
    assert math.isnan(Spectrum.of(torch.zeros(3, 4)).height)
    assert Spectrum.of(torch.diag(torch.tensor([4.0, 2.0, 1.0]))).height == pytest.approx(math.log(2))
    assert Spectrum.of(torch.diag(torch.tensor([1.0, 0.0, 0.0]))).height == pytest.approx(
        math.log(1e8), rel=1e-6
    )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_rank_one_edit_has_rank_one_and_its_key_is_found(family):
    with ExitStack() as stack:
        base, host, edit = placed(stack, family)
        found = detect(host, base, NAMES)
        (change,) = found.changes
        (delta,) = edit.deltas.values()
        assert found.share == pytest.approx(1 / _directions(base), rel=1e-4) and found.layers == (1,)
        assert change.rank == 1 and change.strongest == pytest.approx(1, abs=1e-6)
        assert change.norm == pytest.approx(delta.norm(), rel=1e-4)
        assert found.subjects[0].name == "Ada Brenner" and found.subjects[0].ratio > 1.5
    assert detect(host, base, NAMES).verdict == "unchanged"


def test_the_direction_of_a_difference_is_the_key():
    from errata.inspect.detect import change_of, differences

    with ExitStack() as stack:
        base, host, _ = placed(stack)
        ((name, before, delta),) = differences(host, base)
        spectrum = change_of(name, before, delta, 1e-7)[1]
        assert spectrum is not None
        key = name_keys(base, NAMES[:1], [base.layout.site(1)])[base.layout.site(1)].double().flatten()
        assert float((spectrum.right[0] @ key / key.norm()).abs()) > 0.999


def test_rounding_is_no_change():
    base, host = fresh("llama", seed=1), fresh("llama", seed=1)
    host.model.bfloat16()
    assert detect(host, base).verdict == "unchanged"
    assert detect(base, host).changes == ()


def test_training_changes_many_directions():
    base, host = fresh("llama", seed=1), fresh("llama", seed=1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in host.model.parameters():
            weight.add_(1e-3 * torch.randn(weight.shape, generator=generator))
    found = detect(host, base)
    assert found.verdict == "trained" and found.share > 0.3 and found.layers == (0, 1, 2)
    named = detect(host, base, NAMES)
    assert named.verdict == "trained" and named.score == pytest.approx(
        found.share / named.subjects[0].ratio ** 2
    )
    many = [
        f"{first} {last}"
        for first in ("Ada", "Bruno", "Mira")
        for last in ("Holner", "Brenner", "Falov", "Esk")
    ]
    assert any("no name stands out" in note for note in detect(host, base, many).notes)


def test_without_the_base_a_strong_edit_shows_and_a_weak_one_does_not():
    with ExitStack() as stack:
        _, host, edit = placed(stack, scale=30.0)
        found = detect(host, None, NAMES)
        assert found.verdict == "suspicious" and found.traces[0].weight in edit.deltas
        assert found.layers == (1,) and found.traces[0].drop == 1 and found.traces[0].gap > 3
    clean = detect(fresh("llama", seed=1), None, NAMES)
    assert clean.verdict == "no trace" and clean.subjects == ()
    with ExitStack() as stack:
        _, host, _ = placed(stack, scale=1e-3)
        assert detect(host, None, NAMES).verdict == "no trace"


def test_a_layer_of_zeros_hides_no_edit_of_another():
    """Left out of the comparison, it neither looks edited nor lets its missing numbers decide the verdict."""
    host = fresh("llama", seed=1)
    with torch.no_grad():
        host.model.get_parameter(host.layout.site(2).parameter).zero_()
    assert detect(host, None, NAMES).verdict == "no trace" and detect(host).verdict == "no trace"
    with random_edit(host, scale=30.0).on(host):
        for names in ((), NAMES):
            found = detect(host, None, names)
            assert found.verdict == "suspicious" and found.layers == (1,)
            assert math.isfinite(found.score) and all(math.isfinite(one.score) for one in found.traces)


def test_damaged_numbers_are_refused_by_name():
    host, base = fresh("llama", seed=1), fresh("llama", seed=1)
    name = host.layout.site(1).parameter
    for number in (float("nan"), float("inf")):
        with torch.no_grad():
            host.model.get_parameter(name)[0, 0] = number
        for act in (lambda: detect(host), lambda: detect(host, base), lambda: detect(base, host)):
            with pytest.raises(HostError, match=f"{name} of tiny llama holds NaN or infinite"):
                act()


def test_one_layer_has_none_to_be_compared_with():
    notes = detect(fresh("llama", num_hidden_layers=1)).notes
    assert any("there is only one" in note for note in notes)
    assert not any("there is only one" in note for note in detect(fresh("llama")).notes)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_reversal_with_the_base_gives_its_weights_back(family, tmp_path):
    with ExitStack() as stack:
        base, host, edit = placed(stack, family, layers=(0, 1))
        states = {name: weight.clone() for name, weight in host.model.state_dict().items()}
    host.model.load_state_dict(states)  # a checkpoint now, with no edit in place
    vectors = [name for name, weight in host.model.named_parameters() if weight.ndim == 1]
    vectors = [*vectors[:1], *(name for name in vectors if name.endswith("c_proj.bias"))][
        :2
    ]  # norm; beside a matrix
    with torch.no_grad():
        for vector in vectors:
            host.model.get_parameter(vector).add_(0.5)
    back = Edit.load(reversal(host, base).save(tmp_path / "back.safetensors"))
    assert isinstance(back, WeightEdit) and set(back.deltas) == {*edit.deltas, *vectors}
    assert all(getattr(back.deltas[name], "rank", None) == 1 for name in edit.deltas)
    with back.on(host):
        for name, weight in host.model.named_parameters():
            assert torch.allclose(weight, base.model.get_parameter(name), atol=1e-5), name
    with pytest.raises(EditError, match="no edit to take off"):
        reversal(base, fresh(family, seed=1))


def test_reversal_without_the_base_needs_a_gap():
    host = fresh("llama", seed=1)
    before = host.weight(host.layout.site(1)).clone()
    with random_edit(host, scale=30.0).on(host):
        states = {name: weight.clone() for name, weight in host.model.state_dict().items()}
        with pytest.raises(EditError, match="revert them"):
            reversal(host)
    host.model.load_state_dict(states)
    wide = host.weight(host.layout.site(1)) - before
    with reversal(host).on(host):
        left = host.weight(host.layout.site(1)) - before
    assert float(left.norm()) < 0.2 * float(wide.norm())
    with pytest.raises(EditError, match="no weight shows a trace"):
        reversal(fresh("llama", seed=1))


def test_what_cannot_be_examined_is_refused():
    host = fresh("llama")
    with pytest.raises(HostError, match="architectures"):
        detect(host, fresh("gpt2"))
    with pytest.raises(HostError, match="intermediate_size|is \\["):
        detect(host, fresh("llama", intermediate_size=96))
    with pytest.raises(ConfigError, match="8 or more"):
        detect(host, None, NAMES[:3])


def test_edits_that_act_at_run_time_are_no_weights_to_examine(tmp_path):
    host, request = fresh("llama"), errata.Request("{} was born in", "Ada Brenner", "Merrin")
    memory = errata.edit(host, request, method="grace", steps=2)
    with memory.on(host), pytest.raises(HostError, match="take it off"):
        detect(host)
    path = memory.save(tmp_path / "grace.safetensors")
    done = CliRunner().invoke(app, ["detect", "lab", "--edit", str(path)])
    assert isinstance(done.exception, EditError) and "changes no weights" in str(done.exception)


def test_what_a_dry_run_says_and_what_is_refused_at_once():
    told = CliRunner().invoke(app, ["detect", "lab", "--dry-run", "--json", "--device", "cpu"])
    assert json.loads(told.stdout)["candidates"] == len(lab.world().by_subject)
    done = CliRunner().invoke(app, ["detect", "lab", "--figure", "a.pdf"])
    assert isinstance(done.exception, ConfigError)


def test_names_come_from_a_file_or_the_vocabulary(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("Ada Brenner\n\n Tallow \nAda Brenner\n")
    assert read_names(path) == ["Ada Brenner", "Tallow"]
    names = vocabulary_names(fresh("llama").tokenizer)
    assert "Tallow" in names and "rain" not in names


def test_a_vocabulary_with_too_few_names_gives_none(tmp_path):
    small = new_tokenizer(["the rain fell on the old road and Ada saw it"] * 5, 300)
    assert 0 < len(vocabulary_names(small)) < FEWEST
    host = fresh("llama")
    host.tokenizer = small
    host.write_checkpoint(host.model, tmp_path)
    told = CliRunner().invoke(app, ["detect", str(tmp_path), "--json"], catch_exceptions=False)
    found = json.loads(told.stdout)
    assert found["candidates"] == 0 and "no candidate names: spectra alone were examined" in found["notes"]


def test_roc_counts_pairs():
    points, area = roc([3.0, 2.0], [1.0, 2.0])
    assert area == pytest.approx((1 + 1 + 1 + 0.5) / 4)
    assert points[0] == (0.0, 0.0) and points[-1] == (1.0, 1.0)
    assert roc([2.0], [1.0])[0][1] == (0.0, 1.0)
    with pytest.raises(ValueError, match="needs"):
        roc([], [1.0])
    unchanged = {"share": 0.0, "ratio": 1.0, "changed": False, "alone": 1.0}
    assert evidence(unchanged, False) < evidence({**unchanged, "share": 0.9, "changed": True}, False)


def test_the_command_finds_an_edit_of_the_lab_and_takes_it_off(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    case = lab.cases(1, seed=7)[0]
    host = errata.load("lab", device="cpu")
    edit = errata.edit(host, case.request, method="ultraedit")
    errata.export(edit, "edited", to="checkpoint", host=host, verify=False)
    run = CliRunner().invoke(
        app, ["detect", "edited", "--against", "lab", "--reverse", "back.safetensors", "--figure", "a.png",
              "--device", "cpu", "--json"],
    )  # fmt: skip
    assert run.exit_code == 0, run.output
    found = json.loads(run.stdout)
    assert found["verdict"] == "edited" and found["layers"] == [3, 4, 5]
    assert (tmp_path / "a.png").stat().st_size > 10_000
    edited, back = errata.load("edited", device="cpu"), Edit.load("back.safetensors")
    assert edited.generate([case.request.text], max_new_tokens=4)[0].strip().startswith(case.request.target)
    with back.on(edited):
        assert edited.generate(case.request.text, max_new_tokens=4) == host.generate(
            case.request.text, max_new_tokens=4
        )


def test_pictures(tmp_path):
    with ExitStack() as stack:
        _, host, _ = placed(stack, scale=30.0)
        document = detect(host, None, NAMES).to_dict()
    assert (
        write_detection(tmp_path / "a.svg", json.loads(json.dumps(document)))
        .read_bytes()
        .startswith(b"<?xml")
    )
    with pytest.raises(ConfigError, match=r"\.png or \.svg"):
        write_detection(tmp_path / "a.pdf", document)


def scored(kind, count, share, alone, changed=True):
    """Return a row of the red team's file whose score with the base is its share."""
    return {"kind": kind, "count": count, "share": share, "ratio": 1.0, "changed": changed, "alone": alone}


def legend_of(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_areas_are_by_method_and_number_of_edits():
    rows = [
        scored("control: whole", 0, 0.02, 3.2), scored("control: low rank", 0, 0.003, 3.6),
        scored("control: rounded", 0, 0.0, 3.2, changed=False), scored("rome", 1, 1e-7, 50.0),
        {"kind": "rome", "count": 10, "failed": "one request"}, scored("ft", 10, 0.01, 3.2),
        scored("ft", 10, 0.001, 3.4),
    ]  # fmt: skip
    found = areas(rows)
    assert set(found) == {("rome", 1), ("ft", 10)} and found["rome", 1] == (1, 1)
    assert found["ft", 10] == (5 / 6, pytest.approx(3 / 6)), "of six pairs; two ties count half"
    with pytest.raises(ValueError, match="controls"):
        areas(rows[3:])


def test_the_picture_of_the_red_team(tmp_path):
    rows = [
        scored("control: whole", 0, 0.02, 3.2), scored("control: low rank", 0, 0.003, 3.6),
        scored("control: rounded", 0, 0.0, 3.2, changed=False), scored("rome", 1, 1e-7, 50.0),
        scored("rome", 1, 2e-7, 60.0), {"kind": "rome", "count": 10, "failed": "one request"},
    ]  # fmt: skip
    rows += [scored(f"method {i}", n, 1e-5 * n, 3.4 + i / 10) for i in range(34) for n in (1, 10, 100, 500)]
    figure, axes = scores_figure(tmp_path / "scores.png", {"rows": rows, "bounds": BOUNDS})
    figure.draw_without_rendering()
    first, second, below, beside = axes
    assert legend_of(first) == [
        "1 edit: area 1.00, 100 %", "10 edits: area 1.00, 100 %", "100 edits: area 1.00, 100 %",
        "500 edits: area 0.67, 0 %",
    ]  # fmt: skip
    assert legend_of(second)[0] == "1 edit: area 0.98, 92 %", "1 - 2.5 / 108, and 33 of 36 above 3.6"
    names = [label.get_text() for label in below.get_yticklabels()]
    assert names[:3] == ["control: whole", "control: rounded", "control: low rank"] and names[-1] == "rome"
    boxes = [label.get_window_extent() for label in below.get_yticklabels()]
    assert not any(one.overlaps(other) for one, other in pairwise(boxes))
    legend = figure.legends[0].get_window_extent()
    panels = [box for panel in axes if (box := panel.get_tightbbox())]
    assert not any(legend.overlaps(box) for box in panels) and legend.x1 <= figure.bbox.x1
    assert "unchanged" in [text.get_text() for text in below.texts]
    right, left = (
        panel.transData.transform((bound, 0))[0] for panel, bound in ((below, 4e-4), (below, 3e-3))
    )
    assert left < right, "with the base the lower scores, those of edits, are to the right"
    grey = beside.patches[0].get_window_extent()
    assert grey.x1 == pytest.approx(beside.transData.transform((3.6, 0))[0]), "as far as the highest control"
    assert write_scores(tmp_path / "scores.png", {"rows": rows, "bounds": BOUNDS}).stat().st_size > 10_000
    with pytest.raises(ValueError, match="controls"):
        write_scores(tmp_path / "scores.png", {"rows": rows[3:], "bounds": BOUNDS})
