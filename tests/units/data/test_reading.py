"""Sources, formats and checks: what is read, what is left out, and what is said about it."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest

from errata.data import fetching, formats, reading
from errata.data._base import Dataset, SubjectAbsent, make_request
from errata.data.formats import Truncated
from errata.data.reading import check, iterate, read
from errata.data.sets import REGISTRY
from errata.errors import DataError, RequestError

FOLDER = Path(__file__).parents[2] / "fixtures" / "data"
FLAT = FOLDER / "counterfact-edit.json"
ZSRE = FOLDER / "zsre_mend_eval.json"


def flat(number: int, **changes) -> dict:
    return {
        "case_id": number, "prompt": f"Town {number} lies on the", "subject": f"Town {number}",
        "target_new": "Arve", "ground_truth": "Brae", "rephrase_prompt": f"The river of Town {number} is the",
        "locality_prompt": "Holt lies on the", "locality_ground_truth": "Brae", **changes,
    }  # fmt: skip


def written(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return path


# --- formats -----------------------------------------------------------------------------------------------


def as_formats(folder: Path, rows: list[dict]) -> dict[str, Path]:
    import csv

    lines = "".join(json.dumps(row) + "\n" for row in rows)
    files = {
        "list": written(folder / "list.json", json.dumps(rows, indent=3)),
        "one line": written(folder / "line.json", json.dumps(rows)),
        "mark": written(folder / "bom.json", b"\xef\xbb\xbf" + json.dumps(rows).encode()),
        "jsonl": written(folder / "lines.jsonl", lines),
        "jsonl called json": written(folder / "lines.json", lines),
        "list called jsonl": written(folder / "list.jsonl", json.dumps(rows)),
    }
    for name, mark in (("table.csv", ","), ("table.tsv", "\t")):
        with (folder / name).open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(rows[0]), delimiter=mark)
            table.writeheader()
            table.writerows(rows)
        files[name] = folder / name
    return files


def test_every_format_gives_the_same_cases(tmp_path):
    rows = [flat(i) for i in range(1, 6)]
    rows[1]["prompt"] = 'Town 2, "the grey", lies\non the'  # separators, quotes and line ends inside
    rows[1]["subject"] = "Town 2"
    found = {name: read(path) for name, path in as_formats(tmp_path, rows).items()}
    wanted = found["list"].cases
    assert len(wanted) == 5
    for name, loaded in found.items():
        assert loaded.cases == wanted, name
        assert loaded.check.rows == 5 and not loaded.check.malformed, name


def test_parquet_gives_the_same_cases(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="reading parquet needs the extra errata[datasets]")
    import pyarrow.parquet as parquet

    rows = [flat(i) for i in range(1, 4)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    lines = written(tmp_path / "rows.json", json.dumps(rows))
    assert read(tmp_path / "rows.parquet").cases == read(lines).cases
    with pytest.raises(DataError, match="cannot be read as parquet"):
        read(written(tmp_path / "broken.parquet", b"PAR1 and nothing more"))


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 1 << 20])
def test_a_list_is_decoded_alike_however_it_is_cut_into_chunks(tmp_path, monkeypatch, chunk):
    """Numbers, words, escapes and surrogate pairs may all be cut; the result is that of the whole text."""
    values = [12345, -1.5e-07, True, None, 'a\\"b\u00e9\U0001f600', {"k": [1, {"z": "]},["}]}, [], {}, "", 7]
    text = " \n" + json.dumps(values, indent=1) + "\n\n"
    assert "\\ud83d" in text
    monkeypatch.setattr(formats, "CHUNK", chunk)
    path = written(tmp_path / "values.json", text)
    rows = list(formats.rows(path, formats.layout(path)))
    assert [row.value for row in rows] == values
    assert [row.where for row in rows] == [f"record {i + 1}" for i in range(len(values))]


def test_a_list_larger_than_the_memory_used_for_it(tmp_path):
    """24 MB are read within 8; the whole text, parsed, would need several times its size."""
    row = json.dumps(flat(1, note="x" * 20_000))
    with (tmp_path / "large.json").open("w") as file:
        file.write("[" + ",\n".join(row for _ in range(1200)) + "]")
    assert (tmp_path / "large.json").stat().st_size > 24e6
    tracemalloc.start()
    count = sum(1 for _ in iterate(tmp_path / "large.json"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 1200
    assert peak < 8e6


@pytest.mark.parametrize("chunk", [5, 1 << 20])
@pytest.mark.parametrize(
    ("spoil", "record", "line", "why"),
    [
        (lambda text: text[: text.index("Town 3 lies") + 6], 3, 24, "Unterminated string"),
        (lambda text: text[: text.index('"subject": "Town 2"')], 2, 15, "property name"),
        (lambda text: text.replace('"Town 2"', "Town 2", 1), 2, 15, "Expecting value"),
        (lambda text: text.rstrip()[:-1], 5, 42, "expected a comma or the end of the list"),
        (lambda text: text + "[]", 5, 43, "text after the end"),
    ],
)
def test_a_list_that_breaks_off_keeps_what_stands_before(
    tmp_path, monkeypatch, chunk, spoil, record, line, why
):
    """Each record has 10 lines: record k begins on line 10 k - 8; the list ends on line 42."""
    text = json.dumps([flat(i) for i in range(1, 5)], indent=0) + "\n"
    monkeypatch.setattr(formats, "CHUNK", chunk)
    path = written(tmp_path / "rows.json", spoil(text))
    with pytest.raises(Truncated) as caught:
        read(path)
    assert f"breaks off in record {record} (line {line}, column" in str(caught.value)
    assert why in str(caught.value)
    found = check(path)
    assert found.cases == found.rows == record - 1
    assert found.broken == str(caught.value)
    assert len(read(path, partial=True).cases) == record - 1
    assert len(read(path, limit=record - 1).cases) == record - 1  # the break is never reached


def test_lines_that_cannot_be_read_are_listed_and_the_others_kept(tmp_path):
    good = [json.dumps(flat(i)) for i in range(1, 4)]
    text = "\n".join([good[0], '{"case_id": ', "", good[1], "[1, 2]", good[2]]) + "\n"
    found = check(written(tmp_path / "rows.jsonl", text))
    assert (found.rows, found.cases, found.broken) == (5, 3, None)
    assert [fault.where for fault in found.malformed] == ["line 2", "line 5"]
    assert "not JSON" in found.malformed[0].reason
    assert "prompt: expected a text, found nothing" in found.malformed[1].reason


def test_a_last_line_cut_short_means_a_file_cut_short(tmp_path):
    text = json.dumps(flat(1)) + "\n" + json.dumps(flat(2))
    assert check(written(tmp_path / "whole.jsonl", text)).broken is None
    path = written(tmp_path / "cut.jsonl", text[:-5])
    assert "breaks off in line 2" in str(check(path).broken)
    with pytest.raises(Truncated):
        read(path)


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.csv"])
def test_bytes_that_are_no_text_are_laid_at_their_row(tmp_path, name):
    path = as_formats(tmp_path, [flat(i) for i in range(1, 4)])[
        {"rows.json": "one line", "rows.jsonl": "jsonl", "rows.csv": "table.csv"}[name]
    ]
    path.write_bytes(path.read_bytes().replace(b"of Town 2", b"of \xff\xfe2"))
    found = check(path)
    assert (found.rows, found.cases) == (3, 2)
    assert len(found.malformed) == 1 and "not UTF-8" in found.malformed[0].reason
    assert found.malformed[0].where in ("record 2", "line 2", "line 3")


def test_tables_with_surplus_cells_and_open_quotes(tmp_path):
    head = ",".join(flat(1))
    row = ",".join(map(str, flat(1).values()))
    found = check(
        f"counterfact_edit@{written(tmp_path / 'a.csv', f'{head}{chr(10)}{row}{chr(10)}{row},more,more{chr(10)}')}"
    )
    assert (found.rows, found.cases) == (2, 1)
    assert (found.malformed[0].where, found.malformed[0].reason) == (
        "line 3", "2 cells more than the first line has names",
    )  # fmt: skip
    short = row.rpartition(",")[0]  # cut within a line: what is missing is not taken for an empty cell
    cut = check(f"counterfact_edit@{written(tmp_path / 'd.csv', f'{head}{chr(10)}{short}{chr(10)}{row},')}")
    assert cut.malformed[0].reason == "1 cells fewer than the first line has names"
    open_quote = check(
        f"counterfact_edit@{written(tmp_path / 'b.csv', f'{head}{chr(10)}{row}{chr(10)}1,{chr(34)}open')}"
    )
    assert open_quote.cases == 1 and "breaks off after line 2" in str(open_quote.broken)
    with pytest.raises(DataError, match="several columns of one name: prompt"):
        read(f"counterfact_edit@{written(tmp_path / 'c.csv', 'prompt,prompt' + chr(10) + 'a,b' + chr(10))}")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("empty.json", "", "is empty"),
        ("space.json", " \n ", "is empty"),
        ("rows.bin", "\x00\x01", "of no known format"),
        ("word.json", "hello", "is not JSON"),
        ("none.json", "[]", "found no records"),
    ],
)
def test_files_that_cannot_be_read_at_all(tmp_path, name, text, words):
    with pytest.raises(DataError, match=words):
        read(written(tmp_path / name, text))


# --- sources -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("zsre", ("zsre", "", None, None)),
        ("zsre/alt:20", ("zsre", "alt", None, 20)),
        ("counterfact-edit", ("counterfact-edit", "", None, None)),
        ("zsre/alt@some/where.json:5", ("zsre", "alt", "some/where.json", 5)),
        ("cases@my.jsonl", ("cases", "", "my.jsonl", None)),
    ],
)
def test_sources_taken_apart(text, parts):
    found = reading.parse(text)
    path = str(found.path) if found.path else None
    assert (found.dataset, found.variant, path, found.limit) == parts


def test_files_whose_names_look_like_something_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = json.dumps([flat(i) for i in range(1, 4)])
    for name in ("a:2", "b@c.json", "zsre", "zsre-files", "plain.json"):
        written(tmp_path / name, text)
    (tmp_path / "mquake").mkdir()
    written(tmp_path / "mquake" / "other.json", text)
    assert reading.parse("a:2").limit is None and len(read("a:2").cases) == 3
    assert len(read("a:2:1").cases) == 1
    assert len(read("b@c.json:2").cases) == 2
    assert len(read("mquake/other.json").cases) == 3  # no variant of that name, but a file
    assert reading.parse("zsre").path is None  # a name is the dataset ...
    assert len(read("./zsre").cases) == 3  # ... and the file is written so
    assert len(read(Path("zsre")).cases) == 3
    assert len(read("plain.json:2").cases) == 2
    assert len(read("plain.json:2", limit=1).cases) == 1
    assert read("plain.json:3").check.limit == 3 and read("plain.json:4").check.limit is None


@pytest.mark.parametrize(
    ("name", "file", "variant"),
    [
        ("mquake", "MQuAKE-T.json", "t"),
        ("ecbd", "ecbd_specificity.json", "popular"),
        ("commonsense", "pep3k/probe_set.json", "pep3k"),
        ("commonsense", "probe_set.json", "20q"),  # says nothing without its folder
        ("zsre", "zsre_mend_eval.json", "true"),  # the same file under both conventions
        ("mquake", "mine.json", "cf"),
    ],
)
def test_a_files_usual_name_tells_its_variant(name, file, variant):
    assert fetching.variant_of(REGISTRY.get(name), Path("some") / file) == variant


def test_results_are_labelled_with_the_variant_of_the_file(tmp_path):
    """Also where the variant changes what is read: contradictions are left out of the one file, not the other."""
    rows = json.loads((FOLDER / "counterfact.json").read_text(encoding="utf-8"))[:1]
    torn = json.loads(json.dumps(rows[0]))
    torn["requested_rewrite"]["target_new"]["str"] = "Elsewhere"
    torn["case_id"] = "torn"
    multi = written(tmp_path / "multi_counterfact.json", json.dumps([*rows, torn]))
    plain = written(tmp_path / "counterfact.json", json.dumps([*rows, torn]))
    for source in (multi, f"counterfact@{multi}", f"counterfact/multi@{plain}"):
        assert (check(source).name, check(source).cases) == ("counterfact/multi", 1)
    for source in (plain, f"counterfact@{plain}"):
        assert (check(source).name, check(source).cases) == ("counterfact", 2)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("zrse", "did you mean 'zsre'"),
        ("zsre/tru", "unknown variant of zsre 'tru': did you mean 'true'"),
        ("zsree@x.json", "did you mean 'zsre'"),
        ("zsre:0", "expected a number from 1"),
        ("no/such/file.json", "names neither a file nor a dataset"),
        ("zsre@no/such/file.json", "cannot read no/such/file.json: No such file"),
        ("cases", "cases@PATH"),
    ],
)
def test_sources_that_name_nothing(source, words):
    with pytest.raises(DataError, match=words):
        read(source)


@pytest.mark.parametrize(
    ("prompt", "subject", "template"),
    [
        ("The capital of ruvia is", "Ruvia", ("The capital of ", " is")),  # other capitals
        ("The Ruvian song of Ruvia is", "Ruvia", ("The Ruvian song of ", " is")),  # not within a word
        ("Ruvia, or Ruvia proper, is", "Ruvia", ("", ", or Ruvia proper, is")),  # the first of two
        ("The Ruvian king is", "Ruvia", ("The ", "n king is")),  # spelled so, if only there
    ],
)
def test_where_the_subject_stands(prompt, subject, template):
    assert make_request(prompt, subject, "Kesh").template == template


def test_other_capitals_within_a_word_are_no_subject():
    with pytest.raises(SubjectAbsent, match="'Ada' does not occur in prompt"):
        make_request("The capital of Canada is", "Ada", "Kesh")


def test_a_file_that_fits_nothing_says_what_was_found(tmp_path):
    path = written(tmp_path / "rows.json", json.dumps([{"colour": "red", "size": 3}]))
    with pytest.raises(DataError, match="records with the fields colour, size") as caught:
        read(path)
    assert "counterfact" in str(caught.value) and "NAME@PATH" in str(caught.value)


def test_a_file_that_fits_two_datasets_is_not_guessed_at(tmp_path, monkeypatch):
    twin = replace(REGISTRY.get("counterfact_edit"), name="zsre")
    original = REGISTRY.get

    def get(name: str) -> Dataset:
        return twin if name == "zsre" else original(name)

    monkeypatch.setattr(REGISTRY, "get", get)
    with pytest.raises(DataError, match="fit several datasets: counterfact_edit, zsre; say which"):
        read(FLAT)


def test_own_cases_come_through_the_same_door(tmp_path):
    own = {
        "prompt": "{} lies on the",
        "subject": "Arvella",
        "target": "Brae",
        "target_old": "Arve",
        "id": "one",
    }
    text = json.dumps(own) + "\n" + json.dumps({**own, "target": "Tarn"}) + "\n"
    for source in (written(tmp_path / "own.jsonl", text), f"cases@{tmp_path / 'own.jsonl'}"):
        loaded = read(source)
        assert [case.id for case in loaded.cases] == ["one", "one#2"]
        assert loaded.cases[0].probes[0].kind == "efficacy"
        assert (loaded.check.name, loaded.check.cases, loaded.check.renamed) == ("cases", 2, 1)
        assert (loaded.check.conflicts.prompts, loaded.check.conflicts.cases) == (1, 2)
    written(tmp_path / "own.yaml", "- prompt: '{} lies on the'\n  subject: Arvella\n  target: Brae\n")
    assert len(read(tmp_path / "own.yaml").cases) == 1
    wrong = written(tmp_path / "wrong.jsonl", json.dumps({**own, "targt_old": "x"}) + "\n")
    with pytest.raises(RequestError, match="did you mean 'target_old'"):
        read(wrong)


@pytest.mark.parametrize("name", list(REGISTRY))
def test_every_dataset_stands_any_record_and_document(name):
    entry = REGISTRY.get(name)
    odd = [None, 3, "text", [], {}, [1], {"requested_rewrite": 3}, {"requested_rewrite": []}, {"prompt": None},
           {"portability": 3, "prompt": [], "locality": "x", "subject": {}}]  # fmt: skip
    assert [bool(entry.fits(value)) for value in odd].count(True) == 0
    assert entry.paper and entry.licence and entry.home and entry.variants
    assert set(entry.files) | set(entry.urls) <= {"", *entry.variants}
    if entry.records is not None:
        for document in odd:
            reading._count_fitting(entry, [document], "document")


# --- the check ---------------------------------------------------------------------------------------------


def test_counts_by_hand(tmp_path):
    """Rows 2 and 5 ask row 1's prompt: 2 with another target, 5 with the same. 3 has no subject in its prompt."""
    first = flat(1)
    rows = [
        first,
        {**first, "case_id": 2, "target_new": "Tarn"},
        flat(3, subject="Nowhere"),
        flat(4, target_new=""),
        {**first, "case_id": 5},
        {**flat(6), "case_id": 1},
    ]
    found = check(written(tmp_path / "rows.json", json.dumps(rows)))
    assert (found.rows, found.cases, found.requests, found.prompts) == (6, 4, 4, 2)
    assert (found.duplicates, found.conflicts.prompts, found.conflicts.cases) == (1, 1, 3)
    assert found.conflicts.examples == ("counterfact_edit:1", "counterfact_edit:2", "counterfact_edit:5")
    assert [fault.where for fault in found.skipped] == ["record 3"] and found.subject_absent == 1
    assert [fault.where for fault in found.malformed] == ["record 4"]
    assert found.renamed == 1
    assert found.probes == {"efficacy": 4, "paraphrase": 4, "neighbourhood": 4}
    assert found.sha256 == hashlib.sha256((tmp_path / "rows.json").read_bytes()).hexdigest()
    assert json.loads(json.dumps(found.to_dict()))["conflicts"]["prompts"] == 1


