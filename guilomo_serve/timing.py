"""What a change of an adapter spends its time on, part by part.

Who answers a request begins with `Parts`; what runs for it, in other threads too, adds up its time
under a name. The answer says them as `Server-Timing` (W3C), so that whoever waited for a swap sees
why:

    digest     of the files, while they are copied
    copy       writing them, and having them on the disk
    check      reading what was copied, and whether it fits the base
    read       into the memory of the engine's workers
    wait       for the engine's step to end, and for its answer
    catalogue  writing the version down
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_current: ContextVar[Parts | None] = ContextVar("parts", default=None)


class Parts:
    """The seconds of each part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @classmethod
    def begin(cls) -> Parts:
        """Those of what the task at hand does from now on."""
        parts = cls()
        _current.set(parts)
        return parts

    def header(self) -> str:
        """The value of `Server-Timing`, in milliseconds."""
        return ", ".join(f"{name};dur={1e3 * s:.1f}" for name, s in self.seconds.items())


@contextmanager
def part(name: str) -> Iterator[None]:
    """Adds the time of a block to a part, if anybody counts."""
    began = time.perf_counter()
    try:
        yield
    finally:
        spent(name, time.perf_counter() - began)


def spent(name: str, seconds: float) -> None:
    """Adds a time that was taken elsewhere."""
    parts = _current.get()
    if parts is not None:
        parts.seconds[name] = parts.seconds.get(name, 0.0) + seconds
