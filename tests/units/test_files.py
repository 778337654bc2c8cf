"""The border to files and terminals: bounded readers, short and escaped messages, outputs whole or not at all."""

from __future__ import annotations

import io
import json
import math
import os
import time
from contextlib import redirect_stdout

import pytest
import torch
from typer.testing import CliRunner

from errata import Request, files, lab
from errata.bench import published, recipe, results
from errata.cli import common
from errata.cli.main import app
from errata.config import parse_assignments
from errata.data import formats, reading
from errata.data.requests import write_cases
from errata.edits import format as edits
from errata.errors import (
    LONGEST_MESSAGE,
    ConfigError,
    DataError,
    EditError,
    ErrataError,
    RequestError,
    brief,
    listing,
    shown,
)
from errata.evaluation import ability
from errata.report import card
from errata.report import files as reports
from errata.stats.corpora import file_corpus

LAUGH = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{'bcdefghij'[i]}: &{'bcdefghij'[i]} [{', '.join(['*' + 'abcdefghi'[i]] * 9)}]\n" for i in range(9)
)


# --- messages -------------------------------------------------------------------------------


def nested(width, depth):
    value: object = "x"
    for _ in range(depth):
        value = [value] * width
    return value


@pytest.mark.parametrize(
    "value",
    [nested(9, 40), {"a": nested(9, 40)}, "x" * 10**7, b"x" * 10**7, 10**5000, -(10**5000), ["\x1b[2J"] * 10**6,
     {i: i for i in range(10**5)}, nested(1, 5000), {"k": {"k": nested(3, 900)}}],
    ids=range(10),
)  # fmt: skip
def test_values_are_shown_short_and_at_once(value):
    begun = time.perf_counter()
    text = shown(value)
    assert len(text) <= 200 and text.isprintable() and time.perf_counter() - begun < 0.5
    assert len(shown(value, 60)) <= 60


def test_short_values_are_shown_as_they_are():
    for value in (7, -0.5, None, True, "Zoë", [1, "a"], {"a": [1]}, (1,), float("nan")):
        assert shown(value) == repr(value)
    assert brief("a\nb\x1b") == r"a\nb\x1b" and len(brief("x" * 999)) == 200


def test_an_object_whose_repr_fails_is_still_named():
    class Odd:
        def __repr__(self):
            raise RuntimeError

    assert "Odd" in shown(Odd())


@pytest.mark.parametrize(
    "text", ["x" * 10**6, "\x1b]0;title\x07" * 10**5, "line\n" * 10**5, "\ud800" * 10**5]
)
def test_messages_are_bounded_and_cannot_steer_a_terminal(text):
    message = str(RequestError(text))
    assert len(message) <= LONGEST_MESSAGE and all(c.isprintable() or c == "\n" for c in message)
    assert "cut here" in message
    message.encode("utf-8")


def test_long_lists_of_complaints_are_counted():
    assert listing(["a", "b"], 2) == "a\nb" and listing(["a", "b", "c"], 2) == "a\nb\n... and 1 more"


@pytest.mark.parametrize("value", ["\ud800", [LAUGH] * 10**4, 10**9999, nested(9, 30)], ids=range(4))
def test_requests_of_odd_values_end_in_one_short_message(value):
    with pytest.raises(RequestError) as caught:
        Request("{} is", "", value)
    assert len(str(caught.value)) < 500


# --- readers --------------------------------------------------------------------------------

DEEP = "[" * 30_000 + "]" * 30_000
DOCUMENTS = {
    "laugh": LAUGH,
    "deep": DEEP,
    "cycle": "&a [*a]",
    "date": "name: 2024-13-45",
    "digits": "seeds: [" + "9" * 10_000 + "]",
    "twice": "name: a\nname: b",
    "null": "name: \0",
    "text": "just words",
    "merge": "<<: [1, 2]",
    "documents": "name: a\n---\nname: b",
    "object": "name: !!python/object/apply:os.system [x]",
    "surrogate": '{"name": "\\ud800"}',
}


