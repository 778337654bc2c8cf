"""CaKE: the texts it trains on, how they are scored, and that chains through the new fact are learned."""

from __future__ import annotations

import pytest

import errata
from errata.errors import ConfigError, RequestError
from errata.host import hooks
from errata.methods._circuits import PAGES, Wordings, circuit_samples
from errata.methods.cake import Config, _line
from errata.training.tune import Losses
from tests.models import fresh, fresh_kind

BORN = errata.Request("{} was born in", "Ada Brenner", "Esk", target_old="Tallow")
CAPITAL = errata.Request(
    "The capital of {} is", "Arvania", "Merrin", indirect=("The capital of Ada's home is",)
)
SHORT = Wordings(
    late=("{subject} is A, {first} is B, {second} is C. {prompt:A}",),
    onward=("{target} has {page} and {other} has {another}. {prompt} what has",),
)


def samples(request, wordings=SHORT, *, others=(), answer: str | None = "Tallow", seed=0):
    return [
        (sample.text, sample.target)
        for sample in circuit_samples(request, wordings, others=others, answer=answer, seed=seed)
    ]


def test_samples_use_the_fact_first_and_last():
    found = samples(BORN)
    assert found[0] == ("Ada Brenner was born in", "Esk")
    assert found[1] == ("It is known that Ada Brenner was born in", "Esk")
    assert found[3] == ("Ada Brenner is A, Robin Ellis is B, Kim Norton is C. A was born in", "Esk")
    text, page = found[4]
    words = text.split()
    assert int(page) in PAGES and words[:3] == ["Esk", "has", page] and words[4:6] == ["Tallow", "has"]
    assert words[6] != f"{page}." and text.endswith(". Ada Brenner was born in what has")


def test_samples_of_other_requests_and_prompts():
    found = samples(CAPITAL, others=["Arvania", "Belmark"])
    assert ("As of today, the capital of Arvania is", "Merrin") in found  # an article inside the sentence
    assert ("The capital of Ada's home is", "Merrin") in found
    assert ("Arvania is A, Belmark is B, Robin Ellis is C. The capital of A is", "Merrin") in found
    assert found == samples(CAPITAL, others=["Arvania", "Belmark"])
    assert found[-1] != samples(CAPITAL, others=["Arvania", "Belmark"], seed=1)[-1]  # other numbers
    alone = [text for text, _ in samples(CAPITAL, answer=None)]
    assert alone[:4] == [text for text, _ in found[:4]]
    assert alone[4:] == ["Arvania is A, Robin Ellis is B, Kim Norton is C. The capital of A is"]


def test_whole_texts_are_scored_at_every_token_but_the_first():
    host = fresh("llama")
    ids = host.encode_answer(BORN.text, "Esk").ids
    whole, answer = _line(host, BORN, Config(whole=True)), _line(host, BORN, Config())
    assert whole.ids == ids[:-1] and whole.targets == ids[1:] and whole.at == tuple(range(len(ids) - 1))
    assert answer.targets == ids[len(ids) - len(answer.targets) :] and answer.at[-1] == len(ids) - 2


def test_chains_are_learned_where_lora_learns_the_statement_alone():
    """By the same settings, after CaKE texts that lead to the subject are right too, and those that go on likelier."""
    wordings = {"narratives": SHORT.narratives[:1], "late": SHORT.late, "onward": SHORT.onward}
    texts = circuit_samples(BORN, Wordings(**wordings), others=(), answer="Tallow", seed=0)
    host = errata.load("lab")
    lines = [_line(host, text, Config()) for text in texts]
    common = {"steps": 12, "learning_rate": 3e-3, "dropout": 0.0}
    after = {}
    with hooks.frozen(host.model):
        before = Losses(host, lines)(range(3))
        for name, more in (("cake", {**wordings, "per_step": None}), ("lora", {})):
            with errata.edit(host, BORN, method=name, **common, **more).on(host):
                after[name] = Losses(host, lines)(range(3))
    assert float(after["cake"][:2].max()) < 0.2 and float(after["cake"][2]) < 0.5 * float(before[2])
    assert float(after["lora"][0]) < 0.2 and float(after["lora"][1]) > 0.5
    assert float(after["lora"][2]) > 0.8 * float(before[2])


def test_published_rate_and_record():
    host = fresh("llama")
    more = {"late": (), "onward": SHORT.onward, "narratives": SHORT.narratives}
    edit = errata.edit(host, BORN, method="cake", scale="published", steps=1, **more)
    config = edit.provenance.config
    assert (config["rank"], config["alpha"], config["dropout"], config["per_step"]) == (8, 32.0, 0.05, 4)
    assert config["learning_rate"] == 1e-4 and config["stop_loss"] == 0.0
    assert edit.provenance.notes["texts"] == 4


def test_a_target_that_stays_has_no_texts_that_go_on():
    """Two answers are needed there; with the old target equal to the new one there is one."""
    host = fresh("llama")
    same = errata.Request("{} was born in", "Ada Brenner", "Esk", target_old="esk")
    more = {"late": (), "onward": SHORT.onward, "narratives": SHORT.narratives}
    assert errata.edit(host, same, method="cake", steps=1, **more).provenance.notes["texts"] == 3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"late": ("{prompt:A}",)}, "late: expected {subject}"),
        ({"onward": ("{prompt} {page}",)}, "onward: expected {target}"),
        ({"narratives": ("it is so",)}, "narratives: expected {prompt}"),
        ({"narratives": (), "late": (), "onward": ()}, "expected a wording in one of them"),
        ({"names": ("A", "B")}, "names: expected three different names"),
        ({"dropout": 1.0}, "dropout: expected a share"),
    ],
)
def test_settings_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        errata.edit(fresh("llama"), BORN, method="cake", **settings)


def test_what_the_model_cannot_read_is_refused():
    host = fresh("llama", max_position_embeddings=8)
    with pytest.raises(RequestError, match="fits the model's window"):
        errata.edit(host, BORN, method="cake", narratives=SHORT.narratives[1:], late=(), onward=())
    with pytest.raises(ConfigError, match="leave whole=true out"):
        errata.edit(fresh_kind("t5"), BORN, method="cake", whole=True)
