"""The pool of rows under random loads and unloads: nothing lost, overlapping or wasted."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guilomo_serve.ops.pool import RowPool

WIDTH = 3
# A number of rows loads a new owner, None unloads one of those there are.
steps = st.lists(
    st.tuples(st.one_of(st.none(), st.integers(0, 40)), st.integers(0, 2**16)),
    min_size=1,
    max_size=120,
)


def rows_of(owner: int, count: int) -> torch.Tensor:
    return torch.arange(count * WIDTH).view(count, WIDTH) + 10_000.0 * (owner + 1)


@given(steps)
@settings(max_examples=120, deadline=None, derandomize=True)
def test_every_owner_keeps_its_rows_and_no_memory_is_lost(sequence) -> None:
    pool = RowPool(WIDTH, torch.float32, "cpu")
    sizes: dict[int, int] = {}
    largest = 0
    for number, (count, choice) in enumerate(sequence):
        if count is not None:
            pool.put(number, rows_of(number, count))
            sizes[number] = count
        elif sizes:
            owner = sorted(sizes)[choice % len(sizes)]
            del sizes[owner]
            pool.free(owner)
        largest = max(largest, sum(sizes.values()))

        ranges = sorted(pool.range_of(owner) for owner, count in sizes.items() if count)
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(ranges))
        for owner, count in sizes.items():
            begin, end = pool.range_of(owner)
            assert end - begin == count
            assert torch.equal(pool.rows[begin:end], rows_of(owner, count))
        assert pool.used == sum(sizes.values()) <= pool.capacity
        # What fragmentation may cost: nothing beyond what was once in use, or twice what is.
        assert pool.capacity <= min(largest, 2 * pool.used)


def test_a_gap_between_ranges_is_reused_in_place() -> None:
    pool = RowPool(WIDTH, torch.float32, "cpu")
    for owner, count in enumerate((4, 3, 2, 6)):
        pool.put(owner, rows_of(owner, count))
    memory = pool.rows
    pool.free(1)
    pool.free(2)
    pool.put("new", rows_of(9, 5))  # both gaps, which are one
    assert pool.range_of("new") == (4, 9)
    assert pool.rows is memory
    assert pool.range_of(3) == (9, 15)


def test_memory_of_a_step_that_is_under_way_stays_as_it_was() -> None:
    """A move is a copy to new memory: who still reads the old one finds the old rows."""
    pool = RowPool(WIDTH, torch.float32, "cpu")
    pool.put("a", rows_of(0, 5))
    pool.put("b", rows_of(1, 5))
    before, place = pool.rows, slice(*pool.range_of("b"))
    pool.free("a")
    pool.put("c", rows_of(2, 6))
    assert pool.rows is not before
    assert torch.equal(before[place], rows_of(1, 5))
    assert torch.equal(pool.rows[slice(*pool.range_of("b"))], rows_of(1, 5))


def test_a_load_for_which_there_is_no_memory_changes_nothing() -> None:
    pool = RowPool(2**20, torch.float32, "cpu")
    pool.put("a", torch.ones(1, 2**20))
    memory = pool.rows
    with pytest.raises(RuntimeError, match="alloc"):
        pool.put("b", torch.ones(1, 1).expand(2**40, 2**20))
    assert pool.rows is memory
    assert pool.range_of("a") == (0, 1)
    assert pool.range_of("b") == (0, 0)


def test_two_loads_of_one_owner_are_refused() -> None:
    pool = RowPool(WIDTH, torch.float32, "cpu")
    pool.put("a", rows_of(0, 5))
    with pytest.raises(ValueError, match="'a' has rows in this pool already"):
        pool.put("a", rows_of(0, 5))