@pytest.mark.parametrize("name", DOCUMENTS)
@pytest.mark.parametrize(
    "read", [recipe.read, lambda path: published.read(str(path))], ids=["recipe", "table"]
)
def test_recipes_and_tables_end_in_one_message(read, name, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(DOCUMENTS[name])
    begun = time.perf_counter()
    with pytest.raises(ConfigError) as caught:
        read(path)
    assert len(str(caught.value)) <= LONGEST_MESSAGE and time.perf_counter() - begun < 10


@pytest.mark.parametrize("name", ["laugh", "deep", "cycle", "date", "digits", "merge", "object"])
def test_settings_end_in_one_message(name):
    with pytest.raises(ConfigError, match="not valid YAML"):
        parse_assignments([f"steps={DOCUMENTS[name]}"])


@pytest.mark.parametrize(
    "line",
    [
        '{"text": "\\ud800',
        "[" * 100_000,
        '{"text": ' + "9" * 9999 + "}",
        '{"text": "a", "text": "b"}',
        "null",
        "[]",
    ],
)
def test_a_corpus_ends_in_one_message(line, tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text('{"text": "Some words."}\n' + line + "\n")
    with pytest.raises(DataError, match="line 2"):
        list(file_corpus(path).texts())


@pytest.mark.parametrize(
    "line",
    ["[" * 10**5, '{"question": "", "question": ""}', '{"question": 7}', '{"question": "", "id": ' + "9" * 9999 + "}"],
)  # fmt: skip
def test_a_task_of_ones_own_ends_in_one_message(line, tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(DataError, match="line 1"):
        ability._local_rows(path)


@pytest.mark.parametrize(
    ("name", "text", "part"),
    [
        ("d.json", '{"a": ' + DEEP + "}", "nested too deeply"),
        ("d.json", '{"a": 1, "a": 2}', "names the field 'a' twice"),
        ("d.json", '{"a": "\\udc00"}', "half a surrogate pair"),
        ("l.jsonl", '{"a": 1}\n{"a": 1, "a": 2}\n', "line 2: names the field 'a' twice"),
        ("l.jsonl", '{"a": 1}\n' + DEEP + "\n", "line 2: nested too deeply"),
        ("l.json", '[{"a": 1}, {"a": "\\ud800"}]', "record 2: holds half"),
        ("l.json", '[{"a": 1}, ' + DEEP + "]", "nested too deeply"),
        ("t.csv", "a,b\n1," + "x" * 200_000 + "\n", "field larger than field limit"),
        ("t.csv", "a,a\n1,2\n", "several columns of one name: a"),
        ("t.csv", 'a,b\n1,"2\n', "breaks off after line 1: unexpected end of data"),
    ],
)
def test_files_of_data_say_which_record_is_at_fault(name, text, part, tmp_path):
    path = tmp_path / name
    path.write_text(text)
    faults = []
    try:
        faults = [
            f"{row.where}: {row.fault}" for row in formats.rows(path, formats.layout(path)) if row.fault
        ]
    except DataError as error:
        faults = [str(error)]
    assert len(faults) == 1 and part in faults[0] and len(faults[0]) < 500


def test_whole_numbers_of_any_length_do_not_stop_a_reading(tmp_path):
    path = tmp_path / "l.jsonl"
    path.write_text('{"a": ' + "9" * 10_000 + "}\n")
    (row,) = formats.rows(path, "lines")
    assert "10,000 digits" in shown(row.value)
    with pytest.raises(DataError, match="fit no dataset"):
        reading.read(path)


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b'{"sha256": 1', b"\xff\xfe\x00", b"{" * 100_000, b'{"commit": 1}']
)
def test_a_damaged_lock_is_named(content, tmp_path):
    path = tmp_path / "d.json"
    path.write_text('[{"a": 1}]')
    (tmp_path / "d.json.lock.json").write_bytes(content)
    with pytest.raises(DataError, match="is not a lock file of a dataset"):
        reading.read(path)


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"a": 1', "[]", '{"schema": 1, "schema": 2}', "\0", "null"]
)
def test_documents_of_results_end_in_one_message(content, tmp_path):
    path = tmp_path / "run.json"
    path.write_text(content)
    with pytest.raises(DataError, match="run.json"):
        results.read_document(path)


def test_encodings_are_told_by_their_mark(tmp_path):
    path = tmp_path / "t.txt"
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        path.write_bytes("Zoë 東京".encode(encoding))
        assert files.read_text(path, DataError) == "Zoë 東京"
    path.write_bytes(b"one\ntwo \xe4\n")
    with pytest.raises(DataError, match="line 2: .* is not UTF-8 text; save the file as UTF-8"):
        files.read_text(path, DataError)


# --- outputs --------------------------------------------------------------------------------


def save_edit(path):
    return edits.write(path, {"a": torch.ones(2)}, {"kind": "test"})


def save_cases(path):
    return write_cases(path, CASES)


