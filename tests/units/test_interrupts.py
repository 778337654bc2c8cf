"""Ctrl-C, SIGTERM, a full disk, a closed pipe: one line, the right exit code, nothing half-written, nobody left."""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from errata.errors import DataError, EditError
from tests.units.bench.small import document, write_cases, write_model

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")

EDIT = ("{} was born in", "--subject", "Ada", "--target", "Esk", "--method", "ft", "--set", "steps=3")

STRIKE = """
import os, signal, sys
def strike(where, name, after=0, number=signal.SIGINT):
    import importlib
    at = importlib.import_module(where.partition(":")[0])
    for part in filter(None, where.partition(":")[2].split(".")):
        at = getattr(at, part)
    real, calls = getattr(at, name), []
    def struck(*given, **named):
        calls.append(1)
        if len(calls) > after:
            os.kill(os.getpid(), number)
        return real(*given, **named)
    setattr(at, name, struck)
"""
RUN = "\nfrom errata.cli.main import run\nrun()\n"
HALF_WRITTEN = """
import pathlib
real_write = pathlib.Path.write_bytes
def half(path, data):
    with path.open("wb") as file:
        file.write(data[: len(data) // 2])
        file.flush()
        os.kill(os.getpid(), signal.SIGINT)
        file.write(data[len(data) // 2 :])
pathlib.Path.write_bytes = half
"""


def heed_signals() -> None:
    """Undo what a shell does to its background jobs: it has them ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


SERVER = """
import json, os, signal, sys
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
for line in sys.stdin:
    task = json.loads(line)
    child = os.fork()
    if not child:
        break
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
else:
    os._exit(0)
os.setsid()
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
os.chdir(task["cwd"])
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
for number, path in ((1, task["out"]), (2, task["err"])):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
sys.argv = ["-c", *task["words"]]
exec(compile(task["code"], "<string>", "exec"), {"__name__": "__main__"})
"""
"""A process that has opened a model before, so that each program need not load torch and transformers anew: it
forks for each, and prints the exit code."""


class Programs:
    """Runs programs one after another in children of one warm process."""

    def __init__(self, model: Path, place: Path) -> None:
        self.place = place
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(model)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def run(self, code: str, *words: str, cwd: Path) -> tuple[int, str, str]:
        """Return exit code, standard output and standard error."""
        out, err = self.place / "out", self.place / "err"
        for path in (out, err):
            path.unlink(missing_ok=True)
        task = {"code": code, "words": words, "cwd": str(cwd), "out": str(out), "err": str(err)}
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.write(json.dumps(task) + "\n")
        self.server.stdin.flush()
        ready, _, _ = select.select([self.server.stdout], [], [], 240)
        assert ready, f"no end of: {words}"
        status = int(self.server.stdout.readline())
        return status, out.read_text(), err.read_text()

    def end(self) -> None:
        """End the process."""
        self.server.communicate(timeout=60)


@pytest.fixture(scope="module")
def programs(model, tmp_path_factory):
    """Return what runs programs."""
    made = Programs(model, tmp_path_factory.mktemp("programs"))
    yield made
    made.end()


def start(code: str, *words: str, cwd: Path, **more) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, *words], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, preexec_fn=heed_signals,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}, **more,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, out, err


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> Path:
    return write_cases(tmp_path_factory.mktemp("cases") / "cases.jsonl", 4)


def is_interruption(code: int, out: str, err: str, *, number: int = 130, word: str = "interrupted") -> None:
    assert code == number, (code, err)
    assert err.count("\n") == 1 and err.startswith(f"{word}: "), err
    assert out == ""


@pytest.mark.parametrize(
    ("prelude", "verb"),
    [
        ("strike('errata.cli.common', 'plain_warnings')", "edit"),
        ("strike('errata.host.open', 'load')\nstrike('errata.loading', 'open_host')", "edit"),
        ("strike('errata.training.tune:torch.autograd', 'grad', 1)", "edit"),
        (HALF_WRITTEN, "edit"),
        ("strike('errata.api', 'answer_requests', 1)", "edit"),
        ("strike('errata.bench.runner', 'observe', 1)", "eval"),
        ("strike('errata.stats.collect', '_add', 1)", "stats"),
    ],
    ids=["start", "load", "fit", "write", "check", "eval", "stats"],
)  # fmt: skip
def test_ctrl_c_at_several_moments(programs, model, cases, tmp_path, prelude, verb):
    target = tmp_path / "old.safetensors"
    target.write_bytes(b"what was there before")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("Ada Brenner was born in Tallow and lives there.\n\n" * 2000)
    words = {
        "edit": (*EDIT, "--model", str(model), "-o", str(target), "--force"),
        "eval": ("--model", str(model), "--cases", str(cases), "--method", "ft", "--set", "steps=2",
                 "-o", str(tmp_path / "report.json")),
        "stats": ("--model", str(model), "--tokens", "3000", "--corpus", str(corpus)),
    }[verb]  # fmt: skip
    environment = {"ERRATA_CACHE": str(tmp_path / "cache")}
    code = f"{STRIKE}\nos.environ.update({environment!r})\n{prelude}\n{RUN}"
    is_interruption(*programs.run(code, verb, *words, cwd=tmp_path))
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert not any(name.endswith(".part") for name in left), left
    if prelude.startswith("strike('errata.api', 'answer_requests'"):
        assert target.stat().st_size > 100  # the edit was whole before anything was asked
    else:
        assert target.read_bytes() == b"what was there before"
    assert "report.json" not in left


def test_sigterm_ends_likewise(programs, model, tmp_path):
    code = f"{STRIKE}\nstrike('errata.loading', 'open_host', number=signal.SIGTERM)\n{RUN}"
    ended = programs.run(code, "edit", *EDIT, "--model", str(model), "-o", "e.safetensors", cwd=tmp_path)
    is_interruption(*ended, number=143, word="terminated")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_that_a_library_turns_into_an_error_is_one_still(programs, tmp_path):
    code = f"""{STRIKE}
