"""Names and their versions: put, rolled back, deleted, pinned, and brought in for a request.

An adapter is copied into the store and checked there, then loaded into the engine, then written to
the catalogue, and only then do requests get it: whatever fails before leaves the old version.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from vllm.logger import init_logger
from vllm.lora.request import LoRARequest

from guilomo_serve.adapter import AdapterError
from guilomo_serve.catalogue import (
    Catalogue,
    CatalogueError,
    Entry,
    Listed,
    Settings,
    Source,
    Sources,
    Store,
    Version,
    check_name,
    digest_of,
)
from guilomo_serve.catalogue.database import CATALOGUE_FILE
from guilomo_serve.room import default_memory
from guilomo_serve.runtime.identity import request_of
from guilomo_serve.server import prometheus
from guilomo_serve.server.errors import REFUSALS, NoRoom, Unknown
from guilomo_serve.server.inspection import memory_of
from guilomo_serve.server.leases import leases
from guilomo_serve.server.report import EngineReport
from guilomo_serve.server.residency import Residency
from guilomo_serve.timing import part

logger = init_logger("vllm.guilomo")

_GIVEN = "given"  # in what is known of a version: the command line gave it


class Versions:
    """The catalogue of a server, and what the engine has of it.

    Args:
        settings: of the server.
        engine_client: vLLM's.
        inspect: says what an adapter folder is; raises AdapterError for one that cannot be served.
        is_base_model: whether a name is the base model's.

    Attributes:
        catalogue: names and versions.
        sources: where adapters may be taken from.
        residency: which versions are in memory.
        report: what the engine says of them.
        failed: name -> why its version could not be loaded when that was last tried.
    """

    def __init__(
        self,
        settings: Settings,
        engine_client: Any,
        inspect: Callable[[Path], dict[str, Any]],
        is_base_model: Callable[[str], bool],
    ) -> None:
        state = settings.state
        if state is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="guilomo-serve-")
            state = Path(self._temporary.name)
        database = state / CATALOGUE_FILE if settings.state else Path(":memory:")
        self.catalogue = Catalogue(database)
        self._store = Store(state / "adapters", settings.roots)
        self.sources = Sources(self._store, settings.remote_roots)
        bound = default_memory() if settings.memory is None else settings.memory
        self.residency = Residency(
            engine_client,
            leases,
            bound,
            engine_client.vllm_config.lora_config.max_cpu_loras,
            self.catalogue.pinned,
            evicted=self._evicted,
            freed=lambda version: self._discard(Path(version.lora_path).name),
            fresh=lambda: self.out_of_touch() is None,
        )
        self.report = EngineReport(
            engine_client, self._with_series, modules=settings.expert_load == "modules"
        )
        self.failed: dict[str, str] = {}
        self._inspect = inspect
        self._is_base_model = is_base_model
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._itemsize = engine_client.model_config.dtype.itemsize
        self._putting = 0
        self._unwanted: set[str] = set()  # digests of copies that may not be needed any more
        prometheus.show(self.report, self.residency)

    def find(self, source: str) -> Source:
        """What an administrator names; see `Sources.find`."""
        return self.sources.find(source)

    def out_of_touch(self) -> str | None:
        """Why what is known of names here may not be so any more; None of a server alone."""
        return None

    def entry(self, name: str) -> Entry:
        entry = self.catalogue.get(name)
        if entry is None:
            raise Unknown(f"there is no adapter {name[:140]!a}")
        return entry

    def check_name(self, name: str) -> None:
        """Refuses a name that no adapter can have on this server.

        Raises:
            AdapterError: says which names it can have.
        """
        check_name(name)
        if self._is_base_model(name):
            raise AdapterError(f"{name} is the name of the base model")
        if name == prometheus.BASE:
            raise AdapterError(f"{name} stands for the base model in metrics; choose another name")

    async def put(
        self,
        name: str,
        source: Source,
        dry_run: bool = False,
        digest: str | None = None,
        given: bool = False,
    ) -> Version:
        """Makes an adapter the current version of a name.

        Args:
            name: new, or in use.
            source: folder or address, of which it is known that adapters may be taken from it.
            dry_run: check all that can be checked without the engine, change nothing.
            digest: what the adapter's digest has to be; None: anything.
            given: whether the command line says so, and no administrator. What it gives is not
                put again.

        Returns:
            The version that is served now, or with `dry_run` would be (its number is 0).

        Raises:
            AdapterError: it is refused; OSError, sqlite3.Error: it cannot be stored. The name
                stands for what it did.
        """
        self.check_name(name)
        began = time.monotonic()
        async with self._only_one(name) if dry_run else self._changing(name):
            known = self.catalogue.get(name)
            if given and known is not None and known.current.digest == digest:
                return known.current
            replaces = known is not None and not dry_run
            with self._copying():
                version = await self._put(name, source, dry_run, digest, given)
            if replaces:
                prometheus.swapped(name, began)
            return version

    async def digest_at(self, name: str, source: Source) -> str:
        """The digest of an adapter that may be put; a folder is only read, and not copied.

        Raises:
            AdapterError, OSError: it has none.
        """
        if isinstance(source, Path):
            return await asyncio.to_thread(digest_of, source)
        return (await self.put(name, source, dry_run=True)).digest

    async def rollback(self, name: str) -> Version:
        """Makes the version before the current one the current one, as a new version.

        Raises:
            Unknown: there is no such name; CatalogueError: it has had one version only.
        """
        began = time.monotonic()
        async with self._changing(name):
            previous = self.entry(name).previous
            if previous is None:
                raise CatalogueError(f"{name} has no previous version")
            with self._copying():
                await asyncio.to_thread(self._have, previous.digest)
                about = {**previous.about, _GIVEN: False}
                now = time.time()
                version = await self._make_current(replace(previous, about=about, created=now))
            prometheus.swapped(name, began)
            return version

    async def delete(self, name: str) -> None:
        """Takes a name away; running requests finish.

        Raises:
            Unknown: there is no such name.
        """
        async with self._changing(name):
            self.entry(name)
            await self._remove(name)

    async def pin(self, name: str, pinned: bool) -> None:
        """Keeps a name's weights in memory however long nobody asks for it, or no longer so.

        What is pinned is loaded if it is not in memory. It is pinned before, as something else
        could take its room until then.

        Raises:
            Unknown: there is no such name; NoRoom, AdapterError, OSError: it cannot be loaded, and
                is not pinned.
        """
        async with self._changing(name):
            was = self.entry(name).pinned
            await self._set_pinned(name, pinned)
        if not pinned:
            return
        try:
            await self.bring_in(name, None)
        except BaseException:
            async with self._changing(name):
                if not was and self.catalogue.get(name) is not None:
                    await self._set_pinned(name, False)
            raise

    async def bring_in(self, name: str, member: Source | None) -> None:
        """Loads a name that a request asks for: one that was evicted, or a member of a root.

        Args:
            name: a name that adapters can have.
            member: what a root has under that name, if the catalogue has not.

        Raises:
            Unknown: it was deleted just now.
            AdapterError: it is refused; OSError, sqlite3.Error: it cannot be stored.
        """
        if member is not None and self.catalogue.get(name) is None:
            await self._take_in(name, member)
        async with self._only_one(name):
            while self.residency.current.get(name) is None:
                with self._copying():
                    await self._load(self.entry(name).current)

    async def restore(self) -> None:
        """Loads the names that are pinned; the others are loaded when they are asked for."""
        await asyncio.to_thread(self._store.prune, self.catalogue.digests())
        for name in sorted(self.catalogue.pinned()):
            await self._try_to_bring_in(name)

    async def give(self, name: str, folder: Path) -> None:
        """Puts an adapter of the command line, or loads what the catalogue has of its name.

        What a command line gave, the next one replaces; what an administrator put stays.

        Raises:
            AdapterError: it is refused.
        """
        digest = await asyncio.to_thread(digest_of, folder)
        known = self.catalogue.get(name)
        changed = known is not None and known.current.digest != digest
        replaceable = known is None or (known.current.about.get(_GIVEN) and not known.pinned)
        if known is None or (changed and replaceable):
            await self.put(name, folder, digest=digest, given=True)
            return
        await self._try_to_bring_in(name)
        if changed:
            logger.warning(
                "Adapter '%s' is version %d from %s, which an administrator has put, rolled back "
                "to or pinned; the folder on the command line, %s, holds another one: put it to "
                "serve it",
                *(name, known.current.number, known.current.source, folder),
            )

    async def _try_to_bring_in(self, name: str) -> None:
        try:
            await self.bring_in(name, None)
        except NoRoom as e:
            logger.warning("Adapter '%s' is loaded when it is asked for: %s", name, e)
        except REFUSALS:
            pass  # `failed` and the log have the reason

    async def names(self, limit: int) -> dict[str, Listed]:
        """Names that can be asked for, in their order.

        Args:
            limit: how many at most, those of the catalogue first; 0: those in memory alone.
        """
        if not limit:
            known = ((name, self.catalogue.get(name)) for name in sorted(self.residency.current))
            return {
                name: Listed(entry.current.source, entry.current.digest, entry.current.number)
                for name, entry in known
                if entry is not None
            }
        found = self.catalogue.listed(limit)
        for name in sorted(await asyncio.to_thread(self.sources.members, limit)):
            if len(found) >= limit:
                break
            with contextlib.suppress(AdapterError):  # a folder of a name that no adapter can have
                self.check_name(name)
                found.setdefault(name, Listed(name))
        return dict(sorted(found.items()))

    def in_flight(self, name: str) -> int:
        return leases.of(name)

    def last_used(self, name: str) -> float | None:
        return leases.last_used.get(name)

    def resident(self) -> set[int]:
        """Ids of the versions whose weights are in memory."""
        return {resident.version.lora_int_id for resident in self.residency.resident()}

    async def load_of(self, name: str) -> dict[str, Any]:
        """How the routers of a name's current version have shared out the tokens sampled so far.

        Raises:
            Unknown: there is no such name.
        """
        version = self.entry(name).current
        found = await self.report.ask(self.request_of(version).lora_int_id)
        return {
            "name": name,
            "version": version.number,
            **{k: found[k] for k in ("tokens", "modules")},
        }

    @asynccontextmanager
    async def _only_one(self, name: str) -> AsyncIterator[None]:
        """One load of a name at a time; a lock is gone when nobody has or wants it."""
        lock = self._locks.setdefault(name, asyncio.Lock())
        async with lock:
            yield

    def _changing(self, name: str) -> AbstractAsyncContextManager[None]:
        """One change of a name at a time, on a server alone the same as one load."""
        return self._only_one(name)

    async def _take_in(self, name: str, member: Source) -> None:
        """Puts a member of a root that nobody has put."""
        async with self._changing(name):
            if self.catalogue.get(name) is None:
                with self._copying():
                    await self._put(name, member)

    async def _remove(self, name: str) -> None:
        self._forget(name, self.catalogue.delete(name))

    def _forget(self, name: str, digests: Collection[str]) -> None:
        """Frees what a name had that the catalogue has no more."""
        self._unwanted.update(digests)
        self.residency.withdraw(name)
        self._discard()
        self.failed.pop(name, None)
        leases.last_used.pop(name, None)
        prometheus.series.forget(name)
        logger.info("Adapter '%s' was deleted", name)

    async def _set_pinned(self, name: str, pinned: bool) -> None:
        self.catalogue.pin(name, pinned)

    async def _put(
        self,
        name: str,
        source: Source,
        dry_run: bool = False,
        digest: str | None = None,
        given: bool = False,
    ) -> Version:
        stored, about, origin = await self.sources.add(source, self._inspect)
        self._unwanted.add(stored.digest)  # until the catalogue has it
        if digest is not None and digest != stored.digest:
            raise AdapterError(f"{origin}: its digest is {stored.digest}, expected {digest}")
        size, now = stored.size, time.time()
        about = {**about, _GIVEN: given}
        version = Version(0, name, stored.digest, origin, size, about, now)
        return version if dry_run else await self._make_current(version)

    async def _make_current(self, version: Version) -> Version:
        version = replace(version, number=self.catalogue.next_number())
        loaded = self.request_of(version)
        try:
            await self._fill(version, loaded)
        except NoRoom:
            raise
        except AdapterError as e:  # it names the copy
            raise AdapterError(str(e).replace(loaded.lora_path, version.source)) from None
        try:
            with part("catalogue"):
                self._unwanted.update(self.catalogue.put(version))
        except BaseException:
            self.residency.unload(loaded)
            raise
        self._start_serving(version, loaded)
        return version

    async def _load(self, version: Version) -> None:
        loaded = self.request_of(version)
        try:
            await asyncio.to_thread(self._have, version.digest)
            await self._fill(version, loaded)
        except NoRoom:
            raise
        except (AdapterError, OSError) as e:
            self.failed[version.name] = str(e)
            logger.error("Adapter '%s' of the catalogue is not served: %s", version.name, e)
            raise
        entry = self.catalogue.get(version.name)
        if entry is not None and entry.current.digest == version.digest:
            self._start_serving(version, loaded)
        else:  # a replica has changed the name meanwhile
            self.residency.unload(loaded)

    def _have(self, digest: str) -> None:
        """Makes sure that the store has an adapter's files.

        Raises:
            AdapterError: they are gone, or have changed.
        """
        self._store.verify(digest)

    async def _fill(self, version: Version, loaded: LoRARequest) -> None:
        folder = self._store.folder_of(version.digest)
        room = await asyncio.to_thread(memory_of, folder, self._itemsize)
        await self.residency.load(version.name, loaded, room)

    def _start_serving(self, version: Version, loaded: LoRARequest) -> None:
        self.residency.switch(version.name, loaded)
        leases.last_used.setdefault(version.name, time.time())
        self.failed.pop(version.name, None)
        prometheus.series.of(version.name).loads += 1
        logger.info("Adapter '%s': version %d, %s", version.name, version.number, version.digest)

    def request_of(self, version: Version) -> LoRARequest:
        """A version as vLLM knows it."""
        folder = self._store.folder_of(version.digest)
        return request_of(version.name, version.digest, str(folder))

    @staticmethod
    def _evicted(name: str) -> None:
        prometheus.series.of(name).evictions += 1

    def _with_series(self) -> list[int]:
        """The versions whose load /metrics shows."""
        found = (self.residency.current.get(name) for name, _ in prometheus.series.all())
        return [version.lora_int_id for version in found if version is not None]

    @contextmanager
    def _copying(self) -> Iterator[None]:
        """Keeps copies from being pruned while one may be on its way into the catalogue."""
        self._putting += 1
        try:
            yield
        finally:
            self._putting -= 1
            self._discard()

    def _discard(self, *digests: str) -> None:
        """Deletes copies that neither the catalogue has nor a request that still runs."""
        self._unwanted.update(digests)
        if self._putting:
            return
        # The engine may have to read the files of a version that retires once more.
        in_use = {Path(r.version.lora_path).name for r in self.residency.resident()}
        for digest in self._unwanted - in_use:
            self._unwanted.discard(digest)
            if not self.catalogue.has_digest(digest):
                self._store.discard(digest)
