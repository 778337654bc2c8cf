"""Runs: the same rows whether a run was killed or not, and whoever made them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

import errata
from errata import job
from errata.bench import plan, recipe, workers
from errata.bench.jobs import Jobs
from errata.bench.plan import is_named
from errata.bench.results import read_run
from errata.bench.schedule import Schedule
from errata.data.reading import read
from errata.edits.weight import WeightEdit
from errata.errors import ConfigError, DataError, RequestError
from errata.evaluation import score
from errata.evaluation.observe import observe
from errata.methods import REGISTRY
from errata.methods._method import Method, Workspace
from errata.types import AskOptions
from tests.units.bench.small import (
    NAMES,
    NEW_TOKENS,
    corpus_of,
    document,
    execute,
    lines,
    table,
    write_cases,
    write_model,
)

FT = {"name": "ft", "settings": {"steps": 3, "stop_loss": 1e-9}, "label": "tuned"}
SINGLE = {"methods": [FT], "schedule": "single"}
SEQUENCE = {"methods": [FT], "schedule": "sequential:2", "look": [2, 6]}
COMMAND = "from errata.cli import bench; import typer; typer.run(bench.command)"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> Path:
    return write_cases(tmp_path_factory.mktemp("cases") / "cases.jsonl", 10)


@pytest.fixture(scope="module")
def words(model, cases):
    return document(model, cases, SINGLE, SEQUENCE)


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory):
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    found = execute(words, folder)
    assert [job.state for job in found.jobs] == ["done"] * 8, [job.reason for job in found.jobs]
    return folder


def cell_of(folder: Path, label: str, schedule: str) -> str:
    cells = read_run(folder)["cells"]
    return next(c["id"] for c in cells if c["label"] == label and c["schedule"] == schedule)


def document_of(folder: Path, label: str, schedule: str) -> dict:
    path = folder / "cells" / cell_of(folder, label, schedule) / "cell.json"
    return json.loads(path.read_text())


# --- what a run finds ---------------------------------------------------------------------------


@pytest.mark.parametrize(("schedule", "at"), [("single", None), ("sequential:2", [2, 6])])
def test_rows_are_those_of_an_evaluation(whole, model, cases, schedule, at):
    with workers.threads(1):
        report = errata.evaluate(
            errata.load(str(model)), read(str(cases)).cases, method="ft", schedule=schedule, at=at,
            max_new_tokens=NEW_TOKENS, corpus=corpus_of(cases), **FT["settings"],
        )  # fmt: skip
    found = lines(whole, cell_of(whole, "tuned", schedule))
    rows = [row for line in found if line["type"] == "case" for row in line["rows"]]
    assert len(rows) == len(report.rows)
    for row, expected in zip(rows, report.rows, strict=True):
        assert (row["case"], row["kind"], row["protocol"]) == (
            expected.case,
            expected.kind,
            expected.protocol,
        )
        assert (row["before"], row["after"]) == pytest.approx((expected.before, expected.after), abs=1e-5)
    looks = [line for line in found if line["type"] == "look"]
    assert [look["edits"] for look in looks] == [point.edits for point in report.checkpoints]
    for look, point in zip(looks, report.checkpoints, strict=True):
        assert (look["digest"], look["norm"]) == (point.digest, point.norm)
        assert look["perplexity_after"] == pytest.approx(point.perplexity_after, rel=1e-5)
    summed = document_of(whole, "tuned", schedule)
    for name, entry in report.summary.items():
        assert summed["summary"][name]["after"] == pytest.approx(entry["after"], abs=1e-5)
    assert summed["weights_restored"] and summed["status"] == "done"


def kept_edit(model: Path, digest: str) -> WeightEdit:
    """Fit the sequence by hand."""
    host, method = errata.load(str(model)), REGISTRY.get("ft")
    config, edit = method.config(**FT["settings"]), None
    with workers.threads(1):
        for first in range(0, 10, 2):
            requests = [
                errata.Request("{} was born in", name, "Esk" if i % 2 else "Merrin", "Tallow", f"c{i}")
                for i, name in list(enumerate(NAMES))[first : first + 2]
            ]
            edit = method.run(host, requests, config, Workspace(), after=edit)
    assert isinstance(edit, WeightEdit) and edit.digest == digest
    return edit


def test_a_sequence_says_how_heavy_its_edit_is(whole, model):
    looks = document_of(whole, "tuned", "sequential:2")["looks"]
    assert [look["edits"] for look in looks] == [2, 6, 10]
    host = errata.load(str(model))
    for look in looks:
        (name,) = look["norm_ratio"]
        weight = host.model.get_parameter(name).detach()
        assert look["norm"] / float(weight.norm()) == pytest.approx(look["norm_ratio"][name], rel=1e-4)
        assert look["spectral_ratio"][name] > 0
        assert look["bytes"] == weight.numel() * 4, "a dense change in float32"
        assert look["collapse"]["before"] == looks[0]["collapse"]["before"]
    edit = kept_edit(model, looks[-1]["digest"])
    change = next(iter(edit.deltas.values()))
    weight = weight.mT if edit.transposed else weight
    top, before = (torch.linalg.matrix_norm(matrix.double(), 2) for matrix in (weight + change, weight))
    assert looks[-1]["spectral_ratio"][name] == pytest.approx(float(top / before), rel=1e-3)
    cost = document_of(whole, "tuned", "sequential:2")["cost"]
    assert cost["bytes_per_edit"] == looks[-1]["bytes"] / 10
    assert cost["fit"]["total"] > 0 and cost["observe"]["per_case"] > 0 and cost["peak_memory_mb"] > 100
    assert set(cost["latency_overhead"]) == {"prefill", "decode"}


def test_the_unedited_host_scores_as_before_and_the_oracle_is_asked_with_its_facts(whole, model, cases):
    for schedule in ("single", "sequential:2"):
        for line in lines(whole, cell_of(whole, "none", schedule)):
            for row in line.get("rows", ()):
                if row["protocol"] == "kl":  # of distributions that differ by rounding, if at all
                    assert row["after"] == pytest.approx(0.0, abs=1e-5)
                else:
                    assert row["after"] == pytest.approx(row["before"], abs=1e-5)
    host, given = errata.load(str(model)), read(str(cases)).cases
    found = lines(whole, cell_of(whole, "in_prompt", "single"))
    assert [line["case"] for line in found] == [case.id for case in given]
    for line, case in zip(found, given, strict=True):
        fact = "".join(f"New fact: {r.text} {r.target}.\n" for r in case.requests)
        probes = [replace(probe, prompt=fact + probe.prompt) for probe in case.probes]
        before, after = (
            observe(host, asked, AskOptions(max_new_tokens=NEW_TOKENS)) for asked in (case.probes, probes)
        )
        expected = score.rows(case, before, after)
        for row, wanted in zip(line["rows"], expected, strict=True):
            assert row["prompt"] == wanted.prompt
            assert (row["before"], row["after"]) == pytest.approx((wanted.before, wanted.after), abs=1e-5)


def test_every_case_has_its_own_time(whole):
    for schedule, group in (("single", 1), ("sequential:2", 2)):
        home = whole / "cells" / cell_of(whole, "tuned", schedule)
        found = [json.loads(line) for line in (home / "rows.jsonl").read_text().splitlines()]
        costs = [line["cost"] for line in found if line["type"] == "case"][-10:]
        fits = [cost["fit_seconds"] for cost in costs]
        assert len(set(fits)) == 10 // group and min(fits) > 0 < min(
            cost["observe_seconds"] for cost in costs
        )
        total = document_of(whole, "tuned", schedule)["cost"]["fit"]["total"]
        assert total == pytest.approx(sum(fits))


def test_run_and_cells_say_all_that_is_needed_to_repeat_them(whole, words, cases):
    run = read_run(whole)
    assert run["schema"] == 1 and recipe.parse(run["recipe"]) == recipe.parse(words)
    assert {"torch", "errata"} <= set(run["versions"]) and run["hardware"]["cores"] >= 1
    assert run["datasets"][str(cases)]["cases"] == 10 == run["datasets"][str(cases)]["rows"]
    for cell in run["cells"]:
        found = document_of(whole, cell["label"], cell["schedule"])
        assert found["cell"] == cell and found["host"]["fingerprint"]
        assert found["tag"]["dataset_sha256"] == run["datasets"][str(cases)]["sha256"]
        assert found["tag"]["edits"] == (1 if cell["schedule"] == "single" else 10)
        assert (found["retention"] is None) == (cell["schedule"] == "single")
    assert not list(whole.rglob("edit-*")) and not list(whole.rglob("*.part"))


# --- stopping and going on ----------------------------------------------------------------------


def kill_in(words: dict, folder: Path, only: str, enough) -> None:
    """Start a run in another process and kill it as soon as a cell's rows are enough."""
    path = folder.parent / "recipe.yaml"
    path.write_text(yaml.safe_dump(words))
    rows = folder / "cells"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-c", COMMAND, str(path), "-o", str(folder), "--only", only, "--json"]
    process = subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 240
        while process.poll() is None and time.monotonic() < deadline:
            if any(enough(path.read_text().splitlines()) for path in rows.glob(f"*{only}*/rows.jsonl")):
                break
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        _, said = process.communicate()
    assert process.returncode == -signal.SIGKILL, f"it ended before it was killed: {said.decode()[-2000:]}"