def test_every_row_is_a_case_or_listed():
    """Nothing is dropped silently: rows of one case each are cases, skipped or malformed."""
    for name in ("counterfact.json", "counterfact-edit.json", "zsre_mend_eval.json", "zsre_kilt.jsonl"):
        found = check(FOLDER / name)
        assert found.rows == 20 == found.cases + len(found.skipped) + len(found.malformed)


def test_names_of_cases_are_never_shared(tmp_path):
    path = written(tmp_path / "rows.json", json.dumps([flat(1), flat(1), flat(1)]))
    loaded = read(path)
    assert [case.id for case in loaded.cases] == [f"counterfact_edit:1{mark}" for mark in ("", "#2", "#3")]
    assert [case.request.id for case in loaded.cases] == [case.id for case in loaded.cases]


def test_iterating_gives_what_reading_gives():
    assert list(iterate(ZSRE)) == read(ZSRE).cases
    assert list(iterate(ZSRE, limit=3)) == read(ZSRE).cases[:3]
    with pytest.raises(DataError, match="limit from 1"):
        read(ZSRE, limit=0)
    with pytest.raises(DataError, match="names neither"):
        iterate("no/such/file.json")  # at the call, not at the first case


# --- the command line --------------------------------------------------------------------------------------


def cli(*words: str):
    from typer.testing import CliRunner

    from errata.cli.data import app

    return CliRunner().invoke(app, list(words))


