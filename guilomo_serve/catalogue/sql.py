"""Names, their versions and what is pinned: what every catalogue is asked, in SQL.

The statements are those that SQLite and PostgreSQL have in common; what differs (connections, the
tables' types, numbers) is in database.py and postgres.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

Value = str | int | float | bool | None


class CatalogueError(ValueError):
    """A catalogue that cannot be used; the message says what would help."""


@dataclass(frozen=True)
class Version:
    """What a name stood or stands for.

    Attributes:
        number: unique among all versions of the catalogue.
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

    @classmethod
    def of_row(cls, row: Sequence[Any]) -> Version:
        """The version of a row of the table `version`."""
        number, name, digest, source, size, about, created = row
        return cls(number, name, digest, source, size, json.loads(about), created)

    @property
    def row(self) -> tuple[Value, ...]:
        about = json.dumps(self.about)
        return (
            *(self.number, self.name, self.digest, self.source),
            *(self.size, about, self.created),
        )


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


class SqlCatalogue:
    """A catalogue over some database, with a table `version` and a table `adapter`."""

    def next_number(self) -> int:
        """A number for a version that is about to be loaded."""
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def _ask(self, statement: str, values: Sequence[Value] = ()) -> list[tuple[Any, ...]]:
        """The rows that a statement returns; `?` stands for each value."""
        raise NotImplementedError

    def _transaction(self) -> AbstractContextManager[Any]:
        """All statements of the block have their effect together, or none has."""
        raise NotImplementedError

    def get(self, name: str) -> Entry | None:
        return self._entries("WHERE name = ?", name).get(name)

    def page(self, after: str, limit: int) -> dict[str, Entry]:
        """The first `limit` names that come after one, in their order, with their entries."""
        return self._entries("WHERE name > ? ORDER BY name LIMIT ?", after, limit)

    def all(self) -> dict[str, Entry]:
        return self._entries("")

    def listed(self, limit: int) -> dict[str, Listed]:
        """The first `limit` names, each with what is short to say of its current version."""
        rows = self._ask(
            "SELECT adapter.name, source, digest, number "
            "FROM adapter JOIN version ON current = number ORDER BY adapter.name LIMIT ?",
            (limit,),
        )
        return {name: Listed(*about) for name, *about in rows}

    def _entries(self, which: str, *values: str | int) -> dict[str, Entry]:
        """Args: which: clauses that choose rows of the table `adapter`."""
        chosen = f"(SELECT * FROM adapter {which}) AS chosen"
        numbers = f"SELECT current FROM {chosen} UNION ALL SELECT previous FROM {chosen}"
        rows = self._ask(f"SELECT * FROM version WHERE number IN ({numbers})", (*values, *values))
        versions = {row[0]: Version.of_row(row) for row in rows}
        rows = self._ask(
            f"SELECT name, current, previous, pinned FROM {chosen} ORDER BY name", values
        )
        return {
            name: Entry(versions[current], versions.get(previous), bool(pinned))
            for name, current, previous, pinned in rows
        }

    def pinned(self) -> set[str]:
        """The names that are pinned."""
        return {name for (name,) in self._ask("SELECT name FROM adapter WHERE pinned")}

    def digests(self) -> set[str]:
        """The digests of all current and previous versions."""
        return {digest for (digest,) in self._ask("SELECT digest FROM version")}

    def has_digest(self, digest: str) -> bool:
        """Whether a current or previous version has it."""
        return bool(self._ask("SELECT 1 FROM version WHERE digest = ?", (digest,)))

    def put(self, version: Version) -> list[str]:
        """Makes a version the current one of its name; the current one becomes the previous.

        Returns:
            The digests of versions that are forgotten for it.
        """
        with self._transaction():
            self._insert(version)
            self._ask(
                "INSERT INTO adapter (name, current) VALUES (?, ?) ON CONFLICT (name) "
                "DO UPDATE SET previous = adapter.current, current = excluded.current",
                (version.name, version.number),
            )
            return self._forget_unused(version.name)

    def delete(self, name: str) -> list[str]:
        """Forgets a name; returns the digests of its versions."""
        with self._transaction():
            self._ask("DELETE FROM adapter WHERE name = ?", (name,))
            return self._forget_unused(name)

    def set(self, name: str, entry: Entry) -> list[str]:
        """Has a name stand for what it does in another catalogue; returns as `put`."""
        with self._transaction():
            self._ask("DELETE FROM adapter WHERE name = ?", (name,))
            before = self._forget_unused(name)
            known = [v for v in (entry.current, entry.previous) if v is not None]
            for version in known:
                self._insert(version)
            previous = entry.previous.number if entry.previous else None
            row = (name, entry.current.number, previous, entry.pinned)
            self._ask("INSERT INTO adapter VALUES (?, ?, ?, ?)", row)
        return [digest for digest in before if digest not in {v.digest for v in known}]

    def pin(self, name: str, pinned: bool) -> None:
        self._ask("UPDATE adapter SET pinned = ? WHERE name = ?", (pinned, name))

    def _insert(self, version: Version) -> None:
        self._ask("INSERT INTO version VALUES (?, ?, ?, ?, ?, ?, ?)", version.row)

    def _forget_unused(self, name: str) -> list[str]:
        rows = self._ask(
            "DELETE FROM version WHERE name = ? AND number NOT IN (SELECT current FROM adapter "
            "WHERE name = ? UNION SELECT previous FROM adapter WHERE name = ? AND previous "
            "IS NOT NULL) RETURNING digest",
            (name, name, name),
        )
        return [digest for (digest,) in rows]