def slow(block: dict) -> dict:
    """Make a block's fits take long enough to be killed in."""
    settings = {**FT["settings"], "steps": 15}
    return {**block, "methods": [{**FT, "settings": settings}]}


def test_a_cell_killed_in_the_middle_ends_with_the_same_rows(model, cases, whole, tmp_path):
    words = document(model, cases, slow(SINGLE))
    execute(words, tmp_path / "whole", only="tuned")
    folder = tmp_path / "killed"
    kill_in(words, folder, "tuned", lambda text: len(text) >= 3)
    cell = cell_of(folder, "tuned", "single")
    rows = folder / "cells" / cell / "rows.jsonl"
    left = len(rows.read_text().splitlines())
    assert 3 <= left < 10 and not (rows.parent / "cell.json").exists()
    rows.write_bytes(rows.read_bytes()[:-7])  # as if the kill had come in the middle of a line
    with pytest.raises(DataError, match="--resume"):
        execute(words, folder)
    found = execute(words, folder, resume=True)
    baselines = {name: rows for name, rows in table(whole).items() if name in table(folder)}
    assert len(baselines) == 3, "with settings that are not slow, the fixture's run has them as well"
    assert not found.failed and table(folder) == {**table(tmp_path / "whole"), **baselines}


def test_a_sequence_killed_after_a_look_goes_on_from_its_edit(model, cases, tmp_path):
    words = document(model, cases, {**slow(SEQUENCE), "look": "each"}, keep_edits=True)
    execute(words, tmp_path / "whole", only="tuned")
    folder = tmp_path / "killed"
    kill_in(words, folder, "tuned", lambda text: sum('"type": "look"' in line for line in text) >= 2)
    cell = cell_of(folder, "tuned", "sequential:2")
    kept = list((folder / "cells" / cell).glob("edit-*.safetensors"))
    assert kept and not (folder / "cells" / cell / "cell.json").exists()
    fits = []

    def count(host, requests, config, work):
        fits.append(len(requests))
        return REGISTRY.get("ft").fit(host, requests, config, work)

    patched = pytest.MonkeyPatch()
    patched.setattr(job, "REGISTRY", {"ft": replace(REGISTRY.get("ft"), fit=count)})
    with patched.context():
        found = execute(words, folder, resume=True, only="tuned")
    patched.undo()
    assert not found.failed and len(fits) < 5, "the first edits were not fitted again"
    assert lines(folder, cell) == lines(tmp_path / "whole", cell)
    edits = [root / "cells" / cell / "edit-10.safetensors" for root in (folder, tmp_path / "whole")]
    assert len({errata.Edit.load(path).digest for path in edits}) == 1


