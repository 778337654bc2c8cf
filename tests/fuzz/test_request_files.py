"""Request files as people, spreadsheets and other tools write them, and files damaged at random.

Each handmade file states what is right: the requests it holds, or what its one complaint says. A file of errata's own
that is damaged is read as an independent reading has it, or refused.
"""

# ruff: noqa: E501  (one file a line)
from __future__ import annotations

import csv
import io
import json
import time

import pytest

from errata.data.requests import read_cases, read_requests
from errata.errors import RequestError
from errata.types import Request
from tests.fuzz import mutations

ADA = {"prompt": "{} was born in", "subject": "Ada Brenner", "target": "Tallow"}
BORIS = {"prompt": "{} plays the", "subject": "Boris Sorwick", "target": "violin"}
NOVA = {"prompt": "{} is based in", "subject": "Nova Trading", "target": "Merrin"}
ALL = [ADA, BORIS, NOVA]
HEAD = "prompt,subject,target\n"
LINES = "".join(f"{r['prompt']},{r['subject']},{r['target']}\n" for r in ALL)
LAUGH = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{'bcdefghij'[i]}: &{'bcdefghij'[i]} [{', '.join(['*' + 'abcdefghi'[i]] * 9)}]\n" for i in range(9)
)


def dump(*records, **more):
    return json.dumps(list(records), **more)


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


def sheet(separator, *, head=("prompt", "subject", "target"), end="\n"):
    rows = [head, *([r["prompt"], r["subject"], r["target"]] for r in ALL)]
    return "".join(separator.join(row) + end for row in rows)


def rewritten(record, old="Rowanport", **more):
    fields = {
        "prompt": record["prompt"],
        "subject": record["subject"],
        "target_new": {"str": record["target"]},
    }
    return {"case_id": 7, "requested_rewrite": {**fields, **({"target_true": {"str": old}} if old else {})}, **more}  # fmt: skip


def old(record, answer, **more):
    return {**record, "target_old": answer, **more}


