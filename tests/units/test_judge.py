"""The judge against a local server that speaks the protocol, well and badly."""

from __future__ import annotations

import json
import sqlite3
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from errata.errors import ConfigError, DataError
from errata.evaluation import score
from errata.evaluation.judge import Agreement, JudgeSettings, Reply, agreement, judge, question
from errata.types import Row


@dataclass
class Server:
    """A server whose answers a test chooses: status, headers and body for each call."""

    url: str = ""
    answer: Callable[[str, int], Any] = lambda asked, call: "CORRECT"
    """Given the question and how many calls came before: a text to reply, (status, headers, body), or seconds."""
    asked: list[str] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    most: int = 0
    """Most calls under way at once."""
    now: int = 0
    lock: Any = field(default_factory=threading.Lock)


def completion(text: Any) -> bytes:
    return json.dumps(
        {"model": "toy-2", "system_fingerprint": "fp1", "choices": [{"message": {"content": text}}]}
    ).encode()


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = body["messages"][0]["content"]
            with state.lock:
                call = len(state.asked)
                state.asked.append(text)
                state.bodies.append(body)
                state.keys.append(self.headers.get("Authorization"))
                state.headers.append(dict(self.headers))
                state.now += 1
                state.most = max(state.most, state.now)
            found = state.answer(text, call)
            if isinstance(found, float):
                time.sleep(found)
                found = "CORRECT"
            status, headers, document = (200, {}, completion(found)) if isinstance(found, str) else found
            with state.lock:
                state.now -= 1
            try:
                self.send_response(status if self.path == "/v1/chat/completions" else 404)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(document)
            except (BrokenPipeError, ConnectionResetError):
                return  # the client did not wait

        def log_message(self, format: str, *args: Any) -> None:
            return

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{made.server_port}/v1"
    yield state
    made.shutdown()
    made.server_close()
    thread.join()


def row(case: str, before: str, after: str, *, prompt: str = "Ada was born in", right: float = 1.0) -> Row:
    detail = {
        "answers": ["Tallow", "Old Tallow"],
        "text_before": before,
        "text_after": after,
        "changes": True,
    }
    return Row(case, "efficacy", "generate", prompt, 0.0, right, detail)


def settings(server: Server, **changes: Any) -> JudgeSettings:
    return replace(JudgeSettings(server.url, "toy", pause=0.01, retries=3, timeout=5.0), **changes)


def by_candidate(asked: str, call: int) -> str:
    candidate = asked.split("<candidate>")[1].split("</candidate>")[0]
    return {"Esk": "INCORRECT", "maybe": "It depends: CORRECT or INCORRECT"}.get(candidate, "CORRECT")


def test_rows_carry_verdicts_and_say_who_judged(server):
    server.answer = by_candidate
    rows = [row("a", "Esk", "Tallow"), replace(row("a", "", ""), protocol="teacher_forced")]
    made = judge(rows, settings(server))
    assert [(r.protocol, r.before, r.after) for r in made] == [
        ("judge", 0.0, 1.0),
        ("judge_undecided", 0.0, 0.0),
    ]
    detail = made[0].detail
    assert detail["verdicts"] == {"before": "wrong", "after": "right"}
    assert detail["replies"]["after"] == "CORRECT" and detail["text_after"] == "Tallow"
    assert detail["judge"]["served"] == "toy-2 fp1" and detail["judge"]["model"] == "toy"
    assert len(detail["judge"]["prompt_sha256"]) == 64
    assert "Tallow | Old Tallow" in server.asked[0] and server.bodies[0]["temperature"] == 0.0
    assert server.keys == [None, None]


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("CORRECT", "right"), (" correct.\n", "right"), ("**INCORRECT**", "wrong"), ("'Incorrect'", "wrong"),
        ("INCORRECT, because", "undecided"), ("not CORRECT", "undecided"), ("", "undecided"), ("A", "undecided"),
        ("CORRECT INCORRECT", "undecided"), ("<think>CORRECT", "undecided"),
    ],
)  # fmt: skip
def test_replies_are_read_strictly(text, verdict):
    assert Reply(text, "toy").verdict == verdict


