"""The tables of a ledger's database, and how one of an earlier version is brought up to date."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sql
from sqlalchemy import event

from errata.errors import LedgerError

METADATA = sql.MetaData()
EVENTS = sql.Table(
    "events", METADATA,
    sql.Column("number", sql.Integer, primary_key=True),
    sql.Column("id", sql.String(64), nullable=False, unique=True),
    sql.Column("previous", sql.String(64), nullable=False, unique=True),  # no event has two after it
    sql.Column("kind", sql.String(16), nullable=False),
    sql.Column("edit", sql.String(64), nullable=False, index=True),
    sql.Column("content", sql.Text, nullable=False),
)  # fmt: skip
"""All events in order; ``content`` is their JSON, the other columns are copies to search in."""
FACTS = sql.Table(
    "facts", METADATA,
    sql.Column("edit", sql.String(64), primary_key=True),
    sql.Column("request", sql.Integer, primary_key=True),
    sql.Column("fact", sql.String(64), nullable=False, index=True),
    sql.Column("subject", sql.String(64), nullable=False, index=True),
)  # fmt: skip
"""Requests of all edits by hashes of their subject, and of subject and prompt together: to find conflicts."""
VERSION = "0001"
"""Newest version of the tables."""
WAIT = 60.0
"""Seconds that a writer waits for another."""


def engine(path: Path) -> sql.Engine:
    """Return an engine for a database file: write-ahead log, every commit on the disk before it returns.

    Transactions of a connection with the option ``writes`` take the lock for writing at their begin.
    """
    made = sql.create_engine(sql.URL.create("sqlite", database=str(path)), connect_args={"timeout": WAIT})

    @event.listens_for(made, "connect")
    def _(connection, record):
        connection.isolation_level = None  # transactions begin as written below
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}").close()

    @event.listens_for(made, "begin")
    def _(connection):
        writes = connection.get_execution_options().get("writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return made


def version(database: sql.Engine) -> str | None:
    """Return the version of a database's tables; None for a new one."""
    with database.connect() as connection:
        if not sql.inspect(connection).has_table("alembic_version"):
            return None
        return connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()


def upgrade(database: sql.Engine) -> None:
    """Bring a database's tables to the newest version. Raises LedgerError for one of a newer errata."""
    now = version(database)
    if now == VERSION:
        return
    if now is not None and now > VERSION:
        raise LedgerError(f"the ledger has version {now}, this errata reads up to {VERSION}; update errata")
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")))
    with database.connect().execution_options(writes=True) as connection, connection.begin():
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
