"""Schedules: which cases are fitted together, what is in place when the host is asked, and going on later."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from functools import partial

import pytest
import torch
from typer.testing import CliRunner

import errata
from errata import job
from errata.bench import runner, unedited
from errata.bench.schedule import Schedule
from errata.cli.main import app
from errata.edits.weight import WeightEdit
from errata.errors import ConfigError, DataError
from errata.evaluation.observe import observe
from errata.lab import cases, default_world
from errata.lab.cases import make
from errata.lab.world import World, sentence
from errata.methods import REGISTRY
from errata.methods._method import Workspace
from errata.types import Case, Probe
from tests.models import fresh

evaluate = partial(errata.evaluate, max_new_tokens=6)
"""With short answers, as random models do not end theirs."""
FAST = {"ft": {"steps": 2}, "memit": {"steps": 2, "tokens": 300, "contexts": 2}}


# --- the words ----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["single", "batch:1", "batch:32", "sequential:1", "sequential:100"])
def test_a_schedule_reads_what_it_writes(text):
    schedule = Schedule.parse(text)
    assert str(schedule) == text and Schedule.parse(f" {text} ") == schedule
    assert schedule.describe()


@pytest.mark.parametrize("text", ["", "batch", "batch:0", "batch:-1", "sequential:1.5", "single:2", "each:3"])
def test_other_words_are_refused_with_what_is_expected(text):
    with pytest.raises(ConfigError, match="sequential:N"):
        Schedule.parse(text)


@pytest.mark.parametrize("count", [1, 7, 10, 23])
@pytest.mark.parametrize("size", [1, 3, 10, 50])
def test_groups_are_a_partition_in_order(count, size):
    schedule = Schedule("sequential", size)
    groups = list(schedule.groups(count))
    assert [i for group in groups for i in group] == list(range(count))
    assert all(len(group) == size for group in groups[:-1]) and len(groups[-1]) <= size
    for end in range(0, count, size):
        assert list(schedule.groups(count, end)) == groups[end // size :]


@pytest.mark.parametrize(
    ("size", "count", "at", "expected"),
    [
        (1, 1200, None, (10, 50, 100, 200, 500, 1000, 1200)),
        (10, 500, None, (10, 50, 100, 200, 500)),
        (1, 20_000, None, (10, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000)),
        (1, 3, None, (3,)),
        (30, 100, None, (30, 60, 100)),
        (100, 250, None, (100, 200, 250)),
        (10, 25, "each", (10, 20, 25)),
        (10, 100, "every:30", (30, 60, 90, 100)),
        (10, 100, "end", (100,)),
        (10, 100, " 50, 10 ", (10, 50, 100)),
        (10, 25, [25, 20], (20, 25)),
    ],
)
def test_checkpoints(size, count, at, expected):
    assert Schedule("sequential", size).checkpoints(count, at) == expected


@pytest.mark.parametrize("at", ["5", [5], "110", "every:15", "0", [0], "ten", "", "every:0"])
def test_checkpoints_inside_a_group_or_beyond_the_end_are_refused(at):
    with pytest.raises(ConfigError, match="expected"):
        Schedule("sequential", 10).checkpoints(100, at)


# --- what is in place ---------------------------------------------------------------------------

NAMES = ["Ada", "Bruno", "Clara", "Dario", "Elsa", "Falk", "Greta"]


def made(count: int) -> list[Case]:
    """Cases about people; some neighbours are shared."""
    found = []
    for i, name in enumerate(NAMES[:count]):
        request = errata.Request("{} was born in", name, "Esk" if i % 2 else "Merrin", "Tallow", f"c{i}")
        kept = (f"{NAMES[-1]} lives in", f"The capital of {name} is")
        probes = (
            Probe("efficacy", request.text, (request.target,), ("Tallow",), "Tallow"),
            *(Probe("neighbourhood", text, ("Tallow",), ("Tallow",), request.target) for text in kept),
        )
        found.append(Case(f"c{i}", request, probes))
    return found


@pytest.fixture(scope="module")
def host():
    return fresh("llama")


def options(name: str) -> dict:
    return FAST.get(name, {"steps": 2, "tokens": 300})


def by_hand(host, name: str, groups: list[list[Case]], chain: bool) -> list[errata.Edit]:
    """Fit groups of cases with the method itself, each alone or each on top of the ones before."""
    from errata import config as settings

    method = REGISTRY.get(name)
    config, work = settings.make(method.config, options(name), name), Workspace()
    edits, edit = [], None
    for group in groups:
        edit = method.run(host, [c.request for c in group], config, work, after=edit if chain else None)
        edits.append(edit)
    return edits


def assert_same_rows(found, expected) -> None:
    """The same questions with the same answers; other batches may round otherwise."""
    assert [(r.case, r.kind, r.protocol, r.prompt) for r in found] == [
        (r.case, r.kind, r.protocol, r.prompt) for r in expected
    ]
    for one, other in zip(found, expected, strict=True):
        assert (one.before, one.after) == pytest.approx((other.before, other.after), abs=1e-5)


def test_a_sequence_keeps_every_edit_and_asks_every_case_so_far(host):
    table = made(5)
    start = host.weights_hash()
    report = evaluate(host, table, method="ft", schedule="sequential:2", at="each", **options("ft"))
    assert host.weights_hash() == start and report.meta["weights_restored"] and report.meta["finished"]
    assert report.meta["schedule"] == "sequential:2" and report.meta["after"] is None
    assert [point.edits for point in report.checkpoints] == [2, 4, 5]
    edits = by_hand(host, "ft", [table[:2], table[2:4], table[4:]], chain=True)
    assert [point.digest for point in report.checkpoints] == [edit.digest for edit in edits]
    for point, edit in zip(report.checkpoints, edits, strict=True):
        assert point.norm == pytest.approx(edit.norm()) and point.fit_seconds > 0
        rows = [row for row in report.rows if row.detail["checkpoint"] == point.edits]
        given = evaluate(host, table[: point.edits], edit=edit)
        assert_same_rows(rows, given.rows)
        for name, entry in given.summary.items():
            assert point.summary[name]["after"] == pytest.approx(entry["after"], abs=1e-5)
    assert report.summary == report.checkpoints[-1].summary


def test_a_method_for_one_request_goes_on_one_by_one(host):
    table = made(4)
    report = evaluate(
        host, table, method="rome", schedule="sequential:2", probes=["efficacy"], **options("rome")
    )
    edits = by_hand(host, "rome", [[case] for case in table], chain=True)
    assert [point.digest for point in report.checkpoints] == [edits[-1].digest]
    with pytest.raises(ConfigError, match="one request at a time.*sequential:2"):
        evaluate(host, table, method="rome", schedule="batch:2", **options("rome"))


def test_a_batch_is_one_fit_on_the_unedited_host(host):
    table = made(5)
    start = host.weights_hash()
    report = evaluate(host, table, method="ft", schedule="batch:2", **options("ft"))
    assert host.weights_hash() == start
    edits = by_hand(host, "ft", [table[:2], table[2:4], table[4:]], chain=False)
    assert [point.digest for point in report.checkpoints] == [edit.digest for edit in edits]
    assert [point.edits for point in report.checkpoints] == [2, 2, 1]
    expected = []
    for edit, group in zip(edits, (table[:2], table[2:4], table[4:]), strict=True):
        expected += evaluate(host, group, edit=edit).rows
    assert_same_rows(report.rows, expected)
    assert report.summary["efficacy.generate"]["n"] == len(table)


def test_a_batch_of_one_is_a_case_alone(host):
    table = made(3)
    single = evaluate(host, table, method="ft", **options("ft"))
    batch = evaluate(host, table, method="ft", schedule="batch:1", **options("ft"))
    assert_same_rows(batch.rows, single.rows)
    assert not single.checkpoints and "checkpoints" not in single.to_dict()


def test_the_last_batch_tells_learning_from_forgetting():
    """Without bounds every group is learned; the first group's targets are then taught otherwise."""
    host = fresh("llama")
    first, other = made(1)[0], replace(made(1)[0].request, target="Esk", id="again")
    again = Case("again", other, (Probe("efficacy", other.text, ("Esk",), ("Merrin",), "Merrin"),))
    first = replace(first, probes=first.probes[:1])
    report = evaluate(
        host, [first, again], method="ft", schedule="sequential:1", at="each",
        layers=[0, 1, 2], epsilon=None, steps=200, scale="published", learning_rate=0.02, stop_loss=1e-3,
    )  # fmt: skip
    assert [point.last_batch_efficacy for point in report.checkpoints] == [1.0, 1.0]
    assert [point.summary["efficacy.generate"]["after"] for point in report.checkpoints] == [1.0, 0.5]


