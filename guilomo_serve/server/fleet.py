"""This server as one of several replicas: its lease, what it learns from the others, its changes.

A replica serves adapters while its lease lasts: from when it sent a beat that the catalogue took,
for less than others wait before they take it for dead. Both are told by clocks that only count
seconds, each by its own, so no two clocks have to agree; they have to run equally fast up to the
margin. A process that was stopped finds its lease over when it goes on, before it answers.

docs/decisions.md has the argument why no answer is stale; catalogue/replicas.py what is in the
database.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, Protocol, TypeVar

import psycopg
from vllm.logger import init_logger

from guilomo_serve.catalogue import Entry, Version
from guilomo_serve.catalogue.keys import fingerprint
from guilomo_serve.catalogue.postgres import in_a_line
from guilomo_serve.catalogue.replicas import Change, Member, Peer, Vote, Withdrawn, listen
from guilomo_serve.catalogue.settings import ADMIN_KEY, Admission
from guilomo_serve.server.errors import REFUSALS, Declined, OutOfTouch, status_of

logger = init_logger("vllm.guilomo")

# After as long without a beat others take a replica for dead; it stops serving before.
LEASE_S, _MARGIN_S = 10.0, 1.0
_BEAT_S = 2.0
_LONGEST_BACK_OFF_S = 1.0  # so that a database that restarts is found well within a lease
_LOOK_S = 0.2  # what answers tell is looked for as often, should a message be lost
_LOADING_S = 300.0  # for the slowest replica
_CHANGES = 16  # at once; others wait for a thread

T = TypeVar("T")


class Follower(Protocol):
    """What is told of the catalogue: the server's versions."""

    def replace(self, entries: dict[str, Entry]) -> None:
        """All names, whatever was known before."""

    def apply(self, name: str, entry: Entry | None) -> None:
        """What a name stands for from now on; None: it was deleted."""

    async def prepare(self, version: Version) -> None:
        """Loads a version that may become current."""

    def drop(self, version: Version) -> None:
        """A version that was prepared is not needed, unless it has become current."""

    def admit(self, admission: Admission) -> None:
        """How much clients may ask from now on."""


