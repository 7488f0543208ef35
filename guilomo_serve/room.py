"""How much memory the weights of adapters may take unless --adapter-memory says."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_OF_HOST = 0.25
_OF_GPU = 0.1


def default_memory() -> int:
    """Bytes: a share of this machine's or container's memory, and where GPUs serve of a GPU's.

    The server and its workers ask alike, so that workers reserve what the server lets in.
    """
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    room = int(total * _OF_HOST)
    from vllm.platforms import current_platform

    if current_platform.is_cuda():
        room = min(room, int(current_platform.get_device_total_memory() * _OF_GPU))
    return room
