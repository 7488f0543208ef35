"""A server's process ends on one SIGTERM while it starts; for later ones see test_failures.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.serve.helpers import eventually, free_port, guilomo_serve, started

pytestmark = pytest.mark.slow

_HURRIED = """
import os, sys, threading, time
from guilomo_serve.ending import ended_by_signals
ending = ended_by_signals()
ending.__enter__()
stop = threading.Event()
threading.Thread(target=time.sleep, args=(600,)).start()  # which Python would wait for
said = "ready"
while True:
    try:
        print(said, flush=True)  # here, so that whatever comes after it is caught
        stop.wait()
    except BaseException as e:
        said = f"caught {e!r}"
"""


def test_an_exception_that_is_caught_keeps_no_process():
    """Nor does a thread that waits for ever."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HURRIED], stdout=subprocess.PIPE, text=True, env=os.environ
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    assert process.stdout.readline().startswith("caught SystemExit")
    assert process.wait(timeout=30) == 0


def has_children(pid: int) -> bool:
    """Whether the engine's process is there: it takes seconds to load the model."""
    return bool(psutil.Process(pid).children())


@pytest.mark.parametrize(
    ("moment", "anew"),
    [
        (lambda pid, log: "Resolved architecture" in log.read_text(), True),
        (lambda pid, log: has_children(pid), True),
        (lambda pid, log: "Loading weights took" in log.read_text(), False),
    ],
    ids=["before its engine", "as its engine begins", "as its engine loads the model"],
)
def test_a_server_that_starts_ends(
    tiny_model: Path,
    adapters: dict[str, Path],
    tmp_path: Path,
    moment: Callable[[int, Path], bool],
    anew: bool,
):
    port = free_port()
    log = tmp_path / "log"
    command = guilomo_serve(tiny_model, {"first": adapters["first"]}, "--enforce-eager")
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    process = started([*command, "--port", str(port)], log, environment, anew)
    try:
        eventually(lambda: moment(process.pid, log) or process.poll() is not None, "so far", 200)
        assert process.poll() is None, log.read_text()[-3000:]
        family = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        assert process.wait(timeout=40) == 0, log.read_text()[-3000:]
        psutil.wait_procs(family, timeout=20)
        assert not [child for child in family if child.is_running() and _lives(child)]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