@pytest.fixture(scope="module")
def kept(model, cases, tmp_path_factory) -> tuple[dict, Path]:
    """A sequence that keeps its edits: its words, and its folder."""
    words = document(model, cases, SEQUENCE, keep_edits=True)
    folder = tmp_path_factory.mktemp("kept") / "run"
    execute(words, folder, only="tuned")
    return words, folder


@pytest.mark.parametrize("lost", ["edit", "look", "cell"])
def test_whatever_was_written_last_a_sequence_goes_on(kept, whole, tmp_path, lost):
    """Rows and look come first, then the edit, then the cell: each may be all that is missing."""
    words, made = kept
    folder = shutil.copytree(made, tmp_path / "run")
    cell = cell_of(folder, "tuned", "sequential:2")
    home = folder / "cells" / cell
    text = (home / "rows.jsonl").read_text().splitlines(keepends=True)
    (home / "cell.json").unlink()
    if lost == "edit":
        (home / "edit-10.safetensors").unlink()
    if lost == "look":
        (home / "rows.jsonl").write_text("".join(text[:-1]))
    Jobs(folder / "jobs.sqlite").reopen(["done"], [cell])
    assert not execute(words, folder, resume=True, only="tuned").failed
    assert lines(folder, cell) == lines(whole, cell_of(whole, "tuned", "sequential:2"))
    assert [path.name for path in home.glob("edit-*")] == ["edit-10.safetensors"]