# name: (content, the requests it holds, or a part of its complaint)
HANDMADE = {
    # separators, headers, spreadsheets
    "semicolons.csv": (sheet(";"), ALL),
    "tabs.csv": (sheet("\t"), ALL),
    "tabs.tsv": (sheet("\t"), ALL),
    "bars.csv": (sheet("|"), ALL),
    "declared.csv": ("sep=;\n" + sheet(";"), ALL),
    "declared_crlf.csv": ("sep=;\r\n" + sheet(";", end="\r\n"), ALL),
    "crlf.csv": (sheet(",", end="\r\n"), ALL),
    "cr.csv": (sheet(",", end="\r"), ALL),
    "mark.csv": (b"\xef\xbb\xbf" + sheet(",").encode(), ALL),
    "utf16.csv": (sheet("\t", end="\r\n").encode("utf-16"), ALL),
    "utf16_big.csv": (b"\xfe\xff" + sheet(";").encode("utf-16-be"), ALL),
    "utf16_unmarked.csv": (sheet(",").encode("utf-16-le"), "line 1: a null character"),
    "latin.csv": ((HEAD + "{} was born in,Zoë,Köln\n").encode("latin-1"), "line 2: .* is not UTF-8 text"),
    "capitals.csv": (sheet(",", head=("Prompt", "SUBJECT", "Target")), ALL),
    "spaced.csv": (
        "prompt, subject, target\n{} was born in, Ada Brenner, Tallow\n{} plays the, Boris Sorwick, violin\n",
        ALL[:2],
    ),
    "index.csv": (
        "," + HEAD + "".join(f"{i},{line}\n" for i, line in enumerate(LINES.splitlines())),
        ALL,
    ),
    "nameless.csv": (
        "," + HEAD + "important,{} was born in,Ada Brenner,Tallow\n",
        "column 1 has no name in line 1",
    ),
    "trailing.csv": (HEAD.strip() + ",,\n" + LINES.replace("\n", ",,\n"), ALL),
    "blank_rows.csv": (HEAD + "\n,,\n" + LINES + ",,\n\n", ALL),
    "blank_first.csv": ("\n\n" + HEAD + LINES, ALL),
    "two_columns.csv": (
        "prompt,subject,target,target\n{} was born in,Ada Brenner,Tallow,Rowanport\n",
        "line 1: several columns are named target",
    ),
    "two_capitals.csv": ("prompt,subject,target,Target\n" + LINES, "several columns are named target"),
    "unknown_column.csv": (
        "prompt,subject,target,colour\n" + LINES.replace("\n", ",red\n"),
        "line 2: unknown field 'colour'",
    ),
    "wrong_header.csv": ("question;entity;answer\n" + "a;b;c\n" * 30, "found question.*expected prompt, subject, target"),
    "no_header.csv": (LINES, "expected prompt, subject, target"),
    "only_header.csv": (HEAD, "holds no requests"),
    "empty.csv": ("", "holds no requests"),
    "surplus.csv": (HEAD + "{} was born in,Ada Brenner,Tallow, Esk\n", "line 2: 4 cells, the header has 3"),
    "short.csv": (HEAD + "{} was born in,Ada Brenner\n", "line 2: missing target"),
    "long_cell.csv": (HEAD + "{} x,s," + "y" * 200_000, "line 2: a cell has more than 131,072 characters"),
    "null.csv": (HEAD + "{} was\0 born in,Ada,Esk\n", "line 2: a null character"),
    # quotes
    "open_quote.csv": (HEAD + LINES.replace("Tallow", '"Tallow'), "line 2: a quote that opens here is never closed"),
    "closed_later.csv": (
        HEAD + LINES.replace("Tallow", '"Tallow').replace("violin\n", 'violin"\n'),
        "line 2: a quote that opens here closes only after the row",
    ),
    "behind_quote.csv": (HEAD + '{} was born in,"Ada" Brenner,Tallow\n', "line 2: text follows a closing quote"),
    "quoted.csv": (HEAD + '"{} was born, one says, in","Ada ""the"" Brenner",Tallow\n',
                   [{"prompt": "{} was born, one says, in", "subject": 'Ada "the" Brenner', "target": "Tallow"}]),
    "two_lines.csv": (HEAD + '{} said,Ada,"One line,\nand another."\n',
                      [{"prompt": "{} said", "subject": "Ada", "target": "One line,\nand another."}]),
    "formula.csv": (HEAD + "{} equals,Ada,=1+1\n", [{"prompt": "{} equals", "subject": "Ada", "target": "=1+1"}]),
    # JSON and JSON lines
    "array.jsonl": (dump(*ALL, indent=1), ALL),
    "array_one_line.jsonl": (dump(*ALL), ALL),
    "array_cut.jsonl": (dump(*ALL, indent=1)[:-10], "not JSON: .* at line"),
    "objects_spread.jsonl": ("\n".join(json.dumps(r, indent=2) for r in ALL), ALL),
    "lines.json": (lines(*ALL), ALL),
    "one.json": (json.dumps(ADA), [ADA]),
    "comma_lines.jsonl": (lines(*ALL * 9).replace("\n", ",\n"), "not JSON: Extra data at line 1"),
    "trailing_comma.json": (dump(ADA)[:-1] + ",]", "not JSON: .* line 1"),
    "single_quotes.json": (str([ADA]), "not JSON: .* line 1"),
    "mark.json": (b"\xef\xbb\xbf" + dump(*ALL).encode(), ALL),
    "utf16.json": (dump(*ALL).encode("utf-16"), ALL),
    "crlf.jsonl": (lines(*ALL).replace("\n", "\r\n"), ALL),
    "blank_lines.jsonl": ("\n\n" + lines(*ALL).replace("\n", "\n\n"), ALL),
    "twice.jsonl": (lines(BORIS) + '{"prompt": "{} is", "subject": "Ada", "target": "Esk", "target": "Oa"}\n',
                    "line 2: the field 'target' is there twice"),
    "twice.json": ('[{"prompt": "{} is", "subject": "Ada", "prompt": "{} was", "target": "Esk"}]',
                   "the field 'prompt' is there twice"),
    "deep.json": ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
    "deep.jsonl": ('{"a":' * 50_000 + "1" + "}" * 50_000, "nested too deeply"),
    "deep_value.jsonl": (lines(ADA, {**ADA, "id": json.loads("[" * 400 + "]" * 400)}), "line 2: nested too deeply"),
    "old_list.json": (dump(old(ADA, ["Rowanport", "Rowan Port"])), [old(ADA, "Rowanport")]),
    "old_nan.json": (dump(old(ADA, float("nan"))), "target_old must be text, .* found float nan"),
    "old_number.json": (dump(old(ADA, 7)), "target_old must be text, .* found int 7"),
    "old_nested.json": (dump(old(ADA, [["Esk"]])), "target_old must be text"),
    "old_empty.json": (dump(old(ADA, [])), [ADA]),
    "old_record.json": (dump(old(ADA, {"str": "Esk"})), "target_old must be text, .* found dict"),
    "target_number.json": (dump({**ADA, "target": 1984}), "target must be text, found int 1984"),
    "target_null.json": (dump({**ADA, "target": None}), "target must be text, found NoneType"),
    "target_list.json": (dump({**ADA, "target": ["a"] * 10**5}), "target must be text, found list"),
    "target_infinite.jsonl": (lines({**ADA, "target": float("inf")}), "target must be text, found float inf"),
    "surrogate.json": ('[{"prompt": "{} is", "subject": "Ada", "target": "\\ud83d"}]', "half a surrogate pair"),
    "pair.json": ('[{"prompt": "{} is", "subject": "Ada", "target": "\\ud83d\\ude00"}]',
                  [{"prompt": "{} is", "subject": "Ada", "target": "😀"}]),
    "huge_id.jsonl": ('{"prompt":"{} x","subject":"s","target":"t","id":' + "9" * 10_000 + "}",
                      "id must be text or a whole number, found .* of 10,000 digits"),
    "number_id.json": (dump({**ADA, "id": 7}), [{**ADA, "id": "7"}]),
    "float_id.json": (dump({**ADA, "id": 7.5}), "id must be text or a whole number, found float"),
    "overflow.jsonl": (lines(ADA).replace('"Tallow"', "1e999"), "target must be text, found float inf"),
    "wrapped.json": (json.dumps({"data": ALL}), "unknown field 'data'"),
    "texts.json": (dump("a", "b", "c", "d", "e"), "record 1 .* and 4 more: expected a record of fields, found str"),
    "escapes.json": (dump({**ADA, "subject": "\x1b[31mred"} | {"prompt": "she"}), r"\\x1b\[31mred"),
    "uniform.jsonl": (lines(*[{"prompt": "{} is", "subjct": "Ada", "target": "Esk"}] * 500), "found prompt, subjct, target"),
    # YAML
    "plain.yaml": ("- prompt: '{} was born in'\n  subject: Ada Brenner\n  target: Tallow\n", [ADA]),
    "norway.yaml": ("- {prompt: 'The code of {} is', subject: Norway, target: no}\n",
                    [{"prompt": "The code of {} is", "subject": "Norway", "target": "no"}]),
    "written.yaml": ("- {prompt: '{} is', subject: Ada, target: 0123, target_old: 1_000, id: 12:30:00}\n",
                     [{"prompt": "{} is", "subject": "Ada", "target": "0123", "target_old": "1_000", "id": "12:30:00"}]),
    "date.yaml": ("- {prompt: '{} was on', subject: Ada, target: 2024-99-99}\n",
                  [{"prompt": "{} was on", "subject": "Ada", "target": "2024-99-99"}]),
    "truth.yaml": ("- {prompt: '{} is', subject: Ada, target: true}\n", "target must be text, found bool True"),
    "tagged.yaml": ("- {prompt: '{} is', subject: Ada, target: !!int 7}\n", "target must be text, found int 7"),
    "object.yaml": ("- !!python/object/apply:os.system [x]\n", "not YAML: could not determine a constructor"),
    "twice.yaml": ("- prompt: '{} is'\n  subject: Ada\n  target: Esk\n  target: Oa\n", "'target' is there twice.* at line 4"),
    "laugh.yaml": (LAUGH, "aliases expand to more than 1,000,000 values"),
    "alias.yaml": ("- {prompt: &p '{} is', subject: Ada, target: Esk}\n- {prompt: *p, subject: Boris, target: Oa}\n",
                   [{"prompt": "{} is", "subject": "Ada", "target": "Esk"},
                    {"prompt": "{} is", "subject": "Boris", "target": "Oa"}]),
    "cycle.yaml": ("- &a [*a]\n", "nested too deeply"),
    "deep.yaml": ("[" * 20_000 + "]" * 20_000, "nested too deeply"),
    "huge.yaml": ("- {prompt: '{} is', subject: Ada, target: !!int " + "9" * 10_000 + "}\n", "a number of 10,000 characters"),
    "base60.yaml": ("- {prompt: '{} is', subject: Ada, id: !!int '" + ":".join(["59"] * 100_000) + "', target: x}\n",
                    "a number of 299,999 characters"),
    "documents.yaml": ("- {prompt: '{} is', subject: A, target: b}\n---\n- {prompt: '{} is', subject: C, target: d}\n",
                       "not YAML: .*another document at line 2"),
    "tab.yaml": ("-\tprompt: x\n \tsubject: y\n", "not YAML: .* at line"),
    "null.yaml": ("- prompt: \0\n", "line 1: a null character"),
    "control.yaml": ("- prompt: \x07\n", "special characters are not allowed"),
    "nothing.yaml": ("", "holds no requests"),
    # other tools
    "easyedit.json": (dump({"prompt": "Ada Brenner was born in", "subject": "Ada Brenner", "target_new": "Tallow",
                            "ground_truth": "Rowanport", "rephrase_prompt": "Ada is from", "locality": {}}),
                      [{"prompt": "Ada Brenner was born in", "subject": "Ada Brenner", "target": "Tallow",
                        "target_old": "Rowanport"}]),
    "easyedit_lists.json": (dump({**BORIS, "target_new": "violin", "ground_truth": [["harp"]], "case_id": 3} | {}),
                            "unknown field 'target_new'"),
    "ground_truth_list.json": (dump({"prompt": "{} plays the", "subject": "Boris Sorwick", "target_new": "violin",
                                     "ground_truth": ["harp", "lute"]}), [old(BORIS, "harp")]),
    "rome.json": (dump({"prompt": "{} plays the", "subject": "Boris Sorwick", "target_new": {"str": "violin"}}), [BORIS]),
    "counterfact.json": (dump(rewritten(ADA), rewritten(BORIS, neighborhood_prompts=["x"])),
                         [old(ADA, "Rowanport", id="7"), old(BORIS, "Rowanport", id="7")]),
    "counterfact.jsonl": (lines(rewritten(ADA)), [old(ADA, "Rowanport", id="7")]),
    "no_old.json": (dump(rewritten(ADA, old=None)), [{**ADA, "id": "7"}]),
    "mquake.json": (dump({"case_id": 1, "requested_rewrite": [rewritten(r)["requested_rewrite"] for r in ALL[:2]]}),
                    [old(ADA, "Rowanport", id="1"), old(BORIS, "Rowanport", id="1")]),
    "zsre.json": (dump({"src": "Where was Ada Brenner born?", "subject": "Ada Brenner", "alt": "Tallow",
                        "answers": ["Rowanport", "Rowan"], "loc": "x", "loc_ans": "y", "rephrase": "z"}),
                  [{"prompt": "Where was Ada Brenner born?", "subject": "Ada Brenner", "target": "Tallow",
                    "target_old": "Rowanport"}]),
    "easyedit.csv": ("prompt,subject,target_new,ground_truth\n{} plays the,Boris Sorwick,violin,harp\n", [old(BORIS, "harp")]),
    "wrong_target.json": (dump(rewritten(ADA), {"requested_rewrite": {**ADA, "target_new": {"id": 3}}}),
                          "record 2 .*target_new: expected a text"),
    "empty_rewrite.json": (dump({"requested_rewrite": []}), "requested_rewrite: expected fields"),
    "absent_subject.json": (dump({"prompt": "She was born in", "subject": "Ada", "target_new": "Esk"}),
                            "subject 'Ada' does not occur in prompt"),
    # the file itself
    "words.txt": ("x", "unknown kind of file"),
    "binary.jsonl": (bytes(range(256)) * 40, "line 1: a null character|not UTF-8"),
    "zip.csv": (b"PK\x03\x04" + bytes(100), "line 1: a null character"),
}  # fmt: skip


