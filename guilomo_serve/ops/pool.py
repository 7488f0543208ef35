"""Memory for rows of all resident adapters: contiguous ranges of one tensor, as long as needed.

An adapter's rows lie together, so a kernel needs an address and a count. The gaps between ranges
are the free memory; neighbouring gaps are one gap, as they are not recorded but follow from what
is taken. A range goes into the smallest gap that holds it. If there is none, the pool is made
anew: ranges side by side, and no more rows than are in use. Fragmentation therefore never costs
memory: the capacity is at most the largest number of rows that were in use at once, and at most
twice the number in use now (more only where the device is too full to move them).

When ranges move: only inside `put` and `free`, which run between steps on the thread that also
starts the steps. On a GPU a move is a copy into a *new* tensor, queued behind the steps that were
started before it; those read the old tensor, whose memory the allocator gives out again in the
same order. So no row moves under a running step, whatever the host is ahead. Whoever keeps
addresses must take them anew after each `put` and `free`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable

import torch


class RowPool:
    """Rows of one width, in ranges that belong to owners.

    Attributes:
        rows: [capacity, width], the memory; rows outside of all ranges hold old values.
    """

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self.rows = torch.empty(0, width, dtype=dtype, device=device)
        self._ranges: dict[Hashable, tuple[int, int]] = {}  # by begin; half open

    @property
    def capacity(self) -> int:
        return len(self.rows)

    @property
    def used(self) -> int:
        return sum(end - begin for begin, end in self._ranges.values())

    def range_of(self, owner: Hashable) -> tuple[int, int]:
        """Where the owner's rows are, half open; (0, 0) if it has none."""
        return self._ranges.get(owner, (0, 0))

    def address(self, owner: Hashable) -> int:
        """The address of the owner's first row, until the next `put` or `free`."""
        begin, _ = self.range_of(owner)
        return self.rows.data_ptr() + begin * self.rows.stride(0) * self.rows.element_size()

    def put(self, owner: Hashable, rows: torch.Tensor) -> None:
        """Copies rows into the pool.

        Args:
            owner: has no rows yet.
            rows: [count, width], on any device.

        Raises:
            ValueError: the owner has rows already.
            torch.OutOfMemoryError: the device is full; the pool is as it was.
        """
        if owner in self._ranges:
            raise ValueError(f"{owner!r} has rows in this pool already: free them first")
        count = len(rows)
        if not count:
            return
        begin = self._gap(count)
        if begin is None:
            begin = self.used
            self._rebuild(begin + count)
        self.rows[begin : begin + count] = rows.to(self.rows.device, self.rows.dtype)
        self._ranges[owner] = (begin, begin + count)
        self._ranges = dict(sorted(self._ranges.items(), key=lambda item: item[1]))

    def free(self, owner: Hashable) -> None:
        """Gives an owner's rows back; nothing happens if it has none."""
        self._ranges.pop(owner, None)
        if self.used * 2 < self.capacity:
            # Where there is no room to move to, the pool stays as large as it is.
            with contextlib.suppress(torch.OutOfMemoryError):
                self._rebuild(self.used)

    def _gap(self, count: int) -> int | None:
        """Where the smallest gap of at least `count` rows begins."""
        begins = [0, *(end for _, end in self._ranges.values())]
        ends = [*(begin for begin, _ in self._ranges.values()), self.capacity]
        gaps = [(e - b, b) for b, e in zip(begins, ends, strict=True) if e - b >= count]
        return min(gaps)[1] if gaps else None

    def _rebuild(self, capacity: int) -> None:
        # The only allocation, and before anything changes: if it fails, nothing has.
        rows = self.rows.new_empty(capacity, self.rows.shape[1])
        ranges, position = {}, 0
        for owner, (begin, end) in self._ranges.items():
            ranges[owner] = (position, position + end - begin)
            rows[position : position + end - begin] = self.rows[begin:end]
            position += end - begin
        self.rows, self._ranges = rows, ranges
