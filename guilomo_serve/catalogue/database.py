"""The catalogue of one server, in SQLite.

One server at a time has it: it keeps the database locked, and the lock goes with its process
however that ends.
"""

from __future__ import annotations

import fcntl
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from guilomo_serve.catalogue.sql import CatalogueError, SqlCatalogue, Value

CATALOGUE_FILE = "catalogue.sqlite3"
_SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE version (
    number INTEGER PRIMARY KEY AUTOINCREMENT,  -- a number is never used again
    name TEXT NOT NULL,
    digest TEXT NOT NULL,
    source TEXT NOT NULL,
    size INTEGER NOT NULL,
    about TEXT NOT NULL,                       -- JSON: what the adapter is
    created REAL NOT NULL                      -- seconds since 1970
);
CREATE TABLE adapter (
    name TEXT PRIMARY KEY,
    current INTEGER NOT NULL REFERENCES version,
    previous INTEGER REFERENCES version,
    pinned INTEGER NOT NULL DEFAULT 0
);
"""
# Of catalogues that older guilomos made, too.
_INDICES = (
    "CREATE INDEX IF NOT EXISTS version_of_name ON version (name)",
    "CREATE INDEX IF NOT EXISTS version_of_digest ON version (digest)",
    "CREATE INDEX IF NOT EXISTS pinned_adapter ON adapter (name) WHERE pinned",
)


def hold(state: Path) -> IO[str]:
    """Takes a state folder for this process, before a model is loaded that could not be served.

    Returns:
        An open file; while it is open, no other process gets the folder. A process that ends,
        however it does, and its children do not keep it.

    Raises:
        CatalogueError: another server has it, or its catalogue is none.
    """
    path = state / "lock"
    try:
        lock = path.open("a")
    except OSError as e:
        raise CatalogueError(f"{path}: cannot be opened ({e.strerror})") from None
    try:
        # Of the process: flock's would be the engine's too, which may outlive a killed server.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        Catalogue(state / CATALOGUE_FILE).close()
    except OSError:
        lock.close()
        raise CatalogueError(f"{state}: another server is running with this --state") from None
    except CatalogueError:
        lock.close()
        raise
    return lock


class Catalogue(SqlCatalogue):
    """The database at a path, which is made if it is missing.

    Raises:
        CatalogueError: another server has it, or it is no catalogue of this version.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._db = sqlite3.connect(path, timeout=1.0, isolation_level=None)
        try:
            self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._db.execute("PRAGMA foreign_keys = ON")
            self._db.execute("BEGIN EXCLUSIVE")
            self._create()
            self._db.execute("COMMIT")
        except sqlite3.OperationalError as e:
            raise CatalogueError(
                f"{path}: cannot be used ({e}); is another server running with this --state?"
            ) from None
        except sqlite3.DatabaseError as e:
            raise CatalogueError(f"{path}: not a catalogue ({e}); give another --state") from None
        row = self._db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'version'").fetchone()
        self._last = row[0] if row else 0

    def _create(self) -> None:
        (found,) = self._db.execute("PRAGMA user_version").fetchone()
        if found not in (0, _SCHEMA_VERSION):
            raise CatalogueError(
                f"{self._path}: of version {found}, this guilomo reads version {_SCHEMA_VERSION}: "
                "use the guilomo that wrote it, or another --state"
            )
        if found == 0:
            for statement in _SCHEMA.split(";\n"):
                self._db.execute(statement)
            self._db.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
        for statement in _INDICES:
            self._db.execute(statement)

    def close(self) -> None:
        self._db.close()

    def next_number(self) -> int:
        self._last += 1
        return self._last

    def _ask(self, statement: str, values: Sequence[Value] = ()) -> list[tuple[Any, ...]]:
        return self._db.execute(statement, values).fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._db:
            self._db.execute("BEGIN")
            yield