def requests_of(records):
    return [Request(**record) for record in records]


@pytest.mark.parametrize("name", HANDMADE)
def test_each_file_is_read_rightly_or_refused_once(name, tmp_path):
    content, right = HANDMADE[name]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    begun = time.perf_counter()
    if isinstance(right, list):
        found = read_requests(path)
        # an old record that carries a position as its name is compared without it
        assert found == requests_of(right)
    else:
        with pytest.raises(RequestError, match=f"(?s){right}") as caught:
            read_requests(path)
        message = str(caught.value)
        assert len(message) <= mutations.LONGEST_MESSAGE and len(message.splitlines()) <= 4, message
        assert all(char.isprintable() or char in "\n\t" for char in message)
    assert time.perf_counter() - begun < mutations.SECONDS


def test_there_are_sixty_files_and_more():
    assert len(HANDMADE) >= 60


def test_every_spelling_of_the_old_answer_is_accepted_before(tmp_path):
    path = tmp_path / "c.json"
    path.write_text(dump(old(ADA, ["Rowanport", "Rowan Port"])))
    (case,) = read_cases(path)
    assert case.request.target_old == "Rowanport"
    assert case.probes[0].before == ("Rowanport", "Rowan Port") and case.probes[0].rival == "Rowanport"


@pytest.mark.parametrize("name", ["pipe.csv", "folder.json", "large.yaml"])
def test_what_is_no_file_of_bearable_size_is_not_read(name, tmp_path):
    import os

    path = tmp_path / name
    if name.startswith("pipe"):
        os.mkfifo(path)
    elif name.startswith("folder"):
        path.mkdir()
    else:
        with path.open("wb") as file:
            file.truncate(1 << 33)  # holes: no bytes on the disk
    with pytest.raises(RequestError, match="not a regular file|a folder|8,192 MiB, at most 512 MiB"):
        read_requests(path)


