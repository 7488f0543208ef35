"""What the engine says of the versions in its memory.

The seam, for vLLM 0.32: `collective_rpc` of the engine client, which calls a worker's method by its
name; see guilomo_serve/runtime/report.py for the method.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

_WAIT_S = 1.0  # for the engine, which answers between two steps


class EngineReport:
    """What the engine last said of the versions in its memory.

    Attributes:
        versions: version -> `bytes`, `tokens`, `modules`; see guilomo_serve/runtime/report.py.
    """

    def __init__(self, engine_client: Any) -> None:
        self._engine = engine_client
        self._asking: asyncio.Task[None] | None = None
        self._as_of = -float("inf")
        self.versions: dict[int, dict[str, Any]] = {}

    async def refresh(self, max_age: float = 0.0) -> None:
        """Has what was true when it was called, or at most `max_age` seconds before.

        The engine is asked once for all who wait.
        """
        since = time.monotonic() - max_age
        while self._as_of < since:
            if self._asking is None or self._asking.done():
                self._asking = asyncio.create_task(self._ask())
            await asyncio.shield(self._asking)

    async def try_refresh(self, max_age: float = 0.0) -> None:
        """The same, or what was known before if the engine is in a long step."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.refresh(max_age), _WAIT_S)

    async def _ask(self) -> None:
        began = time.monotonic()
        of_workers = await self._engine.collective_rpc("guilomo_report")
        # Under tensor parallelism each worker has a part of the weights, and the first samples.
        versions = {entry["version"]: dict(entry) for entry in of_workers[0]}
        for entry in (entry for of_worker in of_workers[1:] for entry in of_worker):
            versions[entry["version"]]["bytes"] += entry["bytes"]
        self.versions, self._as_of = versions, began
