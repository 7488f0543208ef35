"""What the engine says of the versions in its memory: their routers, and which are in slots.

The seam, for vLLM 0.32: `collective_rpc` of the engine client, which calls a worker's method by its
name; see guilomo_serve/runtime/report.py for the method.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

from vllm.lora.request import LoRARequest

from guilomo_serve.runtime.report import merge


class EngineReport:
    """What the engine last said of some versions.

    Args:
        engine_client: vLLM's.
        wanted: the versions that are to be asked for.
        modules: whether to ask for each of their modules.

    Attributes:
        in_slots: the versions that a step need not move to be served, of any engine.
    """

    def __init__(
        self, engine_client: Any, wanted: Callable[[], Sequence[int]], modules: bool
    ) -> None:
        self._engine = engine_client
        self._wanted = wanted
        self._modules = modules
        self._asking: asyncio.Task[None] | None = None
        self._as_of = -float("inf")
        self._versions: dict[int, dict[str, Any]] = {}
        self.in_slots: set[int] = set()

    def of(self, version: LoRARequest | None) -> dict[str, Any] | None:
        """What it said of one; see `ExpertLoad.report`. None if it had nothing to say."""
        return None if version is None else self._versions.get(version.lora_int_id)

    async def ask(self, version: int) -> dict[str, Any]:
        """All that there is to say of one version now."""
        found = merge(await self._engine.collective_rpc("guilomo_report", args=([version], True)))
        return found[0] if found else {"tokens": 0, "modules": {}}

    async def try_refresh(self, max_age: float, wait: float) -> None:
        """Has what is at most `max_age` seconds old, or what was known before if the engine takes
        more than `wait` seconds: it answers between two steps. It is asked once for all."""
        since = time.monotonic() - max_age
        if self._as_of >= since:
            return
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask())
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._asking), wait)

    async def _ask(self) -> None:
        began = time.monotonic()
        wanted = (list(self._wanted()), self._modules)
        replies = await self._engine.collective_rpc("guilomo_report", args=wanted)
        self._versions = {of_version["version"]: of_version for of_version in merge(replies)}
        self.in_slots = set().union(*(reply["slots"] for reply in replies))
        self._as_of = began