def test_the_command_line_checks_and_shows(tmp_path):
    found = json.loads(cli("check", str(ZSRE), "--dataset", "zsre/alt", "--json").output)
    assert (found["name"], found["cases"], len(found["skipped"])) == ("zsre/alt", 18, 2)
    text = cli("check", str(ZSRE)).output
    assert "record 8" in text and "19" in text
    shown = json.loads(cli("show", f"{ZSRE}:5", "--case", "2", "--json").output)
    assert (
        shown["id"]
        == "zsre:1"
        == json.loads(cli("show", str(ZSRE), "--case", "zsre:1", "--json").output)["id"]
    )
    assert isinstance(cli("show", str(ZSRE), "--case", "99").exception, DataError)
    listed = json.loads(cli("list", "--json").output)["datasets"]
    assert [entry["name"] for entry in listed] == list(REGISTRY)
    rows = json.dumps([["clerk", 0.0, 0.5]])
    offered = cli("show", f"professions@{written(tmp_path / 'jobs.json', rows)}").output
    assert "of: he | she" in offered
    for words in (("list",), ("show", str(ZSRE))):
        assert cli(*words).exit_code == 0


@pytest.mark.parametrize("verb", ["list", "check", "show", "fetch"])
def test_every_verb_has_help(verb):
    """What help says is read as markup, in which a slash in square brackets is an error."""
    found = cli(verb, "--help")
    assert found.exit_code == 0 and "--json" in found.output


def test_exit_codes(tmp_path):
    skipped = cli("check", f"zsre/alt@{ZSRE}")
    assert skipped.exit_code == 0
    cut = written(tmp_path / "cut.json", FLAT.read_bytes()[:3000])
    broken = cli("check", str(cut))
    assert broken.exit_code == 1 and "BROKEN" in broken.output
    assert json.loads(cli("check", str(cut), "--json").output)["broken"]
    assert isinstance(cli("check", str(tmp_path / "none.json")).exception, DataError)


def test_the_page_on_datasets_names_each_with_its_variants():
    page = (Path(__file__).parents[3] / "docs" / "datasets.md").read_text(encoding="utf-8")
    lines = {
        line.split("`")[1]: line
        for line in page.splitlines()
        if line.startswith("| `") and "/" not in line[:20]
    }
    for name in REGISTRY:
        variants = [v for v in REGISTRY.get(name).variants if v and not v[:8].isdecimal()]  # but for dates
        assert name in lines, name
        assert all(f"`{variant}`" in lines[name] for variant in variants), name