def test_batches_are_gone_on_with_after_the_last_whole_one(model, cases, tmp_path):
    words = document(model, cases, {"methods": [FT], "schedule": "batch:4"})
    execute(words, tmp_path / "whole")
    execute(words, tmp_path / "cut", only="tuned")
    cell = cell_of(tmp_path / "cut", "tuned", "batch:4")
    rows = tmp_path / "cut" / "cells" / cell / "rows.jsonl"
    text = rows.read_text().splitlines(keepends=True)
    assert [json.loads(line)["type"] for line in text].count("look") == 3
    rows.write_text("".join(text[:7]))  # a whole batch with its look, and two cases of the next
    Jobs(tmp_path / "cut" / "jobs.sqlite").reopen(["done"], [cell])
    execute(words, tmp_path / "cut", resume=True)
    assert table(tmp_path / "cut") == table(tmp_path / "whole")
    took = 0.0
    for record in map(json.loads, rows.read_text().splitlines()):
        if record["type"] == "case":
            took += record["cost"]["fit_seconds"]
        else:
            assert record["fit_seconds"] == pytest.approx(took), "what fits took before the stop counts too"


def test_another_recipe_is_not_gone_on_with(words, whole, tmp_path):
    with pytest.raises(ConfigError, match="max_new_tokens: was 6, is 5"):
        execute({**words, "max_new_tokens": 5}, whole, resume=True)
    changed = write_cases(tmp_path / "cases.jsonl", 9)
    source = next(iter(read_run(whole)["datasets"]))
    original = Path(source).read_text()
    try:
        Path(source).write_text(changed.read_text())
        with pytest.raises(ConfigError, match="dataset .* was"):
            execute(words, whole, resume=True)
    finally:
        Path(source).write_text(original)
    with pytest.raises(DataError, match="no run folder"):
        execute(words, tmp_path / "nothing", resume=True)
    with pytest.raises(ConfigError, match="no cell id contains 'nobody'"):
        execute(words, tmp_path / "new", only="nobody")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("only", "found"),
    [("keel-3", True), ("keel, 3 layers", True), ("KEEL", True), ("3 keel", False), ("!", False)],
)
def test_cells_are_picked_by_part_of_an_id_or_by_a_label(only, found):
    assert is_named("lab-keel-3-layers-lab-100-single-s0-0a1b2c3d", only) is found


# --- what goes wrong ----------------------------------------------------------------------------


