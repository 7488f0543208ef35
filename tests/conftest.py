"""Fixtures of all tests: the small model that deploy/setup.sh prepares."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Tests have all they need; a look-up of a name that does not exist would be retried for a minute.
os.environ["HF_HUB_OFFLINE"] = "1"

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def small_model() -> Path:
    """Folder of SmolLM2-135M-Instruct."""
    folder = REPOSITORY / ".cache" / "smollm2-135m-instruct"
    if not folder.is_dir():
        pytest.fail(f"{folder} is missing: run deploy/setup.sh")
    return folder
