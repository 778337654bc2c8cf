"""The wheel, built from the source archive, works in an empty environment outside the repository."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONSTRAINTS = str(ROOT / "constraints.txt")

pytestmark = pytest.mark.package


def run(*words: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a program without what this environment sets for Python."""
    own = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))
    }
    return subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env={**own, **variables},
        capture_output=True,
        text=True,
        timeout=1200,
    )


def done(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> Path:
    """Return a folder with the source archive and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("dist")
    done(run(sys.executable, "-m", "build", "--outdir", folder, cwd=ROOT, PIP_CONSTRAINT=CONSTRAINTS))
    return folder


@pytest.fixture(scope="session")
def installed(built, tmp_path_factory) -> Path:
    """Return the folder of the programs of an environment that has the wheel and what it asks for, nothing else."""
    folder = tmp_path_factory.mktemp("empty")
    done(run(sys.executable, "-m", "venv", folder / "env", cwd=folder))
    wheel = next(built.glob("*.whl"))
    done(run(folder / "env/bin/python", "-m", "pip", "install", "-q", "-c", CONSTRAINTS, wheel, cwd=folder))
    return folder / "env" / "bin"


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("home")


def test_the_archive_has_what_a_packager_needs(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {
        "README.md",
        "LICENSE",
        "THIRD_PARTY.md",
        "SECURITY.md",
        "constraints.txt",
        "pyproject.toml",
    } <= names
    assert {"tests/conftest.py", "docs/ledger.md", "src/errata/lab/model/model.safetensors"} <= names


def test_the_wheel_has_the_package_alone(built):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    tops = {name.split("/")[0] for name in names}
    assert tops == {"errata", next(top for top in tops if top.endswith(".dist-info"))}
    for part in (
        "lab/model/model.safetensors",
        "lab/data/names.yaml",
        "lab/editors/lab/mend.safetensors",
        "bench/published/memit-gpt-j-10k.yaml",
    ):
        assert f"errata/{part}" in names
    ours = {p.relative_to(ROOT / "src").as_posix() for p in (ROOT / "src/errata").rglob("*") if p.is_file()}
    assert {name for name in ours if "__pycache__" not in name} <= names


def test_it_is_the_wheel_that_runs(installed, tmp_path):
    place = done(run(installed / "python", "-c", "import errata; print(errata.__file__)", cwd=tmp_path))
    assert Path(place.strip()).is_relative_to(installed.parent)
    have = json.loads(done(run(installed / "python", "-m", "pip", "list", "--format", "json", cwd=tmp_path)))
    assert not {"pytest", "peft", "mkdocs", "openai"} & {package["name"] for package in have}


def test_the_demo_runs(installed, home, tmp_path):
    shown = done(run(installed / "errata", "demo", cwd=tmp_path, ERRATA_CACHE=str(home)))
    assert "the weights are bit-identical to the start" in shown
    rewrites = [line for line in shown.splitlines() if line.split()[:1] == ["rewrite"]]
    assert len(rewrites) == 3 and not any("not as wanted" in line for line in rewrites)
    assert (tmp_path / "errata-demo.safetensors").is_file()


def test_a_ledger_is_kept(installed, home, tmp_path):
    def errata(*words: str) -> str:
        return done(run(installed / "errata", *words, cwd=tmp_path, ERRATA_CACHE=str(home)))

    start = json.loads(errata("init", "--model", "lab", "--json"))
    errata("edit", "{} was born in", "--subject", "Ada Brenner", "--target", "Tallow", "-m", "register")
    assert "Tallow" in errata("ask", "Ada Brenner was born in")
    events = json.loads(errata("log", "--json"))
    assert "register" in json.dumps(events)
    applied = json.loads(errata("status", "--json"))["edits"]
    assert len(applied) == 1
    errata("revert", applied[0]["edit"], "-m", "wrong register")
    after = json.loads(errata("status", "--weights", "--json"))
    assert after["edits"] == []
    assert start["model"]["weights"] == after["weights"]["base"] == after["weights"]["edited"]
    errata("check")
