"""docs/extending.md is run: each example as the one file that it says it is, in a copy of the package."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from errata.data.sets import REGISTRY as DATASETS
from errata.edits.routers import ROUTERS
from errata.errors import ConfigError
from errata.evaluation.metrics import Metric
from errata.methods import REGISTRY as METHODS
from errata.registry import Records, Registry
from tests.docs import test_layers as layers

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
FILES = {
    "nudge": "src/errata/methods/nudge.py",
    "capitals": "src/errata/data/sets/capitals.py",
    "brevity": "src/errata/evaluation/metrics/brevity.py",
    "taxicab": "src/errata/edits/routers/taxicab.py",
    "norms": "src/errata/cli/norms.py",
}
RECORDS = [
    {"country": "Arvania", "moves_to": "Merrin", "moves_from": "Tallow", "asked_as": ["Arvania is governed from"]},
    {"country": "Kesh", "moves_to": "Esk", "moves_from": "Esk"},
]  # fmt: skip


def examples() -> dict[str, str]:
    """The page's files by their paths, without the line that names them."""
    blocks = re.findall(r"```python\n# (src/\S+\.py)\n(.*?)```", PAGE, re.DOTALL)
    return dict(blocks)


def commands(verb: str) -> list[str]:
    lines = [
        line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()
    ]
    return [line for line in lines if line.startswith(f"errata {verb}")]


STEPS = """
import dataclasses, json, shlex, sys
from typer.testing import CliRunner
import errata
from errata.cli.main import app

runner, results = CliRunner(), {}


def run(line):
    result = runner.invoke(app, shlex.split(line)[1:], catch_exceptions=False)
    assert result.exit_code == 0, (line, result.output, result.stderr)
    return result.stdout


results["help"] = run("errata --help")
results["after_help"] = sorted({"torch", "transformers"} & set(sys.modules))
for line in json.loads(sys.argv[1]):
    results[line] = json.loads(run(line)) if "--json" in line else run(line)
results["methods"] = [entry["name"] for entry in json.loads(run("errata methods --json"))]
results["datasets"] = [entry["name"] for entry in json.loads(run("errata data list --json"))["datasets"]]
results["norms"] = run("errata norms nudge.safetensors"), json.loads(run("errata norms nudge.safetensors --json"))

from errata.edits import Edit

host = errata.load("lab", device="cpu")
edit = Edit.load("nudge.safetensors")
request = edit.provenance.requests[0]
hashes = [host.weights_hash()]
answers = [host.generate(request.text)]
edit.apply_(host)
hashes.append(host.weights_hash())
answers.append(host.generate(request.text))
edit.revert_(host)
hashes.append(host.weights_hash())
answers.append(host.generate(request.text))
results["method"] = {"hashes": hashes, "answers": answers, "target": request.target, "digest": edit.digest}

from errata.edits.routers.taxicab import Taxicab

grace = errata.edit(host, request, method="grace", steps=30)
memory = dataclasses.replace(grace, router=Taxicab(grace.router.keys, reach=1e-3))
memory.save("memory.safetensors")
loaded = Edit.load("memory.safetensors")
prompts = [request.text, "The weather in the harbour was"]
plain, with_grace, with_memory = host.generate(prompts), None, None
with grace.on(host):
    with_grace = host.generate(prompts)
with loaded.on(host):
    with_memory = host.generate(prompts)
results["router"] = {
    "plain": plain, "grace": with_grace, "memory": with_memory, "name": loaded.router.name,
    "same": loaded.digest == memory.digest, "after": host.generate(prompts),
    "shown": run("errata show memory.safetensors"),
}
json.dump(results, open("results.json", "w"))
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The package with each example as the one new file of its kind."""
    target = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "src" / "errata", target / "src" / "errata")
    for path, text in examples().items():
        assert not (target / path).exists(), f"{path} is there already"
        (target / path).write_text(text, encoding="utf-8")
    return target


