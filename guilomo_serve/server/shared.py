"""Versions of a catalogue that replicas share.

What is known of names here is a copy of the shared catalogue, which follows it: so requests and
listings ask no database. A change is made in the database, with all replicas, and comes here on the
same way as everybody's. Files are copied from where replicas share them into a store of the
server's own, so that nothing is deleted that it still reads.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from guilomo_serve.adapter import AdapterError
from guilomo_serve.catalogue import Entry, Settings, Source, Version
from guilomo_serve.catalogue.replicas import Change
from guilomo_serve.catalogue.settings import Admission
from guilomo_serve.catalogue.shared_files import shared_files
from guilomo_serve.server import lifecycle
from guilomo_serve.server.fleet import Fleet
from guilomo_serve.server.leases import leases
from guilomo_serve.server.versions import Versions
from guilomo_serve.timing import part


@dataclass
class _Making:
    """A change that this replica makes; `everywhere`: each replica loads what it brings."""

    change: Change
    everywhere: bool = True


class SharedVersions(Versions):
    """See `Versions`, whose arguments these are. A `Follower` of the fleet."""

    def __init__(self, settings: Settings, *args: Any) -> None:
        super().__init__(settings, *args)
        assert settings.shared is not None
        assert settings.files is not None
        self._files = shared_files(settings.files)
        self._fleet = Fleet(settings.shared, self, settings.admission, settings.admin_key)
        self._making: dict[str, _Making] = {}
        self._pinned: set[asyncio.Task[None]] = set()  # which load what is pinned

    def out_of_touch(self) -> str | None:
        return self._fleet.out_of_touch()

    async def restore(self) -> None:
        await self._fleet.join()
        lifecycle.is_replica(self.out_of_touch, self._fleet.leave)
        for name in sorted(self.catalogue.pinned()):
            await self._try_to_bring_in(name)

    def replace(self, entries: dict[str, Entry]) -> None:
        for name in self.catalogue.all().keys() | entries.keys():
            self.apply(name, entries.get(name))

    def apply(self, name: str, entry: Entry | None) -> None:
        if entry is None:
            if self.catalogue.get(name) is not None:
                self._forget(name, self.catalogue.delete(name))
            return
        self._unwanted.update(self.catalogue.set(name, entry))
        loaded = self.request_of(entry.current)
        if not self.residency.is_resident(loaded):
            self.residency.withdraw(name)  # it is loaded when it is asked for, or
            if entry.pinned:
                task = asyncio.create_task(self._try_to_bring_in(name))
                self._pinned.add(task)  # asyncio alone would let go of it
                task.add_done_callback(self._pinned.discard)
        elif self.residency.current.get(name) != loaded:
            self._start_serving(entry.current, loaded)
        self._discard()

    async def prepare(self, version: Version) -> None:
        async with self._only_one(version.name):
            with self._copying():
                await asyncio.to_thread(self._have, version.digest)
                await self._fill(version, self.request_of(version))

    def drop(self, version: Version) -> None:
        loaded = self.request_of(version)
        if self.residency.is_resident(loaded):
            self.residency.unload(loaded)
        self._discard(version.digest)

    def admit(self, admission: Admission) -> None:
        leases.admission = admission

    def _changing(self, name: str) -> AbstractAsyncContextManager[None]:
        return self._in_the_fleet(name)

    @asynccontextmanager
    async def _in_the_fleet(self, name: str) -> AsyncIterator[None]:
        async with self._fleet.changing(name) as change:
            self._making[name] = _Making(change)
            try:
                yield
            finally:
                del self._making[name]

    async def _take_in(self, name: str, member: Source) -> None:
        async with self._changing(name):
            if self.catalogue.get(name) is None:
                self._making[name].everywhere = False
                with self._copying():
                    await self._put(name, member)

    async def _make_current(self, version: Version) -> Version:
        making = self._making[version.name]
        number = await self._fleet.ask(making.change.next_number)
        version = replace(version, number=number)
        with part("load"):
            revision, forgotten = await self._fleet.agree(
                making.change, version, making.everywhere, lambda: self._publish(version.digest)
            )
        await self._settle(making, revision, forgotten)
        return version

    async def _remove(self, name: str) -> None:
        making = self._making[name]
        await self._settle(making, *await self._fleet.ask(making.change.remove))

    async def _set_pinned(self, name: str, pinned: bool) -> None:
        making = self._making[name]
        revision = await self._fleet.ask(making.change.set_pinned, pinned)
        await self._settle(making, revision, [])

    async def _settle(self, making: _Making, revision: int, forgotten: list[str]) -> None:
        """Waits until a change is so everywhere; then nobody needs the files that it left over."""
        with part("switch"):
            await self._fleet.settle(making.change, revision)
        if forgotten:
            await self._fleet.ask(making.change.discard, forgotten, self._files.discard)

    def _publish(self, digest: str) -> None:
        """Has an adapter's files where all replicas find them."""
        self._files.publish(digest, self._store.folder_of(digest))

    def _have(self, digest: str) -> None:
        try:
            self._store.verify(digest)
        except (AdapterError, OSError):
            self._files.fetch_into(self._store, digest)
