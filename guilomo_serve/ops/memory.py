"""Memory of a GPU for the weights of all resident adapters, reserved once or taken as needed.

An adapter is one range of bytes, of exactly its size. In reserved memory the gaps
between ranges are what is free; neighbouring gaps are one gap, as they are not recorded but follow
from what is taken. A range goes into the smallest gap that holds it; where none does, though there
is room, ranges between some gaps move together, as few bytes as will do. So fragmentation never
costs memory, nothing is allocated after the start, and what vLLM leaves to its KV cache is what is
left beside the adapters.

When ranges move: only inside `take`, which runs between steps on the thread that also starts the
steps. A move is a copy queued behind the steps that were started before it, and so are the tables
of the new places (`moved`): no step reads a range that is half moved.

Bytes come into a range beside the steps (`fill`, `Beside`), and the first step that reads them
waits for them (`arrive`): other requests' steps go on meanwhile.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch

_ALIGNED = 256  # bytes; where a range begins
_PIECE = 2**20  # bytes that are moved at a time, at least


class AdapterMemoryError(torch.OutOfMemoryError):
    """The memory that is reserved for adapters is taken; the message has the figures."""


class Range:
    """Bytes that somebody has taken.

    Attributes:
        data: [its bytes] uint8, where they are now: another tensor once they have moved.
        coming: the copy into them that no step waits for yet; see `Beside`.
    """

    def __init__(self, data: torch.Tensor, begin: int) -> None:
        self.data = data
        self.begin = begin
        self.coming: Any = None


class Beside:
    """A queue of copies beside the steps of a device: on a GPU a stream of its own.

    The steps are what is queued on the current stream. A CPU does all in order, at once.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> Any:
        """Begins a copy, after all steps that were started before. Returns: it, for `wait`.

        Args:
            target: on the device.
            source: pinned for a GPU; torch keeps it until it is there.
        """
        if self._stream is None:
            return target.copy_(source, non_blocking=True)
        self._stream.wait_stream(torch.cuda.current_stream(target.device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        target.record_stream(self._stream)  # or its memory would be free too early
        return self._stream.record_event()

    def wait(self, copy: Any) -> None:
        """The steps that are started from now on come after the copy; the host goes on."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(copy)

    def wait_for_all(self) -> None:
        """The same of all copies that were begun."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)


class Moved(Protocol):
    """Whoever keeps addresses of ranges."""

    def moved(self, ranges: Sequence[Range]) -> None:
        """These have other addresses now."""


class AdapterMemory:
    """Ranges of bytes on one device."""

    def __init__(self, nbytes: int | None, device: torch.device | str) -> None:
        """Args:
        nbytes: to reserve now; None takes each range from the device when it is needed.
        device: where.

        Raises:
            torch.OutOfMemoryError: the device has not so much.
        """
        self._device = torch.device(device)
        self._reserved: torch.Tensor | None = None
        if nbytes is not None:
            nbytes = _rounded(nbytes)
            self._reserved = torch.empty(nbytes, dtype=torch.uint8, device=device)
            self._between = torch.empty(_PIECE, dtype=torch.uint8, device=device)
        self._beside = Beside(self._device)
        self._ranges: list[Range] = []  # by begin
        self._told: weakref.WeakSet[Moved] = weakref.WeakSet()

    @property
    def used(self) -> int:
        """Bytes that are taken."""
        return sum(_size(taken) for taken in self._ranges)

    def tell(self, whom: Moved) -> None:
        """Has somebody told when ranges move, for as long as it lives."""
        self._told.add(whom)

    def take(self, nbytes: int) -> Range:
        """A range of so many bytes, with old values, that begins at a multiple of 256.

        Raises:
            AdapterMemoryError: there are not so many free in the reserved memory.
            torch.OutOfMemoryError: nothing is reserved, and the device is full.
        """
        if self._reserved is None:
            data = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
            self._ranges.append(Range(data, len(self._ranges)))
            return self._ranges[-1]
        size = _rounded(nbytes)
        free = len(self._reserved) - self.used
        if size > free:
            raise AdapterMemoryError(
                f"an adapter's weights take {size} bytes, and {free} of the "
                f"{len(self._reserved)} bytes for adapters are free (--adapter-memory)"
            )
        begin = self._gap(size)
        taken = Range(self._reserved[begin : begin + nbytes], begin)
        self._ranges.append(taken)
        self._ranges.sort(key=lambda r: r.begin)
        return taken

    def check(self, sizes: Sequence[int]) -> None:
        """Refuses ranges that do not fit into the memory together, whatever is taken now.

        Raises:
            AdapterMemoryError: has the figures.
        """
        total = sum(map(_rounded, sizes))
        if self._reserved is not None and total > len(self._reserved):
            raise AdapterMemoryError(
                f"adapters that a batch may have take {total} bytes of memory, expected at most "
                f"{len(self._reserved)} (--adapter-memory)"
            )

    def has_room(self, nbytes: int) -> bool:
        """Whether `take` would find so many free in the reserved memory."""
        return self._reserved is None or _rounded(nbytes) <= len(self._reserved) - self.used

    def fill(self, taken: Range, source: torch.Tensor) -> None:
        """Copies bytes into a range, in one copy beside the steps; call `arrive` before their use.

        Args:
            taken: a range.
            source: as long, pinned for a GPU.
        """
        taken.coming = self._beside.copy(taken.data, source)

    def arrive(self, taken: Range) -> None:
        """The steps that are started from now on find in a range what it was filled with."""
        if taken.coming is not None:
            self._beside.wait(taken.coming)
            taken.coming = None

    def free(self, taken: Range) -> None:
        """Gives a range back."""
        self._ranges.remove(taken)

    def _gap(self, size: int) -> int:
        """Where a gap of at least `size` bytes begins, of as many as are free in all.

        It is the smallest that there is, or one is made, by moving as few bytes as will do.
        """
        assert self._reserved is not None
        begins = [0, *(taken.begin + _size(taken) for taken in self._ranges)]
        ends = [*(taken.begin for taken in self._ranges), len(self._reserved)]
        gaps = [e - b for b, e in zip(begins, ends, strict=True)]
        fitting = [(gap, begin) for gap, begin in zip(gaps, begins, strict=True) if gap >= size]
        if fitting:
            return min(fitting)[1]
        # The gaps first..last hold `size` bytes together, with the ranges first..last-1 between.
        first, free, between, found = 0, gaps[0], 0, []
        for last in range(1, len(gaps)):
            free += gaps[last]
            between += _size(self._ranges[last - 1])
            while free - gaps[first] >= size:
                free -= gaps[first]
                between -= _size(self._ranges[first])
                first += 1
            if free >= size:
                found.append((between, first, last))
        _, first, last = min(found)
        return self._move_together(begins[first], self._ranges[first:last])

    def _move_together(self, position: int, ranges: Sequence[Range]) -> int:
        """Moves neighbouring ranges to where a gap before them begins. Returns: where they end."""
        assert self._reserved is not None
        self._beside.wait_for_all()  # also for what still comes into ranges that were freed
        for taken in self._ranges:
            taken.coming = None
        for taken in ranges:
            if taken.begin != position:
                data = self._reserved[position : position + len(taken.data)]
                distance = taken.begin - position
                piece = max(distance, _PIECE)
                for source, target in zip(taken.data.split(piece), data.split(piece), strict=True):
                    # Pieces that are longer than the way overlap: they go by other memory.
                    if piece > distance:
                        source = self._between[: len(source)].copy_(source)
                    target.copy_(source)
                taken.data, taken.begin = data, position
            position += _size(taken)
        for whom in self._told:
            whom.moved(ranges)
        return position


def _size(taken: Range) -> int:
    return _rounded(len(taken.data))


def _rounded(nbytes: int) -> int:
    return -(-nbytes // _ALIGNED) * _ALIGNED
