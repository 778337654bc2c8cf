"""Defaults that depend on the schedule: one request alone, several together, on top of an earlier edit."""

from __future__ import annotations

import pytest

import errata
from errata.errors import ConfigError
from errata.methods import encore
from errata.methods._closed_form import MEMIT_SETTINGS
from errata.methods._method import Shape
from errata.stats.collect import Corpus
from tests.models import fresh

ADA = errata.Request("{} was born in", "Ada Brenner", "Merrin")
BRUNO = errata.Request("{} plays the", "Bruno Holner", "harp")
TEXT = "Ada Brenner was born in Tallow, and the rain fell on the old road. I saw you, you came."


@pytest.fixture(scope="module")
def host():
    return fresh("gpt2")


def fit(host, method, requests, **options):
    texts = Corpus("one text", lambda: [TEXT])
    return errata.edit(host, requests, method=method, steps=2, corpus=texts, tokens=5000, **options)


@pytest.mark.parametrize("method", ["alphaedit", "lyaplock", "nse", "encore"])
def test_shifts_are_shorter_where_many_edits_add_up(host, method):
    alone = fit(host, method, [ADA])
    assert alone.provenance.config["clamp"] == 1.5
    assert fit(host, method, [ADA, BRUNO]).provenance.config["clamp"] == 0.75
    on_top = fit(host, method, [BRUNO], after=alone)
    assert fit(host, method, [ADA], clamp=0.9).provenance.config["clamp"] == 0.9
    assert on_top.provenance.config["clamp"] == 0.75


@pytest.mark.parametrize("method", ["memit", "pmet", "emmet"])
def test_methods_for_one_batch_keep_one_clamp(host, method):
    for requests in ([ADA], [ADA, BRUNO]):
        assert fit(host, method, requests).provenance.config["clamp"] == 1.5


def test_ultraedit_centres_in_company(host):
    def settings(requests, **options):
        found = errata.edit(host, requests, method="ultraedit", **options).provenance.config
        return found["centre"], found["eta"]

    alone = errata.edit(host, ADA, method="ultraedit")
    assert settings([ADA]) == (False, 0.7)
    assert settings([ADA, BRUNO]) == (True, 0.4)
    assert settings([BRUNO], after=alone) == (True, 0.4)
    assert settings([ADA], scale="published") == (True, 1e-6)
    assert settings([ADA], centre=True, eta=0.1) == (True, 0.1)


def test_lora_is_gentle_unless_as_published(host):
    pytest.importorskip("peft")

    def settings(**options):
        found = errata.edit(host, ADA, method="lora", steps=2, **options).provenance.config
        return found["learning_rate"], found["stop_loss"]

    assert settings() == (5e-4, 0.05)
    assert settings(scale="published") == (5e-3, 0.0)
    assert settings(variant="adalora") == (5e-3, 0.0)
    assert settings(stop_loss=0, learning_rate=1e-3) == (1e-3, 0.0)


def test_encore_is_as_published_for_the_models_of_its_code(monkeypatch):
    host = fresh("gpt2")
    plain = fit(host, "encore", [ADA]).provenance.config
    assert (plain["stop"], plain["top_count"], plain["top_bare"]) == ("loss", 1, True)
    assert plain["update_norm_lambda"] is None and plain["penalty"] == 0.02
    memit = {
        "layers": (0, 1), "cov_weight": 20_000.0, "scale": "published", "learning_rate": 0.1, "clamp": 0.75,
    }  # fmt: skip
    own = {
        "learning_rate": 0.5, "update_norm_lambda": 10.0, "stop": "top", "top_count": 4, "top_bare": False,
    }  # fmt: skip
    monkeypatch.setitem(MEMIT_SETTINGS, Shape("gpt2", 3, 32), memit)
    monkeypatch.setitem(encore.METHOD.published, Shape("gpt2", 3, 32, 80), {**memit, **own})
    known = fit(host, "encore", [ADA]).provenance.config
    assert (known["stop"], known["top_count"], known["top_bare"]) == ("top", 4, False)
    assert (known["update_norm_lambda"], known["learning_rate"], known["clamp"]) == (10.0, 0.5, 0.75)
    given = fit(host, "encore", [ADA], penalty=0.1, stop="loss").provenance.config
    assert given["update_norm_lambda"] is None and given["penalty"] == 0.1 and given["stop"] == "loss"
    relative = fit(host, "encore", [ADA], scale="stream").provenance.config
    assert relative["learning_rate"] == 0.1, "the rate of ENCORE's code is for its own unit"


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (("gpt2", 48, 1600, 6400), (10.0, 4)), (("llama", 32, 4096, 11008), (10.0, 3)),
        (("llama", 32, 4096, 14336), (20.0, 2)), (("gptj", 28, 4096, 16384), None),
    ],
)  # fmt: skip
def test_the_numbers_of_encores_code(shape, expected):
    row = encore.METHOD.published.get(Shape(*shape))
    assert (row and (row["update_norm_lambda"], row["top_count"])) == expected


# where layers lie does not depend on how much text statistics are taken over
@pytest.mark.parametrize(
    ("method", "options"), [("memit", {"tokens": 2_000}), ("ft", {}), ("keel", {"tokens": 2_000})]
)
def test_wide_layers_run_from_a_twelfth_to_five_sixths_of_the_depth(method, options, lab_host):
    request = errata.Request("{} was born in", "Ada Brenner", "Tallow")
    edit = errata.edit(lab_host, request, method=method, layers="wide", steps=1, **options)
    assert edit.provenance.config["layers"] == [0, 1, 2, 3, 4]
    assert len(edit.deltas) == 5


def test_rome_has_one_layer_and_says_so():
    with pytest.raises(ConfigError, match="expected int, found 'wide'"):
        errata.edit(fresh("llama"), errata.Request("{} is", "Esk", "old"), method="rome", layers="wide")
