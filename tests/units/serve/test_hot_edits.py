"""Edits come and go while answers stream; every answer is that of exactly one revision."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import errata
from errata.ledger import folders, reverting
from errata.ledger.contents import facts_of, keep
from errata.serve.settings import ServerSettings
from tests.units.serve.served import new_ledger, quick_guard, running, with_ledger

BORN = "Ada Brenner was born in"
FACT = {"prompt": "{} was born in", "subject": "Ada Brenner", "target": "Tallow"}
OTHER = {"prompt": "{} plays the", "subject": "Boris Sorwick", "target": "cello"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("ledger")


@pytest.fixture(scope="module")
def client(lab_host, place):
    ledger = new_ledger(place, lab_host)
    settings = ServerSettings(port=0, most_tokens=64, most_rows=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("errata.ledger.recording.guard_of", quick_guard)
        with running(with_ledger(lab_host, ledger), settings) as one:
            yield one


def make(client, fact, **more):
    return client.post("/v1/edits", {"requests": [fact], "method": "grace", "reason": "a test", **more})


def test_an_edit_is_made_while_clients_stream(client):
    """No request fails, and each answer is wholly that of the revision it names."""
    failures: list[Exception] = []
    answers: list[tuple[str, str]] = []
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            try:
                stream = client.openai.completions.create(
                    model="lab+all", prompt=BORN, max_tokens=8, stream=True
                )
                chunks = list(stream)
                revisions = {chunk.errata["revision"] for chunk in chunks}
                assert len(revisions) == 1, revisions
                answers.append((revisions.pop(), "".join(chunk.choices[0].text for chunk in chunks)))
            except Exception as error:
                failures.append(error)
                return

    with ThreadPoolExecutor(6) as pool:
        for _ in range(6):
            pool.submit(ask)
        answer = make(client, FACT)
        time.sleep(0.5)
        done.set()
    assert answer.status_code == 200, answer.text
    assert not failures
    revision = answer.json()["revision"]
    by_revision = {name: {text for other, text in answers if other == name} for name, _ in answers}
    assert set(by_revision) == {"base", revision}, "answers before and after the edit are to be seen"
    assert all(len(texts) == 1 for texts in by_revision.values()), by_revision
    assert by_revision["base"].pop().startswith(" Rowanport") and by_revision[revision].pop().startswith(
        " Tallow"
    )


def test_what_was_made_is_listed_verified_reverted_and_applied_again(client):
    listed = client.get("/v1/edits").json()
    (edit,) = listed["data"]
    assert edit["applied"] and edit["reason"] == "a test" and edit["measured"]["passed"]
    assert listed["active"] == [edit["id"]]
    name = edit["id"][:8]
    assert client.post(f"/v1/edits/{name}/verify").json()["measured"]["answered"] == 1.0
    event = client.post(f"/v1/edits/{name}/revert", {"reason": "again"}).json()
    assert event["revision"] == "base" and event["event"]["reason"] == "again"
    assert client.complete("lab+all", BORN).startswith(" Rowanport")
    assert client.complete(f"lab+{name}", BORN).startswith(" Tallow"), "alone it can still be asked"
    again = client.post(f"/v1/edits/{name}/revert")
    assert again.status_code == 400 and "not in place" in again.json()["error"]["message"]
    assert client.post(f"/v1/edits/{name}/apply").json()["applied"]
    assert client.post(f"/v1/edits/{name}/apply").status_code == 400
    assert client.complete("lab+all", BORN).startswith(" Tallow")
    kinds = [event["kind"] for event in client.get("/v1/log").json()["data"]]
    assert kinds == [
        "applied", "verified", "proposed", "reverted", "verified", "applied", "verified", "proposed", "created"
    ]  # fmt: skip
    assert client.get(f"/v1/edits/{name}").json()["id"] == edit["id"]


def test_a_contradiction_is_a_conflict(client):
    answer = make(client, {**FACT, "target": "Merrin"})
    assert answer.status_code == 409 and answer.json()["error"]["code"] == "conflict"
    assert len(client.get("/v1/edits").json()["data"]) == 1, "nothing was fitted"


def test_what_the_guard_refuses_is_recorded_and_not_in_place(client):
    before = client.get("/v1/edits").json()["revision"]
    answer = client.post("/v1/edits", {"requests": [OTHER], "method": "ft", "settings": {"steps": 1}})
    document = answer.json()
    assert answer.status_code == 409 and document["error"]["code"] == "guard_refused"
    (attempt,) = document["attempts"]
    assert not attempt["applied"] and any("requests answered" in one for one in attempt["failures"])
    after = client.get("/v1/edits").json()
    assert after["revision"] == before and not after["data"][-1]["applied"]
    assert f"lab+{attempt['id'][:12]}" in [model.id for model in client.openai.models.list()]


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"method": "serac", "settings": {"editor": "/etc/passwd"}}, "setting_refused"),
        ({"method": "rome", "settings": {"moments": "x.safetensors"}}, "setting_refused"),
        ({"method": "grace", "settings": {"strange": 1}}, "invalid_request"),
        ({"method": "../grace"}, "invalid_request"), ({"after": "ffffffff"}, "model_not_found"),
        ({"requests": []}, "invalid_body"), ({"requests": [{**FACT, "subject": "Nobody"}]}, "invalid_request"),
        ({"requests": [{**FACT, "prompt": "Ada"}]}, "invalid_request"), ({"corpus": "/etc/passwd"}, "invalid_body"),
    ],
)  # fmt: skip
def test_bad_orders_change_nothing(client, body, code):
    before = client.get("/v1/edits").json()
    if body.get("requests") == [{**FACT, "subject": "Nobody"}]:
        body = {"requests": [{"prompt": "{} {} is", "subject": "Nobody", "target": "x"}]}
    answer = client.post("/v1/edits", {"requests": [OTHER], "method": "grace", **body})
    assert answer.json().get("error", {}).get("code") == code, answer.text
    assert answer.status_code in (400, 404) and client.get("/v1/edits").json() == before


def test_tags_are_names_of_models_and_other_processes_are_noticed(client, place):
    ledger = folders.find(place)
    state = ledger.state()
    ledger.append("tagged", body={"name": "first", "number": len(state.ids), "edit": state.active[-1]})
    reverting.revert(ledger, state.active[-1])
    ledger.close()
    deadline = time.monotonic() + 20
    while client.get("/v1/edits").json()["active"] and time.monotonic() < deadline:
        time.sleep(0.1)
    assert client.complete("lab+all", BORN).startswith(" Rowanport")
    assert client.complete("lab+first", BORN).startswith(" Tallow")
    assert "errata_revisions_total" in client.get("/metrics").text


def test_a_server_begins_with_what_the_ledger_has_in_place(tmp_path):
    host = errata.load("lab", device="cpu")
    ledger = new_ledger(tmp_path, host)
    edit = errata.edit(host, errata.Request(**FACT), method="in_prompt")
    ledger.append("proposed", edit=edit.digest, body=facts_of(edit, keep(ledger, edit), ()))
    ledger.append("applied", edit=edit.digest)
    with running(with_ledger(host, ledger), ServerSettings(port=0)) as one:
        assert edit.digest in one.server.engine.in_place
        assert one.complete("lab+all", BORN).startswith(" Tallow")