def test_a_cell_that_fails_or_is_refused_does_not_end_the_run(model, cases, tmp_path, monkeypatch):
    good = REGISTRY.get("ft")

    def breaks(host, requests, config, work):
        if requests[0].subject == "Clara":
            raise RuntimeError("out of luck")
        return good.fit(host, requests, config, work)

    def spoils(host, requests, config, work):
        with torch.no_grad():
            next(host.model.parameters()).add_(1.0)
        return good.fit(host, requests, config, work)

    methods = {
        "ft": good,
        "rome": replace(REGISTRY.get("rome"), name="rome", fit=breaks, config=good.config),
        "memit": replace(REGISTRY.get("memit"), name="memit", fit=spoils, config=good.config),
        "pmet": replace(REGISTRY.get("pmet"), sequential=False, batch=False),
        **{name: REGISTRY.get(name) for name in ("rewrite", "none", "in_prompt")},
    }
    monkeypatch.setattr(job, "REGISTRY", methods)
    words = document(
        model, cases, {"methods": ["rome", "memit", "rewrite"]},
        {"methods": ["pmet"], "schedule": "sequential:5"},
    )  # fmt: skip
    found = execute(words, tmp_path / "run")
    ended = {job.cell.split("-")[1]: job for job in found.jobs}
    assert {name: job.state for name, job in ended.items()} == {
        "none": "done", "in_prompt": "done", "ft": "done", "rome": "failed", "memit": "failed",
        "rewrite": "refused", "pmet": "refused",
    }  # fmt: skip
    assert "Traceback" in ended["rome"].reason and "out of luck" in ended["rome"].reason
    assert "weights" in ended["memit"].reason and "void" in ended["memit"].reason
    assert "image" in ended["rewrite"].reason and "cannot continue" in ended["pmet"].reason
    assert len(lines(tmp_path / "run", ended["rome"].cell)) == 2, "what came before stays"
    assert document_of(tmp_path / "run", "rome", "single")["status"] == "failed"
    methods["rome"] = replace(methods["rome"], fit=good.fit)
    methods["memit"] = replace(methods["memit"], fit=good.fit)
    again = execute(words, tmp_path / "run", resume=True)
    assert not again.failed, "a failed cell is tried again, from where it failed"
    tuned = lines(tmp_path / "run", cell_of(tmp_path / "run", "ft", "single"))
    assert lines(tmp_path / "run", ended["rome"].cell) == tuned
    assert lines(tmp_path / "run", ended["memit"].cell) == tuned, "nothing of the spoilt host is left"


def test_requests_of_one_case_are_fitted_together(model):
    host = errata.load(str(model))
    case = errata.Case(
        "both", errata.Request("{} was born in", "Ada", "Esk"),
        (errata.Probe("efficacy", "Ada was born in", ("Esk",), ()),),
        also=(errata.Request("The capital of {} is", "Esk", "Oa"),),
    )  # fmt: skip
    asked = []
    good = REGISTRY.get("ft")

    def watch(host, requests, config, work):
        asked.append([request.target for request in requests])
        return good.fit(host, requests, config, work)

    for batch, expected in ((True, [["Esk", "Oa"]]), (False, [["Esk"], ["Oa"]])):
        asked.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(job, "REGISTRY", {"ft": replace(good, fit=watch, batch=batch)})
            report = errata.evaluate(host, [case], method="ft", steps=1)
        assert asked == expected and len(report.rows) >= 2
    kept: list[WeightEdit] = []
    more = replace(case, id="more", request=errata.Request("{} was born in", "Bruno", "Oa"))
    run = {"method": "ft", "schedule": Schedule("sequential", 1), "at": "each", "steps": 1}
    errata.evaluate(host, [case, more], keep=lambda report, edit: kept.append(edit), **run)
    assert [len(edit.provenance.requests) for edit in kept] == [2, 4]
    rest = errata.evaluate(host, [case, more], after=kept[0], **run)
    assert [point.digest for point in rest.checkpoints] == [kept[1].digest]


# --- several workers ----------------------------------------------------------------------------


def test_two_processes_give_the_rows_of_one(words, whole, tmp_path):
    found = execute(words, tmp_path / "run", jobs=2, only="tuned")
    assert [job.state for job in found.jobs] == ["done"] * 2, [job.reason for job in found.jobs]
    rows = table(tmp_path / "run")
    assert rows == {cell: table(whole)[cell] for cell in rows} and len(rows) == 2


def test_a_worker_that_lost_its_cell_leaves_it_to_the_other(words, whole, tmp_path, monkeypatch):
    """The first fit takes so long that the cell is given to somebody else, who is done before it ends."""
    folder, lost = tmp_path / "run", []
    good = REGISTRY.get("ft")

    def slow(host, requests, config, work):
        edit = good.fit(host, requests, config, work)
        if not lost:
            table = Jobs(folder / "jobs.sqlite")
            (job,) = [job for job in table.all() if job.state == "leased"]
            table.reopen(["leased"], [job.cell])
            assert table.take("elsewhere:1:other", [job.cell]) == job.cell
            table.end(job.cell, "elsewhere:1:other", "done")
            lost.append(job.cell)
            time.sleep(1.0)
        return edit

    monkeypatch.setattr(
        Jobs.__init__, "__kwdefaults__", {**(Jobs.__init__.__kwdefaults__ or {}), "lease": 0.6}
    )
    monkeypatch.setattr(job, "REGISTRY", {"ft": replace(good, fit=slow)})
    found = execute(words, folder, only="tuned")
    assert [job.state for job in found.jobs] == ["done"] * 2
    ours = [job.cell for job in found.jobs if job.cell not in lost]
    assert not (folder / "cells" / lost[0] / "rows.jsonl").exists(), (
        "nothing is written over the other's rows"
    )
    assert [lines(folder, cell) for cell in ours] == [lines(whole, cell) for cell in ours]