class Fleet:
    """The replicas of a catalogue, as one of them sees them.

    Args:
        address: of the database.
        follower: is told what changes.
        admission: how much clients may ask, by this replica's flags. For all replicas that holds
            which came last: so a rollout of new flags ends with these, wherever requests go.
        key: the admin key. It has to be that of the replica that is there for longest.
    """

    def __init__(self, address: str, follower: Follower, admission: Admission, key: str) -> None:
        self._address, self._follower = address, follower
        self._flags, self._key = admission, fingerprint(key)
        self._admission = admission
        self._stranger: str | None = None
        self._id = secrets.token_hex(8)
        self._host = f"{socket.gethostname()}:{os.getpid()}"
        self._voice = ThreadPoolExecutor(1, "fleet")  # of the one connection that beats
        self._changers = ThreadPoolExecutor(_CHANGES, "change")
        self._until = -1.0
        self._applied = 0
        self._votes: list[Vote] = []
        self._withdrawn: list[int] = []
        self._loading: dict[int, tuple[Version, asyncio.Task[None]]] = {}
        self._seen: dict[str, tuple[int, float]] = {}  # replica -> its beats, and since when
        self._wake = asyncio.Event()
        self._member: Member | None = None

    def out_of_touch(self) -> str | None:
        """Why this replica may serve no adapters; None while its lease lasts."""
        if _now() < self._until:
            return self._stranger
        return "this replica cannot tell whether its adapters are current; ask another one"

    async def join(self) -> None:
        """Becomes one of the replicas, and knows all names; waits for the database."""
        self._living = asyncio.create_task(self._live())
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._listen, args=(loop,), daemon=True).start()
        while self.out_of_touch():
            await asyncio.sleep(_LOOK_S / 10)

    async def leave(self) -> None:
        """Serves no adapters any more, and is not waited for."""
        self._living.cancel()
        self._until = -1.0
        if self._member is not None:
            with suppress(psycopg.Error):
                await self._in(self._voice, self._member.leave)

    @asynccontextmanager
    async def changing(self, name: str) -> AsyncIterator[Change]:
        """A block in which no other replica changes a name, and all earlier changes are known.

        Raises:
            OutOfTouch: the database does not answer, or another change lasts for too long.
        """
        self._check()
        change = await self.ask(Change, self._address, self._id, name)
        try:
            await self._know(await self.ask(change.revision))
            yield change
        finally:
            await self._in(self._changers, change.close)

    async def agree(
        self, change: Change, version: Version, everywhere: bool, publish: Callable[[], None]
    ) -> tuple[int, list[str]]:
        """Has replicas load a version, then makes it current; see `Change.propose`.

        Returns:
            The revision that `settle` waits for, and digests of versions that are forgotten.

        Raises:
            Declined: a replica cannot load it. OutOfTouch: see `changing`. Nothing has changed.
        """
        number, done = version.number, None
        try:
            await self.ask(change.propose, version, everywhere, publish)
            deadline = _now() + _LOADING_S
            while _now() < deadline:
                votes = await self.ask(change.votes, number)
                for host, vote in votes:
                    if vote is not None and vote.refusal is not None:
                        raise Declined(f"replica {host}: {vote.refusal}", vote.status or 500)
                if all(vote for _, vote in votes):
                    done = await self.ask(change.commit, number)
                    if done is not None:
                        return done
                await self.ask(change.wait, _LOOK_S)
            raise OutOfTouch(f"a replica has not loaded it within {_LOADING_S:.0f} s")
        except Withdrawn:
            raise OutOfTouch("other replicas took this one for dead; try again") from None
        finally:
            if done is None:  # not in the change's connection, which may be gone
                self._withdrawn.append(number)
                self._wake.set()

    async def settle(self, change: Change, revision: int) -> None:
        """Waits until each replica that has a lease serves what a change has made of a name."""
        while await self.ask(change.behind, revision):
            await self.ask(change.wait, _LOOK_S)
        await self._know(revision)

    async def ask(self, question: Callable[..., T], *args: Any) -> T:
        """What a connection says, in a thread.

        Raises:
            OutOfTouch: the database does not answer.
        """
        try:
            return await self._in(self._changers, question, *args)
        except psycopg.errors.LockNotAvailable:
            raise OutOfTouch("another replica is changing it; try again") from None
        except psycopg.Error as e:
            logger.warning("The shared catalogue does not answer: %s", in_a_line(e))
            raise OutOfTouch(
                "the shared catalogue does not answer; what was being changed may have been"
            ) from None

    async def _know(self, revision: int) -> None:
        """Waits until this replica has applied a revision."""
        while self._applied < revision:
            self._check()
            self._wake.set()
            await asyncio.sleep(0.005)

    def _check(self) -> None:
        if reason := self.out_of_touch():
            raise OutOfTouch(reason)

    async def _live(self) -> None:
        back_off = _LONGEST_BACK_OFF_S / 16
        while True:
            try:
                about = (self._id, self._host, str(self._flags), self._key)
                self._member = await self._in(self._voice, Member, self._address, *about)
                try:
                    while True:
                        await self._turn(self._member)
                        back_off = _LONGEST_BACK_OFF_S / 16
                finally:
                    self._voice.submit(self._member.close)
            except psycopg.Error as e:
                logger.warning("The shared catalogue does not answer: %s", in_a_line(e))
            except Exception:
                logger.exception("What the shared catalogue says cannot be followed")
            await asyncio.sleep(back_off)
            back_off = min(2 * back_off, _LONGEST_BACK_OFF_S)

    async def _turn(self, member: Member) -> None:
        """One beat, and what is new with it; returns when it is time for the next one."""
        self._wake.clear()
        votes, withdrawn = list(self._votes), list(self._withdrawn)
        applied, sent = self._applied, _now()
        news = await self._in(self._voice, member.beat, applied, votes, withdrawn)
        if news is None:
            await self._enter(member)
            return
        del self._votes[: len(votes)]
        del self._withdrawn[: len(withdrawn)]
        self._agree_with(news.peers)
        self._until = sent + LEASE_S - _MARGIN_S
        for name, entry in news.changed.items():
            self._follower.apply(name, entry)
        self._applied = news.revision
        self._prepare({version.number: version for version in news.proposals})
        await self._expel_the_silent(member, news.peers)
        if self._applied == applied and not self._votes:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), _BEAT_S)

    async def _enter(self, member: Member) -> None:
        """Learns everything anew, as one who was not there or was taken for dead."""
        self._until = -1.0
        self._votes.clear()
        self._prepare({})
        revision, entries = await self._in(self._voice, member.join)
        self._follower.replace(entries)
        self._applied = revision
        logger.info("Replica %s knows the catalogue up to revision %d", self._host, revision)

    def _agree_with(self, peers: list[Peer]) -> None:
        """Has the limits that came last, and serves only with the key that came first."""
        stranger = None
        first = next((peer for peer in peers if peer.key is not None), None)
        if first is not None and first.key != self._key:
            stranger = (
                f"the admin key is another one than that of replica {first.host}: replicas have "
                f"one {ADMIN_KEY}; to change it, end all of them first"
            )
        if stranger and stranger != self._stranger:
            logger.error("This replica serves nothing: %s", stranger)
        self._stranger = stranger
        # Each where it came first: one that is started again with older flags changes nothing.
        came = list(dict.fromkeys(peer.admission for peer in peers if peer.admission is not None))
        admission = Admission.parse(came[-1]) if came else self._flags
        if admission != self._admission:
            logger.warning("Limits are now those of the replica that came last: %s", admission)
            self._admission = admission
            self._follower.admit(admission)

    def _prepare(self, proposals: dict[int, Version]) -> None:
        """Begins to load what is proposed, and drops what is no more."""
        for number, version in proposals.items():
            if number not in self._loading:
                self._loading[number] = (version, asyncio.create_task(self._load(version)))
        for number in self._loading.keys() - proposals.keys():
            version, task = self._loading.pop(number)
            task.add_done_callback(partial(self._drop, version))

    def _drop(self, version: Version, loaded: asyncio.Task[None]) -> None:
        self._follower.drop(version)

    async def _load(self, version: Version) -> None:
        try:
            await self._follower.prepare(version)
            vote = Vote(version.number)
        except REFUSALS as e:
            vote = Vote(version.number, str(e), status_of(e))
        except Exception as e:
            logger.exception("Adapter '%s' cannot be prepared", version.name)
            vote = Vote(version.number, f"{type(e).__name__}: {e}", 500)
        self._votes.append(vote)
        self._wake.set()

    async def _expel_the_silent(self, member: Member, peers: list[Peer]) -> None:
        now = _now()
        self._seen = {
            peer.replica: self._seen[peer.replica]
            if self._seen.get(peer.replica, (None,))[0] == peer.beat
            else (peer.beat, now)
            for peer in peers
        }
        for replica, (beat, since) in self._seen.items():
            silent = replica != self._id and now - since > LEASE_S
            if silent and await self._in(self._voice, member.expel, replica, beat):
                logger.warning("A replica was silent for %.0f s: taken for dead", now - since)

    def _listen(self, loop: asyncio.AbstractEventLoop) -> None:
        """Has the next beat at once where there is news, for as long as the process lives."""
        while not loop.is_closed():
            with suppress(psycopg.Error, RuntimeError):  # the loop may be closed by now
                listen(self._address, self._id, lambda: loop.call_soon_threadsafe(self._wake.set))
            time.sleep(_LONGEST_BACK_OFF_S)

    @staticmethod
    async def _in(pool: ThreadPoolExecutor, ask: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(pool, ask, *args)


def _now() -> float:
    """Seconds of a clock that nobody sets, and that goes on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
