"""vLLM's list of models over a catalogue, in servers that `guilomo-serve` started.

Here is only what vLLM asks for; how it is done is in versions.py and residency.py.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from contextvars import Context
from functools import cached_property
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple

from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse, ModelCard, ModelPermission
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest

from guilomo_serve.adapter import BaseModel
from guilomo_serve.catalogue import Forbidden, Missing, Settings, Source, Unavailable
from guilomo_serve.catalogue.remote import Busy
from guilomo_serve.server import prometheus
from guilomo_serve.server.access import administrating
from guilomo_serve.server.errors import (
    REFUSALS,
    NoRoom,
    OutOfTouch,
    Unknown,
    error_response,
    not_allowed,
    not_now,
    status_of,
)
from guilomo_serve.server.inspection import inspect
from guilomo_serve.server.leases import current_lease, leases
from guilomo_serve.server.models import (
    VersionedServingModels,
    cannot_be_found,
    has_been_loaded,
)
from guilomo_serve.server.residency import Residency
from guilomo_serve.server.schemas import refusal
from guilomo_serve.server.versions import Versions

logger = init_logger("vllm.guilomo")

# A member of a root that was refused is not read again at each request for it; of how many that is
# remembered: clients choose the names.
_REFUSED_FOR_S = 10.0
_MOST_REFUSED = 1000


def _may_administer() -> bool:
    """Whether the call at hand may change adapters: of an administrator's request, or of none.

    A request has a lease in any server with the plugin. A call without one is the process's own:
    Ray Serve LLM loads an adapter so on a miss.
    """
    return administrating.get() or current_lease() is None


class _Coming(NamedTuple):
    """A name that is asked for and not loaded: whether there is one, and its way into memory."""

    found: asyncio.Task[Source | None]
    loaded: asyncio.Task[None]


class Refused:
    """Names that could not be loaded a moment ago, and why."""

    def __init__(self) -> None:
        self._until: OrderedDict[str, tuple[float, Exception]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._until)

    def check(self, name: str) -> None:
        """Raises why a name could not be loaded, if that was a moment ago."""
        until, error = self._until.get(name, (0.0, None))
        if error is not None and time.monotonic() < until:
            raise error

    def note(self, name: str, error: Exception) -> None:
        self._until[name] = (time.monotonic() + _REFUSED_FOR_S, error)
        self._until.move_to_end(name)
        if len(self._until) > _MOST_REFUSED:
            self._until.popitem(last=False)

    def forget(self, name: str) -> None:
        self._until.pop(name, None)


class ManagedServingModels(VersionedServingModels):
    """vLLM's list of models, over a catalogue: `versions`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._coming: dict[str, _Coming] = {}
        self._refused = Refused()

    def _make_residency(self) -> Residency:
        settings = Settings.from_environment()
        assert settings is not None
        self._evict_idle = settings.evict_idle
        self._list_models = settings.list_models
        kind: type[Versions] = Versions
        if settings.shared is not None:
            from guilomo_serve.server.shared import SharedVersions

            kind = SharedVersions
        self.versions = kind(settings, self.engine_client, self._inspect, super().is_base_model)
        leases.admission = settings.admission
        return self.versions.residency

    @cached_property
    def _base(self) -> BaseModel | None:
        try:
            return BaseModel.from_config(self.model_config.hf_config)
        except (AttributeError, ValueError):
            return None  # no plain causal LM to transformers; the engine checks shapes

    def _inspect(self, folder: Path) -> dict[str, Any]:
        return inspect(folder, self._base, self.engine_client.vllm_config)

    def is_base_model(self, model_name: str) -> bool:
        """vLLM asks this first of each request's model."""
        is_base = super().is_base_model(model_name)
        lease = current_lease()
        if lease is not None and not administrating.get():
            lease.asked = prometheus.BASE if is_base else model_name
        return is_base

    async def init_static_loras(self) -> None:
        """Restores the catalogue, then adds the command line's adapters.

        Raises:
            AdapterError: an adapter of the command line is refused.
        """
        await self.engine_client.collective_rpc("guilomo_warm_up")
        await self.versions.restore()
        for module in self.static_lora_modules or ():
            await self.versions.give(module.name, Path(module.path))
        if self._evict_idle is not None:
            self._evicting = asyncio.create_task(self.residency.evict_idle(self._evict_idle))

    async def show_available_models(self) -> Any:
        """The base, and as many names of adapters that can be asked for as are to be listed."""
        models = await self.registry.show_available_models()
        names = await self.versions.names(self._list_models)
        models.data += [
            ModelCard(
                id=name,
                root=listed.source,
                parent=self.base_model_paths[0].name,
                permission=[ModelPermission()],
                **listed.identity,
            )
            for name, listed in names.items()
        ]
        return models

    async def load_lora_adapter(self, request: Any, base_model_name: str | None = None) -> Any:
        name = request.lora_name
        if not _may_administer():
            return not_allowed()
        known = self.versions.catalogue.get(name)
        try:
            source = self.versions.find(request.lora_path)
            if known is None or request.load_inplace:
                await self.versions.put(name, source)
            else:
                if await self.versions.digest_at(name, source) != known.current.digest:
                    return has_been_loaded(name)
                await self.versions.bring_in(name, None)
        except REFUSALS as e:
            return error_response(e, f"The adapter {name[:140]!a} is refused: ")
        return f"Success: LoRA adapter '{name}' added successfully."

    async def unload_lora_adapter(self, request: Any) -> Any:
        if not _may_administer():
            return not_allowed()
        try:
            await self.versions.delete(request.lora_name)
        except Unknown:
            return cannot_be_found(request.lora_name)
        except REFUSALS as e:
            return error_response(e)
        return f"Success: LoRA adapter '{request.lora_name}' removed successfully."

    async def resolve_lora(self, lora_name: str) -> LoRARequest | ErrorResponse:
        """Loads a name that is not loaded, to the end even if no client waits for it any more.

        Raises:
            GracefulHTTPError: 502, its storage cannot be asked; 503, there is no room for it, or
                this replica cannot tell whether it is current.
            HTTPException: it has as many requests as it may have.
        """
        lease = current_lease()
        try:
            self.versions.check_name(lora_name)
            self._check_touch()
            self._refused.check(lora_name)
            coming = self._coming.get(lora_name) or self._bring_in(lora_name)
            await asyncio.shield(coming.found)
            if lease is not None:
                lease.take(lora_name)  # from here on nothing evicts the name
            await asyncio.shield(coming.loaded)
            self._check_touch()  # and no moment passes before the name's version is looked up
        except Busy as e:
            if lease is not None:
                seconds = math.ceil(e.retry_after_s or 1.0)
                lease.refusal = refusal(503, str(e), {"Retry-After": str(seconds)})
            raise not_now(lora_name, e) from None
        except (Unavailable, NoRoom, OutOfTouch) as e:
            raise not_now(lora_name, e) from None
        except (Forbidden, Missing, Unknown) as e:
            return create_error_response(str(e), status_code=status_of(e))
        except REFUSALS as e:
            return create_error_response(f"The adapter {lora_name!a} is refused: {e}")
        version = self.residency.current.get(lora_name)
        if version is None:
            deleted = f"the adapter {lora_name!a} was deleted"
            return create_error_response(deleted, status_code=HTTPStatus.NOT_FOUND)
        if lease is not None:
            lease.bind(version)
        return version

    def _check_touch(self) -> None:
        if reason := self.versions.out_of_touch():
            raise OutOfTouch(reason)

    def _bring_in(self, name: str) -> _Coming:
        """Begins to look for a name and to load it, once for all who wait."""
        # In a context of its own: it is no part of the request that happens to be the first.
        found = asyncio.create_task(self._find(name), context=Context())
        loaded = asyncio.create_task(self._load(name, found), context=Context())
        loaded.add_done_callback(lambda _: self._note(name, found, loaded))
        self._coming[name] = _Coming(found, loaded)
        return self._coming[name]

    async def _find(self, name: str) -> Source | None:
        """What a root has of a name; None for one of the catalogue."""
        known = self.versions.catalogue.get(name) is not None
        return None if known else await self.versions.sources.member(name)

    async def _load(self, name: str, found: asyncio.Task[Source | None]) -> None:
        await self.versions.bring_in(name, await found)

    def _note(
        self, name: str, found: asyncio.Task[Source | None], loaded: asyncio.Task[None]
    ) -> None:
        """Remembers for a while why a name that there is could not be loaded."""
        del self._coming[name]
        error = None if loaded.cancelled() else loaded.exception()
        if error is None:
            self._refused.forget(name)
        elif found.exception() is None and not isinstance(error, (NoRoom, OutOfTouch, Unknown)):
            logger.warning("The adapter '%s' cannot be loaded: %s", name, error)
            if isinstance(error, REFUSALS):
                self._refused.note(name, error)