def test_each_probe_is_asked_once_before_and_once_a_checkpoint(host, monkeypatch):
    asked: list[list[Probe]] = []

    def count(model, probes, *rest, **more):
        asked.append(list(probes))
        return observe(model, probes, *rest, **more)

    for module in (unedited, runner):
        monkeypatch.setattr(module, "observe", count)
    table = made(4)
    evaluate(host, table, method="ft", schedule="sequential:2", at="each", **options("ft"))
    every = [p for case in table for p in case.probes]
    assert len(set(every)) < len(every), "some are shared"
    assert [set(probes) for probes in asked] == [
        set(every), {p for case in table[:2] for p in case.probes}, set(every)
    ]  # fmt: skip
    assert all(len(probes) == len(set(probes)) for probes in asked)


# --- going on -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["memit", "ft"])
def test_stopping_and_going_on_gives_the_same_edit(name, tmp_path):
    table, path = made(5), tmp_path / "kept.safetensors"
    whole = evaluate(fresh("llama"), table, method=name, schedule="sequential:1", **options(name))

    class Stop(Exception):
        pass

    def stop(report, edit):
        edit.save(path)
        assert [point.edits for point in report.checkpoints] == [2] and not report.meta["finished"]
        raise Stop

    host = fresh("llama")
    start = host.weights_hash()
    run = {"method": name, "schedule": "sequential:1", "at": [2], **options(name)}
    with pytest.raises(Stop):
        evaluate(host, table, keep=stop, **run)
    assert host.weights_hash() == start, "stopping leaves nothing behind"
    kept = errata.Edit.load(path)
    rest = evaluate(fresh("llama"), table, after=kept, **run)
    assert [point.edits for point in rest.checkpoints] == [5]
    assert rest.checkpoints[-1].digest == whole.checkpoints[-1].digest != kept.digest
    assert rest.meta["after"] == {"digest": kept.digest, "edits": 2}
    assert_same_rows(rest.rows, whole.rows)


