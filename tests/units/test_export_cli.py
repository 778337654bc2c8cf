"""errata export: what it writes is opened without errata, and what it refuses leaves nothing behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.program import errata
from tests.units.bench.small import write_model

PROMPT = ("{} was born in", "--subject", "Ada Brenner", "--target", "Merrin")
EXPORTS = (("lora", "checkpoint"), ("calinet", "checkpoint"), ("lora", "peft"))
PLAIN = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
found = []
for folder, adapter in json.loads(sys.argv[1]):
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if adapter:
        from peft import PeftModel
        model = PeftModel.from_pretrained(model, adapter)
    ids = tokenizer("Ada Brenner was born in", return_tensors="pt").input_ids
    out = model.generate(input_ids=ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, num_beams=1)
    found.append(out[0, ids.shape[1]:].tolist())
print(json.dumps({"ids": found, "errata": "errata" in sys.modules}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, and an edit of each kind."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "model").mkdir()
    write_model(folder / "model")
    for method, more in {
        "lora": ("--set", "steps=100", "--set", "scale=published"),
        "calinet": ("--set", "activation=gelu_tanh", "--set", "steps=60"),
        "grace": ("--set", "steps=4"), "in_prompt": (),
    }.items():  # fmt: skip
        words = (
            "edit",
            *PROMPT,
            "--model",
            "model",
            "--method",
            method,
            *more,
            "-o",
            f"{method}.safetensors",
        )
        assert errata(*words, cwd=folder).returncode == 0
    return folder


def without_errata(folder: Path, models: list[tuple[str, str | None]]) -> list[list[int]]:
    """Generate with models, some with an adapter, in a process that imports transformers, and peft for an adapter."""
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, json.dumps(models)], cwd=folder, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["errata"] is False
    return found["ids"]


@pytest.fixture(scope="module")
def elsewhere(folder, tmp_path_factory) -> dict[tuple[str, str] | None, list[int]]:
    """What another program generates from each export, and from the model without an edit (None)."""
    models: list[tuple[str, str | None]] = [("model", None)]
    for method, to in EXPORTS:
        out = tmp_path_factory.mktemp("exports") / "out"
        words = ("export", f"{method}.safetensors", "--model", "model", "--to", to, "-o", out)
        done = errata(*words, "--json", cwd=folder)
        assert done.returncode == 0, done.stderr
        receipt = json.loads(done.stdout)
        assert receipt["to"] == to and not receipt["dry_run"]
        assert {p.name for p in out.iterdir()} == set(receipt["files"])
        models.append((str(out), None) if to == "checkpoint" else ("model", str(out)))
    return dict(zip((None, *EXPORTS), without_errata(folder, models), strict=True))


@pytest.mark.parametrize(("method", "to"), EXPORTS)
def test_an_export_answers_in_a_program_without_errata(folder, elsewhere, method, to):
    import torch

    import errata as library

    host = library.load(str(folder / "model"), device="cpu")
    ids = host.encode_prompt("Ada Brenner was born in")
    with library.Edit.load(folder / f"{method}.safetensors").on(host):
        row = list(ids)
        for _ in range(6):  # without the end token, as the other program
            with torch.no_grad():
                scores = host.forward(host.batch([row]))[0, -1]
            scores[host.tokenizer.eos_token_id] = -torch.inf
            row.append(int(scores.argmax()))
    assert elsewhere[method, to] == row[len(ids) :]
    assert elsewhere[None] != row[len(ids) :], "the edit was to be seen"


def test_a_table_says_what_was_written_and_lost(folder, tmp_path):
    words = ("export", "lora.safetensors", "--model", "model", "--to", "checkpoint", "-o", tmp_path / "out")
    done = errata(*words, "--dtype", "bfloat16", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "bfloat16" in done.stdout and "lost by rounding" in done.stdout and "written to" in done.stdout
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert {str(file.get_tensor(name).dtype) for name in file.keys()} == {"torch.bfloat16"}  # noqa: SIM118
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_prompts_need_no_model(folder, tmp_path):
    done = errata("export", "in_prompt.safetensors", "--to", "prompts", "-o", tmp_path / "out", cwd=folder)
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "out" / "prompts.json").read_text(encoding="utf-8"))
    assert "Ada Brenner was born in Merrin" in document["prefix"]
    (line,) = (tmp_path / "out" / "entries.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["context"] == document["prefix"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("grace.safetensors", "--model", "model", "--to", "checkpoint"), "its radius router accepts"),
        (("calinet.safetensors", "--model", "model", "--to", "peft"), "adds no matrix to a linear map"),
        (("in_prompt.safetensors", "--model", "model", "--to", "checkpoint"), "export it to prompts"),
        (("lora.safetensors", "--to", "prompts"), "no texts to put into prompts"),
        (("lora.safetensors", "--to", "checkpoint"), "needs the model"),
        (("in_prompt.safetensors", "--to", "prompts", "--model", "model"), "needs no model"),
        (("lora.safetensors", "--to", "chekpoint", "--model", "model"), "did you mean 'checkpoint'"),
        (("lora.safetensors", "--to", "peft", "--model", "model", "--dtype", "float16"), "takes no dtype"),
        (("lora.safetensors", "--to", "checkpoint", "--model", "absent/"), "no folder 'absent/'"),
        (("lora.safetensors", "--model", "model"), "needs --to"),
    ],
)
def test_what_is_refused_leaves_nothing(folder, words, reason, tmp_path):
    done = errata("export", *words, "-o", tmp_path / "out", cwd=folder)
    assert done.returncode == 2 and reason in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())


def test_an_export_is_replaced_with_force_only(folder, tmp_path):
    words = ("export", "in_prompt.safetensors", "--to", "prompts", "-o", tmp_path / "out")
    assert errata(*words, "--dry-run", cwd=folder).returncode == 0 and not list(tmp_path.iterdir())
    assert errata(*words, cwd=folder).returncode == 0
    again = errata(*words, cwd=folder)
    assert again.returncode == 2 and "--force" in again.stderr
    assert errata(*words, "--force", cwd=folder).returncode == 0
    model = errata("export", "in_prompt.safetensors", "--to", "prompts", "-o", "model", "--force", cwd=folder)
    assert (
        model.returncode == 2
        and "no export wrote" in model.stderr
        and (folder / "model/config.json").exists()
    )


def test_the_list_says_which_edits_each_export_takes():
    text, entries = errata("export", "--list").stdout, json.loads(errata("export", "--list", "--json").stdout)
    assert [entry["name"] for entry in entries] == [
        "checkpoint", "delta", "gguf", "peft", "prompts", "vllm",
    ]  # fmt: skip
    assert all(entry["takes"] and entry["name"] in text for entry in entries)
    assert "calinet" in text and "low-rank" in text and "prompt edits" in text
