"""Which versions have their weights in the engine, and which of them new requests get.

One place decides what is in memory: versions come in through `load` within the bounds, those of
names that nobody has used for longest go for them, and a version that is replaced or withdrawn goes
when no request has a lease on it any more.

Two bounds: so many bytes, which nothing exceeds, and so many versions (`--max-cpu-loras`), which
those that are in use or pinned may exceed, as vLLM lets requests of more adapters wait for theirs.
"""

from __future__ import annotations

import asyncio
import re
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from vllm.exceptions import LoRAAdapterNotFoundError
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.v1.engine.exceptions import EngineDeadError

from guilomo_serve.adapter import AdapterError
from guilomo_serve.runtime.identity import public_name
from guilomo_serve.server.errors import NoRoom
from guilomo_serve.server.leases import Lease, Leases, current_lease
from guilomo_serve.timing import spent

logger = init_logger("vllm.guilomo")  # below vLLM's root logger, or nobody would see it

_POLL_S = 0.005  # for the workers, which answer between two steps
# Bytes of weights that workers on CPUs read between two steps, in some 60 ms for half as many.
# Beside the steps a thread of theirs took ten times as long, as steps leave it little of two cores;
# those of a GPU leave it the host.
_READ_AT_ONCE = 64 * 2**20
# How vLLM wraps an error on its way from a worker to the front end.
_WRAPPING = re.compile(
    r"^Call to \w+ method failed: (?:Worker failed with error ['\"](.*)['\"], please check|(.*)$)",
    re.DOTALL,
)


class Current(dict[str, LoRARequest]):
    """Name -> the version that requests get which come from now on.

    vLLM asks `name in current` once or twice before it takes `current[name]`, with the rendering of
    the prompt between. The first question is where a request takes its lease, and later ones get
    what is in the lease, whatever happened to the name meanwhile.

    Args:
        fresh: whether names stand here for what they do in the catalogue; else nobody gets one.
    """

    def __init__(self, fresh: Callable[[], bool]) -> None:
        super().__init__()
        self._fresh = fresh

    def __contains__(self, name: object) -> bool:
        lease = current_lease()
        if lease is None:
            return super().__contains__(name)
        if lease.version is not None and lease.name == name:
            return True
        version = self.get(str(name))
        if version is None or not self._fresh():
            return False
        lease.take(str(name))
        lease.bind(version)
        return True

    def __getitem__(self, name: str) -> LoRARequest:
        lease = current_lease()
        if lease is not None and lease.version is not None and lease.name == name:
            return lease.version
        return super().__getitem__(name)

    def number_of(self, name: str) -> int:
        """The version that a name stands for now, whoever asks."""
        return super().__getitem__(name).lora_int_id


@dataclass
class Resident:
    """A version in memory, or on its way there.

    Attributes:
        version: as vLLM knows it.
        name: its public name.
        room: bytes that are kept free for it.
        bytes: that its weights take once they are there, in all workers together.
        rank: of its largest module, once it is there.
    """

    version: LoRARequest
    name: str
    room: int
    bytes: int = 0
    rank: int = 0


