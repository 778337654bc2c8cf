"""Files of requests and cases: every format, every mistake, all at once."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

import errata
from errata.data.requests import read_cases, read_requests
from errata.errors import RequestError

ROWS: list[dict[str, Any]] = [
    {"prompt": "{} was born in", "subject": "Ada", "target": "Esk", "id": "a"},
    {"prompt": "Bruno lives in", "subject": "Bruno", "target": "Tallow", "target_old": "Merrin"},
]


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(r) for r in rows) + "\n\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        names = ["prompt", "subject", "target", "target_old", "id"]
        lines = [",".join(names)] + [",".join(f'"{r.get(n, "")}"' for n in names) for r in rows]
        path.write_text("\n".join(lines))
    else:
        path.write_text(yaml.safe_dump(rows))
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "yaml", "yml"])
def test_all_formats_read_alike(tmp_path, suffix):
    found = read_requests(write(tmp_path / f"r.{suffix}", rows=ROWS))
    assert found == [errata.Request(**row) for row in ROWS]


def test_all_mistakes_are_listed_with_their_lines(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text(
        '{"prompt": "{} is", "subject": "Ada", "target": "Esk"}\n'
        '{"prompt": "{} is", "subjct": "Ada", "target": "Esk"}\n'
        "not json\n"
        '{"prompt": "she is", "subject": "Ada", "target": "Esk"}\n'
        '{"prompt": "{} is", "subject": "Ada", "target": ""}\n'
        "[1]\n"
        '{"prompt": "{} is", "subject": "Ada", "target": 7}\n'
    )
    with pytest.raises(RequestError) as caught:
        read_requests(path)
    text = str(caught.value)
    for part in (
        "line 2: unknown field 'subjct', did you mean 'subject'?",
        "line 2: missing subject",
        "line 3: not JSON",
        "line 4: subject 'Ada' does not occur in prompt",
        "line 5: target is empty",
        "line 6: expected a record",
        "line 7: target must be text",
    ):
        assert part in text
    assert "line 1" not in text


def test_yaml_mistakes_name_the_line(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("- prompt: '{} is'\n  subject: Ada\n  target: Esk\n- prompt: '{} is'\n  target: Esk\n")
    with pytest.raises(RequestError, match=r"record 2 \(line 4\): missing subject"):
        read_requests(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.txt", "x", "unknown kind of file"),
        ("r.json", "{", "not JSON"),
        ("r.yaml", "a: [", "not YAML"),
        ("r.jsonl", "", "holds no requests"),
        ("r.json", "[]", "holds no requests"),
    ],
)
def test_unreadable_files(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(RequestError, match=message):
        read_requests(tmp_path / name)
    with pytest.raises(RequestError, match="cannot read"):
        read_requests(tmp_path / "none.jsonl")


def test_cases_carry_probes_and_always_ask_whether_the_edit_took(tmp_path):
    probe = {
        "kind": "neighbourhood",
        "prompt": "Bruno is",
        "answers": ["Esk"],
        "before": "Esk",
        "rival": "Oa",
    }
    path = write(tmp_path / "c.jsonl", [{**ROWS[1], "probes": [probe]}])
    (case,) = read_cases(path)
    assert [p.kind for p in case.probes] == ["efficacy", "neighbourhood"]
    assert case.probes[0].changes and not case.probes[1].changes
    write(path, [{**ROWS[0], "probes": [{"kind": "x", "promt": "y"}, 3]}])
    with pytest.raises(RequestError) as caught:
        read_cases(path)
    for part in ("probe 1: unknown field 'promt'", "probe 1: missing prompt, answers", "probe 2: expected"):
        assert part in str(caught.value)


def test_texts_may_hold_any_character_json_allows(tmp_path):
    """Line separators of Unicode are no ends of lines in JSON lines; ends of Windows are."""
    row = {"prompt": "Ada\u2028Orn is", "subject": "Ada\u2028Orn", "target": "Esk\x85"}
    lines = json.dumps(row, ensure_ascii=False) + "\r\n" + json.dumps(ROWS[0]) + "\r\n"
    for name in ("r.jsonl", "lines.json"):
        (tmp_path / name).write_bytes(lines.encode())
        assert [r.subject for r in read_requests(tmp_path / name)] == ["Ada\u2028Orn", "Ada"]
    (tmp_path / "cut.json").write_text('{\n"prompt": "x"\n}\nmore')
    with pytest.raises(RequestError, match="not JSON: Extra data at line 4"):
        read_requests(tmp_path / "cut.json")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("kind", 3, "kind must be text, found int 3"),
        ("prompt", ["a"], "prompt must be text, found list"),
        ("rival", 7, "rival must be text, found int 7"),
        ("answers", [""], "answers must be texts that are not empty, found str ''"),
        ("answers", {"a": 1}, "answers must be texts that are not empty, found dict"),
        ("before", ["Esk", True], "before must be texts that are not empty, found bool True"),
    ],
)
def test_probes_that_cannot_be_asked_are_refused(tmp_path, field, value, message):
    probe = {"kind": "locality", "prompt": "Bruno is", "answers": [1984], field: value}
    path = write(tmp_path / "c.jsonl", [{**ROWS[0], "probes": [probe]}])
    with pytest.raises(RequestError, match="line 1, probe 1: " + message):
        read_cases(path)


def test_dates_and_indirect_prompts_are_read_and_written(tmp_path):
    row = {**ROWS[0], "valid_from": "2019-05", "indirect": ["The wife of Ivo was born in"]}
    (request,) = read_requests(write(tmp_path / "r.jsonl", [row]))
    assert request.valid_from == "2019-05" and request.indirect == ("The wife of Ivo was born in",)
    assert request.to_dict() == row
    years = tmp_path / "years.yaml"
    years.write_text("- {prompt: '{} is', subject: Ada, target: Esk, valid_from: 2019}\n")
    days = tmp_path / "days.yaml"
    days.write_text("- {prompt: '{} is', subject: Ada, target: Esk, valid_from: 2019-05-31}\n")
    assert [read_requests(path)[0].valid_from for path in (years, days)] == ["2019", "2019-05-31"]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("valid_from", "May 2019", "valid_from must be a date"),
        ("valid_from", "2019-13", "valid_from must be a date"),
        ("indirect", [""], "indirect must be texts"),
        ("indirect", [{"a": 1}], "indirect must be texts"),
    ],
)
def test_dates_and_indirect_prompts_are_checked(tmp_path, field, value, message):
    with pytest.raises(RequestError, match=message):
        read_requests(write(tmp_path / "r.jsonl", [{**ROWS[0], field: value}]))
    with pytest.raises(RequestError, match=field):
        errata.Request("{} is", "Ada", "Esk", **{field: value})  # pyright: ignore[reportArgumentType]
