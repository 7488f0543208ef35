"""Adapters of a server that `guilomo-serve` started: those of its catalogue, and of its roots.

An adapter is copied into the store and checked there, then loaded into the engine, then written to
the catalogue, and only then do requests get it: whatever fails before leaves the old version.
"""

from __future__ import annotations

import asyncio
import errno
import sqlite3
import tempfile
import time
from dataclasses import replace
from functools import cached_property
from http import HTTPStatus
from pathlib import Path
from typing import Any

from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.exceptions import GracefulHTTPError
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest

from guilomo_serve.adapter import AdapterError, BaseModel
from guilomo_serve.catalogue import (
    Catalogue,
    CatalogueError,
    Entry,
    Forbidden,
    Missing,
    Settings,
    Source,
    Sources,
    Store,
    Unavailable,
    Version,
    check_name,
    digest_of,
)
from guilomo_serve.catalogue.sources import DOWN_FOR_S
from guilomo_serve.server import metrics
from guilomo_serve.server.access import administrating
from guilomo_serve.server.inspection import inspect
from guilomo_serve.server.limits import admit
from guilomo_serve.server.models import VersionedServingModels

logger = init_logger("vllm.guilomo")

# A member of a root that was refused is not read again at each request for it.
_REFUSED_FOR_S = 10.0
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, a quota, a process's limit
REFUSALS = (AdapterError, CatalogueError, OSError, sqlite3.Error)


class Unknown(CatalogueError):
    """The catalogue has no adapter of that name."""


class NoRoom(AdapterError):
    """All that is loaded is in use or pinned, and one adapter more would exceed the memory."""


class _Served(dict[str, LoRARequest]):
    """Name -> current version; vLLM asks `name in served` when a request begins."""

    def __init__(self) -> None:
        super().__init__()
        self.last_used: dict[str, float] = {}  # seconds since 1970

    def __contains__(self, name: object) -> bool:
        found = super().__contains__(name)
        if found:
            admit(str(name))
            self.last_used[str(name)] = time.time()
        return found


