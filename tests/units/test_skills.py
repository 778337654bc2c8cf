"""Neurons that tell what texts are labelled with."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from errata.cli.main import app
from errata.errors import ConfigError, ErrataError
from errata.inspect import neurons, skills
from errata.inspect.skills import Activated
from errata.lab.labels import labelled_texts
from errata.locate.keys import Place, capture
from errata.types import Concept, LabelledText
from tests.models import fresh

NAMES = [
    f"{first} {last}"
    for first in ("Ada", "Bruno", "Esk")
    for last in ("Brenner", "Holner", "Tallow", "Merrin")
]
CONCEPT = Concept(
    "trade", tuple(LabelledText(f"The {name} waited.", "cello" if i % 2 else "harp", name)
                   for i, name in enumerate(NAMES)),
)  # fmt: skip


def test_predictivity_is_folded_and_of_balanced_classes():
    label = torch.tensor([True, True, False, False, False, False])
    fires = torch.stack(
        [label, ~label, torch.ones(6, dtype=torch.bool), torch.tensor([1, 0, 0, 0, 0, 0]) == 1], 1
    )
    assert skills.predictivity(fires, label).tolist() == pytest.approx([1, 1, 0.5, 0.75])
    assert skills.balanced(fires, label).tolist() == pytest.approx([1, 0, 0.5, 0.75])


def test_activations_are_those_at_the_subjects_last_token():
    host = fresh("llama", seed=2)
    found = skills.activated(host, CONCEPT)
    text = CONCEPT.texts[3]
    ids = host.encode(f"The {text.subject}").ids
    sites = neurons.sites(host)
    own = capture(host, [Place(ids)], sites).keys
    assert torch.allclose(found.values[3], torch.cat([own[site][0] for site in sites]), atol=1e-5)
    assert found.labels.tolist() == CONCEPT.indices() and found.values.shape == (12, 240)


def planted(monkeypatch, *, flat: int, width: int = 240):
    """Make one neuron low exactly where the label is cello; the others are random."""
    generator = torch.Generator().manual_seed(0)

    def activated(host, concept):
        labels = torch.tensor(concept.indices())
        values = torch.randn(len(labels), width, generator=generator)
        values[:, flat] = labels.float()  # cello is 0
        return Activated(values, labels)

    monkeypatch.setattr(skills, "activated", activated)


def test_a_planted_neuron_is_found_and_random_ones_are_not_better_than_chance(monkeypatch):
    host = fresh("llama", seed=2)
    planted(monkeypatch, flat=85)
    texts = tuple(LabelledText(f"n{i}", "cello" if i % 2 else "harp") for i in range(300))
    found = skills.skills(host, Concept("trade", texts), count=1)
    (one,) = found["skills"]
    assert one["label"] == "cello" and one["neurons"][0] == {
        "neuron": "1.5", "fires": False, "chosen": 1.0, "held_out": 1.0
    }  # fmt: skip
    assert one["vote"] == 1.0 and 0.5 < one["shuffled"] < 0.75 and 0.4 < one["random_vote"] < 0.62
    assert found["texts"] == {"thresholds": 100, "choice": 100, "held_out": 100} and found["neurons"] == 240
    with pytest.raises(ConfigError, match="1 neuron"):
        skills.skills(host, CONCEPT, count=0)


def test_each_of_several_labels_is_told_from_the_rest(monkeypatch):
    planted(monkeypatch, flat=3)
    texts = tuple(LabelledText(f"n{i}", "abc"[i % 3]) for i in range(180))
    found = skills.skills(fresh("llama", seed=2), Concept("letter", texts), count=1)
    best = {one["label"]: one["neurons"][0] for one in found["skills"]}
    assert list(best) == ["a", "b", "c"] and best["a"]["neuron"] == best["c"]["neuron"] == "0.3"
    assert best["c"]["held_out"] == 1.0 and best["c"]["fires"] and not best["a"]["fires"]


def run(*words: str):
    return CliRunner().invoke(app, ["neurons", *words], catch_exceptions=False)


def test_the_verb(tmp_path):
    rows = [
        {"text": one.text, "label": one.label, "subject": one.subject} for one in labelled_texts("kind", limit=150)
        if one.label in ("person", "city")
    ]  # fmt: skip
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    found = json.loads(run("--for", "kind", "--from", str(path), "--count", "3", "--json").stdout)
    (one,) = found["skills"]
    assert one["label"] == "city" and len(one["neurons"]) == 3 and one["vote"] > max(0.9, one["shuffled"])
    shown = run("--for", "kind", "--from", str(path), "--count", "1")
    assert "shuffled" in shown.output and one["neurons"][0]["neuron"] in shown.output


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--for", "kind"), "go together"), (("x", "--from", "lab"), "go together"),
        (("x", "--for", "kind", "--from", "lab"), "one of them"),
        (("--for", "kind", "--from", "lab", "--layer", "1"), "go with a prompt"),
    ],
)  # fmt: skip
def test_what_the_verb_refuses(words, text):
    with pytest.raises(ErrataError, match=text):
        run(*words)
