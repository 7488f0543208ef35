"""Names, their versions and what is pinned, in SQLite.

One server at a time has a catalogue: it keeps the database locked, and the lock goes with its
process however that ends.
"""

from __future__ import annotations

import fcntl
import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

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


class CatalogueError(ValueError):
    """A catalogue that cannot be used; the message says what would help."""


@dataclass(frozen=True)
class Version:
    """What a name stood or stands for.

    Attributes:
        number: unique among all versions of the catalogue; the LoRA id in vLLM.
        name: the adapter's name.
        digest: of its files, by which the store keeps them.
        source: the folder that it was taken from, or the address with its revision.
        size: of its weights file, in bytes.
        about: what the adapter is (kind, base, task, ranks of each module's experts).
        created: when it was put, in seconds since 1970.
    """

    number: int
    name: str
    digest: str
    source: str
    size: int
    about: Mapping[str, Any]
    created: float


@dataclass(frozen=True)
class Listed:
    """A name in a list of models.

    Attributes:
        source: where it was taken from; of a member of a root its name there.
        digest, number: of its current version; None of a member that nobody has asked for.
    """

    source: str
    digest: str | None = None
    number: int | None = None

    @property
    def identity(self) -> dict[str, str | int]:
        """What its card has beyond vLLM's fields."""
        if self.digest is None or self.number is None:
            return {}
        return {"digest": self.digest, "version": self.number}


@dataclass(frozen=True)
class Entry:
    """A name: the version it stands for, the one before, and whether it is pinned."""

    current: Version
    previous: Version | None
    pinned: bool


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


class Catalogue:
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
        """A number for a version that is about to be loaded."""
        self._last += 1
        return self._last

    def get(self, name: str) -> Entry | None:
        return self._entries("WHERE name = ?", name).get(name)

    def page(self, after: str, limit: int) -> dict[str, Entry]:
        """The first `limit` names that come after one, in their order, with their entries."""
        return self._entries("WHERE name > ? ORDER BY name LIMIT ?", after, limit)

    def listed(self, limit: int) -> dict[str, Listed]:
        """The first `limit` names, each with what is short to say of its current version."""
        rows = self._db.execute(
            "SELECT adapter.name, source, digest, number "
            "FROM adapter JOIN version ON current = number ORDER BY adapter.name LIMIT ?",
            (limit,),
        )
        return {name: Listed(*about) for name, *about in rows.fetchall()}

    def _entries(self, which: str, *values: str | int) -> dict[str, Entry]:
        """Args: which: clauses that choose rows of the table `adapter`."""
        adapters = f"(SELECT * FROM adapter {which})"
        numbers = f"SELECT current FROM {adapters} UNION ALL SELECT previous FROM {adapters}"
        versions = {
            number: Version(number, name, digest, source, size, json.loads(about), created)
            for number, name, digest, source, size, about, created in self._db.execute(
                "SELECT number, name, digest, source, size, about, created FROM version "
                f"WHERE number IN ({numbers})",
                (*values, *values),
            )
        }
        rows = self._db.execute(
            f"SELECT name, current, previous, pinned FROM {adapters} ORDER BY name", values
        )
        return {
            name: Entry(versions[current], versions.get(previous), bool(pinned))
            for name, current, previous, pinned in rows
        }

    def pinned(self) -> set[str]:
        """The names that are pinned."""
        return {name for (name,) in self._db.execute("SELECT name FROM adapter WHERE pinned")}

    def digests(self) -> set[str]:
        """The digests of all current and previous versions."""
        return {digest for (digest,) in self._db.execute("SELECT digest FROM version")}

    def has_digest(self, digest: str) -> bool:
        """Whether a current or previous version has it."""
        found = self._db.execute("SELECT 1 FROM version WHERE digest = ?", (digest,))
        return found.fetchone() is not None

    def put(self, version: Version) -> list[str]:
        """Makes a version the current one of its name; the current one becomes the previous.

        Returns:
            The digests of versions that are forgotten for it.
        """
        with self._db:
            self._db.execute("BEGIN")
            self._db.execute(
                "INSERT INTO version VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    *(version.number, version.name, version.digest, version.source),
                    *(version.size, json.dumps(version.about), version.created),
                ),
            )
            self._db.execute(
                "INSERT INTO adapter (name, current) VALUES (?, ?) ON CONFLICT (name) "
                "DO UPDATE SET previous = current, current = excluded.current",
                (version.name, version.number),
            )
            return self._forget_unused(version.name)

    def delete(self, name: str) -> list[str]:
        """Forgets a name; returns the digests of its versions."""
        with self._db:
            self._db.execute("BEGIN")
            self._db.execute("DELETE FROM adapter WHERE name = ?", (name,))
            return self._forget_unused(name)

    def pin(self, name: str, pinned: bool) -> None:
        self._db.execute("UPDATE adapter SET pinned = ? WHERE name = ?", (pinned, name))

    def _forget_unused(self, name: str) -> list[str]:
        rows = self._db.execute(
            "DELETE FROM version WHERE name = ? AND number NOT IN (SELECT current FROM adapter "
            "WHERE name = ? UNION SELECT previous FROM adapter WHERE name = ? AND previous "
            "IS NOT NULL) RETURNING digest",
            (name, name, name),
        )
        return [digest for (digest,) in rows.fetchall()]
