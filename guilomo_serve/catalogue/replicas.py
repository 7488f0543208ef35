"""What replicas say to one another, through the catalogue that they share.

A replica is in the table `replica` while it is waited for, and counts its beats up there. A
version becomes current in two steps: it is proposed, each replica loads it and votes, and only then
it is written down, in one transaction with a revision of the catalogue; each replica applies that
and says so. Who has not beaten for a lease is taken out of the table, and with it what it has
proposed and the connections that it still has. Who finds itself gone has to read everything anew.

That there is one change of a name at a time is an advisory lock of the connection that makes it, so
that it ends with the replica. NOTIFY only saves time: what it tells of is looked for anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import psycopg

from guilomo_serve.catalogue.postgres import FILES, LOCKS, SharedCatalogue
from guilomo_serve.catalogue.sql import Entry, Version

_NEWS = "guilomo_news"  # a proposal, or a change: for all replicas
_ANSWERS = "guilomo_answers"  # a vote, or that a change is applied: for who makes one
_COLUMNS = "number, name, digest, source, size, about, created"
_PEERS = "SELECT id, host, beat, admission, key FROM replica ORDER BY joined"
# For another change of the same name to end, which waits for its slowest replica's load.
_PATIENCE = "60s"


class Withdrawn(Exception):
    """A proposal is gone: its replica was taken for dead."""


@dataclass(frozen=True)
class Vote:
    """What a replica says of a proposal.

    Attributes:
        number: the version's.
        refusal: why it cannot serve it, with an HTTP status; None if it has loaded it.
    """

    number: int
    refusal: str | None = None
    status: int | None = None


@dataclass(frozen=True)
class Peer:
    """A replica as others see it.

    Attributes:
        replica: its id.
        host: what people call it.
        beat: how often it has beaten.
        admission: how much clients may ask, by its flags; None of an older guilomo.
        key: the fingerprint of its admin key; None of an older guilomo.
    """

    replica: str
    host: str
    beat: int
    admission: str | None
    key: str | None


@dataclass(frozen=True)
class News:
    """What a replica learns with a beat.

    Attributes:
        peers: all replicas, this one too, as they joined.
        proposals: versions to be loaded.
        revision: of the catalogue, all of whose changes are in `changed`.
        changed: names since the revision that was known, with what they stand for; None: deleted.
    """

    peers: list[Peer]
    proposals: list[Version]
    revision: int
    changed: dict[str, Entry | None]


class Member(SharedCatalogue):
    """A replica's own connection.

    Args:
        address: postgresql://...
        replica: the replica's id.
        host: what people call it.
        admission, key: see `Peer`.
    """

    def __init__(
        self,
        address: str,
        replica: str,
        host: str,
        admission: str | None = None,
        key: str | None = None,
    ) -> None:
        super().__init__(address, _connection_of(replica))
        self._replica, self._about = replica, (host, admission, key)

    def join(self) -> tuple[int, dict[str, Entry]]:
        """Has other replicas wait for this one; returns the revision, and all names."""
        self._ask(
            "INSERT INTO replica (id, host, admission, key) VALUES (?, ?, ?, ?) "
            "ON CONFLICT DO NOTHING",
            (self._replica, *self._about),
        )
        # After that: what is committed later waits for this replica.
        with self._snapshot():
            return self.revision(), self.all()

    def beat(self, applied: int, votes: Sequence[Vote], withdrawn: Collection[int]) -> News | None:
        """Says that this replica lives, and asks what is new.

        Args:
            applied: the revision up to which it serves what names stand for.
            votes: on what was proposed.
            withdrawn: numbers of versions that it does not propose any more.

        Returns:
            None if it was taken for dead, and has to join anew.
        """
        for vote in votes:
            self._vote(vote)
        before = self._ask("SELECT applied FROM replica WHERE id = ?", (self._replica,))
        beaten = self._ask(
            "UPDATE replica SET beat = beat + 1, applied = ? WHERE id = ? RETURNING beat",
            (applied, self._replica),
        )
        if not beaten:
            return None
        if before != [(applied,)]:
            self._notify(_ANSWERS)
        for number in withdrawn:
            self._ask("DELETE FROM proposal WHERE number = ?", (number,))
            self._notify(_NEWS)
        with self._snapshot():
            proposals = self._ask(
                f"SELECT {_COLUMNS} FROM proposal WHERE everywhere OR owner = ?", (self._replica,)
            )
            revision = self.revision()
            names = "SELECT name FROM change WHERE revision > ?"
            changed = self._ask(names, (applied,)) if revision > applied else []
            entries = self._entries(f"WHERE name IN ({names})", applied) if changed else {}
            return News(
                [Peer(*row) for row in self._ask(_PEERS)],
                [Version.of_row(row) for row in proposals],
                revision,
                {name: entries.get(name) for (name,) in changed},
            )

    def expel(self, replica: str, beat: int) -> bool:
        """Takes a replica for dead, unless it has beaten again; ends its connections."""
        gone = self._ask(
            "DELETE FROM replica WHERE id = ? AND beat = ? RETURNING id", (replica, beat)
        )
        if gone:
            self._end_connections(replica)
            self._notify(_ANSWERS)
            self._notify(_NEWS)
        return bool(gone)

    def leave(self) -> None:
        """Nobody waits for this replica any more."""
        self._ask("DELETE FROM replica WHERE id = ?", (self._replica,))
        self._notify(_ANSWERS)

    def _vote(self, vote: Vote) -> None:
        try:
            self._ask(
                "INSERT INTO vote VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING",
                (vote.number, self._replica, vote.status, vote.refusal),
            )
        except psycopg.errors.ForeignKeyViolation:
            return  # it was withdrawn, or this replica was taken for dead
        self._notify(_ANSWERS)

    def _end_connections(self, replica: str) -> None:
        self._ask(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = ?",
            (_connection_of(replica),),
        )


class Change(SharedCatalogue):
    """A change of one name, which no other replica changes until this is closed.

    Args:
        address: postgresql://...
        replica: the id of the one that makes it.
        name: the adapter's.

    Raises:
        psycopg.errors.LockNotAvailable: another replica has been at it for too long.
    """

    def __init__(self, address: str, replica: str, name: str) -> None:
        super().__init__(address, _connection_of(replica))
        self._replica, self._name = replica, name
        try:
            self._db.execute(f"SET lock_timeout = '{_PATIENCE}'".encode())
            self._ask("SELECT pg_advisory_lock(hashtextextended(?, ?))", (name, LOCKS))
            self._db.execute(f"LISTEN {_ANSWERS}".encode())
            # Of a change that lost its connection, or its replica.
            self._ask("DELETE FROM proposal WHERE name = ?", (name,))
        except BaseException:
            self.close()
            raise

    def propose(self, version: Version, everywhere: bool, publish: Callable[[], None]) -> None:
        """Asks replicas to load a version.

        Args:
            version: of a number that no other has.
            everywhere: whether all have to, or the one that makes the change alone.
            publish: leaves the version's files where all replicas find them.
        """
        # What nobody has in the catalogue is deleted, but not between these two steps.
        self._ask("SELECT pg_advisory_lock_shared(?, ?)", (LOCKS, FILES))
        try:
            publish()
            self._ask(
                f"INSERT INTO proposal ({_COLUMNS}, owner, everywhere) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (*version.row, self._replica, everywhere),
            )
        finally:
            if not self._db.closed:
                self._ask("SELECT pg_advisory_unlock_shared(?, ?)", (LOCKS, FILES))
        self._notify(_NEWS)

    def votes(self, number: int) -> list[tuple[str, Vote | None]]:
        """The hosts of those who have to load a version, and what they say; None: nothing yet."""
        rows = self._ask(
            "SELECT host, vote.number, refusal, status FROM replica JOIN proposal "
            "ON proposal.number = ? AND (everywhere OR owner = id) LEFT JOIN vote "
            "ON vote.number = proposal.number AND vote.replica = id",
            (number,),
        )
        return [(host, Vote(*vote) if vote[0] is not None else None) for host, *vote in rows]

    def commit(self, number: int) -> tuple[int, list[str]] | None:
        """Makes a proposal the current version of the name, if all have loaded it.

        Returns:
            The new revision, and the digests of versions that are forgotten; None: not all have.

        Raises:
            Withdrawn: it is no proposal any more.
        """
        with self._db.transaction():
            self._ask("LOCK TABLE replica IN SHARE MODE")  # nobody joins or beats meanwhile
            votes = self.votes(number)
            if any(vote is None or vote.refusal is not None for _, vote in votes):
                return None
            rows = self._ask(
                f"DELETE FROM proposal WHERE number = ? RETURNING {_COLUMNS}", (number,)
            )
            if not rows:
                raise Withdrawn
            forgotten = self.put(Version.of_row(rows[0]))
            return self._revised(), forgotten

    def remove(self) -> tuple[int, list[str]]:
        """Forgets the name; returns the new revision, and the digests of its versions."""
        with self._db.transaction():
            forgotten = self.delete(self._name)
            return self._revised(), forgotten

    def set_pinned(self, pinned: bool) -> int:
        """Returns: the new revision."""
        with self._db.transaction():
            self.pin(self._name, pinned)
            return self._revised()

    def behind(self, revision: int) -> bool:
        """Whether a replica that is waited for has not applied a revision."""
        return bool(self._ask("SELECT 1 FROM replica WHERE applied < ? LIMIT 1", (revision,)))

    def wait(self, seconds: float) -> None:
        """Until a replica answers something, to whoever."""
        for _ in self._db.notifies(timeout=seconds, stop_after=1):
            pass

    def discard(self, digests: Collection[str], discard: Callable[[str], None]) -> None:
        """Calls `discard` with those digests that nobody has, unless somebody is adding some."""
        ((free,),) = self._ask("SELECT pg_try_advisory_lock(?, ?)", (LOCKS, FILES))
        if not free:
            return
        for digest in digests:
            proposed = self._ask("SELECT 1 FROM proposal WHERE digest = ?", (digest,))
            if not proposed and not self.has_digest(digest):
                discard(digest)
        self._ask("SELECT pg_advisory_unlock(?, ?)", (LOCKS, FILES))

    def _revised(self) -> int:
        """Counts the change; whoever changes something else waits for this one's transaction."""
        ((revision,),) = self._ask("UPDATE format SET revision = revision + 1 RETURNING revision")
        self._ask(
            "INSERT INTO change VALUES (?, ?) ON CONFLICT (name) "
            "DO UPDATE SET revision = excluded.revision",
            (self._name, revision),
        )
        self._notify(_NEWS)
        return int(revision)


def listen(address: str, replica: str, tell: Callable[[], Any]) -> None:
    """Calls `tell` when something may be new, for as long as the connection lasts."""
    with closing(SharedCatalogue(address, _connection_of(replica))) as ears:
        ears.listen(_NEWS, tell)


def _connection_of(replica: str) -> str:
    return f"guilomo {replica}"
