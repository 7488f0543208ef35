"""Several engines behind one server (--data-parallel-size): what adapters need of all of them.

The front end asks all workers to read an adapter, waits until all have, and then adds it; a version
whose reading or adding one of them refuses goes from all. vLLM asks all engines too, but hands out
what the first one says.

The seam, for vLLM 0.32: `collective_rpc_async` of `DPLBAsyncMPClient` (v1/engine/core_client.py),
the client of vLLM's internal load balancer, and `call_utility_all_async`. If the first is renamed,
an adapter that the second engine cannot read is refused late, and the others' memory and load are
not counted.
"""

from __future__ import annotations

from typing import Any


def install() -> None:
    """Has calls of workers answered for all engines; calling it again changes nothing."""
    from vllm.v1.engine.core_client import DPLBAsyncMPClient

    setattr(DPLBAsyncMPClient, "collective_rpc_async", _of_all_engines)  # noqa: B010


async def _of_all_engines(
    client: Any,
    method: Any,
    timeout: float | None = None,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
) -> list[Any]:
    """As `collective_rpc_async`: the replies of each engine's workers, one engine after another."""
    asked = ("collective_rpc", method, timeout, args, kwargs)
    return [
        reply for of_engine in await client.call_utility_all_async(*asked) for reply in of_engine
    ]
