"""Who may do what, and how much: tokens, addresses, other sites' pages, sizes, times, slow clients."""

from __future__ import annotations

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import errata
from errata.errors import ConfigError
from errata.serve.engine import Engine
from errata.serve.server import Served, served_name
from errata.serve.settings import ServerSettings
from errata.serve.tokens import READ, WRITE, Tokens, digest
from tests.units.serve.served import new_ledger, running, with_ledger

READER, WRITER = "reader-0123456789", "writer-0123456789"
TOKENS = Tokens((digest(READER),), (digest(WRITER),))


@pytest.fixture(scope="module")
def guarded(lab_host, tmp_path_factory):
    served = with_ledger(lab_host, new_ledger(tmp_path_factory.mktemp("ledger"), lab_host))
    settings = ServerSettings(
        port=0, tokens=TOKENS, most_body=20_000, most_tokens=400, most_rows=2, most_waiting=2, timeout=1.5,
        read_timeout=0.5,
    )  # fmt: skip
    with running(served, settings, token=READER) as client:
        yield client


@pytest.fixture
def slow_steps(monkeypatch):
    """Have every step of the engine take a while, however fast the machine is."""
    advance = Engine._advance

    def slowly(*args):
        time.sleep(0.02)
        advance(*args)

    monkeypatch.setattr(Engine, "_advance", slowly)


def bearer(token: str | None) -> dict[str, str]:
    return {"authorization": "" if token is None else f"Bearer {token}"}


@pytest.mark.parametrize("token", [None, "x", READER[:-1], READER + "x", "ünicode", f" {WRITER[:-1]}"])
def test_without_a_right_token_nothing_is_answered(guarded, token):
    headers = [(b"authorization", b"" if token is None else f"Bearer {token}".encode())]
    for method, path in [
        ("GET", "/v1/models"), ("GET", "/v1/edits"), ("GET", "/metrics"), ("GET", "/openapi.json"), ("GET", "/v1/log"),
        ("POST", "/v1/completions"), ("POST", "/v1/edits"), ("POST", "/v1/edits/x/revert"), ("GET", "/nothing"),
    ]:  # fmt: skip
        answer = guarded.http.build_request(method, path, headers=headers, json={})
        answer.headers["authorization"] = answer.headers["authorization"]
        got = guarded.http.send(answer)
        assert got.status_code == 401 and got.json()["error"]["type"] == "authentication_error", (
            method,
            path,
        )
    assert guarded.http.get("/health", headers=bearer(None)).status_code == 200


def test_a_reader_may_not_write_and_a_writer_may_read(guarded):
    body = {"model": "lab", "prompt": "x", "max_tokens": 1}
    for token in (READER, WRITER):
        assert guarded.post("/v1/completions", body, headers=bearer(token)).status_code == 200
    for path in (
        "/v1/edits",
        "/v1/edits/abcd/apply",
        "/v1/edits/abcd/revert",
        "/v1/edits/abcd/verify",
        "/any",
    ):
        answer = guarded.post(path, {}, headers=bearer(READER))
        assert answer.status_code == 403 and answer.json()["error"]["code"] == "read_only", path
    assert guarded.http.delete("/v1/edits", headers=bearer(READER)).status_code == 403
    assert guarded.post("/v1/edits/abcd/revert", {}, headers=bearer(WRITER)).status_code == 404
    assert [event["kind"] for event in guarded.get("/v1/log").json()["data"]] == ["created"]


def test_bodies_are_bounded_in_size_and_form(guarded):
    url = "/v1/completions"
    assert guarded.post(url, {"model": "lab", "prompt": "x" * 30_000}).status_code == 413
    kind = {"content-type": "application/json"}
    chunked = guarded.http.post(url, content=(b"x" * 1000 for _ in range(100)), headers=kind)
    assert chunked.status_code == 413
    assert guarded.http.post(url, content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
    for content in (
        b"",
        b"{",
        b"[" * 15_000,
        b"\xff\xfe",
        b'{"model": NaN}',
        b"1" * 9000,
        b'{"model": "\\ud800"}',
    ):
        answer = guarded.http.post(url, content=content, headers=kind)
        assert answer.status_code == 400 and answer.json()["error"]["message"], content[:20]


def test_too_many_at_once_are_refused_at_once(guarded, slow_steps):
    def ask(_):
        return guarded.post("/v1/completions", {"model": "lab", "prompt": "The", "max_tokens": 10})

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, range(12)))
    codes = {answer.status_code for answer in answers}
    assert 429 in codes and codes - {429} and codes <= {200, 429, 504}
    assert all("retry-after" in answer.headers for answer in answers if answer.status_code == 429)
    many = guarded.post("/v1/completions", {"model": "lab", "prompt": ["x"] * 5, "max_tokens": 1})
    assert many.status_code == 429


def test_an_answer_that_takes_too_long_is_given_up(guarded, slow_steps):
    body = {"model": "lab", "prompt": ["The", "And"], "max_tokens": 400}
    whole = guarded.post("/v1/completions", body)
    assert whole.status_code == 504 and whole.json()["error"]["type"] == "timeout_error"
    with guarded.http.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream:
        lines = [line for line in stream.iter_lines() if line]
    assert len(lines) > 2 and json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "timeout"
    assert _rows(guarded) == 0


