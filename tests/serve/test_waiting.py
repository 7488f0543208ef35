"""On a CPU vLLM's processes sleep while they wait for one another, and wake for each message."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection

import pytest
from vllm.distributed.device_communicators import shm_broadcast
from vllm.distributed.device_communicators.shm_broadcast import MessageQueue, SpinCondition

from guilomo_serve.runtime import waiting

PAUSE_S = 0.3  # of vLLM's second after a message


@contextmanager
def written(pauses: Sequence[Sequence[float]]):
    """What reads numbers that another process writes, each after a pause, and asks for the next.

    Args: pauses: of numbers that are written at once; the next ones are when they have been asked.
    """
    processes = multiprocessing.get_context("fork")
    here, there = processes.Pipe()
    process = processes.Process(target=_write, args=(there, pauses))
    process.start()
    reader = MessageQueue.create_from_handle(here.recv(), 0)
    reader.wait_until_ready()
    yield reader, here
    process.join(20)
    reader.shutdown()


def _write(there: Connection, pauses: Sequence[Sequence[float]]) -> None:
    writer = MessageQueue(1, 1)
    there.send(writer.export_handle())
    writer.wait_until_ready()
    for together in pauses:
        for pause in together:
            time.sleep(pause)
            writer.enqueue(pause)
        there.recv()
    writer.shutdown()


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SpinCondition, "wait", SpinCondition.wait)  # as it was, afterwards
    waiting.install()


def test_who_waits_for_long_sleeps(patched, monkeypatch) -> None:
    looks = 0

    def counted() -> None:
        nonlocal looks
        looks += 1
        time.sleep(0)

    monkeypatch.setattr(shm_broadcast, "sched_yield", counted)
    with written([[PAUSE_S] * 3]) as (reader, asked):
        assert [reader.dequeue(timeout=20) for _ in range(3)] == [PAUSE_S] * 3
        asked.send(None)
    # A look takes longer than this; with vLLM's second they are as many as fit into the pauses.
    assert looks <= 3 * waiting.LOOK_S / 1e-6


@pytest.mark.timeout(45)  # a second of it is needed
def test_no_message_needs_a_bell_that_may_not_ring(patched, monkeypatch) -> None:
    """A reader that nothing wakes but the bell gets the second of two, however soon it comes."""
    for where, name in ((waiting, "SLEEP_MS"), (shm_broadcast, "SHM_READER_RECHECK_INTERVAL_MS")):
        monkeypatch.setattr(where, name, 60_000)
    pairs = [[0.01, 0.0001 * i] for i in range(4, 40)]
    with written([[0.5], *pairs]) as (reader, asked):  # it listens to the bell by then
        for together in [[0.5], *pairs]:
            assert [reader.dequeue() for _ in together] == together
            asked.send(None)