class Residency:
    """The versions in one engine's memory.

    Args:
        engine_client: vLLM's.
        leases: of the server's requests.
        bound: bytes that all weights may take; None: no bound.
        most: versions that are kept for those who may ask for them.
        pinned: the names whose weights stay however long nobody asks for them.
        keeps_names: whether a name whose weights went for others still stands for its version.
        evicted, freed: are called with what goes: a name; a version that the engine no longer has.
        fresh: see `Current`.

    Attributes:
        current: name -> the version that requests get which come from now on.
    """

    def __init__(
        self,
        engine_client: Any,
        leases: Leases,
        bound: int | None = None,
        most: int = sys.maxsize,
        pinned: Callable[[], Collection[str]] = tuple,
        keeps_names: bool = False,
        evicted: Callable[[str], None] = lambda name: None,
        freed: Callable[[LoRARequest], None] = lambda version: None,
        fresh: Callable[[], bool] = lambda: True,
    ) -> None:
        self._engine = engine_client
        self._leases = leases
        self._bound = bound
        self._most = most
        self._pinned = pinned
        self._keeps_names = keeps_names
        self._evicted = evicted
        self._freed = freed
        self.current = Current(fresh)
        self._resident: dict[int, Resident] = {}
        self._removing: dict[int, asyncio.Task[None]] = {}
        if bound is not None:
            logger.info("Adapters may take %.2f GiB of memory (--adapter-memory)", bound / 2**30)
        leases.when_ended.append(self._free_if_done)

    async def load(self, name: str, version: LoRARequest, size: int = 0) -> None:
        """Loads weights that take `size` bytes; names that were not used for longest go for them.

        0 stands for a size that is not known before they are there.

        Requests do not get the version before `switch`.

        Raises:
            NoRoom: all that could go is in use or pinned.
            LoRAAdapterNotFoundError: there is none at its path.
            AdapterError: the engine refuses it, or it is larger than all the room.
            EngineDeadError: the engine has ended.
        """
        number = version.lora_int_id
        resident = self._resident.get(number)
        if resident is not None and resident.version == version:
            return  # what a name stands for now, or stood for and still has requests
        if resident is not None:
            raise NoRoom(
                f"vLLM's id of {version.lora_name} is that of {resident.version.lora_name}, which "
                "is in memory"
            )
        self._make_room(name, size)
        resident = self._resident[number] = Resident(version, name, size)
        try:
            if number in self._removing:
                await asyncio.shield(self._removing[number])
            outcomes = await self._add_to_engine(version, size)
        except BaseException:
            self._drop(version)
            raise
        resident.bytes = sum(outcome["bytes"] for outcome in outcomes)
        resident.room = resident.room or resident.bytes
        resident.rank = outcomes[0]["rank"]

    def unload(self, version: LoRARequest) -> None:
        """Takes out a version that was loaded, unless it is what a name stands for, or stood for
        and still has requests."""
        if self.current.get(public_name(version.lora_name)) != version:
            self._retire(version)

    def switch(self, name: str, version: LoRARequest) -> None:
        """Gives requests that come from now on a version that is loaded."""
        previous = self.current.get(name)
        self.current[name] = version
        if previous is not None and previous != version:
            self._retire(previous)

    def withdraw(self, name: str) -> None:
        """Gives a name's version to no more requests; those that have it finish."""
        version = self.current.pop(name, None)
        if version is not None:
            self._retire(version)

    def free(self, version: LoRARequest) -> None:
        """Takes a version out of memory, whatever stands for it or has it."""
        logger.info("Adapter '%s' is no longer in use and is freed", version.lora_name)
        self._drop(version)

    def is_resident(self, version: LoRARequest) -> bool:
        """Whether its weights are in memory, whole."""
        resident = self._resident.get(version.lora_int_id)
        return resident is not None and resident.version == version and resident.bytes > 0

    def resident(self) -> list[Resident]:
        """All versions in memory: those that names stand for, and those that retire."""
        return list(self._resident.values())

    def of(self, name: str) -> Resident | None:
        """The version that a name stands for; None where it is not in memory."""
        version = self.current.get(name)
        return None if version is None else self._resident.get(version.lora_int_id)

    async def evict_idle(self, after_s: float) -> None:
        """Frees, for ever, the weights of names that nobody asked for as long."""
        while True:
            await asyncio.sleep(min(after_s / 2, 10.0))
            for name in self._idle():
                idle = time.time() - self._leases.last_used.get(name, 0.0)
                if idle > after_s:
                    self._evict(name, f"was not used for {idle:.0f} s")

    async def _add_to_engine(self, version: LoRARequest, size: int) -> list[Any]:
        """Has the workers read it and put it into the layers.

        A small one on CPUs in a single call, as each call waits for a step of the engine; its files
        were just written or read here, so no disk is waited for. Others are read beside the steps.

        Returns:
            Of each worker the bytes that its weights take, and its rank.
        """
        about = (version.lora_name, version.lora_int_id, version.lora_path)
        began = time.perf_counter()
        try:
            outcomes = []
            if not (current_platform.is_cpu() and 0 < size <= _READ_AT_ONCE):
                await self._ask("guilomo_read", *about)
                while None in (outcomes := await self._ask("guilomo_has_read", about[1])):
                    await asyncio.sleep(_POLL_S)
            if not _refused(outcomes):
                outcomes = await self._ask("guilomo_add", *about)
        except EngineDeadError:
            raise
        except Exception as e:
            outcomes = [{"refused": _reason(e)}]
        if any(outcome.get("is_full") for outcome in outcomes):
            raise NoRoom(_refused(outcomes)[0])
        if refused := _refused(outcomes):
            missing = LoRAAdapterNotFoundError(version.lora_name, version.lora_path)
            raise missing if str(missing) in refused[0] else AdapterError(refused[0])
        reading = max(outcome["seconds"] for outcome in outcomes)
        spent("read", reading)
        spent("wait", time.perf_counter() - began - reading)
        return outcomes

    async def _ask(self, method: str, *args: Any) -> list[Any]:
        """Each worker's answer."""
        answers: list[Any] = await self._engine.collective_rpc(method, args=args)
        return answers

    def _make_room(self, name: str, size: int) -> None:
        """Evicts what has to go for `size` bytes of a name."""
        if self._bound is not None and size > self._bound:
            raise AdapterError(
                f"its weights take {size} bytes of memory, expected at most {self._bound} "
                "(--adapter-memory)"
            )
        excess = self._excess(size)
        leaving = []
        for idle in self._idle() if excess > 0 else ():
            leaving.append(idle)
            excess -= self._resident[self.current.number_of(idle)].room
            if excess <= 0:
                break
        if excess > 0:
            raise NoRoom(
                f"there is no room for {size} bytes of weights: all that is loaded is in "
                "use or pinned (--adapter-memory)"
            )
        for idle in leaving:
            self._evict(idle, "makes room for another one")
        self._keep_to_most(coming=name)

    def _keep_to_most(self, coming: str | None = None) -> None:
        """Evicts names until there are as many versions as there may be, with one that comes."""
        excess = len(self._resident) + (coming is not None) - self._most
        if excess > 0:
            for name in [name for name in self._idle() if name != coming][:excess]:
                self._evict(name, "makes room for another one (--max-cpu-loras)")

    def _excess(self, size: int) -> int:
        """By how many bytes the weights would exceed the bound with `size` more."""
        if self._bound is None:
            return 0
        return sum(resident.room for resident in self._resident.values()) + size - self._bound

    def _idle(self) -> list[str]:
        """The names that may go, those first that were not used for longest."""
        pinned = self._pinned()
        idle = (
            name
            for name, version in self.current.items()
            if self.is_resident(version) and name not in pinned and not self._leases.of(name)
        )
        return sorted(idle, key=lambda name: self._leases.last_used.get(name, 0.0))

    def _evict(self, name: str, why: str) -> None:
        self._evicted(name)
        if self._keeps_names:
            self.free(self.current[name])
        else:
            self.withdraw(name)
        logger.info("Adapter '%s' %s: evicted", name, why)

    def _retire(self, version: LoRARequest) -> None:
        """Frees a version that no new request gets, now or when the last one ends that has it."""
        number = version.lora_int_id
        if number in self._resident and not self._leases.of_version(number):
            self.free(version)

    def _free_if_done(self, lease: Lease) -> None:
        version = lease.version
        if version is None or self._leases.of_version(version.lora_int_id):
            return
        resident = self._resident.get(version.lora_int_id)
        if resident is not None and self.current.get(resident.name) != version:
            self.free(version)
        self._keep_to_most()

    def _drop(self, version: LoRARequest) -> None:
        """Takes weights out of the engine, which does it before what it is asked from now on."""
        number = version.lora_int_id
        del self._resident[number]
        task = asyncio.create_task(self._remove(version))
        self._removing[number] = task
        task.add_done_callback(lambda _: self._removing.pop(number))

    async def _remove(self, version: LoRARequest) -> None:
        try:
            await self._engine.remove_lora(version.lora_int_id)
        except EngineDeadError:
            return
        self._freed(version)


def _refused(outcomes: list[Any]) -> list[str]:
    """Why workers refuse an adapter; nothing where none does."""
    return [outcome["refused"] for outcome in outcomes if "refused" in outcome]


def _reason(error: Exception) -> str:
    found = _WRAPPING.search(str(error))
    return (found[1] or found[2]) if found else str(error)