import errata.cli.show as show
from errata.errors import EditError
def load(*_):
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:
        raise EditError("cannot be read")
import errata.edits
errata.edits.Edit.load = load
{RUN}"""
    is_interruption(*programs.run(code, "show", "x", cwd=tmp_path))


def test_an_ignored_interrupt_stays_ignored(programs, tmp_path):
    code = f"import os, signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n{STRIKE}\n"
    code += f"strike('errata.cli.common', 'emit')\n{RUN}"
    status, out, _ = programs.run(code, "methods", "rome", "--json", cwd=tmp_path)
    assert status == 0 and json.loads(out)["name"] == "rome"


def test_bench_with_workers_ends_them_and_goes_on_later(model, cases, tmp_path):
    methods = [
        {"name": "ft", "label": f"ft {i}", "settings": {"steps": 400, "stop_loss": 1e-9}} for i in range(4)
    ]
    words = document(model, cases, {"schedule": "single", "methods": methods})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(words))
    process = start(RUN, "bench", "recipe.yaml", "-o", "run", "--jobs", "2", "--json", cwd=tmp_path)
    children = await_workers(process, tmp_path / "run" / "jobs.sqlite")
    assert all(holds_back(child, signal.SIGINT) for child in children)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
    status, out, err = finish(process)
    assert status == 130 and err.count("\n") == 1 and "--resume" in err and out == "", err
    assert len(children) >= 2 and not any(lives(child) for child in children)
    assert not list((tmp_path / "run").rglob("*.part"))
    for path in (tmp_path / "run" / "cells").rglob("rows.jsonl"):
        assert path.read_text() == "" or path.read_text().endswith("}\n")


def await_workers(process: subprocess.Popen, table: Path) -> list[int]:
    """Wait until two cells are worked on; return the processes of their workers."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
        if not table.exists():
            continue
        try:
            with sqlite3.connect(table) as base:
                found = base.execute("SELECT owner FROM jobs WHERE state = 'leased'").fetchall()
        except sqlite3.Error:
            continue
        if len(found) == 2:
            return [int(owner.split(":")[1]) for (owner,) in found]
    raise AssertionError(
        f"no two workers: {process.poll()} {process.communicate()[1] if process.poll() else ''}"
    )


