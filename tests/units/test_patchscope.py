"""States that are read in place of a word of another prompt."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from errata.cli.main import app
from errata.errors import ErrataError, RequestError
from errata.inspect import patchscope
from errata.inspect.lens import Lens
from tests.models import fresh

TARGET = "The old {} was born in"


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma2"])
def lens(request):
    return Lens(fresh(request.param))


def test_a_state_in_its_own_place_changes_nothing(lens):
    goal = patchscope.target(lens.host, TARGET)
    own = lens.states([goal.ids])[0]
    with torch.no_grad():
        expected = lens.host.forward(lens.host.batch([goal.ids]), keep=1)[0, -1]
    for layer in range(1, lens.depth + 1):
        logits = patchscope.patched(lens, [goal.ids], goal.place, layer, own[layer, goal.place][None])
        assert torch.allclose(logits[0], expected.float(), atol=1e-5)


def test_at_the_last_layer_of_the_last_token_it_is_the_logit_lens(lens):
    ids = lens.host.encode_base("Ada Brenner was born in")
    states = lens.states([ids])[0][:, -1]
    goal = patchscope.target(lens.host, "The rain fell on {}")
    assert goal.place == len(goal.ids) - 1
    rows = [goal.ids] * len(states)
    with torch.no_grad():
        logits = patchscope.patched(lens, rows, goal.place, lens.depth, states)
        expected = lens.read(lens.depth, states)
    assert torch.allclose(logits, expected, atol=1e-5)


def test_a_state_reaches_later_tokens_only_through_higher_blocks(lens):
    found = patchscope.scope(lens, "Bruno Holner", TARGET, tokens=2)
    assert found.logs.shape[:2] == (lens.depth + 1, lens.depth) and len(found.texts) == lens.depth + 1
    into_last = found.logs[:, -1]  # no block is left to read it
    assert torch.allclose(into_last, into_last[:1].expand_as(into_last), atol=1e-5)
    assert not torch.allclose(found.logs[0, 0], found.logs[2, 0], atol=1e-4)
    document = found.to_dict(lens.host)
    assert document["rank"] == found.rank.tolist() and 0 < document["answer"]["plain"] <= 1
    whole = lens.host.encode_base(TARGET.format("Bruno Holner"))
    with torch.no_grad():
        best = int(lens.host.forward(lens.host.batch([whole]), keep=1)[0, -1].argmax())
    assert found.answer == best


def test_prompts_and_layers_that_do_not_exist_are_refused(lens):
    with pytest.raises(RequestError, match="one {}"):
        patchscope.target(lens.host, "Ada was born in")
    with pytest.raises(RequestError, match="layers 1 to 3"):
        patchscope.patched(lens, [(5, 6)], 0, 0, torch.zeros(1, 32))


def run(*words: str):
    return CliRunner().invoke(app, ["lens", *words], catch_exceptions=False)


def test_the_verb_and_its_pictures(tmp_path):
    picture = tmp_path / "scope.png"
    found = json.loads(run("Ada Brenner", "--into", "{} was born in", "-o", str(picture), "--json").stdout)
    assert found["answer"]["token"].strip() == "Rowanport" and found["answer"]["plain"] > 0.9
    assert len(found["probability"]) == 7 and len(found["probability"][0]) == 6
    assert picture.read_bytes().startswith(b"\x89PNG")
    reading = tmp_path / "reading.svg"
    shown = run("Ada Brenner was born in", "-o", str(reading))
    assert shown.exit_code == 0 and "reading.svg" in shown.output and "Rowanport" in reading.read_text()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--exit", "0.5", "--into", "{} is"), "--into goes with a prompt"),
        (("--exit", "0.5", "-o", "a.png"), "--output goes with a prompt"),
        (("Ada", "--into", "{} is", "--tuned", "a.safetensors"), "leave --tuned out"), (("Ada", "-o", "a.pdf"), ".svg"),
    ],
)  # fmt: skip
def test_what_the_verb_refuses(words, text):
    with pytest.raises(ErrataError, match=text):
        run(*words)