def test_a_client_that_leaves_frees_its_place(guarded, slow_steps):
    body = {"model": "lab", "prompt": "The", "max_tokens": 400, "stream": True}
    for _ in range(6):  # more than there is room for
        with guarded.http.stream("POST", "/v1/completions", json=body) as stream:
            next(stream.iter_lines())
        deadline = time.monotonic() + 5
        while _rows(guarded) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert _rows(guarded) == 0


def _rows(client) -> int:
    text = client.get("/metrics").text
    return int(float(text.partition("\nerrata_rows ")[2].split()[0]))


def _raw(client) -> socket.socket:
    host, port = client.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def test_heads_and_bodies_that_never_end_are_given_up(guarded):
    with _raw(guarded) as slow:
        slow.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
        begin = time.monotonic()
        for _ in range(40):  # a byte now and then does not help
            try:
                slow.sendall(b"a")
            except OSError:
                break
            time.sleep(0.05)
        assert slow.recv(100) == b"" or time.monotonic() - begin < 5
    with _raw(guarded) as slow:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {READER}\r\n"
            "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        )
        slow.sendall(head.encode())
        assert slow.recv(1000).startswith(b"HTTP/1.1 408")
    assert guarded.get("/health").status_code == 200


def test_pages_of_other_sites_cannot_use_a_server_without_tokens(lab_host):
    with running(Served(lab_host, "lab"), ServerSettings(port=0)) as client:
        body = {"model": "lab", "prompt": "x", "max_tokens": 1}
        assert client.post("/v1/completions", body).status_code == 200
        assert client.post("/v1/completions", body, headers={"origin": client.url}).status_code == 200
        for headers, code in [
            ({"origin": "https://evil.example"}, "foreign_origin"), ({"origin": "null"}, "foreign_origin"),
            ({"host": "evil.example"}, "unknown_host"), ({"host": "127.0.0.1.evil.example:80"}, "unknown_host"),
        ]:  # fmt: skip
            answer = client.post("/v1/completions", body, headers=headers)
            assert answer.status_code == 403 and answer.json()["error"]["code"] == code
        answer = client.http.options("/v1/completions", headers={"origin": client.url})
        assert not any(name.startswith("access-control") for name in answer.headers)


def test_an_unforeseen_error_shows_an_id_and_no_trace(lab_host, monkeypatch, caplog):
    with running(Served(lab_host, "lab"), ServerSettings(port=0)) as client:
        monkeypatch.setattr(client.server.desk, "catalogue", None)  # any request about names breaks now
        answer = client.get("/v1/models")
        monkeypatch.undo()
        message = answer.json()["error"]["message"]
        number = message.split()[2].rstrip(";")
        assert (
            answer.status_code == 500
            and message.startswith("internal error")
            and "Traceback" not in answer.text
        )
        assert number in caplog.text and "AttributeError" in caplog.text
        assert "AttributeError" not in answer.text and ".py" not in answer.text


def test_a_step_that_fails_costs_its_rows_and_not_the_server(lab_host, monkeypatch):
    with running(Served(lab_host, "lab"), ServerSettings(port=0)) as client:
        with monkeypatch.context() as patch:
            patch.setattr("errata.host.decoding.run_prefixes", lambda *_: 1 / 0)
            answer = client.post("/v1/completions", {"model": "lab", "prompt": "x", "max_tokens": 2})
        assert answer.status_code == 500 and "ZeroDivision" not in answer.text
        assert client.complete("lab", "Ada Brenner was born in").startswith(" Rowanport")


def test_addresses_that_others_reach_need_tokens(monkeypatch, tmp_path):
    for address in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        with pytest.raises(ConfigError, match="needs tokens"):
            ServerSettings(address)
        assert ServerSettings(address, tokens=TOKENS).host == address
    for address in ("127.0.0.1", "::1", "localhost", "127.8.8.8"):
        ServerSettings(address)
    monkeypatch.setenv(READ, READER)
    monkeypatch.delenv(WRITE, raising=False)
    only_read = Tokens.collect()
    assert only_read.may_read(READER) and not only_read.may_write(READER) and not only_read.may_read(None)
    file = tmp_path / "tokens"
    file.write_text(f"{WRITER}\n\nsecond-0123456789\n")
    both = Tokens.collect(write_file=file)
    assert both.may_write("second-0123456789") and both.may_read(WRITER) and not both.may_write(READER)
    for text in ("", "short\n", "with a space in it\n"):
        file.write_text(text)
        with pytest.raises(ConfigError):
            Tokens.collect(write_file=file)


def test_a_folders_name_is_served_and_not_its_path(tmp_path):
    (tmp_path / "mine").mkdir()
    assert served_name(str(tmp_path / "mine")) == "mine" and served_name("org/model") == "org/model"
    assert errata.__name__ not in served_name("lab")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"model": "lab", "prompt": "a\ud800b"}),
        ("/v1/completions", {"model": "lab", "prompt": ["Ada", "\udcff"]}),
        ("/v1/completions", {"model": "\ud800", "prompt": "Ada"}),
        ("/v1/completions", {"model": "lab", "prompt": "Ada", "stop": "\ud800"}),
        ("/v1/completions", {"model": "lab", "prompt": "Ada", "edits": ["\ud800"]}),
        ("/v1/completions", {"model": "lab", "prompt": "Ada", "\ud800": 1}),
        ("/v1/chat/completions", {"model": "lab", "messages": [{"role": "user", "content": "\udfff"}]}),
    ],
)
def test_half_a_surrogate_pair_is_a_bad_request(guarded, path, body):
    answer = guarded.http.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
