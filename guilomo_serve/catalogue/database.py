"""Names, their versions and what is pinned, in SQLite.

One server at a time has a catalogue: it keeps the database locked, and the lock goes with its
process however that ends.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
class Entry:
    """A name: the version it stands for, the one before, and whether it is pinned."""

    current: Version
    previous: Version | None
    pinned: bool


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

    def close(self) -> None:
        self._db.close()

    def next_number(self) -> int:
        """A number for a version that is about to be loaded."""
        self._last += 1
        return self._last

    def get(self, name: str) -> Entry | None:
        return self._entries("WHERE name = ?", name).get(name)

    def all(self) -> dict[str, Entry]:
        """All names with their entries, in the order of the names."""
        return self._entries("")

    def _entries(self, where: str, *values: str) -> dict[str, Entry]:
        versions = {
            number: Version(number, name, digest, source, size, json.loads(about), created)
            for number, name, digest, source, size, about, created in self._db.execute(
                f"SELECT number, name, digest, source, size, about, created FROM version {where}",
                values,
            )
        }
        rows = self._db.execute(
            f"SELECT name, current, previous, pinned FROM adapter {where} ORDER BY name", values
        )
        return {
            name: Entry(versions[current], versions.get(previous), bool(pinned))
            for name, current, previous, pinned in rows
        }

    def sources(self) -> dict[str, str]:
        """Name -> what its current version was taken from."""
        return dict(
            self._db.execute(
                "SELECT adapter.name, source FROM adapter JOIN version ON current = number"
            )
        )

    def pinned(self) -> set[str]:
        """The names that are pinned."""
        return {name for (name,) in self._db.execute("SELECT name FROM adapter WHERE pinned")}

    def digests(self) -> set[str]:
        """The digests of all current and previous versions."""
        return {digest for (digest,) in self._db.execute("SELECT digest FROM version")}

    def put(self, version: Version) -> None:
        """Makes a version the current one of its name; the current one becomes the previous."""
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
            self._forget_unused()

    def delete(self, name: str) -> None:
        with self._db:
            self._db.execute("BEGIN")
            self._db.execute("DELETE FROM adapter WHERE name = ?", (name,))
            self._forget_unused()

    def pin(self, name: str, pinned: bool) -> None:
        self._db.execute("UPDATE adapter SET pinned = ? WHERE name = ?", (pinned, name))

    def _forget_unused(self) -> None:
        self._db.execute(
            "DELETE FROM version WHERE number NOT IN (SELECT current FROM adapter UNION "
            "SELECT previous FROM adapter WHERE previous IS NOT NULL)"
        )
