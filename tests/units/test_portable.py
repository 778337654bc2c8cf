"""Modules that only POSIX systems have are not needed: what Windows lacks is hidden, and all of errata runs."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest

from errata.bench import jobs, machine
from tests.models import fresh

HIDE = (
    "import sys\nfor name in ('resource', 'fcntl', 'pwd', 'grp', 'termios'):\n    sys.modules[name] = None\n"
)

PRELOAD = "import psutil\n"
"""Its files for Linux and macOS need one of these; transformers imports it."""

IMPORT_ALL = """
import importlib, pkgutil
import errata
for module in pkgutil.walk_packages(errata.__path__, "errata."):
    importlib.import_module(module.name)
print("imported")
"""

EDIT = """
from pathlib import Path
import errata

host = errata.load(sys.argv[1])
request = errata.Request("{} was born in", "Ada Brenner", "Merrin")
before = host.weights_hash()
edit = errata.edit(host, request, method="ft", steps=2)
with edit.on(host):
    assert host.weights_hash() != before
assert host.weights_hash() == before
path = Path(sys.argv[2]) / "edit.safetensors"
edit.save(path)
edit = errata.Edit.load(path)
case = errata.Case("a", request, (errata.Probe("efficacy", "Ada Brenner was born in", ("Merrin",), ()),))
report = errata.evaluate(host, [case], edit=edit, corpus=sys.argv[3])
assert report.rows and report.meta["peak_memory_mb"] > 50
print("edited")
"""


def run(code: str, *arguments: str, before: str = "") -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", before + HIDE + code, *arguments],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-3000:]
    return found.stdout


def test_every_module_can_be_imported():
    assert "imported" in run(IMPORT_ALL)


def test_fit_apply_and_evaluate(tmp_path):
    host = fresh("gpt2")
    host.model.save_pretrained(tmp_path / "model")
    host.tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "corpus.txt").write_text("Ada Brenner was born in Tallow, and the rain fell.\n" * 3)
    assert "edited" in run(
        EDIT, str(tmp_path / "model"), str(tmp_path), str(tmp_path / "corpus.txt"), before=PRELOAD
    )


def test_peak_memory_is_known_without_linux_files(tmp_path, monkeypatch):
    linux = machine.peak_memory_mb()
    monkeypatch.setattr(machine, "LINUX_STATUS", tmp_path / "none")
    present = psutil.Process().memory_info().rss / 2**20
    if os.name == "posix":
        assert machine.peak_memory_mb() == pytest.approx(linux, rel=0.2), "the kernel's count since the start"
    monkeypatch.setitem(sys.modules, "resource", None)
    assert machine.peak_memory_mb() == pytest.approx(present, rel=0.05), "what is held now"
    windows = SimpleNamespace(rss=2**20, peak_wset=7 * 2**20)
    monkeypatch.setattr(psutil.Process, "memory_info", lambda self: windows)
    assert machine.peak_memory_mb() == 7.0


def test_the_machine_is_described(tmp_path, monkeypatch):
    facts = machine.hardware()
    assert facts["cpu"] and facts["cores"] >= 1 and facts["memory_gb"] > 0.5
    monkeypatch.setattr(machine, "LINUX_PROCESSORS", tmp_path / "none")
    assert machine.processor()


def test_who_lives_is_asked_without_a_signal():
    """On Windows os.kill ends the process, whatever the signal."""
    assert machine.is_running(os.getpid()) and jobs._is_running(jobs.new_owner())
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert not machine.is_running(ended.pid)