class ManagedServingModels(VersionedServingModels):
    """vLLM's list of models, over a catalogue.

    Attributes:
        catalogue: names and versions.
        failed: name -> why its version could not be loaded when the server started.
        report: what the engine says of the versions that it has.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings = Settings.from_environment()
        assert settings is not None
        self._settings = settings
        state = settings.state
        if state is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="guilomo-serve-")
            state = Path(self._temporary.name)
        self.catalogue = Catalogue(state / "catalogue.sqlite3")
        self._store = Store(state / "adapters", settings.roots)
        self._sources = Sources(self._store, settings.remote_roots)
        self._served = _Served()
        self.lora_requests = self._served
        self.failed: dict[str, str] = {}
        self._retiring_digests: list[str] = []
        self._resolving: set[asyncio.Task[LoRARequest | ErrorResponse]] = set()
        self._putting = 0
        self._held: dict[int, int] = {}  # version -> bytes that its weights take, or will take
        self._making_room = asyncio.Lock()
        # Name -> until when, and why.
        self._refused: dict[str, tuple[float, str | Unavailable]] = {}
        self.report = metrics.EngineReport(self.engine_client)
        metrics.know(*self.catalogue.all())
        metrics.show(self)

    @cached_property
    def _base(self) -> BaseModel | None:
        try:
            return BaseModel.from_config(self.model_config.hf_config)
        except ValueError:
            return None  # no plain causal LM to transformers; the engine checks shapes

    def _inspect(self, folder: Path) -> dict[str, Any]:
        return inspect(folder, self._base, self.engine_client.vllm_config.lora_config)

    # What operators do.

    def find(self, source: str) -> Source:
        return self._sources.find(source)

    def entry(self, name: str) -> Entry:
        entry = self.catalogue.get(name)
        if entry is None:
            raise Unknown(f"there is no adapter {name[:140]!a}")
        return entry

    async def put(
        self, name: str, source: Source, dry_run: bool = False, digest: str | None = None
    ) -> Version:
        """Makes an adapter the current version of a name.

        Args:
            name: new, or in use.
            source: folder or address, of which it is known that adapters may be taken from it.
            dry_run: check all that can be checked without the engine, change nothing.
            digest: what the adapter's digest has to be; None: anything.

        Returns:
            The version that is served now, or with `dry_run` would be (its number is 0).

        Raises:
            AdapterError: it is refused; OSError, sqlite3.Error: it cannot be stored. The name
                stands for what it did.
        """
        self._check_name(name)
        began = time.monotonic()
        async with self.lora_resolver_lock[name]:
            replaces = self.catalogue.get(name) is not None and not dry_run
            with _Counted(self):
                version = await self._put(name, source, dry_run, digest)
            if replaces:
                metrics.swapped(name, began)
            return version

    async def _put(
        self, name: str, source: Source, dry_run: bool = False, digest: str | None = None
    ) -> Version:
        stored, about, origin = await self._sources.add(source, self._inspect)
        if digest is not None and digest != stored.digest:
            raise AdapterError(f"{origin}: its digest is {stored.digest}, expected {digest}")
        size, now = stored.size, time.time()
        version = Version(0, name, stored.digest, origin, size, about, now)
        return version if dry_run else await self._make_current(version)

    async def rollback(self, name: str) -> Version:
        """Makes the version before the current one the current one, as a new version.

        Raises:
            Unknown: there is no such name; CatalogueError: it has had one version only.
        """
        began = time.monotonic()
        async with self.lora_resolver_lock[name]:
            previous = self.entry(name).previous
            if previous is None:
                raise CatalogueError(f"{name} has no previous version")
            with _Counted(self):
                await asyncio.to_thread(self._store.verify, previous.digest)
                version = await self._make_current(replace(previous, created=time.time()))
            metrics.swapped(name, began)
            return version

    async def delete(self, name: str) -> None:
        """Takes a name away; running requests finish.

        Raises:
            Unknown: there is no such name.
        """
        async with self.lora_resolver_lock[name]:
            self.entry(name)
            self.catalogue.delete(name)
            self._withdraw(name)
            self.failed.pop(name, None)
            self._served.last_used.pop(name, None)
            metrics.forget(name)
        logger.info("Adapter '%s' was deleted", name)

    def pin(self, name: str, pinned: bool) -> None:
        """Keeps a name's weights in memory however long nobody asks for it, or no longer so."""
        self.entry(name)
        self.catalogue.pin(name, pinned)

    def in_flight(self, name: str) -> int:
        return sum(self._in_flight(v) for v, of in list(self._names.items()) if of == name)

    def last_used(self, name: str) -> float | None:
        return self._served.last_used.get(name)

    async def resident(self) -> set[int]:
        """Numbers of the versions whose weights the engine has; while it is in a long step, had."""
        await self.report.try_refresh()
        return set(self.report.versions)

    async def load_of(self, name: str) -> dict[str, Any]:
        """How the routers of a name's current version have shared out the tokens sampled so far.

        Raises:
            Unknown: there is no such name.
        """
        self.entry(name)
        await self.report.refresh()
        version = self.entry(name).current.number
        found = self.report.versions.get(version, {"tokens": 0, "modules": {}})
        return {"name": name, "version": version, **{k: found[k] for k in ("tokens", "modules")}}

    # vLLM's interface.

    def is_base_model(self, model_name: str) -> bool:
        """vLLM asks this first of each request's model."""
        is_base = super().is_base_model(model_name)
        if not administrating.get():
            metrics.asked_for(metrics.BASE if is_base else model_name)
        return is_base

    async def init_static_loras(self) -> None:
        """Restores the catalogue, then adds the command line's adapters.

        Raises:
            AdapterError: an adapter of the command line is refused.
        """
        self._prune()
        entries = self.catalogue.all()
        for name in sorted(entries, key=lambda name: not entries[name].pinned):
            entry = entries[name]
            if self._excess(entry.current.size) > 0:
                continue  # loaded when it is asked for
            try:
                await asyncio.to_thread(self._store.verify, entry.current.digest)
                await self._load(entry.current)
            except (AdapterError, OSError) as e:
                self.failed[name] = str(e)
                logger.error("Adapter '%s' of the catalogue is not served: %s", name, e)
        for module in self.static_lora_modules or ():
            known = self.catalogue.get(module.name)
            if known is None:
                await self.put(module.name, Path(module.path))
            elif known.current.digest != await asyncio.to_thread(digest_of, Path(module.path)):
                logger.warning(
                    "Adapter '%s' is version %d from %s, as the catalogue has it; the folder on "
                    "the command line, %s, holds another one: put it to serve it",
                    *(module.name, known.current.number, known.current.source, module.path),
                )
        if self._settings.evict_idle is not None:
            self._evicting = asyncio.create_task(self._evict_idle(self._settings.evict_idle))

    async def show_available_models(self) -> Any:
        models = await super().show_available_models()
        sources = self.catalogue.sources()
        for card in models.data:
            card.root = sources.get(card.id, card.root)
        return models

    async def load_lora_adapter(self, request: Any, base_model_name: str | None = None) -> Any:
        name = request.lora_name
        if not administrating.get():
            return _not_allowed()
        if not request.load_inplace and self.catalogue.get(name) is not None:
            return create_error_response(f"{name} is loaded; replace it with load_inplace: true")
        try:
            await self.put(name, self.find(request.lora_path))
        except REFUSALS as e:
            return error_response(e, f"The adapter {name[:140]!a} is refused: ")
        return f"Success: LoRA adapter '{name}' added successfully."

    async def unload_lora_adapter(self, request: Any) -> Any:
        if not administrating.get():
            return _not_allowed()
        try:
            await self.delete(request.lora_name)
        except REFUSALS as e:
            return error_response(e)
        return f"Success: LoRA adapter '{request.lora_name}' removed successfully."

    async def resolve_lora(self, lora_name: str) -> LoRARequest | ErrorResponse:
        """Loads a name that is not loaded, to the end even if the client does not wait for it.

        Raises:
            GracefulHTTPError: 502, its storage cannot be asked; 503, there is no room for it.
        """
        resolving = asyncio.create_task(self._resolve(lora_name))
        self._resolving.add(resolving)
        resolving.add_done_callback(self._resolving.discard)
        return await asyncio.shield(resolving)

    async def _resolve(self, lora_name: str) -> LoRARequest | ErrorResponse:
        """Loads a name that is not loaded: one that was evicted, or a member of a root."""
        try:
            self._check_name(lora_name)
            known = self.catalogue.get(lora_name) is not None
            member = None if known else await self._sources.member(lora_name)
        except Unavailable as e:
            raise _not_now(lora_name, e) from None
        except REFUSALS as e:
            return create_error_response(str(e), status_code=status_of(e))
        admit(lora_name)
        async with self.lora_resolver_lock[lora_name]:
            loaded = self._served.get(lora_name)
            if loaded is not None:
                return loaded
            until, reason = self._refused.get(lora_name, (0.0, ""))
            if time.monotonic() < until:
                if isinstance(reason, Unavailable):
                    raise _not_now(lora_name, reason)
                return create_error_response(reason)
            try:
                with _Counted(self):
                    entry = self.catalogue.get(lora_name)
                    if entry is not None:
                        await asyncio.to_thread(self._store.verify, entry.current.digest)
                        await self._load(entry.current)
                    elif member is not None:
                        await self._put(lora_name, member)
                    else:
                        raise Missing(f"there is no adapter {lora_name!a}")  # deleted just now
            except Unavailable as e:
                self._refused[lora_name] = (time.monotonic() + DOWN_FOR_S, e)
                raise _not_now(lora_name, e) from None
            except NoRoom as e:
                raise _not_now(lora_name, e) from None
            except REFUSALS as e:
                reason = f"The adapter {lora_name!a} is refused: {e}"
                logger.warning("%s", reason)
                self._refused[lora_name] = (time.monotonic() + _REFUSED_FOR_S, reason)
                return create_error_response(reason)
            self._refused.pop(lora_name, None)
            return self._served[lora_name]

    # How it is done.

    def _check_name(self, name: str) -> None:
        check_name(name)
        if self.is_base_model(name):
            raise AdapterError(f"{name} is the name of the base model")
        if name == metrics.BASE:
            raise AdapterError(f"{name} stands for the base model in metrics; choose another name")

    async def _make_current(self, version: Version) -> Version:
        version = replace(version, number=self.catalogue.next_number())
        loaded = self._request_of(version)
        try:
            await self._add_in_room(loaded, version.size)
        except NoRoom:
            raise
        except AdapterError as e:  # it names the copy
            raise AdapterError(str(e).replace(loaded.lora_path, version.source)) from None
        try:
            self.catalogue.put(version)
        except BaseException:
            await self._remove(loaded)
            raise
        self._start_serving(version, loaded)
        return version

    async def _load(self, version: Version) -> None:
        loaded = self._request_of(version)
        await self._add_in_room(loaded, version.size)
        self._start_serving(version, loaded)

    async def _add_in_room(self, loaded: LoRARequest, size: int) -> None:
        """Loads weights of `size` bytes; adapters that were not used for longest go for them.

        Raises:
            NoRoom: all that could go is in use or pinned.
            AdapterError: the engine refuses it, or it is larger than all the room.
        """
        async with self._making_room:
            if loaded.lora_int_id not in self._held:  # else it is still on its way out
                await self._make_room(size)
            self._held[loaded.lora_int_id] = size
        try:
            await self._add_to_engine(loaded)
        except BaseException:
            self._held.pop(loaded.lora_int_id, None)
            raise

    async def _make_room(self, size: int) -> None:
        if self._settings.memory is not None and size > self._settings.memory:
            raise AdapterError(
                f"its weights have {size} bytes, expected at most {self._settings.memory} "
                "(--adapter-memory)"
            )
        while (excess := self._excess(size)) > 0:
            retiring = self._retiring.values()
            going = sum(self._held.get(v, 0) for v in retiring if not self._in_flight(v))
            if excess > going:
                name = self._least_recently_used()
                if name is not None:
                    self._evict(name, "makes room for another one")
                    continue
                if not self._retiring:
                    raise NoRoom(
                        f"there is no room for {size} bytes of weights: all that is loaded is in "
                        "use or pinned (--adapter-memory)"
                    )
            await asyncio.wait(self._retiring, return_when=asyncio.FIRST_COMPLETED)

    def _excess(self, size: int) -> int:
        """By how many bytes the weights would exceed the memory with `size` more."""
        if self._settings.memory is None:
            return 0
        return sum(self._held.values()) + size - self._settings.memory

    def _least_recently_used(self) -> str | None:
        pinned = self.catalogue.pinned()
        idle = [name for name in self._served if name not in pinned and not self.in_flight(name)]
        return min(idle, key=lambda name: self._served.last_used.get(name, 0.0), default=None)

    async def _remove(self, version: LoRARequest) -> None:
        await super()._remove(version)
        self._held.pop(version.lora_int_id, None)

    def _start_serving(self, version: Version, loaded: LoRARequest) -> None:
        self._switch(version.name, loaded)
        self._served.last_used.setdefault(version.name, time.time())
        self.failed.pop(version.name, None)
        metrics.know(version.name)
        metrics.LOADS.labels(version.name).inc()
        logger.info("Adapter '%s': version %d, %s", version.name, version.number, version.digest)

    def _request_of(self, version: Version) -> LoRARequest:
        return LoRARequest(
            lora_name=f"{version.name}@{version.number}",
            lora_int_id=version.number,
            lora_path=str(self._store.folder_of(version.digest)),
        )

    def _evict(self, name: str, why: str) -> None:
        self._withdraw(name)
        metrics.EVICTIONS.labels(name).inc()
        logger.info("Adapter '%s' %s: evicted", name, why)

    def _withdraw(self, name: str) -> None:
        loaded = self._served.pop(name, None)
        if loaded is not None:
            self._retire(loaded)

    async def _free_when_idle(self, version: LoRARequest) -> None:
        # Its files stay as long: a request on its way may need them to be read once more.
        digest = Path(version.lora_path).name
        self._retiring_digests.append(digest)
        try:
            await super()._free_when_idle(version)
        finally:
            self._retiring_digests.remove(digest)
            self._prune()

    def _prune(self) -> None:
        if self._putting == 0:  # or a copy that is not in the catalogue yet would be deleted
            self._store.prune(self.catalogue.digests() | set(self._retiring_digests))

    async def _evict_idle(self, after_s: float) -> None:
        while True:
            await asyncio.sleep(min(after_s / 2, 10.0))
            pinned = self.catalogue.pinned()
            for name in list(self._served.keys()):
                idle = time.time() - self._served.last_used.get(name, 0.0)
                if idle > after_s and name not in pinned and not self.in_flight(name):
                    self._evict(name, f"was not used for {idle:.0f} s")


