"""Logit lens, tuned lens, early exit."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from errata import edit, lab
from errata.cli.main import app
from errata.edits.artefact import Artefact
from errata.errors import ConfigError, EditError, ErrataError
from errata.inspect import lens as lenses
from errata.inspect import tuned
from errata.inspect.lens import Lens
from errata.training.loop import TrainingFiles
from errata.types import Request
from tests.models import TEXTS, fresh

ROWS = [(5, 9, 30, 44, 7), (12, 90), (7, 8, 9)]


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma2", "gptj"])
def host(request):
    return fresh(request.param)


def test_at_the_last_layer_it_is_the_model(host):
    lens = Lens(host)
    states = lens.states(ROWS)
    with torch.no_grad():
        for row, own in zip(ROWS, states, strict=True):
            assert own.shape == (4, len(row), 32)
            expected = host.forward(host.batch([row]))[0]
            assert torch.allclose(lens.read(3, own[-1]), expected.float(), atol=1e-5)
            assert not torch.allclose(lens.read(0, own[0]), expected.float(), atol=1e-3)


def test_padding_and_batches_change_nothing(host):
    lens = Lens(host)
    right, left = lens.states(ROWS), lens.states(ROWS, side="left")
    alone = [lens.states([row])[0] for row in ROWS]
    for one, two, three in zip(right, left, alone, strict=True):
        assert torch.allclose(one, two, atol=1e-5) and torch.allclose(one, three, atol=1e-5)


def test_what_the_norm_removes_is_not_read():
    lens = Lens(fresh("gpt2"))
    states = lens.states(ROWS)[0][1]
    with torch.no_grad():
        before, after = lens.read(1, states), lens.read(1, states + 3.0)  # a LayerNorm takes the mean off
        assert torch.allclose(before, after, atol=1e-4)
        assert not torch.allclose(before, lens.read(1, states + torch.linspace(-1, 1, 32)), atol=1e-3)


def test_a_reading(host):
    reading = Lens(host).look(ROWS[0])
    document = reading.to_dict(host)
    assert document["answer"]["rank"][-1] == 0 and max(document["divergence"][-1]) == pytest.approx(
        0, abs=1e-5
    )
    assert all(value >= -1e-5 for row in document["divergence"] for value in row)
    assert document["saturation"] == reading.saturation.tolist() and max(document["saturation"]) <= 3
    other = Lens(host).look(ROWS[0], answer=17)
    assert other.answer == 17 and int(other.rank[-1]) > 0


def test_saturation_is_where_the_choice_stays():
    top = torch.tensor([[1, 2, 3], [1, 5, 3], [4, 5, 3], [1, 5, 3]])
    assert lenses.saturation(top).tolist() == [3, 1, 0]


def test_early_exit_at_the_extremes():
    lens = Lens(fresh("llama"))
    never, always = (lenses.exits(lens, ROWS, confidence=value) for value in (1.0, 0.0))
    assert never["agreement"] == 1 and never["mean_layers_saved"] == 0 and never["tokens"] == 10
    assert always["mean_layers_saved"] == 3 and always["agreement"] == always["agreement_by_layer"][0]
    assert always["settled_by_layer"][-1] == 1 and always["agreement_by_layer"][-1] == 1
    split = lenses.exits(lens, ROWS, confidence=0.5, batch_rows=1)
    assert split == lenses.exits(lens, ROWS, confidence=0.5)
    with pytest.raises(ConfigError, match="texts"):
        lenses.exits(lens, [])


# --- tuned ----------------------------------------------------------------------------------


def test_no_map_is_the_logit_lens(host):
    maps = tuned.Maps(3, 32)
    states = Lens(host).states(ROWS)[0]
    with torch.no_grad():
        for layer in range(4):
            assert torch.equal(
                Lens(host, maps.translate).read(layer, states[layer]), Lens(host).read(layer, states[layer])
            )


def test_the_regression_finds_an_affine_map():
    generator = torch.Generator().manual_seed(0)
    matrix, shift = torch.randn(6, 6, generator=generator), torch.randn(6, generator=generator)

    def states(rows: Any) -> list[torch.Tensor]:
        first = [torch.randn(len(row), 6, generator=generator) for row in rows]
        return [torch.stack([one, one @ matrix.mT + shift]) for one in first]

    maps = tuned.Maps(1, 6)
    stand_in: Any = SimpleNamespace(states=states)
    tuned.ridge_(stand_in, maps, [(0,) * 50] * 20)
    new = torch.randn(4, 6, generator=generator)
    with torch.no_grad():
        assert torch.allclose(maps.translate(0, new), new @ matrix.mT + shift, atol=0.05)
        assert torch.equal(maps.translate(1, new), new)


class Stop(Exception):
    pass


def test_training_comes_closer_and_resumes_to_the_same_bits(tmp_path):
    host = fresh("llama")
    rows = tuned.fixed_rows(host, TEXTS, tokens=400, length=16)
    settings = tuned.Settings(steps=4, rows=4, rate=1e-3)
    before = host.weights_hash()
    whole = tuned.fit(host, rows, settings)
    card = whole.card
    assert sum(card["tuned_lens"]) <= sum(card["ridge"]) + 1e-6
    assert card["tuned_lens"][0] < card["logit_lens"][0]
    assert host.weights_hash() == before

    def stop(what: str, done: int, total: int) -> None:
        if done == 2:
            raise Stop

    where = TrainingFiles(tmp_path / "lens.checkpoint", resume=True)
    with pytest.raises(Stop):
        tuned.fit(host, rows, settings, where=where, on_progress=stop)
    again = tuned.fit(host, rows, settings, where=where)
    assert all(torch.equal(whole.tensors[name], again.tensors[name]) for name in whole.tensors)
    with pytest.raises(ConfigError, match="other settings"):
        tuned.fit(host, rows, settings, seed=1, where=where)

    saved = Artefact.load(whole.save(tmp_path / "lens.safetensors"))
    states = Lens(host).states([rows[0]])[0][0]
    with torch.no_grad():
        assert torch.equal(
            tuned.lens_of(host, saved).read(0, states), tuned.lens_of(host, whole).read(0, states)
        )
    with pytest.raises(EditError, match="trained on host"):
        tuned.lens_of(fresh("llama", seed=1), saved)


def test_losses_by_layer_and_batch_are_those_of_all_at_once(host):
    rows = [tuple(host.encode(text).ids) for text in TEXTS[:3]]
    maps = tuned.Maps(3, 32)
    with torch.no_grad():
        maps.matrix.normal_(0, 0.05, generator=torch.Generator().manual_seed(0))
    lens = Lens(host, maps.translate)
    task = tuned._Task(lens, maps, rows, rows * 6)  # more than a batch is held out
    states = torch.cat(lens.states(rows), 1)
    logs = [lens.read(layer, states[layer]).log_softmax(-1) for layer in range(4)]
    losses = torch.stack([(logs[3].exp() * (logs[3] - own)).sum(-1).mean() for own in logs[:3]])
    expected = torch.autograd.grad(losses.sum(), [maps.matrix, maps.bias])
    found, gradients = task.differentiate(0, [0, 1, 2])
    assert found["loss"] == pytest.approx(float(losses.sum().detach()), rel=1e-5)
    for own, whole in zip(gradients, expected, strict=True):
        torch.testing.assert_close(own, whole, rtol=1e-4, atol=1e-6)
    assert task.by_layer() == pytest.approx(losses.tolist(), rel=1e-5)


def test_too_few_rows_are_refused():
    host = fresh("llama")
    with pytest.raises(ConfigError, match="ten rows"):
        tuned.fixed_rows(host, TEXTS[:1], tokens=10)
    with pytest.raises(ConfigError, match="steps"):
        tuned.Settings(steps=-1)


# --- the verb -------------------------------------------------------------------------------


def run(*words: str):
    return CliRunner().invoke(app, ["lens", *words], catch_exceptions=False)


def test_the_verb_reads_a_prompt_fits_and_measures(tmp_path):
    found = json.loads(run("Ada Brenner was born in", "--json").stdout)
    assert (
        found["answer"]["rank"][-1] == 0
        and found["answer"]["token"].strip() == "Rowanport"
        and len(found["top"]) == 7
    )
    assert "rank" in run("Ada Brenner was born in", "--answer", "Tallow").output
    path = str(tmp_path / "lens.safetensors")
    fitted = run("--fit", path, "--tokens", "1500", "--steps", "0")
    assert fitted.exit_code == 0 and "ridge regression" in fitted.output
    tuned_one = json.loads(run("Ada Brenner was born in", "--tuned", path, "--json").stdout)
    assert tuned_one["top"][-1] == found["top"][-1] and tuned_one["top"][0] != found["top"][0]
    left = run("--exit", "0.9", "--tokens", "600")
    assert left.exit_code == 0 and "layers saved" in left.output


def test_an_edit_of_weights_is_read_and_a_memory_refused(tmp_path):
    host = lab.load()
    request = Request("{} was born in", "Ada Brenner", "Tallow")
    paths = []
    edits = (
        edit(host, [request], method="ft", layers=[3], steps=4),
        edit(host, [request], method="grace", layer=2, steps=1),
    )
    for number, one in enumerate(edits):
        paths.append(str(tmp_path / f"{number}.safetensors"))
        one.save(paths[-1])
    plain, edited = (
        json.loads(run("Ada Brenner was born in", *words, "--json").stdout)
        for words in ((), ("-e", paths[0]))
    )
    assert plain["divergence"][:4] != edited["divergence"][:4] and plain["top"][0] == edited["top"][0]
    assert plain["answer"]["probability"][-1] > edited["answer"]["probability"][-1]
    with pytest.raises(ErrataError, match="act by row"):
        run("Ada Brenner was born in", "-e", paths[1])


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ((), "one of them; found none"), (("A prompt", "--exit", "0.5"), "one of them"),
        (("--exit", "0.5", "--answer", "x"), "--answer goes with"), (("A prompt", "--resume"), "--resume goes with"),
        (("--fit", "a.safetensors", "--tuned", "b.safetensors"), "leave --edit and --tuned out"),
        (("--fit", "lens.txt"), "edits are .safetensors files"),
        (("A prompt", "--corpus", "none.txt"), "not for a prompt"), (("A prompt", "--tokens", "9"), "not for a prompt"),
        (("--exit", "0.5", "--steps", "9"), "--steps goes with --fit"),
    ],
)  # fmt: skip
def test_what_the_verb_refuses(words, text):
    with pytest.raises(ErrataError, match=text):
        run(*words)