def test_undecided_is_counted_and_neither_right_nor_wrong(server):
    server.answer = by_candidate
    rows = [
        row("a", "Esk", "Tallow"),
        row("b", "Esk", "maybe"),
        row("c", "maybe", "Esk"),
        row("d", "Esk", "Esk"),
    ]
    summary = score.summarise(judge(rows, settings(server)))
    assert summary["efficacy.judge"]["n"] == 2 and summary["efficacy.judge"]["after"] == 0.5
    undecided = summary["efficacy.judge_undecided"]
    assert undecided["n"] == 4 and undecided["after"] == 0.25 and undecided["before"] == 0.25


def test_like_questions_are_asked_once_and_a_cache_asks_nothing(server, tmp_path):
    server.answer = by_candidate
    rows = [row("a", "Esk", "Tallow"), row("b", "Esk", "Tallow")]
    kept = settings(server, cache=tmp_path / "deep" / "replies.sqlite")
    ticks: list[tuple[int, int]] = []
    first = judge(rows, kept, on_progress=lambda *tick: ticks.append(tick))
    assert len(server.asked) == 2 and ticks == [(0, 2), (1, 2), (2, 2)]
    assert judge(rows, kept) == first and len(server.asked) == 2
    judge(rows, replace(kept, prompt=kept.prompt + "\n"))
    assert len(server.asked) == 4, "another prompt is another question"
    judge(rows, replace(kept, model="toy-3"))
    assert len(server.asked) == 6, "another model is another judge"


@pytest.mark.parametrize(
    "failure",
    [
        (429, {"Retry-After": "0"}, b"slow down"), (503, {}, b"busy"), (500, {}, b""),
        (200, {}, b"<html>gateway</html>"), (200, {}, b'{"choices": []}'), (200, {}, b"[]"),
    ],
)  # fmt: skip
def test_failures_that_may_pass_are_repeated(server, failure):
    server.answer = lambda asked, call: failure if call < 2 else "CORRECT"
    made = judge([row("a", "Tallow", "Tallow")], settings(server))
    assert made[0].after == 1.0 and len(server.asked) == 3


def test_retry_after_is_heeded_within_the_bound(server):
    server.answer = lambda asked, call: (429, {"Retry-After": "1"}, b"") if call == 0 else "CORRECT"
    start = time.monotonic()
    judge([row("a", "Tallow", "Tallow")], settings(server))
    assert time.monotonic() - start >= 1.0
    server.asked.clear()
    start = time.monotonic()
    judge([row("a", "Tallow", "Tallow")], settings(server, longest_pause=0.05))
    assert time.monotonic() - start < 0.9


def test_a_slow_reply_is_given_up_and_asked_again(server):
    server.answer = lambda asked, call: 1.5 if call == 0 else "CORRECT"
    made = judge([row("a", "Tallow", "Tallow")], settings(server, timeout=0.3))
    assert made[0].after == 1.0 and len(server.asked) == 2


def test_a_run_that_breaks_off_goes_on_from_its_cache(server, tmp_path):
    rows = [row(str(i), f"text {i}", "Tallow") for i in range(6)]
    server.answer = lambda asked, call: "INCORRECT" if call < 3 else (503, {}, b"down")
    kept = settings(server, parallel=1, retries=1, cache=tmp_path / "replies.sqlite")
    with pytest.raises(DataError, match="no reply: status 503 down"):
        judge(rows, kept)
    with sqlite3.connect(tmp_path / "replies.sqlite") as file:
        assert file.execute("SELECT count(*) FROM replies").fetchone() == (3,)
    broken = len(server.asked)
    server.answer = lambda asked, call: "INCORRECT"
    assert len(judge(rows, kept)) == 12
    assert len(server.asked) - broken == 7 - 3, "seven different questions, three of them answered before"


