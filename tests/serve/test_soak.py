"""benchmarks/soak.py in small: adapters come and go, and no answer is of another one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serve.helpers import random_adapter

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "soak.py"
REQUESTS = 150


def test_every_answer_is_that_of_its_adapter(
    server_with_everything, tiny_model, adapters, tmp_path
):
    server = server_with_everything
    before = server.admin("GET").json()["data"]
    folders = [
        *adapters.values(),
        *(random_adapter(tiny_model, tmp_path / str(seed), seed) for seed in (10, 11)),
        random_adapter(tiny_model, tmp_path / "narrow", 20, targets=("o_proj",)),
    ]
    done = subprocess.run(
        [
            *(sys.executable, SCRIPT, "--url", server.url, "--requests", str(REQUESTS)),
            *("--adapters", *folders),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result.keys() == {"requests", "wrong", "failed", "loads"}, result
    assert (result["requests"], result["wrong"], result["failed"]) == (REQUESTS, 0, 0), done.stdout
    assert result["loads"] > 10
    assert [e["name"] for e in server.admin("GET").json()["data"]] == [e["name"] for e in before]
