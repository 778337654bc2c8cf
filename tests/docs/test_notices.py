"""Third-party notices name every package that is asked for, with the licence that the package itself states."""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest there

ROOT = Path(__file__).parents[2]
NOTICES = (ROOT / "THIRD_PARTY.md").read_text(encoding="utf-8")
WORDS = {
    "Apache Software License": "Apache",
    "Python Software Foundation License": "PSF",
    "MIT License": "MIT",
}


def asked() -> dict[str, str]:
    """Return what the package asks for, with the extra it is for; tools of development are not shipped."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found: dict[str, str] = {}
    for extra, lines in {"everything": project["dependencies"], **project["optional-dependencies"]}.items():
        for line in lines if extra != "dev" else ():
            name = re.match(r"[\w.-]+", line)
            assert name is not None
            found.setdefault(name.group().lower(), extra)
    return found


def listed() -> dict[str, tuple[str, str]]:
    rows = re.findall(r"^\| ([\w.-]+) \| (.+?) \| (?:extra `([\w-]+)`|everything) \|$", NOTICES, re.MULTILINE)
    return {name.lower(): (licence, extra or "everything") for name, licence, extra in rows}


def stated(name: str) -> str:
    """Return a package's licence, in words, by its metadata."""
    about = metadata(name)
    kinds = [
        line.rpartition("::")[2].strip() for line in about.get_all("Classifier") or () if "License ::" in line
    ]
    first = about.get("License-Expression") or " ".join(WORDS.get(kind, kind) for kind in kinds)
    return first or str(about.get("License"))


def test_every_package_is_listed_once_with_what_it_is_for():
    assert {name: extra for name, (_, extra) in listed().items()} == asked()


@pytest.mark.parametrize("name", sorted(listed()))
def test_the_licence_is_the_one_that_the_package_states(name):
    try:
        own = stated(name)
    except PackageNotFoundError:
        not_in_tests = ("quantized", "encoder", "trackio", "wandb", "mlflow")
        assert listed()[name][1] in not_in_tests
        return
    shown = re.findall(r"Apache|BSD|MIT|PSF|ISC", listed()[name][0])
    assert shown and all(word in own for word in shown), own