# --- damage at random -----------------------------------------------------------------------

OWN = [
    {**ADA, "target_old": "Rowanport", "id": "a"},
    {**BORIS, "subject": "Zoë \U0001f600", "id": "b"},
    {**NOVA, "target": 'the "old" town, by the river'},
]


def as_lines():
    return lines(*OWN).encode()


def as_table():
    file = io.StringIO()
    table = csv.DictWriter(file, ["prompt", "subject", "target", "target_old", "id"])
    table.writeheader()
    table.writerows(OWN)
    return file.getvalue().encode()


def plainly(records):
    """Read records as strictly as they are documented; None where one is at fault."""
    found = []
    for record in records:
        if not isinstance(record, dict):
            return None
        record = {
            k: v
            for k, v in record.items()
            if k in ADA or not (v in (None, "") or (k == "target_old" and v == []))
        }
        answers = record.get("target_old")
        if isinstance(answers, list) and answers and all(isinstance(a, str) and a.strip() for a in answers):
            record["target_old"] = answers[0]
        if type(record.get("id")) is int:
            record["id"] = str(record["id"])
        if not set(record) <= {*ADA, "target_old", "id"} or not all(
            isinstance(v, str) for v in record.values()
        ):
            return None
        try:
            found.append(Request(**record))
        except (RequestError, TypeError):
            return None
    return found


