"""Opens a model with its edits and serves it until it is told to stop."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from errata.edits import Edit
from errata.errors import ConfigError, HostError
from errata.host.host import Host
from errata.host.kinds import CAUSAL, KINDS
from errata.ledger.store import Ledger
from errata.ledger.working import Working
from errata.serve.app import make_app
from errata.serve.catalogue import PLUS, Catalogue
from errata.serve.desk import Desk
from errata.serve.engine import Engine
from errata.serve.metrics import Metrics
from errata.serve.protocol import protocol
from errata.serve.settings import ServerSettings

GRACE = 20
"""Seconds that answers under way have to end once the server is told to stop."""


@dataclass(frozen=True)
class Served:
    """What is served."""

    host: Host
    name: str
    """What the model is called in requests."""
    files: tuple[Edit, ...] = ()
    """Edits of no ledger."""
    ledger: Ledger | None = None
    foreign: bool = False
    """Whether edits of another model are taken."""
    open_working: Callable[[Ledger], Working] = Working.open
    """Opens the copy of the model that edits are fitted and measured on."""


def served_name(model: str) -> str:
    """Return what a model is called where none was given a name: a folder's own name, not where it is."""
    folder = Path(model).expanduser()
    return folder.resolve().name if folder.is_dir() else model


class Server(uvicorn.Server):
    """A server that says where it listens once it does."""

    def __init__(
        self, served: Served, settings: ServerSettings, *, on_ready: Callable[[str], None] = lambda _: None
    ) -> None:
        """``on_ready``: is called with the server's address. Raises ConfigError or HostError for what is not served."""
        if served.host.kind != CAUSAL or served.host.tokenizer is None:
            raise HostError(
                f"{served.host.name} is one of the {KINDS[served.host.kind].plural}; errata serve takes causal "
                "language models"
            )
        if not served.name or not served.name.isprintable() or served.name.endswith(PLUS):
            raise ConfigError(
                f"a model cannot be called {served.name!r}: expected printable text; see --name"
            )
        self.metrics, self.on_ready, self.settings = Metrics(), on_ready, settings
        catalogue = (
            Catalogue.of_files(served.name, served.files)
            if served.ledger is None
            else Catalogue.of_ledger(served.name, served.ledger)
        )
        self.desk = Desk(
            catalogue,
            self.metrics,
            files=served.files,
            ledger=served.ledger,
            open_working=served.open_working,
        )
        self.engine = Engine(
            served.host, self.desk.load, self.metrics, most_rows=settings.most_rows, foreign=served.foreign
        )
        super().__init__(_config(make_app(self.desk, self.engine, settings), settings))

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        if self.started:
            self.on_ready(self.address)

    @property
    def address(self) -> str:
        """Where the server listens, once it does."""
        port = self.servers[0].sockets[0].getsockname()[1] if self.servers else self.settings.port
        name = f"[{self.settings.host}]" if ":" in self.settings.host else self.settings.host
        return f"http://{name}:{port}"

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Stop at a signal; not raised again afterwards, as stopping is what it asks for."""
        super().handle_exit(sig, frame)
        self._captured_signals.clear()


def _config(app: Any, settings: ServerSettings) -> uvicorn.Config:
    return uvicorn.Config(
        app, host=settings.host, port=settings.port, http=protocol(settings.read_timeout), ws="none", lifespan="on",
        loop="asyncio", log_level="warning", access_log=False, server_header=False, proxy_headers=False,
        limit_concurrency=settings.most_connections, timeout_keep_alive=5, timeout_graceful_shutdown=GRACE,
        h11_max_incomplete_event_size=65_536,
    )  # fmt: skip


def check_edits(host: Host, edits: Sequence[Edit], *, foreign: bool) -> None:
    """Raise EditError for an edit of another model, before anything is served."""
    for edit in edits:
        edit.overridden_checks(host, foreign=foreign)
