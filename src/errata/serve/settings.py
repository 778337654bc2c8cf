"""The server's limits and where it listens."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from errata.errors import ConfigError
from errata.serve.tokens import Tokens, check_address


@dataclass(frozen=True)
class ServerSettings:
    """Where the server listens, and what it takes. Raises ConfigError for an address that needs tokens."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0: any that is free."""
    tokens: Tokens = field(default_factory=Tokens)
    most_body: int = 1_000_000
    """Bytes of a request's body."""
    most_tokens: int = 2048
    """Tokens of one answer."""
    most_rows: int = 32
    """Texts that are continued in one batch."""
    most_waiting: int = 128
    """Texts that wait for a place in it."""
    timeout: float = 120.0
    """Seconds that an answer may take."""
    read_timeout: float = 10.0
    """Seconds in which a request's head, and then its body, have to arrive."""
    most_connections: int = 512
    """Open connections."""
    page: bool = False
    """Whether the page is served."""
    runs: tuple[Path, ...] = ()
    """Folders of runs whose boards the page shows."""

    def __post_init__(self) -> None:
        check_address(self.host, self.tokens)
        for name in ("most_body", "most_tokens", "most_rows", "timeout", "read_timeout", "most_connections"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be more than 0, found {getattr(self, name)}")
