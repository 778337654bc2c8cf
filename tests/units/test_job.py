"""Jobs: what a fit needs is validated once, by whoever prepares it, and the host brings its own texts along."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace

import pytest
from typer.testing import CliRunner

import errata
from errata import job as jobs
from errata.bench.runner import neutral_texts
from errata.cli.main import app
from errata.errors import ConfigError, RequestError
from errata.report.read import read_run
from errata.types import AskOptions, Case, Corpus, Probe, Resources
from tests.models import fresh

REQUEST = errata.Request("{} was born in", "Ada", "Esk", "Merrin", "r")
CASE = Case("c", REQUEST, (Probe("efficacy", REQUEST.text, ("Esk",), ("Merrin",)),))


def test_a_job_gives_the_edit_and_is_validated_once(monkeypatch):
    host = fresh("llama")
    calls = []
    plain = jobs.check_requests
    monkeypatch.setattr(jobs, "check_requests", lambda *given: calls.append(given) or plain(*given))
    job = errata.prepare(host, REQUEST, method="ft", options={"steps": 2}, seed=4)
    edit = job.run()
    assert len(calls) == 1 and edit.digest == job.fit(job.requests).digest
    assert edit.digest == errata.edit(host, REQUEST, method="ft", seed=4, steps=2).digest
    expected, actual = job.provenance, edit.provenance
    for name in ("method", "requests", "host", "seed", "versions", "prompt_format", "parents"):
        assert getattr(expected, name) == getattr(actual, name), name
    assert json.loads(json.dumps(job.to_dict()))["settings"]["steps"] == 2
    with pytest.raises(FrozenInstanceError):
        job.after = edit  # type: ignore[misc]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"method": "memitt"}, ConfigError, "memit"),
        ({"method": "ft", "options": {"stepz": 2}}, ConfigError, "steps"),
        ({"method": "rewrite"}, ConfigError, "image"),
        ({"method": "ft", "requests": []}, RequestError, "no requests"),
        ({"method": "ft", "batch_size": 0}, ConfigError, "batch size"),
        ({"method": "ft", "ask": AskOptions(template="poem")}, ConfigError, "template"),
        ({"method": "ft", "requests": replace(REQUEST, target="Esk " * 4000)}, RequestError, "window"),
    ],
)
def test_what_a_fit_cannot_use_is_refused_before_it(given, error, message):
    with pytest.raises(error, match=message):
        errata.prepare(fresh("llama"), **{"requests": REQUEST, **given})


def test_an_edit_that_cannot_be_continued_is_refused_before_the_fit():
    host = fresh("llama")
    edit = errata.edit(host, REQUEST, method="ft", steps=1)
    with pytest.raises(ConfigError, match="made by ft"):
        errata.prepare(host, REQUEST, method="memit", after=edit)
    job = errata.prepare(
        host, replace(REQUEST, target="Tallow"), method="ft", options={"steps": 1}, after=edit
    )
    assert job.provenance.parents == (edit.digest,) and job.to_dict()["after"] == edit.digest


def test_requests_may_be_left_to_the_fit():
    long = replace(REQUEST, target="Esk " * 4000)
    assert errata.prepare(fresh("llama"), long, method="ft", check=False).requests == (long,)


def test_options_of_asking_say_what_differs_from_the_defaults():
    assert AskOptions().to_dict() == {"max_new_tokens": 24}
    given = AskOptions("chat", thinking=False, join="auto", max_new_tokens=3, context="Rain.")
    assert given.to_dict() == {"template": "chat", "thinking": False, "max_new_tokens": 3, "context": "Rain."}


def test_a_host_brings_its_texts_and_examples(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("Ada lives in Esk.\n\nBruno was born in Tallow.\n")
    plain = fresh("llama")
    host = errata.load(plain.model, plain.tokenizer, corpus=path)
    work = jobs.workspace(host, seed=0)
    assert work.corpus == host.resources.corpus and next(iter(work.corpus.texts())) == "Ada lives in Esk."
    assert neutral_texts(host, work) == ["Ada lives in Esk.", "Bruno was born in Tallow."]
    assert jobs.workspace(plain, seed=0).corpus is None and list(jobs.workspace(plain, seed=0).examples) == []
    host.resources = Resources(
        Corpus("mine", lambda: ["x"]), lambda count: ["neutral"] * count, lambda: [CASE]
    )
    work = jobs.workspace(host.with_prompt_format(replace(host.prompt_format, join="space")), seed=0)
    assert work.corpus.name == "mine" and list(work.examples) == [CASE]
    assert neutral_texts(host, work) == ["neutral"] * 200
    assert list(jobs.workspace(host, seed=0, examples=[]).examples) == []


def test_an_evaluation_is_a_run_that_can_be_kept(tmp_path):
    host = fresh("llama")
    texts = Corpus("mine", lambda: ["Ada lives in Esk and was born in Tallow, which lies by the sea."])
    more = replace(CASE, id="d", request=replace(REQUEST, target="Tallow"))
    run = {"method": "ft", "steps": 1, "schedule": "sequential:1", "at": "each", "corpus": texts}
    report = errata.evaluate(host, [CASE, more], run_folder=tmp_path / "run", **run)
    plain = errata.evaluate(host, [CASE, more], **run)
    assert report.rows == plain.rows and report.summary == plain.summary
    (cell,) = read_run(tmp_path / "run").cells
    assert cell.status == "done" and cell.method == "ft" and cell.cases == 2
    assert cell.summary["efficacy.generate"]["after"] == report.summary["efficacy.generate"]["after"]
    assert [look["digest"] for look in cell.checkpoints] == [point.digest for point in report.checkpoints]
    with pytest.raises(errata.ErrataError, match="not empty"):
        errata.evaluate(
            host, [CASE], edit=errata.edit(host, REQUEST, method="ft", steps=1), run_folder=tmp_path
        )


def test_a_dry_run_prints_the_job(tmp_path):
    host = fresh("llama")
    host.model.save_pretrained(tmp_path / "model")
    host.tokenizer.save_pretrained(tmp_path / "model")
    words = ["edit", "{} was born in", "--subject", "Ada", "--target", "Esk", "--model", str(tmp_path / "model"),
             "--method", "ft", "--set", "steps=3", "-o", str(tmp_path / "e.safetensors"), "--dry-run"]  # fmt: skip
    done = CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False)
    document = json.loads(done.stdout)
    assert document["dry_run"] and document["requests"] == 1 and document["settings"]["steps"] == 3
    shown = CliRunner().invoke(app, words, catch_exceptions=False).stdout
    assert "steps" in shown and "nothing was fitted or written" in shown
    assert not (tmp_path / "e.safetensors").exists()
