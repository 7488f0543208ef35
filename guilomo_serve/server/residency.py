"""Which versions have their weights in the engine, and which of them new requests get.

One place decides what is in memory: versions come in through `load` within a bound, those that
nobody has used for longest go for them, and what is replaced or withdrawn goes when its last
request has ended.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Collection
from typing import Any

from vllm.exceptions import LoRAAdapterNotFoundError
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest
from vllm.v1.engine.exceptions import EngineDeadError

from guilomo_serve.adapter import AdapterError
from guilomo_serve.server.errors import NoRoom
from guilomo_serve.server.limits import admit

logger = init_logger("vllm.guilomo")  # below vLLM's root logger, or nobody would see it

# A request that has looked its adapter up may still be on its way to the engine.
_GRACE_S = 5.0
_POLL_S = 0.5
# How vLLM wraps an error on its way from a worker to the front end.
_WRAPPING = re.compile(
    r"^Call to \w+ method failed: (?:Worker failed with error ['\"](.*)['\"], please check|(.*)$)",
    re.DOTALL,
)


class Current(dict[str, LoRARequest]):
    """Name -> the version that new requests get; vLLM asks `name in current` when one begins."""

    def __init__(self) -> None:
        super().__init__()
        self.last_used: dict[str, float] = {}  # seconds since 1970

    def __contains__(self, name: object) -> bool:
        found = super().__contains__(name)
        if found:
            admit(str(name))
            self.last_used[str(name)] = time.time()
        return found


class Residency:
    """The versions in one engine's memory.

    Args:
        engine_client: vLLM's.
        bound: bytes that all weights may take; None: no bound.
        pinned: the names whose weights stay however long nobody asks for them.
        evicted, freed: are called with what left: a name; a version that the engine no longer has.

    Attributes:
        current: name -> the version that requests get which come from now on.
        names: version -> its public name, of versions that are on their way out too.
    """

    def __init__(
        self,
        engine_client: Any,
        bound: int | None = None,
        pinned: Callable[[], Collection[str]] = tuple,
        evicted: Callable[[str], None] = lambda name: None,
        freed: Callable[[LoRARequest], None] = lambda version: None,
    ) -> None:
        self._engine = engine_client
        self._bound = bound
        self._pinned = pinned
        self._evicted = evicted
        self._freed = freed
        self.current = Current()
        self.names: dict[int, str] = {}
        self._held: dict[int, int] = {}  # version -> bytes that its weights take, or will take
        self._retiring: dict[asyncio.Task[None], LoRARequest] = {}  # what frees it -> the version
        self._making_room = asyncio.Lock()

    async def load(self, version: LoRARequest, size: int = 0) -> None:
        """Loads `size` bytes of weights; names that were not used for longest go for them.

        Requests do not get the version before `switch`.

        Raises:
            NoRoom: all that could go is in use or pinned.
            LoRAAdapterNotFoundError: there is none at its path.
            AdapterError: the engine refuses it, or it is larger than all the room.
            EngineDeadError: the engine has ended.
        """
        async with self._making_room:
            if version.lora_int_id not in self._held:  # else it is still on its way out
                await self._make_room(size)
            self._held[version.lora_int_id] = size
        try:
            await self._add_to_engine(version)
        except BaseException:
            self._held.pop(version.lora_int_id, None)
            raise

    async def unload(self, version: LoRARequest) -> None:
        """Takes a version's weights out of the engine, whoever uses them."""
        await self._engine.remove_lora(version.lora_int_id)
        self._held.pop(version.lora_int_id, None)

    def switch(self, name: str, version: LoRARequest) -> None:
        """Gives requests that come from now on a version that is loaded."""
        self.names[version.lora_int_id] = name
        previous = self.current.get(name)
        self.current[name] = version
        if previous is not None:
            self._retire(previous)

    def withdraw(self, name: str) -> None:
        """Gives a name's version to no more requests; those that have it finish."""
        version = self.current.pop(name, None)
        if version is not None:
            self._retire(version)

    def in_flight(self, name: str) -> int:
        """How many requests of a name run or wait, with whichever version."""
        return sum(self._in_flight(v) for v, of in list(self.names.items()) if of == name)

    def retiring(self) -> list[LoRARequest]:
        """The versions that wait for their last request to end."""
        return list(self._retiring.values())

    def has_room(self, size: int) -> bool:
        return self._excess(size) <= 0

    async def evict_idle(self, after_s: float) -> None:
        """Frees, for ever, the weights of names that nobody asked for as long."""
        while True:
            await asyncio.sleep(min(after_s / 2, 10.0))
            pinned = self._pinned()
            for name in list(self.current.keys()):
                idle = time.time() - self.current.last_used.get(name, 0.0)
                if idle > after_s and name not in pinned and not self.in_flight(name):
                    self._evict(name, f"was not used for {idle:.0f} s")

    async def _add_to_engine(self, version: LoRARequest) -> None:
        try:
            await self._engine.add_lora(version)
        except EngineDeadError:
            raise
        except Exception as e:
            missing = LoRAAdapterNotFoundError(version.lora_name, version.lora_path)
            if str(missing) in str(e):
                raise missing from None
            raise AdapterError(_reason(e)) from None

    async def _make_room(self, size: int) -> None:
        if self._bound is not None and size > self._bound:
            raise AdapterError(
                f"its weights have {size} bytes, expected at most {self._bound} (--adapter-memory)"
            )
        while (excess := self._excess(size)) > 0:
            retiring = [version.lora_int_id for version in self._retiring.values()]
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
        """By how many bytes the weights would exceed the bound with `size` more."""
        return 0 if self._bound is None else sum(self._held.values()) + size - self._bound

    def _least_recently_used(self) -> str | None:
        pinned = self._pinned()
        idle = [name for name in self.current if name not in pinned and not self.in_flight(name)]
        return min(idle, key=lambda name: self.current.last_used.get(name, 0.0), default=None)

    def _evict(self, name: str, why: str) -> None:
        self.withdraw(name)
        self._evicted(name)
        logger.info("Adapter '%s' %s: evicted", name, why)

    def _in_flight(self, version: int) -> int:
        """How many requests are running or waiting that use a version."""
        states = list(self._engine.output_processor.request_states.values())
        used = [state.lora_request for state in states if state.lora_request is not None]
        return sum(request.lora_int_id == version for request in used)

    def _retire(self, version: LoRARequest) -> None:
        """Frees a version's weights once no request uses it."""
        task = asyncio.create_task(self._free_when_idle(version))
        self._retiring[task] = version
        task.add_done_callback(self._retired)

    def _retired(self, task: asyncio.Task[None]) -> None:
        self._freed(self._retiring.pop(task))

    async def _free_when_idle(self, version: LoRARequest) -> None:
        await asyncio.sleep(_GRACE_S)
        while self._in_flight(version.lora_int_id):
            await asyncio.sleep(_POLL_S)
        if version in self.current.values():
            return  # it is in use again
        await self.unload(version)
        self.names.pop(version.lora_int_id, None)
        logger.info("Adapter '%s' is no longer in use and was freed", version.lora_name)


def _reason(error: Exception) -> str:
    found = _WRAPPING.search(str(error))
    return (found[1] or found[2]) if found else str(error)
