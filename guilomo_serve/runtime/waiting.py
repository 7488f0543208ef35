"""On CPUs, vLLM's processes sleep while they wait for one another.

An engine and its worker hand each other messages through shared memory. Whoever waits for one looks
for it in a loop for a second after the last, and sleeps only then. Beside a GPU that is a core
which nobody else needs. On a CPU it is one of those that compute: the engine takes a core from the
step that it waits for, the worker one from whatever comes after it, and each replica on a machine
does. Here they look for `LOOK_S`, and sleep.

A bell wakes who sleeps: a zmq socket that holds one ring, and drops another one while it has not
heard that the first is gone. It listens for that once in 3 million ticks of the processor's clock,
3 ms at most, so of two messages a millisecond apart the second one may ring no bell. Who looks for
longer than that after a message needs none for the next. `SLEEP_MS` is for what is left: a first
message that comes before the bell is hung, and a writer held up between writing and ringing.

The seam, for vLLM 0.32: `SpinCondition` of vllm/distributed/device_communicators/shm_broadcast.py,
its `busy_loop_s` and `wait`. If `wait` moves, no engine starts; if the other does, processes go on
looking for a second.
"""

from __future__ import annotations

from typing import Any

LOOK_S = 0.005
SLEEP_MS = 20  # at most, before another look


def install() -> None:
    """Shortens the wait of `SpinCondition`, on a CPU; calling it again changes nothing."""
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition
    from vllm.platforms import current_platform

    wait = SpinCondition.wait
    if not current_platform.is_cpu() or hasattr(wait, "sleeps"):
        return

    def look_or_sleep(condition: Any, timeout_ms: int | None = None) -> None:
        condition.busy_loop_s = LOOK_S
        wait(condition, SLEEP_MS if timeout_ms is None else min(timeout_ms, SLEEP_MS))

    look_or_sleep.sleeps = True  # type: ignore[attr-defined]
    setattr(SpinCondition, "wait", look_or_sleep)  # noqa: B010