@pytest.fixture(scope="module")
def results(copy, tmp_path_factory) -> dict[str, Any]:
    """What the page's commands, and the other steps, gave in a process that sees the copy."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "capitals.jsonl").write_text("\n".join(map(json.dumps, RECORDS)), encoding="utf-8")
    as_json = [f"{line} --json" for verb in ("edit", "eval", "data check") for line in commands(verb)]
    lines = [*commands("methods"), *(line for line in commands("eval") if "capitals" in line), *as_json]
    environment = {**os.environ, "PYTHONPATH": str(copy / "src"), "COLUMNS": "300", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", STEPS, json.dumps(lines)], cwd=folder, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def test_there_is_one_example_of_each_kind():
    assert set(examples()) == set(FILES.values())
    for path, text in examples().items():
        assert 15 <= text.count("\n") <= 60, path
        assert f"`{Path(path).parent.as_posix()}/NAME.py`" in PAGE, "the table names its folder"


def test_examples_keep_the_rules_of_rooms_and_sizes(copy, monkeypatch):
    monkeypatch.setattr(layers, "SOURCE", copy / "src" / "errata")
    for path in FILES.values():
        layers.test_arrows_point_down(copy / path)
        for node in ast.walk(ast.parse((copy / path).read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                assert ast.get_docstring(node), f"{path}: {node.name} has no docstring"
    layers.test_sizes()
    layers.test_transformers_is_the_hosts_business()


def test_a_method_is_found_edits_and_is_taken_back(results):
    assert "nudge" in results["methods"]
    assert "length of what is added" in results["errata methods nudge"]
    (line,) = commands("edit")
    assert results[f"{line} --json"]["answered"] == 1
    method = results["method"]
    before, edited, after = method["hashes"]
    assert edited != before == after
    without, with_edit, reverted = method["answers"]
    assert with_edit.strip().startswith(method["target"]) and without == reverted != with_edit


def test_a_method_is_measured(results):
    (line,) = (line for line in commands("eval") if "nudge" in line)
    report = results[f"{line} --json"]
    assert report["summary"]["efficacy.generate"]["after"] > report["summary"]["efficacy.generate"]["before"]


def test_a_dataset_is_checked_and_measured(results):
    assert "capitals" in results["datasets"]
    (line,) = commands("data check")
    found = results[f"{line} --json"]
    assert (found["dataset"], found["rows"], found["cases"]) == ("capitals", 2, 1)
    assert "the capital of Kesh stays Esk" in json.dumps(found["skipped"])
    (line,) = (line for line in commands("eval") if "capitals" in line)
    kinds = {row["kind"] for row in results[f"{line} --json"]["rows"]}
    assert {"efficacy", "paraphrase"} <= kinds


def test_a_metric_is_in_table_and_json(results):
    (line,) = (line for line in commands("eval") if "capitals" in line)
    entry = results[f"{line} --json"]["summary"]["efficacy.brevity"]
    assert entry["letters"] > 0 and 0 < entry["after"] <= 1
    assert "brevity of texts" in results[line]


def test_a_router_decides_for_a_memory(results):
    router = results["router"]
    assert router["name"] == "taxicab" and router["same"] and "taxicab router" in router["shown"]
    assert router["memory"] == router["grace"] and router["memory"][0] != router["plain"][0]
    assert router["memory"][1] == router["plain"][1] and router["after"] == router["plain"]


def test_a_verb_is_in_the_help_and_runs(results):
    assert re.search(r"norms\s+Print the norm of each edit's change", results["help"])
    assert not results["after_help"], "the help is light"
    text, document = results["norms"]
    assert document["nudge.safetensors"] > 0 and f"{document['nudge.safetensors']:.4g}" in text


# --- from another package -----------------------------------------------------------------------------


def entry_points() -> str:
    """The page's entry points as an installed package has them."""
    (block,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    return re.sub(r'\[project\.entry-points\."(.*?)"\]', r"[\1]", block).replace('"', "")


def install(folder: Path, points: str) -> None:
    """Lay out what pip leaves of a package ``my_package`` with the examples as its modules."""
    (folder / "my_package").mkdir(parents=True)
    (folder / "my_package" / "__init__.py").touch()
    for path, text in examples().items():
        (folder / "my_package" / Path(path).name).write_text(text, encoding="utf-8")
    info = folder / "my_package-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(points, encoding="utf-8")


@pytest.fixture
def package(tmp_path, monkeypatch):
    def put(points: str) -> Path:
        install(tmp_path, points)
        monkeypatch.syspath_prepend(tmp_path)
        return tmp_path

    yield put
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_package"]:
        del sys.modules[name]


def test_another_package_brings_all_kinds(package):
    folder = package(entry_points())
    for registry, name in ((METHODS, "nudge"), (DATASETS, "capitals"), (ROUTERS, "taxicab")):
        assert name in registry and registry.get(name).name == name
        assert registry.origin(name).startswith("my_package.")
    metrics = Records("errata.evaluation.metrics", ("METRIC", "METRICS"), Metric, group="errata.metrics")
    assert metrics.get("brevity").label == "brevity of texts"
    code = "from errata.cli.main import run; run()"
    path = os.pathsep.join([str(folder), str(ROOT / "src")])
    done = subprocess.run(
        [sys.executable, "-c", code, "--help"], env={**os.environ, "PYTHONPATH": path, "COLUMNS": "200"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and re.search(r"norms\s+Print the norm", done.stdout), done.stderr
    (folder / "my_package-1.dist-info" / "entry_points.txt").write_text("", encoding="utf-8")


@pytest.mark.parametrize(
    ("points", "complaint"),
    [
        ("[errata.methods]\nnudge = my_package.absent:METHOD", "my_package.absent:METHOD of my-package.*uninstall"),
        ("[errata.methods]\nshove = my_package.nudge:METHOD", "defines 'nudge', expected 'shove'"),
        ("[errata.methods]\nrome = my_package.nudge:METHOD", "takes the name 'rome', which errata.methods.rome has"),
    ],
)  # fmt: skip
def test_a_wrong_entry_point_is_named(package, points, complaint):
    package(points)
    registry: Registry[Any] = Registry("errata.methods", "METHOD", "Method", group="errata.methods")
    with pytest.raises(ConfigError, match=complaint):
        assert registry.names()
        registry.get(points.partition("\n")[2].partition(" ")[0])


@pytest.mark.slow
def test_the_method_keeps_the_contract(copy):
    """The whole contract suite, for the example: a method is tested by existing."""
    shutil.copytree(ROOT / "tests", copy / "tests")
    shutil.copy(ROOT / "pyproject.toml", copy)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/contract/test_methods.py", "-k", "nudge", "-p", "no:cacheprovider"],
        cwd=copy, env={**os.environ, "PYTHONPATH": str(copy / "src")}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and passed and int(passed[1]) >= 30, done.stdout[-3000:]