def test_only_the_beginning_of_the_same_run_is_gone_on_from(host):
    table = made(5)
    edit = by_hand(host, "ft", [table[:3]], chain=True)[0]

    def go(cases=table, schedule="sequential:3", method="ft", **more):
        return evaluate(
            host, cases, method=method, schedule=schedule, after=edit, **{**options(method), **more}
        )

    with pytest.raises(ConfigError, match="request 1 of the edit"):
        go(table[1:])
    with pytest.raises(ConfigError, match="request 3 of the edit"):
        go(table[:2])
    with pytest.raises(ConfigError, match="every 2"):
        go(schedule="sequential:2")
    with pytest.raises(ConfigError, match="seed 0"):
        go(seed=1)
    with pytest.raises(ConfigError, match="made by ft"):
        go(method="memit")
    over = go(table[:3])
    assert [point.digest for point in over.checkpoints] == [edit.digest], "nothing left to fit: only asked"


def test_what_does_not_belong_together_is_refused(host, monkeypatch):
    table = made(2)
    edit = by_hand(host, "ft", [table], chain=False)[0]
    for more in ({"at": "end"}, {"after": edit}, {"keep": lambda report, edit: None}):
        with pytest.raises(ConfigError, match="require the schedule sequential:N"):
            evaluate(host, table, method="ft", **more)
    with pytest.raises(ConfigError, match="without a schedule"):
        evaluate(host, table, edit=edit, schedule="batch:2")
    with pytest.raises(ConfigError, match="did you mean 'neighbourhood'"):
        evaluate(host, table, method="ft", probes=["neighborhood"])
    once = replace(REGISTRY.get("ft"), sequential=False)
    monkeypatch.setattr(job, "REGISTRY", {"ft": once})
    with pytest.raises(ConfigError, match="cannot continue from an earlier edit.*batch:N"):
        evaluate(host, table, method="ft", schedule="sequential:1")


def test_only_the_kinds_asked_for_are_observed(host):
    report = evaluate(host, made(3), method="ft", probes=["efficacy"], **options("ft"))
    assert {row.kind for row in report.rows} == {"efficacy"}


# --- collapse -----------------------------------------------------------------------------------


def test_perplexity_before_and_after_and_overflow_is_infinite(host, monkeypatch):
    """An edit that overflows the host's numbers: the report says so and stays JSON."""
    names = [f"model.layers.1.mlp.{part}_proj.weight" for part in ("up", "down")]
    table = made(2)

    def broken(model, requests, config, work):
        deltas = {name: torch.full_like(host.model.get_parameter(name), 1e30) for name in names}
        good = REGISTRY.get("ft").fit(model, requests, config, work)
        return WeightEdit(deltas, frozenset(), good.provenance)

    monkeypatch.setattr(job, "REGISTRY", {"ft": replace(REGISTRY.get("ft"), fit=broken)})
    report = evaluate(host, table, method="ft", schedule="batch:2", **options("ft"))
    point = report.checkpoints[0]
    assert 1 < point.perplexity_before < 10_000 and point.perplexity_after == float("inf")
    document = report.to_dict()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert float(document["checkpoints"][0]["perplexity_after"]) == float("inf")
    assert report.meta["weights_restored"]


def test_neutral_text_is_the_corpus_end_or_what_the_unedited_host_writes(host):
    corpus = runner.held_out(host, Workspace(corpus=_corpus([f"text number {i}" for i in range(500)])))
    assert corpus == [f"text number {i}" for i in range(300, 500)]
    written = runner.held_out(host, Workspace(seed=3))
    assert len(written) == runner.SAMPLED and written == runner.held_out(host, Workspace(seed=3))
    assert not set(written) & set(runner.held_out(host, Workspace(seed=4)))
    with pytest.raises(DataError, match="longer corpus"):
        evaluate(host, made(2), method="ft", schedule="batch:2", corpus=_corpus([""]), **options("ft"))


def _corpus(texts: list[str]):
    from errata.stats.collect import Corpus

    return Corpus("made up", lambda: texts)


# --- cases that stand together ------------------------------------------------------------------


@pytest.fixture(scope="module")
def world() -> World:
    return default_world()


def back(world: World, relation: str) -> str | None:
    found = world.relations[relation]
    return relation if found.symmetric else found.inverse


def edited(world: World, table: list[Case]) -> dict[tuple[str, str], str | None]:
    """The graph with all requests granted, worked out anew: every fact, None where none is left."""
    graph: dict[tuple[str, str], str | None] = {(f.subject, f.relation): f.object for f in world.facts}
    wanted = {}
    for case in table:
        subject, relation = asked(world, case.request)
        wanted[subject, relation] = case.request.target
        reverse = back(world, relation)
        if reverse:
            wanted[case.request.target, reverse] = subject
    for (subject, relation), target in wanted.items():  # one to one: nobody else holds what is taken
        reverse = back(world, relation)
        if reverse:
            for key, value in graph.items():
                if (key[1] == relation and value == target) or (key[1] == reverse and value == subject):
                    graph[key] = None
    return {**graph, **wanted}


def asked(world: World, request: errata.Request) -> tuple[str, str]:
    relations = world.relations.values()
    found = [r.name for r in relations if any(sentence(w, "{}") == request.prompt for w in r.phrasings)]
    names = [name for name in found if world.get(request.subject, name) == request.target_old]
    assert len(names) == 1
    return request.subject, names[0]


def meanings(world: World) -> dict[str, tuple[str, tuple[str, ...]]]:
    """What every prompt of the lab asks: a subject and a path of relations."""
    found = {}
    for fact in world.facts:
        relation = world.relations[fact.relation]
        for name in world.names(fact.subject):
            for wording in (*relation.phrasings, *relation.held_out):
                found[sentence(wording, name)] = (fact.subject, (fact.relation,))
            for wording in relation.questions:
                found[f"Question: {sentence(wording, name)}\nAnswer:"] = (fact.subject, (fact.relation,))
    for chain in world.chains.values():
        for fact in world.by_relation[chain.path[0]]:
            for wording in chain.phrasings:
                found[sentence(wording, fact.subject)] = (fact.subject, chain.path)
    # an edit may give someone a fact of a kind they had none of
    for relation in (r for r in world.relations.values() if back(world, r.name)):
        for entity in world.entities.values():
            if entity.type == relation.subject:
                for wording in relation.phrasings:
                    found[sentence(wording, entity.name)] = (entity.name, (relation.name,))
    return found


def follow(graph, subject: str, path: tuple[str, ...]) -> str | None:
    at: str | None = subject
    for relation in path:
        at = None if at is None else graph.get((at, relation))
    return at


