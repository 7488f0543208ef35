"""What a machine runs out of: memory and room on a disk, as errors that a user can act on."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from guilomo_train.errors import OutOfMemoryError, OutputError

# A disk, quota or file size limit that is reached; and places where nothing may be written.
WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)

# How torch tells that an allocation failed where it has no type for it: its allocator on CPUs, a
# CUDA error that is not its own allocator's, a CUDA library.
_MEMORY_TEXTS = ("DefaultCPUAllocator: ", "CUDA error: out of memory", "ALLOC_FAILED")

# How torch's writer, which has no type for it, tells that a write fell short.
_WRITE_TEXTS = ("PytorchStreamWriter failed", "iostream error", "unexpected pos")


@contextmanager
def enough_memory(stage: str, remedy: str) -> Iterator[None]:
    """Turns a failed allocation in the block, on a GPU or CPU, into one sentence.

    Args:
        stage: what runs, as a sentence has it after "in".
        remedy: what to lower.

    Raises:
        OutOfMemoryError: memory did not suffice.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as e:  # torch.OutOfMemoryError is a RuntimeError
        known = isinstance(e, torch.OutOfMemoryError | MemoryError)
        if isinstance(e, OSError):
            known = e.errno == errno.ENOMEM
        elif isinstance(e, RuntimeError) and not known:
            known = any(text in str(e) for text in _MEMORY_TEXTS)
        if not known:
            raise
        raise OutOfMemoryError(f"out of memory in {stage}: {remedy}") from None


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yields a file to write that takes the name `path` when the block ends without an error.

    What had that name stays untouched until then, and for good if the block fails.

    Raises:
        OutputError: the file cannot be written; the message names it.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with writing(path):
            yield partial
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a failed write in the block into one sentence that names `path`.

    Raises:
        OutputError: a file cannot be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as e:
        reason = getattr(e, "strerror", None) or e
        raise OutputError(f"{path}: cannot be written ({reason})") from None
    except RuntimeError as e:
        if not any(text in str(e) for text in _WRITE_TEXTS):
            raise
        raise OutputError(f"{path}: cannot be written (is the disk full?)") from None
