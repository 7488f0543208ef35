"""Python's collector stands back while vLLM is imported.

That makes some 700,000 objects that stay. Python 3.11 looks through them again and again as they
come, which is a sixth of an import, and a server has three processes that import one after another.
"""

from __future__ import annotations

import gc

_YOUNG = 50_000  # objects before it looks for the first time; Python has 700
_usual = gc.get_threshold()


def begin() -> None:
    gc.set_threshold(_YOUNG, *_usual[1:])


def end() -> None:
    """It collects as it does anywhere else."""
    gc.set_threshold(*_usual)
