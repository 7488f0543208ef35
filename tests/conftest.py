"""Fixtures of all tests: the small model that deploy/setup.sh prepares."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

# Tests have all they need; a look-up of a name that does not exist would be retried for a minute.
os.environ["HF_HUB_OFFLINE"] = "1"
# `make test` runs several processes: threads in each would wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).parent.parent


# Servers that several files ask, one after another.
_SHARED_SERVERS = {"opened", "restarted", "server_with_everything"}


@pytest.hookimpl(tryfirst=True)  # before xdist's own, which reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What shares a fixture runs in one process: a file's tests, and files that share a server."""
    sharing = {item.path for item in items if _SHARED_SERVERS & set(item.fixturenames)}
    for item in items:
        group = "servers" if item.path in sharing else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))


def pytest_collection_finish() -> None:
    """What tests have imported stays, so the collector need not look through it: transformers and
    accelerate have it run before each training, for up to a second."""
    import hypothesis  # noqa: F401  (as it is imported it asks the collector what refers to what)

    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def small_model() -> Path:
    """Folder of SmolLM2-135M-Instruct."""
    folder = REPOSITORY / ".cache" / "smollm2-135m-instruct"
    if not folder.is_dir():
        pytest.fail(f"{folder} is missing: run deploy/setup.sh")
    return folder