CASES = lab.cases(2)
WRITERS = {
    "edit": (save_edit, "e.safetensors", EditError),
    "report": (lambda path: results.write_report(path, {"a": 1}), "r.json", DataError),
    "page": (lambda path: reports.write(path, "<p>"), "p.html", DataError),
    "picture": (lambda path: reports.write(path, b"png"), "p.png", DataError),
    "cases": (save_cases, "c.jsonl", RequestError),
    "sealed": (lambda path: results.write_sealed(path, {"a": 1}), "cell.json", DataError),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_only_regular_files_are_replaced(kind, tmp_path):
    write, name, error = WRITERS[kind]
    target = tmp_path / name
    os.mkfifo(target)
    with pytest.raises(error, match="not a regular file"):
        write(target)
    assert target.is_fifo() and list(tmp_path.iterdir()) == [target]
    target.unlink()
    target.symlink_to("/dev/null")
    with pytest.raises(error, match="not a regular file"):
        write(target)
    target.unlink()
    target.mkdir()
    with pytest.raises(error, match="it is a folder"):
        write(target)
    target.rmdir()
    target.symlink_to(target)
    with pytest.raises(error, match="cannot write"):
        write(target)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_link_stays_and_what_it_points_to_is_written(kind, tmp_path):
    write, name, _ = WRITERS[kind]
    (tmp_path / "there").mkdir()
    real, link = tmp_path / "there" / name, tmp_path / name
    link.symlink_to(real)
    write(link)  # to nothing yet
    first = real.read_bytes()
    real.write_bytes(b"old")
    write(link)
    assert link.is_symlink() and real.read_bytes() == first
    assert sorted(p.name for p in tmp_path.rglob("*")) == sorted([name, "there", name])


@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_leaves_the_old_file_and_nothing_beside_it(kind, tmp_path, monkeypatch):
    write, name, error = WRITERS[kind]
    target = tmp_path / name
    target.write_bytes(b"old")

    def full(self, other):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(error, match="No space left on device"):
        write(target)
    assert target.read_bytes() == b"old" and list(tmp_path.iterdir()) == [target]


def test_an_interrupt_while_writing_leaves_the_old_file(tmp_path):
    target = tmp_path / "r.json"
    target.write_text("old")
    with pytest.raises(KeyboardInterrupt), files.replacing(target) as part:
        part.write_text("ne")
        raise KeyboardInterrupt
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_the_mode_of_a_replaced_file_stays(tmp_path):
    target = tmp_path / "r.json"
    target.write_text("old")
    target.chmod(0o640)
    files.write(target, "new")
    assert target.stat().st_mode & 0o777 == 0o640


# --- terminals, pages, cards ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("\x9b2J", r"\x9b2J"),
        ("a\rb\x07\x08", r"a\rb\x07\x08"),
        ("\u202eevil\u2069", r"\u202eevil\u2069"),
        ("half \ud83d", r"half \ud83d"),
        (
            "Zoë 東京 हिन्दी می‌خواهم 👩‍👩‍👧 [bold]x[/bold]\n2\t",
            "Zoë 東京 हिन्दी می‌خواهم 👩‍👩‍👧 [bold]x[/bold]\n2\t",
        ),
    ],
)
def test_tables_show_controls_escaped_and_scripts_as_they_are(text, safe):
    assert common.safe(text) == safe
    held = io.StringIO()
    with redirect_stdout(held):
        common.table(text, [text], [[text]])
    assert not {"\x1b", "\x9b", "\x07", "\u202e", "\ud83d"} & set(held.getvalue())


def test_json_on_the_terminal_says_the_same_without_controls():
    document = {"a": "\x9b2J \ud800 \x7f 東"}
    held = io.StringIO()
    with redirect_stdout(held):
        common.emit(document)
    assert json.loads(held.getvalue()) == document
    held.getvalue().encode("utf-8")
    assert not {"\x9b", "\x7f"} & set(held.getvalue())


def test_json_on_the_terminal_has_no_numbers_that_json_lacks():
    held = io.StringIO()
    with redirect_stdout(held):
        common.emit({"perplexity": float("inf"), "change": [(-0.5, float("nan"))], "least": {"x": -math.inf}})
    refused = json.loads(held.getvalue(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert refused == {"perplexity": "inf", "change": [[-0.5, "nan"]], "least": {"x": "-inf"}}


@pytest.mark.parametrize(
    "text",
    ["# head", "<script>", "a | b", "[x](javascript:y)", "`code`", "![i](u)", "~~x~~", "\x1b[2J", "*x*"],
)
def test_cards_show_texts_as_texts(text):
    made = card.escape(text)
    assert not any(mark in made.replace("\\" + mark, "") for mark in "#|[]`~*!<>") and made.isprintable()


@pytest.mark.parametrize("name", ["deep.json", "half.jsonl", "open.csv"])
def test_the_command_line_ends_with_one_message_and_exit_code_2(name, tmp_path):
    path = tmp_path / name
    path.write_text({
        "deep.json": DEEP,
        "half.jsonl": '{"prompt": "{} is", "subject": "\\u001b[2J", "target": "\\ud800"}',
        "open.csv": 'prompt,subject,target\n{} is,Ada,"Esk\n',
    }[name])  # fmt: skip
    done = CliRunner().invoke(
        app, ["edit", str(path), "--model", "lab", "-o", str(tmp_path / "e.safetensors")]
    )
    assert isinstance(done.exception, ErrataError) and "\x1b" not in str(done.exception)
