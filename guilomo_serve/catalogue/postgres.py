"""The catalogue that replicas share, in PostgreSQL 13 or newer.

Its tables are in the schema `guilomo`, beside names and versions those by which replicas agree
(replicas.py). What a connection needs beyond an address (`postgresql://USER@HOST/DATABASE`) may be
in the environment, as libpq has it: PGPASSWORD or PGPASSFILE, PGSSLMODE. A pooler between must give
each connection a session of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import psycopg
from psycopg import conninfo

from guilomo_serve.catalogue.sql import CatalogueError, SqlCatalogue, Value

# A database that says nothing for as long is taken to be gone.
_SILENT_S = 5
_CONNECTION: dict[str, str | int] = {
    "client_encoding": "utf8",
    "connect_timeout": _SILENT_S,
    "tcp_user_timeout": 1000 * _SILENT_S,
    "keepalives_idle": 2,
    "keepalives_interval": 1,
    "keepalives_count": _SILENT_S - 2,
}
# Keys of advisory locks, in the space of two numbers; names have theirs in the space of one.
LOCKS = 0x6775696C  # "guil"
_MIGRATING, FILES = 1, 2

# What brings a catalogue from each version to the next one. None is changed once it is released.
_MIGRATIONS = (
    """
CREATE TABLE version (
    number BIGINT PRIMARY KEY,
    name TEXT COLLATE "C" NOT NULL,
    digest TEXT NOT NULL,
    source TEXT NOT NULL,
    size BIGINT NOT NULL,
    about TEXT NOT NULL,                        -- JSON: what the adapter is
    created DOUBLE PRECISION NOT NULL           -- seconds since 1970
);
CREATE INDEX version_of_name ON version (name);
CREATE INDEX version_of_digest ON version (digest);
CREATE SEQUENCE version_number;
CREATE TABLE adapter (
    name TEXT COLLATE "C" PRIMARY KEY,
    current BIGINT NOT NULL REFERENCES version,
    previous BIGINT REFERENCES version,
    pinned BOOLEAN NOT NULL DEFAULT FALSE
);
-- What replicas have yet to learn of: names by the count of changes when they last changed.
ALTER TABLE format ADD COLUMN revision BIGINT NOT NULL DEFAULT 0;
CREATE TABLE change (
    name TEXT COLLATE "C" PRIMARY KEY,
    revision BIGINT NOT NULL
);
CREATE INDEX change_since ON change (revision);
-- Servers that are waited for. Each counts its beats up, and says which revision it has applied.
CREATE TABLE replica (
    id TEXT PRIMARY KEY,
    host TEXT NOT NULL,
    beat BIGINT NOT NULL DEFAULT 0,
    applied BIGINT NOT NULL DEFAULT 0
);
-- Versions that are about to be current, and what replicas say of them.
CREATE TABLE proposal (
    LIKE version,
    owner TEXT NOT NULL REFERENCES replica ON DELETE CASCADE,
    everywhere BOOLEAN NOT NULL,                -- or by its owner alone
    PRIMARY KEY (number)
);
CREATE INDEX proposal_of_owner ON proposal (owner);
CREATE TABLE vote (
    number BIGINT REFERENCES proposal ON DELETE CASCADE,
    replica TEXT REFERENCES replica ON DELETE CASCADE,
    status INTEGER,                             -- HTTP's, of a refusal
    refusal TEXT,
    PRIMARY KEY (number, replica)
);
CREATE INDEX vote_of_replica ON vote (replica);
""",
    """
-- What replicas have to have in common: the order in which they came says whose it is.
CREATE SEQUENCE replica_joined;
ALTER TABLE replica ADD COLUMN joined BIGINT NOT NULL DEFAULT nextval('replica_joined'),
    ADD COLUMN admission TEXT,                  -- JSON: how much clients may ask
    ADD COLUMN key TEXT;                        -- the fingerprint of the admin key
""",
)


def connect(address: str, name: str = "guilomo") -> psycopg.Connection[Any]:
    """A connection whose statements have their effect at once.

    Args:
        address: postgresql://...
        name: what the database calls the connection (`application_name`).

    Raises:
        psycopg.Error: there is no database, or it does not take us.
    """
    given = conninfo.conninfo_to_dict(address)
    settings = {**_CONNECTION, **given, "application_name": name}
    db = psycopg.connect(**settings, autocommit=True)
    db.execute("SET search_path TO guilomo")
    # A process that is stopped in the middle of a change keeps nobody waiting.
    db.execute("SET idle_in_transaction_session_timeout = '2s'")
    return db


class SharedCatalogue(SqlCatalogue):
    """A catalogue in a database, with a connection of its own.

    Methods block; one thread at a time may call them. They raise psycopg.Error where the database
    does not answer.

    Args:
        address: postgresql://...
        name: what the database calls the connection.
    """

    def __init__(self, address: str, name: str = "guilomo") -> None:
        self._db = connect(address, name)

    def close(self) -> None:
        self._db.close()

    def listen(self, channel: str, tell: Callable[[], Any]) -> None:
        """Calls `tell` now and with each message, until the connection ends."""
        self._db.execute(f"LISTEN {channel}".encode())
        tell()  # of what came before
        for _ in self._db.notifies():
            tell()

    def next_number(self) -> int:
        ((number,),) = self._ask("SELECT nextval('version_number')")
        return int(number)

    def _ask(self, statement: str, values: Sequence[Value] = ()) -> list[tuple[Any, ...]]:
        found = self._db.execute(statement.replace("?", "%s").encode(), values)
        return found.fetchall() if found.description else []

    def _transaction(self) -> AbstractContextManager[Any]:
        return self._db.transaction()

    @contextmanager
    def _snapshot(self) -> Iterator[None]:
        """A block whose statements all see the same state."""
        with self._db.transaction():
            self._db.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            yield

    def revision(self) -> int:
        """How many changes there were."""
        ((revision,),) = self._ask("SELECT revision FROM format")
        return int(revision)

    def _notify(self, channel: str) -> None:
        self._ask("SELECT pg_notify(?, '')", (channel,))


def prepare(address: str) -> None:
    """Makes the tables in a database, or brings older ones to this version.

    Raises:
        CatalogueError: it cannot be used, or a newer guilomo made them.
    """
    try:
        with connect(address) as db, db.transaction():
            db.execute("SELECT pg_advisory_xact_lock(%s, %s)", (LOCKS, _MIGRATING))
            db.execute("CREATE SCHEMA IF NOT EXISTS guilomo")
            db.execute("CREATE TABLE IF NOT EXISTS format (version INTEGER NOT NULL)")
            row = db.execute("SELECT version FROM format").fetchone()
            if row is None:
                db.execute("INSERT INTO format VALUES (0)")
            found = 0 if row is None else row[0]
            if found > len(_MIGRATIONS):
                raise CatalogueError(
                    f"--state: the catalogue is of version {found}, this guilomo reads version "
                    f"{len(_MIGRATIONS)}: use the guilomo that wrote it, or another database"
                )
            for migration in _MIGRATIONS[found:]:
                db.execute(migration)
            db.execute("UPDATE format SET version = %s", (len(_MIGRATIONS),))
    except psycopg.ProgrammingError as e:
        raise CatalogueError(f"--state: the database cannot be used ({in_a_line(e)})") from None
    except psycopg.Error as e:
        raise CatalogueError(f"--state: no database answers there ({in_a_line(e)})") from None


def in_a_line(error: psycopg.Error) -> str:
    """What went wrong; libpq does not repeat passwords."""
    return " ".join(str(error).split()) or type(error).__name__
