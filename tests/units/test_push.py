"""Pushes: what was exported arrives, whole and under its name; a changed folder, a refusing server are refused."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from typer.testing import CliRunner

import errata
from errata.cli.main import app
from errata.edits.export._card import card
from errata.edits.pushing import push_to_hub, push_to_vllm, read_export, remove_from_vllm, served
from errata.errors import EditError
from tests.exports import ADA
from tests.models import fresh

KEY = "a-key-of-the-server"


class Server(BaseHTTPRequestHandler):
    """The part of vLLM's server that loads adapters, by its protocol."""

    loaded: dict[str, str]
    updating = True

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, code: int, text: str) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())

    def do_GET(self) -> None:
        names = ["base", *self.loaded]
        self.answer(200, json.dumps({"object": "list", "data": [{"id": name} for name in names]}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers.get("Authorization") != f"Bearer {KEY}":
            return self.answer(401, '{"error": "Unauthorized"}')
        if not self.updating:
            return self.answer(404, '{"detail": "Not Found"}')
        name = body["lora_name"]
        if self.path == "/v1/unload_lora_adapter":
            known = self.loaded.pop(name, None) is not None
            return self.answer(200 if known else 404, "Success" if known else "no such adapter")
        if not (Path(body["lora_path"]) / "adapter_config.json").is_file():
            return self.answer(400, '{"message": "No adapter found"}')
        self.loaded[name] = body["lora_path"]
        return self.answer(200, f"Success: LoRA adapter '{name}' added successfully.")


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    handler = type("Own", (Server,), {"loaded": {}})
    running = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield SimpleNamespace(url=f"http://127.0.0.1:{running.server_port}", handler=handler)
    running.shutdown()
    running.server_close()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Exports of one edit, to vllm and to peft, and the edit's digest."""
    host, folder = fresh("llama"), tmp_path_factory.mktemp("exports")
    edit = errata.edit(host, ADA, method="rome", steps=3, layers=[1], prefixes=["The old road. "])
    for to in ("vllm", "peft"):
        errata.export(edit, folder / to, to=to, host=host)
    return folder, edit.digest


@pytest.mark.parametrize("ending", ["", "/", "/v1"])
def test_a_server_gets_the_adapter_under_the_name_of_its_content(made, server, ending):
    folder, digest = made
    pushed = push_to_vllm(folder / "vllm", server.url + ending)
    adapter = next(path for path in (folder / "vllm").iterdir() if path.is_dir())
    assert server.handler.loaded == {adapter.name: str(adapter.resolve())}
    assert (
        pushed.name == adapter.name
        and pushed.digest == digest
        and pushed.facts["models"] == ["base", adapter.name]
    )
    assert remove_from_vllm(server.url, adapter.name) == ["base"] and served(server.url) == ["base"]


def test_a_name_and_a_path_of_the_server_s_own(made, server):
    adapter = next(path for path in (made[0] / "vllm").iterdir() if path.is_dir())
    push_to_vllm(made[0] / "vllm", server.url, name="fixed", path=str(adapter))
    assert server.handler.loaded == {"fixed": str(adapter)}
    with pytest.raises(EditError, match=r"answered 400: .*No adapter found"):
        push_to_vllm(made[0] / "vllm", server.url, path="/nowhere")


def test_what_a_server_refuses_is_said(made, server, monkeypatch):
    with pytest.raises(EditError, match="answered 404: no such adapter"):
        remove_from_vllm(server.url, "unknown")
    server.handler.updating = False
    with pytest.raises(EditError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"):
        push_to_vllm(made[0] / "vllm", server.url)
    monkeypatch.delenv("VLLM_API_KEY")
    with pytest.raises(EditError, match="answered 401"):
        push_to_vllm(made[0] / "vllm", server.url)
    with pytest.raises(EditError, match="cannot be reached"):
        push_to_vllm(made[0] / "vllm", "http://127.0.0.1:9")


def test_a_server_that_does_not_list_what_it_acknowledged(made, server, monkeypatch):
    monkeypatch.setattr(server.handler, "do_GET", lambda self: self.answer(200, '{"data": []}'))
    with pytest.raises(EditError, match="does not list it"):
        push_to_vllm(made[0] / "vllm", server.url)
    monkeypatch.setattr(server.handler, "do_GET", lambda self: self.answer(200, "<html>"))
    with pytest.raises(EditError, match="lists no models"):
        served(server.url)
    monkeypatch.setattr(server.handler, "do_GET", lambda self: self.answer(200, '{"data": 3}'))
    with pytest.raises(EditError, match="lists no models"):
        served(server.url)


@pytest.mark.parametrize(
    "url", ["localhost:8000", "file:///etc/passwd", "ftp://x", "", "http://", "http://x/?a=b"]
)
def test_only_addresses_of_http(made, url):
    with pytest.raises(EditError, match="expected an address"):
        push_to_vllm(made[0] / "vllm", url)


def test_another_kind_of_export_is_refused(made, server):
    with pytest.raises(EditError, match="export to peft; a vLLM server takes one made with --to vllm"):
        push_to_vllm(made[0] / "peft", server.url)
    assert server.handler.loaded == {}


def damage(folder: Path, how: str) -> None:
    if how == "changed":
        path = folder / "adapter_config.json"
        path.write_text(path.read_text().replace('"lora_alpha": ', '"lora_alpha": 1'))
    elif how == "missing":
        (folder / "adapter_config.json").unlink()
    elif how == "added":
        (folder / "pytorch_model.bin").write_bytes(b"")
    elif how == "linked":
        path = folder / "adapter_config.json"
        path.rename(folder.parent / "elsewhere.json")
        path.symlink_to(folder.parent / "elsewhere.json")
    elif how == "record":
        (folder / "errata-export.json").write_text("[]")
    else:
        (folder / "errata-export.json").unlink()


@pytest.mark.parametrize("how", ["changed", "missing", "added", "linked", "record", "no record"])
def test_a_folder_that_was_changed_is_not_sent(made, tmp_path, how):
    import shutil

    shutil.copytree(made[0] / "peft", tmp_path / "copy")
    assert read_export(tmp_path / "copy").digest == made[1]
    damage(tmp_path / "copy", how)
    sent: list[object] = []
    with pytest.raises(EditError):
        push_to_hub(
            tmp_path / "copy", "me/fixed", api=SimpleNamespace(create_repo=lambda *a, **k: sent.append(a))
        )
    assert sent == []


class Hub:
    """What is asked of the Hub."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict]] = []
        self.files: dict[str, bytes] = {}

    def create_repo(self, name: str, **options: object) -> str:
        self.asked.append((name, options))
        return f"https://hub.example/{name}"

    def create_commit(self, name: str, *, operations: list, commit_message: str) -> SimpleNamespace:
        for one in operations:
            with one.as_file() as file:
                self.files[one.path_in_repo] = file.read()
        self.message = commit_message
        return SimpleNamespace(oid="c0ffee")


def test_the_hub_gets_all_files_with_a_card(made):
    hub = Hub()
    pushed = push_to_hub(made[0] / "peft", "me/fixed", message="register corrected", api=hub)
    assert hub.asked == [("me/fixed", {"private": True, "exist_ok": True})]
    for path in (made[0] / "peft").iterdir():
        assert hub.files[path.name] == path.read_bytes()
    text = hub.files["README.md"].decode()
    assert 'library_name: "peft"' in text and made[1] in text and "method: rome" in text
    assert hub.message == "register corrected" and pushed.facts == {
        "revision": "c0ffee",
        "files": len(hub.files),
    }
    push_to_hub(made[0] / "peft", "me/fixed", public=True, api=hub)
    assert hub.asked[-1][1]["private"] is False


def test_a_card_names_a_base_model_of_the_hub_and_no_path(made):
    exported = read_export(made[0] / "peft")
    for name, shown in (("meta/llama-8b", True), ("/home/me/models/llama", False), ("lab", False)):
        record = {**exported.record, "base_model": name}
        head = yaml.safe_load(card(record).split("---")[1])
        assert head["tags"] and head.get("base_model_relation") == ("adapter" if shown else None)
        assert (name in card(record)) == shown


def test_the_hub_s_refusal_is_one_error(made):
    with pytest.raises(EditError, match="cannot push to me/fixed"):  # the tests run without network
        push_to_hub(made[0] / "peft", "me/fixed")
    with pytest.raises(EditError, match="cannot push to a/b/c"):
        push_to_hub(made[0] / "peft", "a/b/c")


def test_the_verbs(made, server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    shown = runner.invoke(
        app, ["push", "vllm", str(made[0] / "vllm"), "--url", server.url, "--name", "fixed"]
    )
    assert shown.exit_code == 0 and f"edit {made[1]} is at {server.url} as fixed" in shown.output
    left = runner.invoke(
        app, ["push", "remove", "fixed", "--url", server.url, "--json"], catch_exceptions=False
    )
    assert json.loads(left.output) == {"removed": "fixed", "models": ["base"]}
    with pytest.raises(EditError):
        runner.invoke(app, ["push", "hub", str(made[0]), "me/fixed"], catch_exceptions=False)


def test_a_push_is_recorded_where_the_edit_was_exported(made, server, tmp_path, monkeypatch):
    from errata.ledger import folders
    from errata.ledger.settings import LedgerSettings

    monkeypatch.chdir(tmp_path)
    model = {"name": "none", "fingerprint": "f" * 16, "weights": "0" * 64, "dtype": "float32"}
    ledger = folders.create(tmp_path, LedgerSettings(model="none"), model)
    words = ["push", "vllm", str(made[0] / "vllm"), "--url", server.url, "-m", "shipped", "--json"]
    first = json.loads(CliRunner().invoke(app, words, catch_exceptions=False).output)
    assert first["event"] is None  # this ledger did not export it
    ledger.append("exported", body={"to": "vllm", "edits": [], "folder": "adapter", "digest": made[1]})
    second = json.loads(CliRunner().invoke(app, words, catch_exceptions=False).output)
    event = ledger.events()[-1]
    assert (event.number, event.kind, event.reason) == (second["event"], "exported", "shipped")
    assert event.body["to"] == f"vllm {server.url}" and event.body["digest"] == made[1]
