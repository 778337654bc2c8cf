"""The ledger's store: appended events are there for good, and anything else that happened to them is noticed."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from errata.errors import LedgerError, StateChanged
from errata.ledger import blobs, folders
from errata.ledger.events import Event, read
from errata.ledger.settings import LedgerSettings
from errata.ledger.store import DATABASE, Ledger
from tests.units.ledger.small import MODEL, empty, facts, propose


def digest(number: int) -> str:
    return f"{number:016x}"


def test_what_was_appended_is_read_again(tmp_path):
    ledger = empty(tmp_path)
    propose(ledger, digest(1))
    ledger.append("applied", edit=digest(1), reason="why", source="https://example.org", author="Ada")
    again = folders.find(tmp_path)
    first, second, third = again.events()
    assert (first.kind, second.kind, third.kind) == ("created", "proposed", "applied")
    assert (third.reason, third.source, third.author) == ("why", "https://example.org", "Ada")
    assert third.previous == second.id and second.previous == first.id
    assert again.state().active == (digest(1),)
    assert again.state().model["fingerprint"] == MODEL["fingerprint"]


def test_reading_loads_no_torch(tmp_path):
    propose(empty(tmp_path), digest(1))
    code = (
        "import sys; from errata.cli.main import run; sys.argv = ['errata', 'log', '--json']\n"
        "try: run()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'heavy'"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [e["kind"] for e in json.loads(done.stdout)] == ["proposed", "created"]


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=50), st.text(max_size=50), st.dictionaries(st.text(max_size=5), st.text(max_size=9)))
def test_an_event_is_the_same_after_reading(reason, author, body):
    event = Event("exported", "2026-01-01T00:00:00+00:00", author, reason, body=body)
    assert read(1, event.id, event.previous, event.content()) == Event(
        "exported", "2026-01-01T00:00:00+00:00", author, reason, body=body, number=1
    )


@pytest.mark.parametrize("text", ["\x1b[31mred", "a\0b", "\ud800", "\u202egnp"], ids=ascii)
def test_texts_that_control_a_terminal_are_escaped(tmp_path, text):
    event = empty(tmp_path).append("tagged", body={"name": "v1", "number": 1}, reason=text, author=text)
    assert event.reason.isprintable() and event.author.isprintable()
    assert folders.find(tmp_path).events()[-1] == event


CHANGES = {
    "a reason": ("UPDATE events SET content = replace(content, 'why', 'not') WHERE number = 3", "event 3"),
    "a hash": (
        "UPDATE events SET id = replace(id, substr(id, 1, 8), '00000000') WHERE number = 2",
        "event 2",
    ),
    "an event gone": ("DELETE FROM events WHERE number = 2", "event 2"),
    "the first gone": ("DELETE FROM events WHERE number = 1", "event 1"),
    "two exchanged": ("UPDATE events SET number = number + 10 WHERE number = 2", "event 2"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_history_is_refused(tmp_path, change):
    ledger = empty(tmp_path)
    propose(ledger, digest(1))
    ledger.append("applied", edit=digest(1), reason="why")
    propose(ledger, digest(2))
    ledger.close()
    command, named = CHANGES[change]
    with sqlite3.connect(ledger.folder / DATABASE) as connection:
        connection.execute(command)
    with pytest.raises(LedgerError, match=named):
        folders.find(tmp_path).events()


def test_an_open_ledger_notices_a_changed_history(tmp_path):
    ledger = empty(tmp_path)
    propose(ledger, digest(1))
    with sqlite3.connect(ledger.folder / DATABASE) as connection:
        connection.execute("DELETE FROM events WHERE number = 2")
    with pytest.raises(LedgerError, match="event 2"):
        propose(ledger, digest(2))


def test_what_cannot_follow_is_not_recorded(tmp_path):
    ledger = empty(tmp_path)
    propose(ledger, digest(1))
    for kind, more in {
        "applied": {"edit": digest(2)}, "reverted": {"edit": digest(1)}, "created": {"body": MODEL},
        "verified": {"edit": digest(3)}, "reset": {"body": {"active": [digest(4)]}},
    }.items():  # fmt: skip
        with pytest.raises(LedgerError):
            ledger.append(kind, **more)
    assert len(ledger.events()) == 2
    ledger.append("applied", edit=digest(1))
    with pytest.raises(LedgerError, match="in place already"):
        ledger.append("applied", edit=digest(1))
    assert len(folders.find(tmp_path).events()) == 3


def test_a_state_that_moved_on_is_noticed(tmp_path):
    ledger, other = empty(tmp_path), folders.find(tmp_path)
    propose(ledger, digest(1))
    propose(ledger, digest(2))
    seen = ledger.state().active
    other.append("applied", edit=digest(1))
    with pytest.raises(StateChanged):
        ledger.append("applied", edit=digest(2), expected=seen)
    ledger.append("applied", edit=digest(2), expected=ledger.state().active)
    assert other.state().active == (digest(1), digest(2))


def test_a_second_ledger_in_a_folder_is_refused(tmp_path):
    empty(tmp_path)
    with pytest.raises(LedgerError, match="exists already"):
        folders.create(tmp_path, LedgerSettings(), MODEL)


def test_a_folder_below_finds_the_ledger(tmp_path, monkeypatch):
    empty(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    assert folders.find().folder == tmp_path / ".errata"
    with pytest.raises(LedgerError, match="no ledger"):
        folders.find(tmp_path / "a")  # a folder that is named is meant itself


def test_settings_are_read_as_they_were_written(tmp_path):
    ledger = empty(tmp_path)
    assert ledger.settings == LedgerSettings(model="none")


# --- files ----------------------------------------------------------------------------------


def test_a_file_is_kept_once_under_its_hash(tmp_path):
    source = tmp_path / "one"
    source.write_bytes(b"content")
    name = blobs.add(tmp_path, source)
    assert blobs.add(tmp_path, source) == name
    assert blobs.check(tmp_path, name).read_bytes() == b"content"
    assert blobs.check(tmp_path, name).stat().st_mode & 0o777 == source.stat().st_mode & 0o777


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "a" * 63, "A" * 64, "0" * 64 + "/x", ""])
def test_a_name_that_leads_elsewhere_is_refused(tmp_path, name):
    with pytest.raises(LedgerError, match="no SHA-256"):
        blobs.path(tmp_path, name)


def test_a_changed_file_is_refused(tmp_path):
    source = tmp_path / "one"
    source.write_bytes(b"content")
    name = blobs.add(tmp_path, source)
    blobs.path(tmp_path, name).write_bytes(b"Content")
    with pytest.raises(LedgerError, match="was changed"):
        blobs.check(tmp_path, name)
    blobs.path(tmp_path, name).unlink()
    with pytest.raises(LedgerError, match="is missing"):
        blobs.check(tmp_path, name)


def test_what_a_killed_process_left_is_removed(tmp_path):
    ledger = empty(tmp_path)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    stale = ledger.edits_folder / f"{dead.pid}.x.part"
    fresh = ledger.edits_folder / f"{os.getpid()}.x.part"
    stale.write_bytes(b"half")
    fresh.write_bytes(b"half")
    folders.find(tmp_path)
    assert not stale.exists() and fresh.exists()


# --- several processes ----------------------------------------------------------------------

WRITER = """
import json, sys
from pathlib import Path
from errata.ledger.store import Ledger
ledger, name, count, facts = Ledger(Path(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
for i in range(count):
    digest = f"{name:04x}{i:012x}"
    ledger.append("proposed", edit=digest, body=facts)
    ledger.append("applied", edit=digest)
    print(digest, flush=True)
"""
"""Writes events, and the digest of each edit once it is recorded; starts without torch."""


def writer(ledger: Ledger, name: int, count: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(ledger.folder), str(name), str(count), json.dumps(facts())],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3] / "src")},
    )  # fmt: skip


def test_writers_side_by_side_lose_nothing(tmp_path):
    ledger = empty(tmp_path)
    writers = [writer(ledger, name, 25) for name in range(3)]
    outputs = [one.communicate(timeout=120) for one in writers]
    assert [one.returncode for one in writers] == [0, 0, 0], outputs
    acknowledged = {line for out, _ in outputs for line in out.split()}
    assert len(acknowledged) == 75
    assert set(ledger.state().active) == acknowledged
    assert len(ledger.events()) == 1 + 2 * 75


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="kill -9 is a signal of POSIX")
def test_what_was_acknowledged_survives_kill_9(tmp_path):
    ledger = empty(tmp_path)
    acknowledged: set[str] = set()
    for turn in range(6):
        one = writer(ledger, turn, 10_000)
        other = writer(ledger, 100 + turn, 10_000)
        assert one.stdout is not None and other.stdout is not None
        one.stdout.readline()
        time.sleep(0.05 * turn)
        for process in (one, other):
            process.kill()
            process.wait()
        acknowledged |= {line for p in (one, other) for line in p.stdout.read().split() if len(line) == 16}
    again = folders.find(tmp_path)
    assert acknowledged and acknowledged <= set(again.state().active)
    assert sqlite3.connect(again.folder / DATABASE).execute("PRAGMA integrity_check").fetchone() == ("ok",)
    propose(again, "f" * 16)