def test_calls_run_side_by_side_up_to_the_bound(server):
    rows = [row(str(i), f"text {i}", f"other {i}") for i in range(6)]
    server.answer = lambda asked, call: 0.1
    judge(rows, settings(server, parallel=3))
    assert 2 <= server.most <= 3 and Counter(server.asked).most_common(1)[0][1] == 1


def test_what_the_server_refuses_is_not_repeated(server, monkeypatch):
    server.answer = lambda asked, call: (401, {}, b"bad key")
    monkeypatch.setenv("TOY_KEY", "s3cret")
    with pytest.raises(ConfigError, match="401 bad key") as caught:
        judge([row("a", "Tallow", "Tallow")], settings(server, key_variable="TOY_KEY"))
    assert len(server.asked) == 1 and server.keys == ["Bearer s3cret"]
    assert "s3cret" not in str(caught.value)
    server.answer = lambda asked, call: "CORRECT"
    with pytest.raises(ConfigError, match="404"):
        judge([row("a", "Tallow", "Tallow")], settings(server, base_url=server.url + "/elsewhere"))
    made = judge([row("a", "Tallow", "Tallow")], settings(server, key_variable="TOY_KEY"))
    assert "s3cret" not in json.dumps([dict(r.detail) for r in made])


def test_no_account_of_the_environment_is_sent(server, monkeypatch):
    """The client reads OPENAI_API_KEY, OPENAI_ORG_ID and others; a server elsewhere must not get them."""
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_BASE_URL"):
        monkeypatch.setenv(name, "http://127.0.0.1:9/s3cret")
    made = judge([row("a", "Tallow", "Tallow")], settings(server))
    assert made[0].after == 1.0 and server.keys == [None]
    assert not any("s3cret" in value for headers in server.headers for value in headers.values())


@pytest.mark.parametrize("package", ["openai", "tenacity"])
def test_without_its_packages_nothing_is_asked(server, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"judging needs {package}: pip install 'errata\[judge\]'"):
        judge([row("a", "Tallow", "Tallow")], settings(server, cache=tmp_path / "replies.sqlite"))
    assert not server.asked and not list(tmp_path.iterdir())


def test_nobody_there():
    alone = JudgeSettings("http://127.0.0.1:9", "toy", retries=1, pause=0.0)
    with pytest.raises(DataError, match="gave no reply"):
        judge([row("a", "Tallow", "Tallow")], alone)


