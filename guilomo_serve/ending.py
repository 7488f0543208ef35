"""The end of a server's process: on one signal, at whatever moment, within seconds.

vLLM has a handler of SIGTERM while it starts, which raises an exception; where that comes while
something catches it, or in a callback, it is lost, and the server goes on. And Python waits at its
end for all threads, one of which may be reading from a storage that says nothing. So whoever ends
also sets a time, after which the process and its children are ended.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import psutil

_STARTING_S = 5.0  # nothing is served yet, so nothing is lost


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Has SIGTERM and SIGINT end the process with status 0, until a server handles them.

    After the block they do what they did before.
    """
    theirs = {n: signal.signal(n, _end) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in theirs.items():
            signal.signal(number, handler)


def end_within(seconds: float, status: int) -> None:
    """Ends the process after a time, however busy it is; it may end before by itself."""
    threading.Thread(target=_end_after, args=(seconds, status), daemon=True).start()


def _end(number: int, frame: Any) -> None:
    end_within(_STARTING_S, 0)
    sys.exit(0)


def _end_after(seconds: float, status: int) -> None:
    time.sleep(seconds)
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    os._exit(status)