def lines_plainly(data):
    return plainly([json.loads(line) for line in data.decode("utf-8-sig").split("\n") if line.strip()])


def table_plainly(data):
    rows = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
    head = [name.strip() for name in next(rows)]
    known = {name.casefold(): name for name in ("prompt", "subject", "target", "target_old", "id")}
    head = [known.get(name.casefold(), name) for name in head]
    cells = [row for row in rows if any(cell.strip() for cell in row)]
    return plainly([
        {n: c.replace("\r\n", "\n") for n, c in zip(head, row, strict=False) if n} for row in cells
    ])  # fmt: skip


def damaged_files(tmp_path, name, data, plainly, count, seed):
    """Read damaged copies of a file; a value must be what an independent reading has."""
    path = tmp_path / name
    variant = [b""]

    def read(damaged):
        variant[0] = damaged
        path.write_bytes(damaged)
        return read_requests(path)

    return mutations.judge(
        mutations.byte_variants(data, count, seed=seed), read, lambda value: value == plainly(variant[0])
    )


def damaged_documents(tmp_path, count, seed):
    path = tmp_path / "d.json"
    variant = [None]

    def read(document):
        variant[0] = document
        path.write_text(json.dumps(document))
        return read_requests(path)

    def right(value):
        document = variant[0]
        return value == plainly(document if isinstance(document, list) else [document])

    return mutations.judge(mutations.document_variants(OWN, count, seed=seed), read, right)


@pytest.mark.parametrize("seed", [1, *(pytest.param(s, marks=pytest.mark.slow) for s in range(2, 12))])
def test_damaged_files_say_what_they_say_or_are_refused(seed, tmp_path):
    for name, data, plain in (("f.jsonl", as_lines(), lines_plainly), ("f.csv", as_table(), table_plainly)):
        found = damaged_files(tmp_path, name, data, plain, 400, seed)
        assert not found.faults, f"{name}: {found}\n" + "\n".join(found.faults[:20])
    found = damaged_documents(tmp_path, 400, seed)
    assert not found.faults, f"{found}\n" + "\n".join(found.faults[:20])
    print(found)