def test_settings_are_checked_at_once(monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    wrong = JudgeSettings(
        "ftp://x", " ", key_variable="NO_SUCH_KEY", prompt="{prompt}", parallel=0, retries=-1
    )
    with pytest.raises(ConfigError) as caught:
        judge([], wrong)
    for part in ("base_url", "model", "{answers}", "{candidate}", "parallel", "retries", "NO_SUCH_KEY"):
        assert part in str(caught.value)
    with pytest.raises(DataError, match="text_after"):
        judge(
            [Row("a", "efficacy", "generate", "p", 0, 1, {"answers": []})], JudgeSettings("http://x", "toy")
        )


def test_rows_of_groups_have_no_text_to_judge():
    group = Row("a", "hop.all", "generate", "p", 0, 1, {"group": "hops", "of": 2})
    assert judge([group], JudgeSettings("http://x", "toy")) == []


def test_texts_that_hold_fields_are_not_filled_in():
    text = question(row("a", "", "{answers} {prompt}"), "after", JudgeSettings("http://x", "toy"))
    assert "<candidate>{answers} {prompt}</candidate>" in text


def test_agreement_by_hand(server):
    server.answer = by_candidate
    said = [
        ("a", "Tallow", 1.0),
        ("b", "Tallow", 1.0),
        ("c", "Tallow", 0.0),
        ("d", "Esk", 0.0),
        ("e", "maybe", 1.0),
    ]
    rows = [row(case, "Esk", text, right=right) for case, text, right in said]
    found = agreement(judge(rows, settings(server)), rows)
    # judge: right right right wrong; matcher: right right wrong wrong; p_o = 3/4,
    # p_e = 3/4 * 2/4 + 1/4 * 2/4 = 1/2, kappa = (3/4 - 1/2) / (1/2) = 1/2
    assert found == Agreement(4, 0.75, 0.5, 2, 1, 0, 1, 1, (("c", None, "efficacy", "Ada was born in"),))
    with pytest.raises(DataError, match="no row of protocol generate"):
        agreement(judge(rows, settings(server)), rows[1:])
    assert agreement([], []).agree is None
    assert agreement(judge(rows[:2], settings(server)), rows).kappa is None, "one verdict throughout"


def test_the_command_judges_the_newest_rows_of_a_run(server, tmp_path):
    from typer.testing import CliRunner

    from errata.bench.results import Journal
    from errata.cli.main import app
    from errata.report.card import card
    from errata.report.read import read_run
    from tests.units.report.synthetic import case_line, row, write_small

    lines = [
        case_line("c", row("c", "efficacy", "early", 0.0), edits=1),  # an older look is not asked about
        *(case_line(f"c{i}", row(f"c{i}", "efficacy", f"late {i}", i % 2), edits=2) for i in range(4)),
    ]
    run = write_small(tmp_path / "run", [{"method": "rome", "lines": lines}])
    words = ["judge", str(run), "--url", server.url, "--judge", "toy", "--json"]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    asked = len(server.asked)
    assert found and asked
    for cell, entry in found.items():
        made = list(Journal(run / "cells" / cell / "judged.jsonl").records())
        assert {row["protocol"] for row in made} == {"judge", "judge_undecided"}
        shares = {n: e["after"] for n, e in entry["summary"].items() if n.endswith(".judge")}
        assert shares and set(shares.values()) == {1.0}  # this server finds everything correct
        assert len(made) == 8 and all("late" in row["prompt"] for row in made)
        assert entry["agreement"]["undecided"] == 0 and entry["agreement"]["agree"] == 0.5
    assert "by toy, prompt" in card([read_run(run)]), "reports show it under the judge's name"
    assert CliRunner().invoke(app, words, catch_exceptions=False).exit_code == 0
    assert len(server.asked) == asked  # replies are kept
    refused = CliRunner().invoke(app, [*words, "--only", "no such cell"])
    assert isinstance(refused.exception, ConfigError)


def test_a_run_is_judged_from_python(server, tmp_path):
    import errata
    from errata.bench.judging import REPLIES, ROWS
    from errata.bench.results import Journal, read_sealed
    from tests.units.report.synthetic import case_line, row, write_small

    lines = [case_line(f"c{i}", row(f"c{i}", "efficacy", f"p{i}", i % 2)) for i in range(4)]
    run = write_small(tmp_path / "run", [{"method": name, "lines": lines} for name in ("rome", "memit")])
    calls: list[tuple[str, int, int]] = []
    cells = errata.judge_run(run, settings(server), only="rome", on_progress=lambda *call: calls.append(call))
    assert list(cells) == ["rome-0"] and {name for name, _, _ in calls} == {"rome-0"}
    cell = cells["rome-0"]
    assert isinstance(cell, errata.JudgedCell) and cell.agreement.n == 4 and cell.agreement.agree == 0.5
    assert set(cell.summary) == {"efficacy.generate", "efficacy.judge", "efficacy.judge_undecided"}
    written = read_sealed(run / "cells" / "rome-0", "judged.json")
    assert written["summary"] == json.loads(json.dumps(cell.to_dict()["summary"]))
    assert written["judge"]["model"] == "toy" and (run / REPLIES).is_file()
    assert len(list(Journal(run / "cells" / "rome-0" / ROWS).records())) == 8
    assert not (run / "cells" / "memit-1" / "judged.json").exists()
    kept = tmp_path / "elsewhere.sqlite"
    asked = len(server.asked)
    errata.judge_run(run, settings(server, cache=kept), only="rome")
    assert kept.is_file() and len(server.asked) > asked, "other replies are kept elsewhere"
    with pytest.raises(ConfigError, match="has no rows to judge in cells named like 'none'"):
        errata.judge_run(run, settings(server), only="none")
