"""The memory of adapters under random loads and unloads: nothing lost, overlapping or wasted."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from guilomo_serve.ops.memory import _PIECE, AdapterMemory, AdapterMemoryError, Beside, Range
from tests.ops.late_copies import LateCopies

CAPACITY = 40 * 256
# A number of bytes loads a new owner, None unloads one of those there are.
steps = st.lists(
    st.tuples(st.one_of(st.none(), st.integers(1, 10 * 256)), st.integers(0, 2**16)),
    min_size=1,
    max_size=120,
)


class Told:
    def __init__(self) -> None:
        self.ranges: list[Range] = []

    def moved(self, ranges: Sequence[Range]) -> None:
        self.ranges += ranges


@pytest.mark.parametrize(("reserved", "piece"), [(CAPACITY, 2**20), (CAPACITY, 512), (None, 2**20)])
@given(steps)
@settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],  # the machine may do other work
)
def test_every_owner_keeps_its_bytes_and_no_memory_is_lost(reserved, piece, sequence) -> None:
    with mock.patch("guilomo_serve.ops.memory._PIECE", piece):
        keeps_bytes(reserved, sequence)


def keeps_bytes(reserved, sequence) -> None:
    memory, told = AdapterMemory(reserved, "cpu"), Told()
    memory._beside = LateCopies()
    memory.tell(told)
    ranges = {}
    for number, (size, choice) in enumerate(sequence):
        if size is not None:
            padded = -(-size // 256) * 256
            if reserved is not None and memory.used + padded > CAPACITY:
                with pytest.raises(AdapterMemoryError, match=f"weights take {padded} bytes"):
                    memory.take(size)
                continue
            before = {owner: of.data.data_ptr() for owner, of in ranges.items()}
            told.ranges.clear()
            ranges[number] = memory.take(size)  # whatever the gaps are
            memory.fill(ranges[number], torch.full((size,), number % 251, dtype=torch.uint8))
            if choice % 2:  # the others nobody has read yet
                memory.arrive(ranges[number])
            for owner, at in before.items():
                assert ranges[owner].data.data_ptr() == at or ranges[owner] in told.ranges
        elif ranges:
            memory.free(ranges.pop(sorted(ranges)[choice % len(ranges)]))
        for owner, taken in ranges.items():
            assert taken.coming or taken.data.eq(owner % 251).all()
        if reserved is not None:
            places = sorted((r.data.data_ptr(), len(r.data)) for r in ranges.values())
            assert all(a + n <= b for (a, n), (b, _) in itertools.pairwise(places))
    for owner, taken in ranges.items():
        memory.arrive(taken)
        assert taken.data.eq(owner % 251).all()


class Queue:
    """A stream of a GPU that keeps what it is told."""

    device = torch.device("cpu")

    def __init__(self, name: str, told: list[str]) -> None:
        self.name, self._told = name, told

    def wait_stream(self, other: Queue) -> None:
        self._told.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: str) -> None:
        self._told.append(f"{self.name} waits for {event}")

    def record_event(self) -> str:
        self._told.append(f"{self.name} has an event")
        return f"{self.name}'s event"


def test_on_a_gpu_bytes_come_by_a_stream_of_their_own(monkeypatch) -> None:
    """After the steps that may read what was there; the first step that reads them waits."""
    told: list[str] = []
    steps, beside = Queue("steps", told), Queue("beside", told)
    current = [steps]

    @contextlib.contextmanager
    def stream(of: Queue):
        current.append(of)
        yield
        current.pop()

    class Target:
        device = torch.device("cpu")

        def copy_(self, source: torch.Tensor, non_blocking: bool) -> None:
            told.append(f"a copy on {current[-1].name}, {non_blocking=}")

        def record_stream(self, of: Queue) -> None:
            told.append(f"kept for {of.name}")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: beside)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", stream)
    copies = Beside(torch.device("cuda"))
    event = copies.copy(Target(), torch.zeros(4))
    assert told == [
        "beside waits for steps",
        "a copy on beside, non_blocking=True",
        "kept for beside",
        "beside has an event",
    ]
    told.clear()
    copies.wait(event)
    copies.wait_for_all()
    assert told == ["steps waits for beside's event", "steps waits for beside"]


def test_a_gap_between_ranges_is_reused_in_place() -> None:
    memory = AdapterMemory(15 * 256, "cpu")
    a, b, c, d = (memory.take(count * 256) for count in (4, 3, 2, 6))
    at, last = b.data.data_ptr(), d.data.data_ptr()
    memory.free(b)
    memory.free(c)
    assert memory.take(5 * 256).data.data_ptr() == at  # both gaps, which are one
    assert d.data.data_ptr() == last
    assert memory.used == 15 * 256
    memory.free(a)
    assert memory.take(4 * 256).data.data_ptr() == at - 4 * 256


class Copies(TorchDispatchMode):
    """Counts them."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.copy_.default
        return func(*args, **(kwargs or {}))


def test_a_range_that_moves_far_moves_in_one_copy() -> None:
    size = 3 * _PIECE
    memory = AdapterMemory(3 * size, "cpu")
    first, second, third = (memory.take(size) for _ in range(3))
    second.data.copy_(torch.arange(size) % 251)
    memory.free(first)
    memory.free(third)
    with Copies() as copies:
        memory.take(2 * size)
    assert copies.count == 1
    assert torch.equal(second.data, (torch.arange(size) % 251).to(torch.uint8))


def test_no_more_is_moved_than_a_gap_needs() -> None:
    """In a memory that is as good as full a move would else be one of all adapters."""
    memory, told = AdapterMemory(40 * 256, "cpu"), Told()
    memory.tell(told)
    ranges = [memory.take(count * 256) for count in (4, 2, 9, 1, 3, 2, 8, 1, 10)]
    places = [taken.begin for taken in ranges]
    for freed in (1, 3, 5, 7):
        memory.free(ranges[freed])
    taken = memory.take(3 * 256)  # no gap is as large; two are, with the least between them
    assert taken.begin == places[3] + 3 * 256
    assert told.ranges == [ranges[4]]
    others = (0, 2, 6, 8)
    assert [ranges[i].begin for i in others] == [places[i] for i in others]


def test_a_range_larger_than_a_piece_moves_over_itself(monkeypatch) -> None:
    monkeypatch.setattr("guilomo_serve.ops.memory._PIECE", 256)
    memory = AdapterMemory(20 * 256, "cpu")
    first, second = memory.take(256), memory.take(17 * 256)
    values = torch.randint(0, 256, (17 * 256,), dtype=torch.uint8)
    second.data.copy_(values)
    memory.free(first)
    memory.take(3 * 256)
    assert torch.equal(second.data, values)
