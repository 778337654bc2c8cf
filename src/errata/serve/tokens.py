"""Who may read and who may write: bearer tokens, of which only digests are kept."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from errata.errors import ConfigError
from errata.files import read_text

READ, WRITE = "ERRATA_READ_TOKEN", "ERRATA_WRITE_TOKEN"
"""Environment variables that hold tokens."""
SHORTEST = 16
"""Characters of a token at least."""


def digest(token: str) -> bytes:
    """Return what is kept of a token."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


@dataclass(frozen=True)
class Tokens:
    """Digests of the tokens that may read, and of those that may also write."""

    read: tuple[bytes, ...] = ()
    write: tuple[bytes, ...] = ()

    @staticmethod
    def collect(read_file: Path | None = None, write_file: Path | None = None) -> Tokens:
        """Read tokens from files, one a line, else from the environment. Raises ConfigError for unusable ones."""
        return Tokens(_tokens(read_file, READ), _tokens(write_file, WRITE))

    @property
    def required(self) -> bool:
        """Whether requests need a token."""
        return bool(self.read or self.write)

    def may_read(self, token: str | None) -> bool:
        """Whether a request with this token may ask."""
        return not self.required or _matches(token, (*self.read, *self.write))

    def may_write(self, token: str | None) -> bool:
        """Whether a request with this token may change the ledger; with read tokens alone, none may."""
        return not self.required or _matches(token, self.write)


def check_address(host: str, tokens: Tokens) -> None:
    """Raise ConfigError for an address that others can reach, where there is no token."""
    if not is_loopback(host) and not tokens.required:
        raise ConfigError(
            f"--host {host}: an address that other machines can reach needs tokens: set {READ} and {WRITE}, or name "
            "files with --read-token-file and --write-token-file; 127.0.0.1 needs none"
        )


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    if host.lower() == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _matches(token: str | None, digests: Sequence[bytes]) -> bool:
    """Compare with every digest, each in constant time, so that how long it takes tells nothing."""
    own = digest(token or "")
    found = False
    for one in digests:
        found |= hmac.compare_digest(own, one)
    return found and token is not None


def _tokens(file: Path | None, variable: str) -> tuple[bytes, ...]:
    where = variable if file is None else str(file)
    text = (
        os.environ.get(variable, "")
        if file is None
        else read_text(file, ConfigError, what="a file of tokens")
    )
    tokens = [line.strip() for line in text.splitlines() if line.strip()]
    if file is not None and not tokens:
        raise ConfigError(f"{where} holds no token; write one a line")
    for token in tokens:
        if len(token) < SHORTEST or not token.isascii() or " " in token:
            raise ConfigError(
                f"{where} has a token of {len(token)} characters: expected {SHORTEST} at least, ASCII without spaces"
            )
    return tuple(digest(token) for token in tokens)