@pytest.mark.slow
def test_two_workers_of_ray_give_the_rows_of_one(words, whole, tmp_path):
    pytest.importorskip("ray", reason="Ray is an extra: pip install 'errata[ray]'")
    found = execute(words, tmp_path / "run", jobs=2, executor="ray")
    assert [job.state for job in found.jobs] == ["done"] * 8, [job.reason for job in found.jobs]
    assert table(tmp_path / "run") == table(whole)


# --- the command line ---------------------------------------------------------------------------


def test_the_command_shows_a_plan_and_the_outcome(words, tmp_path, monkeypatch):
    import typer
    from typer.testing import CliRunner

    from errata.cli import bench

    monkeypatch.chdir(tmp_path)
    app = typer.Typer()
    app.command()(bench.command)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**words, "runs": words["runs"][:1]}))

    def run(*arguments: str, code: int = 0):
        done = CliRunner().invoke(app, ["mine.yaml", *arguments], catch_exceptions=False)
        assert done.exit_code == code
        return done.stdout

    assert "4 cells into runs/mine" in run("--dry-run") and not (tmp_path / "runs").exists()
    assert len(json.loads(run("--dry-run", "--json", "--only", "tuned"))["chosen"]) == 1
    shown = run("--only", "none")
    assert "evaluation:" in shown and "done" in shown
    ended = json.loads(run("--resume", "--json"))
    assert [cell["status"] for cell in ended["cells"]] == ["done"] * 4
    assert all(seconds > 0 for seconds in ended["evaluation_seconds_per_case"].values())

    def fails(*arguments, **more):
        raise RuntimeError("no")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "REGISTRY", {"ft": replace(REGISTRY.get("ft"), fit=fails)})
        assert "RuntimeError: no" in run("-o", "other", code=1)
    assert plan.restore(read_run(tmp_path / "other")).cells


def refusing(monkeypatch, *ids: str) -> None:
    """Have every method refuse the requests of these names."""
    plain = Method.run

    def run(self, host, requests, *rest, **more):
        if any(request.id in ids for request in requests):
            raise RequestError("no token of its own")
        return plain(self, host, requests, *rest, **more)

    monkeypatch.setattr(Method, "run", run)


def test_a_case_that_cannot_be_edited_counts_as_unedited(words, whole, tmp_path, monkeypatch):
    refusing(monkeypatch, "c0", "c3")
    only = {**words, "runs": [{**words["runs"][0]}]}
    found = execute(only, tmp_path / "run")
    assert {job.state for job in found.jobs} == {"done"}
    cell = cell_of(tmp_path / "run", "tuned", "single")
    made, as_before = lines(tmp_path / "run", cell), lines(whole, cell_of(whole, "tuned", "single"))
    assert [line["case"] for line in made] == [line["case"] for line in as_before]
    for line, other in zip(made, as_before, strict=True):
        if line["case"] in ("c0", "c3"):
            assert line["refused"] == "no token of its own"
            assert all(row["before"] == row["after"] for row in line["rows"] if row["protocol"] != "kl")
        else:
            assert line == other
    document = json.loads((tmp_path / "run" / "cells" / cell / "cell.json").read_text())
    assert [entry["case"] for entry in document["refused_cases"]] == ["c0", "c3"]
    assert document["summary"]["efficacy.generate"]["n"] == 10


def test_a_method_that_can_edit_no_case_is_refused(words, tmp_path, monkeypatch):
    refusing(monkeypatch, *(f"c{i}" for i in range(10)))
    only = {**words, "runs": [{**words["runs"][0]}]}
    found = execute(only, tmp_path / "run")
    state = {job.cell: job for job in found.jobs}[cell_of(tmp_path / "run", "tuned", "single")]
    assert state.state == "refused" and "none of 10 cases" in state.reason
    assert lines(tmp_path / "run", state.cell) == []
