"""Datasets of a recipe: demonstrations before questions, questions beside cases, and names that say so."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from errata import lab
from errata.bench import plan, recipe, sources
from errata.bench.recipe import DatasetSpec
from errata.bench.worker_state import WorkerState
from errata.data.requests import write_cases
from errata.errors import ConfigError, DataError
from errata.report.board import Board
from errata.report.published import comparable
from errata.types import Case, Probe, Request
from tests.units.data.test_mquake import COT, LINES, RECORD, probes

SHARED = Path(__file__).parents[4] / "shared" / "data"


@pytest.fixture
def files(tmp_path):
    """A file of two chains, both kinds of demonstrations, and questions to put beside."""
    (tmp_path / "MQuAKE-CF.json").write_text(json.dumps([RECORD, {**RECORD, "case_id": 8}]))
    (tmp_path / "cot.txt").write_bytes(COT.replace("\n", "\r\n").encode())
    (tmp_path / "lines.txt").write_text(LINES)
    kept = [
        Case(f"k{i}", Request("{} is", name, "Esk"), (
            Probe("efficacy", f"{name} is", ("Esk",), ()),
            Probe("locality", f"Where is {name}?", ("Oa",), ("Oa",), group="towns"),
            Probe("locality", "And Holt?", ("Arve",), ("Arve",)),
        ))
        for i, name in enumerate(("Ada", "Bruno"))
    ]  # fmt: skip
    write_cases(tmp_path / "kept.jsonl", kept)
    return tmp_path


def spelled(*datasets) -> dict:
    return {"models": ["lab"], "runs": [{"methods": ["ft"], "datasets": list(datasets)}]}


def source(files: Path) -> str:
    return f"mquake/cf@{files / 'MQuAKE-CF.json'}"


def test_demonstrations_go_before_the_questions_of_their_format(files):
    plain, bare = sources.read(source(files))
    texts = [str(files / "cot.txt"), str(files / "lines.txt")]
    cases, facts = sources.read(source(files), demonstrations=texts)
    for case, was in zip(cases, plain, strict=True):
        thoughts, direct = probes(case, "multi_hop", "thought"), probes(case, "multi_hop")
        assert thoughts[1].prompt == f"{COT}\n\nQuestion: Her capital?\nThoughts:"
        assert direct[1].prompt == LINES + "Q: Her capital? A:"
        changed = [new.kind for new, old in zip(case.probes, was.probes, strict=True) if new != old]
        assert changed == ["multi_hop"] * 6 and case.requests == was.requests
    assert facts["demonstrations"] == [
        {"path": path, "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest()} for path in texts
    ]
    assert facts["sha256"] != bare["sha256"] and bare["demonstrations"] == bare["beside"] == []


def test_questions_beside_are_put_to_every_case_once(files):
    plain, _ = sources.read(source(files))
    cases, facts = sources.read(source(files), beside=[str(files / "kept.jsonl")])
    for case, was in zip(cases, plain, strict=True):
        assert case.probes[: len(was.probes)] == was.probes
        added = case.probes[len(was.probes) :]
        assert [probe.prompt for probe in added] == ["Where is Ada?", "And Holt?", "Where is Bruno?"]
        # the groups of two cases are not one
        assert [probe.group for probe in added] == ["k0 towns", None, "k1 towns"]
    sha = hashlib.sha256((files / "kept.jsonl").read_bytes()).hexdigest()
    assert facts["beside"] == [{"source": str(files / "kept.jsonl"), "sha256": sha, "probes": 3}]
    # cases that ask them already do not ask twice
    own, _ = sources.read(str(files / "kept.jsonl"), beside=[str(files / "kept.jsonl")])
    assert [probe.prompt for probe in own[0].probes].count("And Holt?") == 1


def test_the_file_of_popular_entities_can_stand_beside():
    if not SHARED.is_dir():
        pytest.skip("the real data files are not beside the checkout")
    from errata.data.sets.ecbd import popular

    path = SHARED / "ecbd_specificity.json"
    mine = f"ecbd/span@{SHARED / 'ecbd_np_easy.json'}:3"
    (first, *_), facts = sources.read(mine, beside=[f"ecbd/popular@{path}"])
    added = [probe for probe in first.probes if probe.kind == "entity_locality"]
    assert (
        tuple(added) == tuple(dict.fromkeys(popular(path))) and facts["beside"][0]["probes"] == len(added) > 0
    )


def test_the_datasets_own_demonstrations_go_together(files):
    names = ("multihop-prompts.txt", "multihop-cot-prompts.txt")
    paths = [SHARED / "mquake_prompts" / name for name in names]
    if not all(path.is_file() for path in paths):
        pytest.skip("the real data files are not beside the checkout")
    spec = DatasetSpec(source(files), tuple(map(str, paths)))
    (first, _), _ = sources.read(spec.source, demonstrations=spec.demonstrations)
    for form, path in zip(("short", "thought"), paths, strict=True):
        lines = path.read_text(encoding="utf-8").strip()
        assert all(probe.prompt.startswith(lines) for probe in probes(first, "multi_hop", form))
    assert spec.name == f"{source(files)} + multihop-prompts.txt + multihop-cot-prompts.txt"


def test_what_cannot_be_added_is_refused(files):
    (files / "mello.txt").write_text("Question: Which sea?\nSubquestion: Which coast?")
    (files / "latin.txt").write_bytes(b"Q: \xe9? A: x")
    (files / "more.txt").write_text("Q: Which lake? A: Low Lake")
    two = [str(files / "lines.txt"), str(files / "more.txt")]
    for texts, kind, message in (
        ([str(files / "mello.txt")], DataError, "mello.txt: .*no demonstrations"),
        ([str(files / "latin.txt")], DataError, "latin.txt, line 1: .* is not UTF-8"),
        ([str(files / "none.txt")], DataError, "cannot read demonstrations .*none.txt"),
        (two, ConfigError, "lines.txt and .*more.txt apply to the same questions"),
        (two[:1] * 2, ConfigError, "apply to the same questions"),
    ):
        with pytest.raises(kind, match=message):
            sources.read(source(files), demonstrations=texts)
    with pytest.raises(DataError, match=r"lines.txt: no case has a multi-hop question"):
        sources.read("lab:2", demonstrations=two[:1])
    with pytest.raises(ConfigError, match="expected probes of the kinds locality.*found efficacy, hop"):
        sources.read("lab:2", beside=[source(files)])


def test_a_recipe_names_them_and_reads_what_it_writes(files):
    said = {
        "source": source(files),
        "demonstrations": str(files / "cot.txt"),
        "beside": [str(files / "kept.jsonl")],
    }
    made = recipe.parse(spelled("lab:2", said, {"source": "lab:3"}))
    datasets = made.runs[0].datasets
    assert datasets[1] == DatasetSpec(source(files), (str(files / "cot.txt"),), (str(files / "kept.jsonl"),))
    assert [spec.name for spec in datasets] == [
        "lab:2", f"{source(files)} + cot.txt + {files / 'kept.jsonl'}", "lab:3"
    ]  # fmt: skip
    # what a text can say is said by a text, as recipes have it
    assert [type(value) for value in made.to_dict()["runs"][0]["datasets"]] == [str, dict, str]
    assert recipe.parse(made.to_dict()) == made


def test_mistakes_in_a_recipe_are_told_with_the_others(files):
    with pytest.raises(ConfigError) as caught:
        recipe.parse(
            spelled(
                {"demonstrations": ["none.txt", 3]},
                {"source": "lab:2", "demos": "cot.txt"},
                {"source": "", "beside": [""]},
                7,
            )
        )
    text = str(caught.value)
    for part in (
        "runs[0].datasets[0].source: is missing", "runs[0].datasets[0].demonstrations[1]: expected a text, found 3",
        "runs[0].datasets[0].demonstrations[0]: there is no file none.txt",
        "runs[0].datasets[1]: unknown field 'demos'", "runs[0].datasets[2].source: expected a text, found ''",
        "runs[0].datasets[2].beside[0]: expected a text", "runs[0].datasets[3]: expected the name of a dataset",
    ):  # fmt: skip
        assert part in text, part
    wrong = {"source": "lab:2", "demonstrations": str(files / "lines.txt")}
    with pytest.raises(ConfigError) as caught:
        plan.make(recipe.parse(spelled(wrong, "no/such/file.json")))
    assert "runs[0], lab:2 + lines.txt: demonstrations" in str(caught.value)
    assert "no/such/file.json" in str(caught.value)


def test_boards_with_and_without_are_two_datasets(files):
    said = {"source": source(files), "demonstrations": str(files / "cot.txt")}
    made = plan.make(recipe.parse(spelled(source(files), said)))
    names = [source(files), f"{source(files)} + cot.txt"]
    assert list(made.datasets) == names
    for name in names:
        cells = [cell for cell in made.cells if cell.dataset == name]
        assert {cell.method for cell in cells} == {"none", "in_prompt", "ft"}
        assert {cell.id[-8:] for cell in cells}.isdisjoint(
            cell.id[-8:] for cell in made.cells if cell.dataset != name
        )


def test_two_files_of_one_name_are_not_mistaken_for_each_other(files):
    (files / "other").mkdir()
    (files / "other" / "cot.txt").write_text(COT.replace("sea", "lake"))
    paths = [str(files / "cot.txt"), str(files / "other" / "cot.txt")]
    both = [{"source": source(files), "demonstrations": path} for path in paths]
    with pytest.raises(ConfigError, match="two datasets would have this name"):
        plan.make(recipe.parse(spelled(*both)))
    assert len(plan.make(recipe.parse(spelled(both[0], both[0]))).datasets) == 1


def test_workers_read_the_same_cases_or_none(files):
    said = {
        "source": source(files), "demonstrations": str(files / "cot.txt"), "beside": str(files / "kept.jsonl"),
    }  # fmt: skip
    made = plan.make(recipe.parse(spelled(said)))
    (name,) = made.datasets
    restored = plan.restore(json.loads(json.dumps(made.document())))
    assert list(WorkerState(files, restored).cases(restored.cells[0])) == list(made.cases[name])
    (files / "cot.txt").write_text(COT.replace("sea", "lake"))
    with pytest.raises(DataError, match="has changed since the run began"):
        WorkerState(files, restored).cases(restored.cells[0])


def test_facts_of_older_runs_can_be_read_again():
    cases, facts = sources.read("lab:3", together=True)
    older = {name: facts[name] for name in ("source", "together", "sha256", "rows", "cases", "check")}
    assert sources.again(older) == (cases, facts)


def test_together_stands_with_the_source(files):
    spec = DatasetSpec("lab:2", (), (str(files / "kept.jsonl"),))
    words = {
        "models": ["lab"],
        "runs": [{"methods": ["ft"], "datasets": [spec.plain()], "schedule": "batch:2"}],
    }
    (name,) = plan.make(recipe.parse(words)).datasets
    assert name == f"lab:2 together + {files / 'kept.jsonl'}"


def test_what_was_added_does_not_hide_the_published_table():
    table = {"model": "m", "dataset": "mquake/cf-3k", "schedule": "single"}
    for dataset in (
        "mquake/cf-3k",
        "mquake/cf-3k:9 + cot.txt",
        "mquake/cf-3k + a:b.txt",
        "mquake/cf-3k@x/y.json",
    ):
        assert comparable(table, Board("m", "single", {"dataset": dataset}, (), (), frozenset(), ())), dataset
    other = Board("m", "single", {"dataset": "mquake/cf-3k-v2 + cot.txt"}, (), (), frozenset(), ())
    assert not comparable(table, other)


@pytest.mark.parametrize("together", [False, True])
def test_cases_of_the_lab_are_drawn_with_the_seed_of_their_source(together):
    expected = lab.cases(3, seed=7, together=together)
    for source, seed in (("lab:3:7", 0), ("lab:3", 7)):
        cases, facts = sources.read(source, seed=seed, together=together)
        assert cases == expected and facts["check"] == {"seed": 7}
    assert sources.read("lab:3", together=together)[0] != expected


@pytest.mark.parametrize("source", ["lab:3:", "lab:3:x", "lab:3:1:2", "lab::1", "lab:-3"])
def test_a_seed_that_is_no_number_is_refused(source):
    with pytest.raises(ConfigError, match="lab:N:SEED"):
        sources.read(source)
