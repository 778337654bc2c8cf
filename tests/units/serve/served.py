"""A real server on loopback, with what tests ask it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
from openai import OpenAI

from errata.edits import Edit
from errata.host.host import Host
from errata.ledger import folders
from errata.ledger.guard import Guard
from errata.ledger.settings import GuardSettings, LedgerSettings
from errata.ledger.store import Ledger
from errata.ledger.working import Working, describe
from errata.serve.server import Served, Server
from errata.serve.settings import ServerSettings

QUICK = GuardSettings(statements=1, prompts=2, texts=2)
"""A guard that measures little."""


class Client:
    """What talks to a server in a test."""

    def __init__(self, server: Server, token: str = "none") -> None:
        self.server, self.url = server, server.address
        headers = {"authorization": f"Bearer {token}"}
        self.http = httpx.Client(base_url=self.url, timeout=120, headers=headers)
        self.openai = OpenAI(base_url=f"{self.url}/v1", api_key=token, max_retries=0, timeout=120)

    def complete(self, model: str, prompt: str, tokens: int = 8, **more: Any) -> str:
        answer = self.openai.completions.create(model=model, prompt=prompt, max_tokens=tokens, **more)
        return answer.choices[0].text

    def post(self, path: str, body: Any = None, **more: Any) -> httpx.Response:
        return self.http.post(path, json={} if body is None else body, **more)

    def get(self, path: str) -> httpx.Response:
        return self.http.get(path)

    def close(self) -> None:
        self.http.close()
        self.openai.close()


@contextmanager
def running(
    served: Served, settings: ServerSettings | None = None, *, token: str = "none"
) -> Iterator[Client]:
    """Serve until the block ends; whatever happened, the model is then as it was."""
    before = served.host.weights_hash()
    ready = threading.Event()
    server = Server(served, settings or ServerSettings(port=0), on_ready=lambda _: ready.set())
    thread = threading.Thread(target=server.run, name="test-server")
    thread.start()
    try:
        assert ready.wait(60), "the server did not start"
        client = Client(server, token)
        try:
            yield client
        finally:
            client.close()
    finally:
        server.should_exit = True
        thread.join(60)
    assert not thread.is_alive() and not server.engine.alive
    assert not served.host.placed and served.host.weights_hash() == before


def new_ledger(folder: Path, host: Host, **settings: Any) -> Ledger:
    """Make a ledger of the lab's model."""
    return folders.create(
        folder, LedgerSettings(model="lab", guard=QUICK, **settings), describe(host, "lab"), author="tester"
    )


def with_ledger(host: Host, ledger: Ledger) -> Served:
    """Serve a ledger; edits are fitted on a copy that is opened as a user's would be."""
    return Served(host, "lab", ledger=ledger, open_working=lambda own: Working.open(own, device="cpu"))


def alone(host: Host, edits: list[Edit], prompt: str, tokens: int = 8) -> str:
    """Return what the model answers with some edits in place for everything, as errata ask does it."""
    with ExitStack() as stack:
        for edit in edits:
            stack.enter_context(edit.on(host))
        return host.generate(prompt, max_new_tokens=tokens, natural_stop=False)


def quick_guard(working: Working) -> Guard:
    """Return a guard that asks two canaries and reads two texts, and needs no tables of what the model says."""
    texts = ("Ada Brenner lives in Merrin.", "The capital of Arvania is Tallow.")
    with working.showing(()):
        guard = Guard(
            working.host,
            working.ledger.settings.guard,
            texts,
            ("Flora Zimley was",),
            ("Flora Zimley was born in",),
        )
        guard.base_perplexity = guard.perplexity()
    return guard