def holds_back(process: int, number: int) -> bool:
    """Whether a process blocks a signal."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    mask = next(line.split()[1] for line in lines if line.startswith("SigBlk:"))
    return bool(int(mask, 16) >> (number - 1) & 1)


def lives(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_a_closed_pipe_ends_quietly(tmp_path):
    process = start(RUN, "methods", "--json", cwd=tmp_path)
    process.stdout.close()
    process.wait(60)
    assert process.stderr.read() == "" and process.returncode == 141
    for words in (("methods",), ("--help",), ("data", "list", "--json"), ("data", "list")):
        program = f"{sys.executable} -c '{RUN}' {' '.join(words)} | head -n 1"
        done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, timeout=60)
        assert done.stderr == "" and done.stdout.count("\n") == 1, words


# --- disks and folders ----------------------------------------------------------------------


def full(path: Path, data: bytes) -> int:
    """Write half of some bytes, as a full disk does."""
    with path.open("wb") as file:
        file.write(data[: len(data) // 2])
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_the_old_edit(tmp_path, monkeypatch):
    import torch

    from errata.edits.format import write

    target = write(tmp_path / "e.safetensors", {"a": torch.ones(3)}, {"kind": "weight"})
    before = target.read_bytes()
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(EditError, match="No space left"):
        write(target, {"a": torch.zeros(1000)}, {"kind": "weight"})
    assert target.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["e.safetensors"]


def test_a_full_disk_leaves_whole_lines_and_the_old_report(tmp_path, monkeypatch):
    from errata.bench import results
    from errata.report.files import write

    journal = results.Journal(tmp_path / "rows.jsonl")
    journal.append({"type": "case", "case": "a"})
    whole = journal.path.read_bytes()

    def fsync(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        with pytest.raises(DataError, match="No space left"):
            journal.append({"type": "case", "case": "b" * 1000})
    assert journal.path.read_bytes() == whole
    report = results.write_report(tmp_path / "r.json", {"a": 1})
    page = write(tmp_path / "page.html", "old")
    monkeypatch.setattr(Path, "write_bytes", full)
    monkeypatch.setattr(Path, "write_text", lambda path, text, **_: full(path, text.encode()))
    with pytest.raises(DataError, match="No space left"):
        results.write_report(report, {"a": list(range(1000))})
    with pytest.raises(DataError, match="No space left"):
        write(page, "new" * 1000)
    assert json.loads(report.read_text()) == {"a": 1} and page.read_text() == "old"
    assert {p.name for p in tmp_path.iterdir()} == {"rows.jsonl", "r.json", "page.html"}


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder_is_found_out_before_the_fit(model, tmp_path):
    from typer.testing import CliRunner

    from errata.cli.main import app

    folder = tmp_path / "closed"
    folder.mkdir(mode=0o500)
    result = CliRunner().invoke(
        app, ["edit", *EDIT, "--model", str(model), "-o", str(folder / "e.safetensors")]
    )
    assert isinstance(result.exception, EditError) and "no permission" in str(result.exception)


def test_training_leaves_no_half_model(tmp_path, monkeypatch):
    from errata.lab import train as training

    monkeypatch.setattr(training, "save_file", lambda state, part, **_: full(Path(part), b"x" * 100))
    with pytest.raises(OSError, match="No space left"):
        training.checkpoint(tmp_path, TinyModel(), SimpleNamespace(state={}), 1)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(KeyboardInterrupt):
        training.export(tmp_path, TinyModel(), None)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "config.json").read_text() == "{}"


class TinyModel:
    """Breaks off in the middle of being saved."""

    def named_parameters(self):
        return []

    def to(self, _):
        return self

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt
