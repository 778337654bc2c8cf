"""A host's own tables: what is mined from raw text, what columns tell, what is kept, and what never enters."""

from __future__ import annotations

import ast
import inspect
import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

import errata
from errata import api
from errata.cli.main import app
from errata.errors import ConfigError, HostError
from errata.locate import contexts, own
from errata.locate.own import OwnCounts, own_text, type_of
from errata.methods._method import Workspace
from errata.stats import tables as stats
from errata.stats.collect import Corpus
from errata.stats.tables import (
    AnswerTable,
    Tables,
    TableSettings,
    agreement,
    compositions,
    facts,
    follows,
    free_text,
    inverses,
    own_tables,
    plan,
)
from errata.stats.templates import Kind, mine, sentences
from tests.models import fresh

RIVERS = ("Oru", "Bel", "Tavi", "Sanu", "Kem")
BOATS = ("Mira Sol", "Nuna Sol", "Pala Ket", "Rika Ket", "Suvi Ket")
PORTS = ("Anko", "Dresi", "Folu", "Ganta", "Hovo")
SMALL = TableSettings(texts=40, length=8, names=4, templates=6, answer_tokens=3, budget=2_000)


def invented() -> list[str]:
    """Text in no language: two types of names, each with its own sentences."""
    texts = []
    for i in range(5):
        river, boat, other = RIVERS[i], BOATS[i], BOATS[(i + 1) % 5]
        port = PORTS[(2 * i) % 5]
        texts.append(f"{river} velo ta {port}. Ta mor na {river} es {PORTS[i]}. Ulo mirit kas!")
        texts.append(f"{boat} gerit {port}. Nak {boat} fas um {PORTS[i]}. Do {other} gerit {port}?")
        texts.append(f"{other} sed nak {i}. {boat}-a nim {port}. {boat} sed")
    return texts


TEXT = Corpus("invented", invented)


# --- mining ---------------------------------------------------------------------------------


def test_templates_and_types_are_found_in_a_language_nobody_knows():
    kinds = mine(invented())
    found = {frozenset(kind.names): set(kind.templates) for kind in kinds}
    assert set(found) == {frozenset(RIVERS), frozenset(BOATS)}
    assert found[frozenset(RIVERS)] == {"{} velo ta", "Ta mor na {} es"}
    assert {"{} gerit", "Nak {} fas um", "{} sed nak"} <= found[frozenset(BOATS)]


def test_questions_and_what_breaks_off_are_no_statements():
    assert sentences(["Ana es tu. Bo es ti? Ci es"]) == ["Ana es tu"]


def test_a_beginning_that_goes_on_in_few_ways_is_no_template():
    names = [f"{first} {last}" for first in ("Ada", "Bo", "Cy", "Di") for last in ("Ulm", "Ost")]
    texts = []
    for i, name in enumerate(names):
        texts.append(
            f"We say {name} was born in {PORTS[i % 5]}. We say {name} was fed by {PORTS[-1 - i % 5]}."
        )
        texts.append(
            f"We say {name} was born in {PORTS[-1 - i % 5]}. We say {name} was fed by {PORTS[i % 5]}."
        )
    (kind,) = mine(texts)
    assert set(kind.templates) == {"We say {} was born in", "We say {} was fed by"}


def test_text_that_does_not_repeat_and_writing_without_capitals_give_nothing():
    assert mine([]) == []
    assert mine(["Nothing here is said twice. Every line goes its own way."]) == []
    assert mine(["安达出生于梅林。布鲁诺住在塔洛。"] * 5) == []


# --- reading columns ------------------------------------------------------------------------

CITIES = ("Anko", "Anko", "Dresi", "Dresi", "Folu", "Folu", "Ganta", "Ganta", "Hovo", "Hovo")
LANDS = ("North", "North", "North", "North", "South", "South", "East", "East", "West", "West")
TRADES = tuple(f"trade {i}" for i in range(10))
TABLE = AnswerTable(
    tuple(f"Name {i}" for i in range(10)),
    ("{} lives in", "The home of {} is", "{} pays in", "{} works as", "Ask {} for"),
    (CITIES, (*CITIES[:8], "Anko", "Dresi"), LANDS, TRADES, tuple(f"the {trade}" for trade in TRADES)),
)
TABLES = Tables((TABLE,), "by hand", 0, 0, 0)


def test_paraphrases_agree_in_their_answers():
    assert agreement(("A", "B.", ""), ("a", "b", "")) == pytest.approx(2 / 3)
    assert TABLE.paraphrases(CITIES) == ["{} lives in", "The home of {} is"]
    assert TABLE.related(TRADES) == {"{} works as", "Ask {} for"}, "an article more is the same relation"
    assert TABLE.relations[0] == ["{} lives in", "The home of {} is"]


def test_a_country_follows_from_its_city():
    assert follows(CITIES, LANDS)
    assert TABLE.dependents(CITIES) == ["{} pays in"]
    shuffled = tuple(CITIES[(3 * i + 1) % 10] for i in range(10))
    assert not follows(CITIES, shuffled)
    assert not follows(TRADES, LANDS), "no two names agree in their trade: nothing can be said"
    many = tuple(itertools.chain.from_iterable([land] * 10 for land in ("N", "S")))
    towns = tuple(str(i) for i in range(20))
    assert not follows(many, towns)


TOWNS = AnswerTable(
    ("Anko", "Dresi", "Folu", "Ganta", "Hovo"),
    ("{} lies in", "The sea at {} is", "{} has a wall"),
    (
        ("North", "North", "South", "East", "West"),
        ("A", "B", "C", "D", "E"),
        ("Yes", "Yes", "Yes", "Yes", "No"),
    ),
)
CRAFTS = AnswerTable(
    TRADES,
    ("{} is done by", "{} needs"),
    (tuple(f"name {i}." for i in range(10)), tuple(f"tool {i}" for i in range(10))),
)
WITH_BRIDGES = Tables((TABLE, TOWNS, CRAFTS), "by hand", 0, 0, 0)


def test_a_template_that_composes_two_others_is_found_by_its_answers():
    """Name -> city -> land is what "{} pays in" answers, for names whose land no other name shares as well."""
    found = compositions(CITIES, TABLE, WITH_BRIDGES)
    assert {template: match.template for template, match in found.items()} == {"{} pays in": "{} lies in"}
    assert found["{} pays in"].share == 1 and found["{} pays in"].table is TOWNS
    assert compositions(TRADES, TABLE, WITH_BRIDGES) == {}, "what trades need is nobody's land"
    assert compositions(CITIES, TABLE, TABLES) == {}, "no table is about cities"


def test_answers_that_agree_because_they_are_nearly_all_equal_compose_nothing():
    walled = ("Yes",) * 9 + ("No",)
    table = replace(TABLE, templates=(*TABLE.templates, "{} is safe"), answers=(*TABLE.answers, walled))
    assert "{} is safe" not in compositions(CITIES, table, replace(WITH_BRIDGES, types=(table, TOWNS)))


def test_the_inverse_of_a_relation_leads_back_to_the_names():
    (found,) = inverses(TRADES, TABLE.names, WITH_BRIDGES)
    assert found.template == "{} is done by" and found.share == 1
    assert inverses(CITIES, TABLE.names, WITH_BRIDGES) == [], "two names live in each city"


def test_the_report_lists_what_follows_and_what_leads_back():
    people, *_ = WITH_BRIDGES.report()
    by_template = {one["template"]: one for one in people["relations"]}
    assert by_template["{} lives in"]["follows"] == ["{} pays in"]
    assert by_template["{} lives in"]["inverses"] == []
    assert by_template["{} works as"]["inverses"] == ["{} is done by"]


def test_tables_are_read_back_as_they_were():
    assert Tables.from_dict(json.loads(json.dumps(TABLES.to_dict()))) == TABLES
    (record,) = TABLES.report()
    assert record["relations"][0]["example"] == "Name 0 lives in Anko"
    assert record["relations"][0]["follows"] == ["{} pays in"]


# --- cost and cache -------------------------------------------------------------------------


def test_the_budget_bounds_what_is_asked():
    kinds = [Kind(tuple("abcdefgh"), tuple("ijklmnop")), Kind(tuple("qr"), tuple("st"))]
    for budget in (0, 100, 300, 100_000):
        chosen = plan(kinds, TableSettings(answer_tokens=8), budget)
        assert 8 * sum(len(k.names) * len(k.templates) for k in chosen) <= budget
    assert plan(kinds, TableSettings(), 100_000) == kinds
    with pytest.raises(ConfigError, match="budget"):
        own_tables(fresh("llama"), TableSettings(budget=100))
    with pytest.raises(ConfigError, match="names"):
        TableSettings(names=0)


def test_tables_are_made_once_kept_whole_and_made_anew_when_damaged(tmp_path, monkeypatch):
    host, phases = fresh("llama"), []
    made = own_tables(
        host, SMALL, corpus=TEXT, folder=tmp_path, on_progress=lambda what, done, total: phases.append(what)
    )
    assert made.prompts > 0 and made.generated <= SMALL.budget and "answers" in phases
    (place,) = tmp_path.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(stats, "answers", None)
        assert own_tables(host, SMALL, corpus=TEXT, folder=tmp_path) == made
    place.write_bytes(place.read_bytes()[:-40] + b"x" * 40)
    with pytest.warns(RuntimeWarning, match="is recomputed"):
        assert own_tables(host, SMALL, corpus=TEXT, folder=tmp_path) == made
    assert facts(host, SMALL) != facts(fresh("llama", seed=1), SMALL)


@pytest.mark.parametrize("stage", ["free text", "answers"])
def test_tables_that_were_interrupted_go_on_from_what_was_stored(stage, tmp_path, monkeypatch):
    monkeypatch.setattr(stats, "ROWS", 4)
    monkeypatch.setattr(stats, "SAVE_EVERY", 1)
    read: list[list[str]] = []
    text = list(TEXT.texts())  # a random model repeats nothing
    monkeypatch.setattr(stats, "mine", lambda texts: read.append(list(texts)) or mine(text))
    host, asked = fresh("llama"), []
    settings = replace(SMALL, texts=16)
    whole = own_tables(host, settings)

    def stop(phase: str, done: int, total: int) -> None:
        if phase == stage and done >= 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        own_tables(host, settings, folder=tmp_path, on_progress=stop)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith("tables-unfinished")
    for name in ("sample_rows", "generate_rows"):
        run = getattr(stats, name)
        monkeypatch.setattr(stats, name, lambda *a, run=run, **b: asked.extend(a[1]) or run(*a, **b))
    assert own_tables(host, settings, folder=tmp_path) == whole
    assert read[-1] == read[0] and len(set(read[0])) > 4
    assert len(asked) == (8 + whole.prompts if stage == "free text" else whole.prompts - 8)
    assert [path.name[:7] for path in tmp_path.iterdir()] == ["tables-"] and not left.exists()
    left.write_bytes(b"of another process")
    own_tables(host, settings, folder=tmp_path)
    assert not left.exists()


def test_tables_of_an_edited_host_are_not_kept(tmp_path):
    host = fresh("llama")
    edit = errata.edit(host, errata.Request("{} lives in", "Ada Brenner", "Merrin"), method="ft", steps=1)
    with edit.on(host), pytest.raises(HostError, match="edited"):
        own_tables(host, SMALL, corpus=TEXT, folder=tmp_path)


def test_free_text_is_the_hosts_and_the_same_for_the_same_seed():
    host = fresh("llama")
    texts = free_text(host, TableSettings(texts=3, length=5))
    assert texts == free_text(host, TableSettings(texts=3, length=5)) and len(texts) == 3
    assert texts != free_text(host, TableSettings(texts=3, length=5, seed=1))


