"""The page's side of HTTP: one file that loads nothing, runs only its own script, and never writes data as markup."""

from __future__ import annotations

import base64
import hashlib
import re

import pytest
from typer.testing import CliRunner

from errata.cli.main import app
from errata.serve import ui
from errata.serve.catalogue import guard_report
from errata.serve.server import Served
from errata.serve.settings import ServerSettings
from tests.units.serve.served import running

RECIPE = """
models: [lab]
runs:
  - {methods: [in_prompt], datasets: ["lab:1"], schedule: single}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (folder / "recipe.yaml").write_text(RECIPE)
    result = CliRunner().invoke(app, ["bench", str(folder / "recipe.yaml"), "-o", str(folder / "out")])
    assert result.exit_code == 0, result.output
    return folder / "out"


@pytest.fixture(scope="module")
def client(lab_host, run):
    with running(Served(lab_host, "lab"), ServerSettings(port=0, page=True, runs=(run,))) as one:
        yield one


def test_the_page_is_whole_and_may_run_only_itself(client):
    answer = client.get("/")
    policy, text = answer.headers["content-security-policy"], answer.text
    assert answer.status_code == 200 and "default-src 'none'" in policy and "unsafe" not in policy
    for tag, source in (("script", "script-src"), ("style", "style-src")):
        (inner,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()
        assert f"{source} 'sha256-{digest}'" in policy
    assert "@@" not in text
    assert not re.search(r"(?:src|href)=\"(?!#)", text) and "http" not in text.replace("HTTP", "")
    assert not re.search(r"\son\w+=|style=\"", text), "the policy forbids handlers and styles inside of tags"


def test_data_never_becomes_markup():
    script = ui.page()[0].partition("<script>")[2]
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "DOMParser",
        "Function(",
    ):
        assert word not in script


def test_every_field_has_a_label():
    text = ui.page()[0]
    fields = re.findall(r"<(?:input|select|textarea) id=\"([\w-]+)\"", text)
    assert len(fields) >= 11
    for name in fields:
        inside = re.search(rf"<label[^>]*>\s*<input id=\"{name}\"", text)
        assert f'for="{name}"' in text or inside, name
    assert 'lang="en"' in text and 'name="viewport"' in text and "prefers-color-scheme: dark" in text


def test_the_board_of_a_run_and_the_methods_are_told(client):
    (section,) = client.get("/v1/board").json()["sections"]
    table = section["tables"][0]
    assert len(table["columns"]) == len(table["rows"][0]) and any(
        "in_prompt" in row[0] for row in table["rows"]
    )
    methods = client.get("/v1/methods").json()
    names = [one["name"] for one in methods["data"]]
    assert methods["usual"] in names and "grace" in names and "rewrite" not in names


def test_without_the_page_there_is_none(lab_host):
    with running(Served(lab_host, "lab"), ServerSettings(port=0)) as client:
        assert client.get("/").status_code == 404 and client.get("/v1/board").status_code == 404


def test_a_report_says_which_bounds_were_kept():
    body = {
        "measured": {"answered": 1.0, "canaries": 0.5, "divergence": 0.2, "norm": "nan", "perplexity": None},
        "bounds": {"answered": 1.0, "canaries": 0.95, "divergence": 0.3, "norm": 1.0, "perplexity": 1.05},
    }
    lines = {line["what"].split()[0]: line["passed"] for line in guard_report(body)}
    assert lines == {"requests": True, "canary": False, "divergence": True, "norm": False}
    assert guard_report({}) == []
