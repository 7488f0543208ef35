"""A large adapter is read beside the steps of the engine, not between two of them.

vLLM reads an adapter's files in `add_lora`, while no request gets a token. Here the front end first
has each worker read them in a thread of its own (`guilomo_read`), asks until that is done
(`guilomo_has_read`), and calls `guilomo_add` for what is in memory by then: only its place in the
layers is left to do. The thread is of low priority, on one core, and on whichever is free. A small
one is read by `guilomo_add` itself, which says of each worker what became of it, so that a refusal
leaves several workers in step (see refusal.py) and its size needs no further question.

The seam, for vLLM 0.32: `collective_rpc` calls a method of `WorkerBase` (v1/worker/worker_base.py)
by its name, and passes plain values alone. Without it no adapter is loaded.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import torch

_NICE = 10  # the steps first

T = TypeVar("T")


def install() -> None:
    """Gives vLLM's workers the methods that the front end calls by their names."""
    from vllm.v1.worker.worker_base import WorkerBase

    setattr(WorkerBase, "guilomo_read", _begin)  # noqa: B010
    setattr(WorkerBase, "guilomo_has_read", _outcome)  # noqa: B010
    setattr(WorkerBase, "guilomo_add", _add)  # noqa: B010


def _begin(worker: Any, name: str, number: int, path: str) -> None:
    worker.model_runner._ensure_lora_enabled()
    worker.model_runner.lora_manager.begin_reading(name, number, path)


def _outcome(worker: Any, number: int) -> dict[str, Any] | None:
    outcome: dict[str, Any] | None = worker.model_runner.lora_manager.outcome_of_reading(number)
    return outcome


def _add(worker: Any, name: str, number: int, path: str) -> dict[str, Any]:
    worker.model_runner._ensure_lora_enabled()
    began = time.perf_counter()
    outcome: dict[str, Any] = worker.model_runner.lora_manager.outcome_of_adding(name, number, path)
    return {**outcome, "seconds": time.perf_counter() - began}


class Reader(Generic[T]):
    """What is being read, by the number of its version."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "read", initializer=_stand_back)
        self._reading: dict[int, Future[T]] = {}

    def begin(self, number: int, read: Callable[[], T]) -> None:
        self._reading[number] = self._thread.submit(read)

    def is_reading(self, number: int) -> bool:
        return number in self._reading and not self._reading[number].done()

    def take(self, number: int) -> T | None:
        """What was read, once; None if nothing was begun.

        Raises:
            Whatever reading it raised.
        """
        reading = self._reading.pop(number, None)
        return None if reading is None else reading.result()

    def forget(self, number: int) -> None:
        """What is still being read is dropped when it is there."""
        self._reading.pop(number, None)


def _stand_back() -> None:
    """Of the thread at hand alone: the main one is bound to its core, and shares it with nobody."""
    with contextlib.suppress(OSError):  # a sandbox may forbid it; then it is only less polite
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
    torch.set_num_threads(1)
