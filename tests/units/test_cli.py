"""The command line: light to start, one message and code 2 for bad input, JSON that parses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import errata
from tests.models import fresh
from tests.program import errata as run


def launch(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run the program in a process of its own; ``more`` is added to its environment."""
    return subprocess.run(
        [sys.executable, "-c", "from errata.cli.main import run; run()", *words],
        capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1", **more}, timeout=300,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A GPT-2-shaped model saved by transformers."""
    host = fresh("gpt2")
    target = tmp_path_factory.mktemp("models") / "gpt2-like"
    host.model.save_pretrained(target)
    host.tokenizer.save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def edit_file(folder, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("edits") / "fix.safetensors"
    done = launch(
        "edit", "{} was born in", "--subject", "Ada Brenner", "--target", "Merrin", "--model", str(folder),
        "--method", "rome", "--set", "steps=3", "--set", "tokens=300", "-o", str(path), "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["path"] == str(path) and document["bytes"] == path.stat().st_size
    return path


def test_help_is_light(tmp_path):
    code = (
        "import sys, time; start = time.perf_counter()\n"
        "from errata.cli.main import app\n"
        "from typer.testing import CliRunner\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'tokenizers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    compiled = {  # as an installation has it
        "PYTHONDONTWRITEBYTECODE": "",
        "PYTHONPYCACHEPREFIX": str(tmp_path),
    }
    seconds = []  # of computing: what else runs on the machine does not count
    for _ in range(12):
        if seconds and min(seconds) < 0.5:  # a busy machine makes a process dearer, never cheaper
            break
        start = os.times()
        assert launch("--help", **compiled).returncode == 0
        end = os.times()
        seconds.append(end.children_user + end.children_system - start.children_user - start.children_system)
    assert min(seconds) < 0.5, seconds


def test_import_is_light():
    code = "import sys, errata; assert not {'torch', 'transformers'} & set(sys.modules); errata.Request; dir(errata)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_saved_model_through_edit_ask_show(folder, edit_file):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    asked = run(
        "ask", "--model", str(folder), "--edit", str(edit_file), "Ada Brenner was born in", "Bruno", "--json"
    )
    answers = json.loads(asked.stdout)["answers"]
    assert [a["prompt"] for a in answers] == ["Ada Brenner was born in", "Bruno"]
    assert all({"with", "without"} <= set(a) for a in answers)
    shown = json.loads(run("show", str(edit_file), "--json").stdout)
    assert shown["method"] == "rome" and shown["requests"][0]["target"] == "Merrin"
    assert shown["config"]["steps"] == 3 and "transformer.h.0.mlp.c_proj.weight" in shown["weights"]
    for words in (("show", str(edit_file)), ("model", str(folder)), ("methods", "rome"), ("methods",)):
        done = run(*words)
        assert done.returncode == 0 and done.stdout.strip(), done.stderr
    assert json.loads(run("model", str(folder), "--json").stdout)["family"] == "gpt2"
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_a_live_model_through_python(tmp_path):
    from transformers import LlamaForCausalLM

    tiny = fresh("llama")
    assert isinstance(tiny.model, LlamaForCausalLM)
    host = errata.load(tiny.model, tokenizer=tiny.tokenizer)
    start = host.weights_hash()
    request = errata.Request("{} was born in", "Ada Brenner", "Merrin")
    edit = errata.edit(host, [request], method="rome", steps=3, tokens=300)
    assert errata.Edit.load(edit.save(tmp_path / "e.safetensors")).summary()["digest"] == edit.digest
    with edit.on(host):
        assert host.weights_hash() != start
    assert host.weights_hash() == start


def test_eval_writes_the_documented_document(folder, tmp_path):
    cases = tmp_path / "cases.jsonl"
    cases.write_text(json.dumps({
        "prompt": "{} was born in", "subject": "Ada Brenner", "target": "Merrin", "target_old": "Esk",
        "probes": [{"kind": "neighbourhood", "prompt": "Bruno was born in", "answers": ["Esk"],
                    "before": ["Esk"], "rival": "Merrin"}],
    }))  # fmt: skip
    out = tmp_path / "report.json"
    done = run(
        "eval", "--model", str(folder), "--method", "ft", "--set", "steps=2", "--cases", str(cases), "--json",
        "-o", str(out), "--seed", "5",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document == json.loads(out.read_text())
    assert set(document) == {"summary", "rows", "meta"}
    entry = document["summary"]["efficacy.probability"]
    assert {"before", "after", "n", "ci"} <= set(entry) and len(entry["ci"]) == 2
    assert {"seconds", "cpu_seconds", "peak_memory_mb", "versions", "seed", "host_fingerprint"} <= set(
        document["meta"]
    )
    assert document["meta"]["seed"] == 5 and document["meta"]["weights_restored"]


EDIT = ("edit", "{} was born in", "--subject", "Ada", "--target", "Esk")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("edit", "she is", "--subject", "Ada", "--target", "Esk"), "does not occur in prompt"),
        (("edit", "Ada and Ada in", "--subject", "Ada", "--target", "Esk"), "mark the one that is meant"),
        (("edit", "{} is", "--subject", "Ada", "--target", ""), "target is empty"),
        (("edit", "{} is", "--subject", "Ada"), "--target"),
        ((*EDIT, "--method", "rmoe"), "did you mean 'rome'"),
        ((*EDIT, "--set", "stepz=3"), "did you mean 'steps'"),
        ((*EDIT, "--set", "steps=many"), "expected int"),
        ((*EDIT, "--set", "steps"), "key=value"),
        ((*EDIT, "--set", "layers=[77]"), "layer 77 does not exist"),
        ((*EDIT, "--dtype", "float8"), "unknown dtype"),
        ((*EDIT, "--device", "tpu9"), "device"),
        (("edit", "{} " + "was " * 400, "--subject", "Ada", "--target", "Esk"), "window"),
        (("edit", "missing.jsonl"), "cannot read"),
        ((*EDIT, "-o", "no/such/folder/e.safetensors"), "does not exist"),
    ],
)
def test_bad_input_is_one_message_and_code_two(folder, tmp_path, words, message):
    output = () if "-o" in words else ("-o", str(tmp_path / "e.safetensors"))
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    done = run(*words, *output, "--model", str(folder), cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr and done.stdout == ""
    assert list(tmp_path.iterdir()) == []
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_bad_models_and_edits_are_refused(folder, edit_file, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.safetensors").write_bytes(edit_file.read_bytes()[:200])
    other = fresh("gpt2", seed=8)
    other.model.save_pretrained(tmp_path / "other")
    other.tokenizer.save_pretrained(tmp_path / "other")
    for words, message in (
        (("model", str(tmp_path / "empty")), "no config.json"),
        (("ask", "--model", str(tmp_path / "nowhere/at/all"), "x"), "no folder"),
        (("show", str(tmp_path / "bad.safetensors")), "truncated"),
        (("ask", "--model", str(folder), "--edit", str(tmp_path / "none"), "x"), "does not exist"),
        (("ask", "--model", str(tmp_path / "other"), "--edit", str(edit_file), "x"), "edit made for host"),
        (("eval", "--model", str(folder), "--cases", "lab:x", "--method", "rome"), "lab:N"),
        (("eval", "--model", str(folder), "--cases", "lab:2"), "either --method or --edit"),
        (("lab", "world", "Ada Brener"), "did you mean 'Ada Brenner'"),
    ):
        done = run(*words)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
    overruled = run(
        "ask", "--model", str(tmp_path / "other"), "--edit", str(edit_file), "x", "--foreign", "--json"
    )
    assert overruled.returncode == 0
    assert other.fingerprint in json.loads(overruled.stdout)["overrides"][0]


def test_dry_run_writes_nothing(folder, tmp_path):
    done = run(*EDIT, "--model", str(folder), "-o", str(tmp_path / "e.safetensors"), "--dry-run")
    assert done.returncode == 0 and "dry run" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_methods_are_listed_by_the_kind_of_their_edits():
    everything = json.loads(run("methods", "--json").stdout)
    for kind in ("weight", "memory", "prompt", "steer"):
        names = [entry["name"] for entry in json.loads(run("methods", "--kind", kind, "--json").stdout)]
        assert names and names == [entry["name"] for entry in everything if entry["gives"] == kind]
    refused = run("methods", "--kind", "zqxw")
    assert (
        refused.returncode == 2 and "expected one of memory, model, prompt, steer, weight" in refused.stderr
    )
