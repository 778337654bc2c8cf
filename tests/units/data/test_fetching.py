"""Fetching a dataset's file: locks, pinned commits, damage, and what is said without network."""

from __future__ import annotations

import hashlib
import json
import threading
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from errata.data import fetching, reading
from errata.data._base import Dataset
from errata.data.reading import read
from errata.data.sets import REGISTRY
from errata.errors import DataError

FOLDER = Path(__file__).parents[2] / "fixtures" / "data"
FLAT = FOLDER / "counterfact-edit.json"


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("ERRATA_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


@contextmanager
def serving(handler):
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format, *args):
        """Keep the tests' output clean."""


def at(address: str | None = None, hub: str | None = None) -> Dataset:
    entry = REGISTRY.get("counterfact_edit")
    return replace(entry, urls={"": address} if address else {}, hub=hub)


def test_a_fetched_file_is_locked_and_a_changed_one_refused(folder, monkeypatch):
    with serving(partial(Quiet, directory=str(FOLDER))) as host:
        entry = at(f"{host}/counterfact-edit.json")
        ticks: list[tuple[str, int, int]] = []
        path = fetching.fetch_file(entry, "", tick=lambda *tick: ticks.append(tick))
    assert path == folder / "counterfact-edit.json" and path.read_bytes() == FLAT.read_bytes()
    assert ticks[-1] == ("fetch", FLAT.stat().st_size, FLAT.stat().st_size)
    lock = json.loads((folder / "counterfact-edit.json.lock.json").read_text())
    assert lock == {
        "source": f"{host}/counterfact-edit.json", "commit": None,
        "sha256": hashlib.sha256(FLAT.read_bytes()).hexdigest(), "bytes": FLAT.stat().st_size,
    }  # fmt: skip
    assert sorted(p.name for p in folder.iterdir()) == [
        "counterfact-edit.json",
        "counterfact-edit.json.lock.json",
    ]
    assert read("counterfact_edit").check.cases == 20
    assert fetching.fetch_file(entry, "") == path  # there already: the server is gone, and not asked
    path.write_bytes(path.read_bytes().replace(b"Arvella", b"Brvella", 1))
    for source in ("counterfact_edit", path):
        with pytest.raises(DataError, match="is not the file that was fetched"):
            read(source)


def test_a_damaged_file_is_fetched_anew_but_another_one_is_refused(folder, tmp_path):
    served = written(tmp_path / "served.json", FLAT.read_text(encoding="utf-8"))
    entry = at(served.as_uri())
    path = fetching.fetch_file(entry, "")
    path.write_bytes(b"spoilt")
    assert fetching.fetch_file(entry, "").read_bytes() == FLAT.read_bytes()
    path.unlink()
    served.write_bytes(FLAT.read_bytes() + b" ")
    with pytest.raises(DataError, match="has changed since the first download"):
        fetching.fetch_file(entry, "")
    assert not path.exists()


def test_a_file_put_there_by_hand_is_not_overwritten(folder, tmp_path):
    folder.mkdir()
    own = written(folder / "counterfact-edit.json", "mine")
    with pytest.raises(DataError, match="exists already, without a lock"):
        fetching.fetch_file(at(FLAT.as_uri()), "")
    assert own.read_text() == "mine"


def test_without_network_it_is_said_what_to_do(folder):
    entry = at("http://127.0.0.1:9/counterfact-edit.json")
    with pytest.raises(
        DataError, match="cannot be fetched: .*without network, copy the file into the data folder"
    ):
        fetching.fetch_file(entry, "")
    with pytest.raises(DataError, match="cannot be downloaded; get it from .*put it at"):
        fetching.fetch_file(at(), "")
    with pytest.raises(DataError, match="which has no revisions"):
        fetching.fetch_file(entry, "", revision="abc")
    assert not list(folder.iterdir())


def test_a_data_folder_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setenv("ERRATA_DATA", str(written(tmp_path / "file", "")))
    with pytest.raises(DataError, match="cannot write .*set ERRATA_DATA"):
        fetching.fetch_file(at(FLAT.as_uri()), "")


def test_a_download_that_stops_is_no_file(folder):
    class Short(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"x" * 10)

        def log_message(self, format, *args):
            """Keep the tests' output clean."""

    with serving(Short) as host, pytest.raises(DataError, match="stopped after 10 of 1000|cannot be fetched"):
        fetching.fetch_file(at(f"{host}/counterfact-edit.json"), "")
    assert not list(folder.iterdir())


class Hub(BaseHTTPRequestHandler):
    """The little of the hub's protocol that one file needs: two commits of one data set."""

    commits: ClassVar = {"main": "b" * 40, "b" * 40: "b" * 40, "a" * 40: "a" * 40}

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0]
        if path.startswith("/api/datasets/own/set"):
            revision = path.partition("/revision/")[2] or "main"
            if revision not in self.commits:
                return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return self.answer(200, json.dumps({"id": "own/set", "sha": self.commits[revision]}).encode(), {})
        commit = path.split("/")[5]
        body = json.dumps([{"note": commit}]).encode()
        tag = hashlib.sha256(body).hexdigest()
        self.answer(200, body, {"ETag": f'"{tag}"', "X-Repo-Commit": commit})

    def answer(self, status: int, body: bytes, headers: dict[str, str]):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body)), "Accept-Ranges": "bytes"}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format, *args):
        """Keep the tests' output clean."""


def test_the_hubs_commit_is_pinned_at_the_first_fetch(folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    entry = at(hub="own/set:data/rows.json")
    with serving(Hub) as host:
        path = fetching.fetch_file(entry, "", endpoint=host)
        lock = fetching.read_lock(path)
        assert lock is not None and (lock.source, lock.commit) == ("own/set:data/rows.json", "b" * 40)
        assert json.loads(path.read_text())[0]["note"] == "b" * 40
        other = fetching.fetch_file(entry, "", revision="a" * 40, endpoint=host)
        assert json.loads(other.read_text())[0]["note"] == "a" * 40
        # from now on without revision: the lock's commit, not the newest
        path.unlink()
        fetching.fetch_file(entry, "", endpoint=host)
        assert json.loads(path.read_text())[0]["note"] == "a" * 40
        with pytest.raises(DataError, match="at revision nowhere cannot be fetched from the hub"):
            fetching.fetch_file(entry, "", revision="nowhere", endpoint=host)
    path.unlink()
    with pytest.raises(DataError, match="cannot be fetched from the hub: .*without network"):
        fetching.fetch_file(entry, "", endpoint="http://127.0.0.1:9")


def test_fetch_by_name_takes_the_files_of_all_variants(folder, monkeypatch):
    entry = REGISTRY.get("counterfact")
    local = replace(entry, urls={"": (FOLDER / "counterfact.json").as_uri(), "multi": FLAT.as_uri()})
    monkeypatch.setattr(reading, "dataset", lambda name: local)
    assert [path.name for path in reading.fetch("counterfact")] == [
        "counterfact.json",
        "multi_counterfact.json",
    ]
    assert [path.name for path in reading.fetch("counterfact/multi")] == ["multi_counterfact.json"]


def test_a_lock_that_cannot_be_read(tmp_path):
    path = written(tmp_path / "rows.json", json.dumps([{"prompt": "x"}]))
    written(tmp_path / "rows.json.lock.json", '{"source": 1}')
    with pytest.raises(DataError, match="is not a lock file of a dataset"):
        read(path)