def test_texts_to_rehearse_are_written_once_for_the_unedited_host(tmp_path, monkeypatch):
    host, calls = fresh("llama"), []
    first = Workspace(folder=tmp_path, on_progress=lambda *call: calls.append(call))
    texts = first.texts(host, 20, 5, own=True)
    assert calls == [("free text", 16, 20), ("free text", 20, 20)] and len(texts) > 10
    with monkeypatch.context() as patch:
        patch.setattr(contexts, "sample", None)
        assert Workspace(folder=tmp_path).texts(host, 20, 5, own=True) == texts
    edit = errata.edit(host, errata.Request("{} lives in", "Ada Brenner", "Merrin"), method="ft", steps=1)
    with edit.on(host):
        edited, unedited = tmp_path / "edited", tmp_path / "unedited"
        Workspace(folder=edited).texts(host, 20, 5, own=True)
        assert not edited.exists(), "what an edited host writes is not stored"
        assert Workspace(folder=unedited, after=edit).texts(host, 20, 5, own=True) == texts
        assert len(list(unedited.iterdir())) == 2, (
            "both parts of the host without the edit that is continued are"
        )


# --- statements for a request ---------------------------------------------------------------

REQUEST = errata.Request("{} lives in", "Name 0", "Folu", "Anko")


def test_statements_come_from_the_columns(monkeypatch):
    host = fresh("llama")
    monkeypatch.setattr(own, "answers", lambda host, prompts, **_: [f"said to {p}" for p in prompts])
    found = own_text(host, REQUEST, TABLES, OwnCounts(paraphrases=6, consequences=4, anchors=24, mates=16))
    assert [(r.text, r.target) for r in found.paraphrases] == [("The home of Name 0 is", "Folu")]
    assert [(r.text, r.target) for r in found.consequences] == [("Name 0 pays in", "South")]
    assert {r.text for r in found.anchors} == {"Name 0 works as", "Ask Name 0 for"}
    assert all(r.target == f"said to {r.text}" for r in found.anchors)
    assert {r.subject for r in found.mates} == set(TABLE.names[1:])
    for mate in found.mates:
        assert (TABLE.column(mate.prompt) or ())[TABLE.names.index(mate.subject)] == mate.target
    assert type_of(host, REQUEST, TABLES) == 0


def test_what_follows_is_what_the_host_says_about_the_target(monkeypatch):
    host = fresh("llama")
    monkeypatch.setattr(own, "answers", lambda host, prompts, **_: [f"said to {p}" for p in prompts])
    found = own_text(host, REQUEST, WITH_BRIDGES, OwnCounts(consequences=4, anchors=9))
    assert [(r.text, r.target) for r in found.consequences] == [("Name 0 pays in", "said to Folu lies in")]
    assert "{} pays in" not in {r.prompt for r in found.anchors}
    abroad = replace(REQUEST, target="Jurt")
    (statement,) = own_text(host, abroad, WITH_BRIDGES, OwnCounts(consequences=4)).consequences
    assert statement.target == "said to Jurt lies in", (
        "no name has this city so far, nor does a table know it"
    )


def test_the_inverse_is_said_about_the_target_and_its_mates_keep_their_answers(monkeypatch):
    host = fresh("llama")
    monkeypatch.setattr(own, "answers", lambda host, prompts, **_: [f"said to {p}" for p in prompts])
    request = errata.Request("{} works as", "Name 0", "trade 4", "trade 0")
    found = own_text(host, request, WITH_BRIDGES, OwnCounts(inverses=2, mates=6))
    assert [(r.text, r.target) for r in found.inverses] == [("trade 4 is done by", "Name 0")]
    others = [mate for mate in found.mates if mate.prompt == "{} is done by"]
    assert len(others) == 6 and not {"trade 4", "trade 0"} & {mate.subject for mate in others}
    assert all(mate.target == f"name {mate.subject[-1]}." for mate in others)
    assert len(found.mates) == 12, "as many of the request's own statement"
    unknown = replace(request, target_old=None)
    everybody = own_text(host, unknown, WITH_BRIDGES, OwnCounts(inverses=1, mates=30)).mates
    assert "trade 0" not in {mate.subject for mate in everybody}, (
        "it is what the request takes from its subject"
    )
    assert not own_text(host, request, WITH_BRIDGES, OwnCounts(mates=6)).inverses