class _Counted:
    """Keeps copies from being pruned while one of them may be on its way into the catalogue."""

    def __init__(self, models: ManagedServingModels) -> None:
        self._models = models

    def __enter__(self) -> None:
        self._models._putting += 1

    def __exit__(self, *_: object) -> None:
        self._models._putting -= 1
        self._models._prune()


def status_of(error: Exception) -> HTTPStatus:
    """The HTTP status that says what a refusal means to a client."""
    if isinstance(error, (Missing, Unknown)):
        return HTTPStatus.NOT_FOUND
    if isinstance(error, Forbidden):
        return HTTPStatus.FORBIDDEN
    if isinstance(error, NoRoom):
        return HTTPStatus.SERVICE_UNAVAILABLE
    if isinstance(error, Unavailable):
        return HTTPStatus.BAD_GATEWAY
    if isinstance(error, CatalogueError):
        return HTTPStatus.CONFLICT
    if isinstance(error, AdapterError):
        return HTTPStatus.BAD_REQUEST
    if isinstance(error, OSError) and error.errno not in _DISK_FULL:
        return HTTPStatus.INTERNAL_SERVER_ERROR
    return HTTPStatus.INSUFFICIENT_STORAGE


def error_response(error: Exception, prefix: str = "") -> ErrorResponse:
    """A refusal in the form of vLLM's errors, for an administrator: paths are in it as they are."""
    status = status_of(error)
    kinds = {
        HTTPStatus.NOT_FOUND: "NotFoundError",
        HTTPStatus.FORBIDDEN: "PermissionDeniedError",
        HTTPStatus.BAD_GATEWAY: "BadGatewayError",
    }
    kind = kinds.get(status, "BadRequestError" if status < 500 else "InternalServerError")
    response = create_error_response(f"{prefix}{error}", kind, status)
    response.error.message = f"{prefix}{error}"  # vLLM puts "<path>" for paths
    return response


def _not_now(name: str, error: Unavailable | NoRoom) -> GracefulHTTPError:
    """What may go better later, for a client: an exception, as vLLM makes 404 of other errors."""
    return GracefulHTTPError(
        f"The adapter {name!a} cannot be loaded now: {error}", status_of(error)
    )


def _not_allowed() -> ErrorResponse:
    return create_error_response(
        "only an administrator may change adapters", "PermissionDeniedError", HTTPStatus.FORBIDDEN
    )
