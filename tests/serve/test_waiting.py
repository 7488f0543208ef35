"""On a CPU vLLM's processes sleep while they wait for one another, and wake for each message."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from vllm.distributed.device_communicators import shm_broadcast
from vllm.distributed.device_communicators.shm_broadcast import MessageQueue, SpinCondition

from guilomo_serve.runtime import waiting

PAUSE_S = 0.3  # of vLLM's second after a message
MESSAGES = 20


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[MessageQueue, MessageQueue]]:
    """Of one process to another: what it writes to, and what the other one reads from."""
    monkeypatch.setattr(SpinCondition, "wait", SpinCondition.wait)  # as it was, afterwards
    writer = MessageQueue(1, 1)
    reader = MessageQueue.create_from_handle(writer.export_handle(), 0)
    together = threading.Thread(target=writer.wait_until_ready)
    together.start()
    reader.wait_until_ready()
    together.join()
    yield writer, reader
    for end in (reader, writer):
        end.shutdown()


@pytest.mark.parametrize("pause", [0, 0.002, PAUSE_S], ids=["at once", "later", "much later"])
def test_who_waits_sleeps_and_gets_every_message(queue, pause, monkeypatch) -> None:
    looks = 0

    def counted() -> None:
        nonlocal looks
        looks += 1
        time.sleep(0)

    monkeypatch.setattr(shm_broadcast, "sched_yield", counted)
    waiting.install()
    writer, reader = queue
    count = MESSAGES if pause < PAUSE_S else 3

    def write() -> None:
        for i in range(count):
            time.sleep(pause)
            writer.enqueue(i)

    writing = threading.Thread(target=write)
    writing.start()
    assert [reader.dequeue(timeout=20) for _ in range(count)] == list(range(count))
    writing.join()
    # A look takes longer than this; with vLLM's second they are as many as fit into the pauses.
    assert looks <= count * waiting.LOOK_S / 1e-6
