"""Which versions a figure or a result was made with."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import guilomo_serve


def versions(*packages: str) -> dict[str, str]:
    """guilomo's version, Python's, and those of the packages named that are installed."""
    found = {"guilomo": guilomo_serve.__version__, "python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