@pytest.mark.parametrize(("count", "seed"), [(60, 0), (500, 0), (1500, 1)])
def test_every_answer_holds_with_all_edits_in_place(world, count, seed):
    table = cases(count, seed=seed, together=True)
    graph, means = edited(world, table), meanings(world)
    assert len(table) == count == len({asked(world, case.request) for case in table})
    for case in table:
        for probe in case.probes:
            subject, path = means[probe.prompt]
            assert follow(graph, subject, path) == probe.answers[0], (case.request, probe)


def test_only_probes_with_another_answer_are_left_out(world):
    table = cases(400, seed=2, together=True)
    graph, means = edited(world, table), meanings(world)
    differing = {key: value for key, value in graph.items() if world.get(*key) != value}
    left_out = 0
    for i, case in enumerate(table):
        subject, relation = asked(world, case.request)
        fact = next(f for f in world.by_subject[subject] if f.relation == relation)
        alone, among = (
            make(world, fact, random.Random(i), case.id, case.request.target, edits).probes
            for edits in (None, differing)
        )
        kept = [p for p in alone if follow(graph, *means[p.prompt]) == p.answers[0]]
        assert list(among) == kept
        left_out += len(alone) - len(kept)
    assert left_out > 100


def test_fewer_cases_together_ask_for_the_first_of_more():
    few, many = cases(50, seed=5, together=True), cases(300, seed=5, together=True)
    assert [case.request for case in few] == [case.request for case in many[:50]]
    assert cases(50, seed=5, together=True) == few != cases(50, seed=6, together=True)


def test_more_cases_than_can_stand_together_are_refused(world):
    with pytest.raises(ConfigError, match=r"seed 0 has (\d+)") as caught:
        cases(len(world.facts), together=True)
    possible = int(str(caught.value).split("seed 0 has ")[1].split(";")[0])
    assert 500 < possible < len(world.facts) and len(cases(possible, together=True)) == possible
    with pytest.raises(ConfigError):
        cases(possible + 1, together=True)


# --- the command line ---------------------------------------------------------------------------


def test_the_command_stops_and_goes_on(tmp_path):
    folder, table = tmp_path / "model", tmp_path / "cases.jsonl"
    host = fresh("gpt2")
    host.model.save_pretrained(folder)
    host.tokenizer.save_pretrained(folder)
    lines = [
        {**case.request.to_dict(), "probes": [
            {"kind": "neighbourhood", "prompt": "The capital is", "answers": ["Esk"], "before": ["Esk"]}
        ]}
        for case in made(4)
    ]  # fmt: skip
    kept, out = tmp_path / "edit.safetensors", tmp_path / "run.json"

    def run(first: int, *more: str):
        table.write_text("\n".join(json.dumps(line) for line in lines[:first]))
        words = ["eval", "--model", str(folder), "--cases", str(table), "--method", "ft", "--set", "steps=2"]
        done = CliRunner().invoke(app, [*words, "--schedule", "sequential:2", *more], catch_exceptions=False)
        assert done.exit_code == 0
        return done.stdout

    whole = json.loads(run(4, "--at", "each", "--json"))
    assert [point["edits"] for point in whole["checkpoints"]] == [2, 4]
    assert set(whole["checkpoints"][0]) == {
        "edits", "summary", "perplexity_before", "perplexity_after", "last_batch_efficacy", "fit_seconds",
        "norm", "digest", "routing_drift",
    }  # fmt: skip
    shown = run(2, "--keep-edit", str(kept), "-o", str(out))
    first = json.loads(out.read_text())
    assert (
        errata.Edit.load(kept).digest
        == whole["checkpoints"][0]["digest"]
        == first["checkpoints"][0]["digest"]
    )
    assert "sequential:2" in shown and "perplexity" in shown and first["meta"]["finished"]
    rest = json.loads(run(4, "--after", str(kept), "--json", "--probes", "efficacy, neighbourhood"))
    assert rest["checkpoints"][-1]["digest"] == whole["checkpoints"][-1]["digest"]
    assert rest["summary"] == whole["summary"]


def test_the_command_draws_cases_that_stand_together():
    from errata.cli.common import read_cases

    for words, together in (("single", False), ("batch:1", False), ("batch:5", True), ("sequential:1", True)):
        plan = Schedule.parse(words)
        assert read_cases("lab:5", 3, together=plan.together) == cases(5, seed=3, together=together)