def test_without_tables_the_host_is_let_write_about_the_subject(monkeypatch):
    host = fresh("llama")
    written = [
        " lives near Anko today. More",
        " works as a cook, and",
        "",
        " lives in Dresi",
        " sold Folu to him.",
    ]
    monkeypatch.setattr(own, "sample_rows", lambda *_, **__: written)
    found = own_text(
        host,
        REQUEST,
        Tables((), "none", 0, 0, 0),
        OwnCounts(paraphrases=6, consequences=4, anchors=24, mates=16),
    )
    assert [(r.text, r.target) for r in found.paraphrases] == [("Name 0 lives near", "Folu")]
    assert [(r.text, r.target) for r in found.anchors] == [("Name 0 works as a cook,", "and")]
    assert not found.mates and found.type is None


# --- what never enters ----------------------------------------------------------------------


def test_nothing_that_makes_tables_or_statements_can_see_a_case():
    for module in (stats, own):
        tree = ast.parse(Path(module.__file__ or "").read_text(encoding="utf-8"))
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        names |= {
            alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names
        }
        assert not names & {"Case", "Probe", "cases"}, module
    assert set(inspect.signature(own_text).parameters) == {"host", "request", "tables", "counts", "seed"}
    assert set(inspect.signature(own_tables).parameters) == {
        "host", "settings", "corpus", "folder", "on_progress",
    }  # fmt: skip


def test_no_held_out_wording_enters_and_every_statement_is_in_the_hosts_own_words(monkeypatch):
    """The tables are made before any request; what a request adds to them is its own prompt alone."""
    host = errata.load("lab")
    settings = TableSettings(texts=400, names=6, templates=48, budget=60_000)
    texts = free_text(host, settings)
    monkeypatch.setattr(stats, "free_text", lambda *_: texts)  # written once for both
    tables, text = own_tables(host, settings), " ".join(" ".join(texts).split())
    held_out = {
        wording.replace("{s}", "{}") for r in errata.lab.world().relations.values() for wording in r.held_out
    }
    templates = {template for table in tables.types for template in table.templates}
    assert len(templates) > 30 and not templates & held_out
    for template in templates:
        before, _, after = template.partition("{}")
        assert before in text and after in text
    taken = 0
    for case in errata.lab.cases(6, seed=9):
        found = own_text(host, case.request, tables, OwnCounts(6, 4, 2, 8, 8))
        asked = {probe.prompt for probe in case.probes if probe.kind in ("paraphrase", "question")}
        statements = (*found.paraphrases, *found.consequences, *found.inverses, *found.anchors, *found.mates)
        taken += len(statements)
        for statement in statements:
            assert statement.prompt in templates | {"{}".join(case.request.template)}
            assert statement.text not in asked
    assert taken > 40


# --- what a person reads --------------------------------------------------------------------


def test_the_command_shows_tables_and_keeps_them(tmp_path, monkeypatch):
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path))
    monkeypatch.setattr(api, "load", lambda *_, **__: fresh("llama"))
    monkeypatch.setattr("errata.cli.common.open_host", lambda *_: fresh("llama"))
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(invented()), encoding="utf-8")
    call = ["stats", "--model", "tiny", "--tables", "--corpus", str(text), "--budget", "3000"]
    done = CliRunner().invoke(app, [*call, "--dry-run"])
    assert done.exit_code == 0 and "3,000" in done.output and not list(tmp_path.glob("tables-*"))
    done = CliRunner().invoke(app, [*call, "--json"])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert not document["kept_already"] and {"types", "report", "generated"} <= document.keys()
    assert list(tmp_path.glob("tables-*"))
    done = CliRunner().invoke(app, call)
    assert done.exit_code == 0 and "prompts answered" in done.output
