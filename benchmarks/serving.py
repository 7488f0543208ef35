"""A guilomo-serve process for the length of a block, as the benchmarks need it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from guilomo_serve.catalogue import keys
from guilomo_serve.catalogue.settings import ADMIN_KEY

START_S = 300


def admin_headers(url: str) -> dict[str, str]:
    """What a request must have that changes a server's adapters."""
    return {"Authorization": f"Bearer {os.environ.get(ADMIN_KEY) or keys.find(url)}"}


@contextmanager
def serving(base: str, adapters: Mapping[str, Path], log: Path, *flags: str) -> Iterator[str]:
    """Runs `guilomo-serve` and yields the URL of its OpenAI API once it answers.

    Args:
        base: the base model; it is served under the name "base".
        adapters: name -> folder.
        log: file for what the server prints.
        flags: further flags of the server.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "guilomo_serve.cli", base, "--served-model-name", "base"]
    for name, folder in adapters.items():
        command += ["--adapter", f"{name}={folder}"]
    command += ["--host", "127.0.0.1", "--port", str(port), *flags]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "2"}
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    try:
        _wait(process, f"http://127.0.0.1:{port}/health", log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait(process: subprocess.Popen[bytes], health: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(health, timeout=1).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
    sys.exit(f"{tail}\nthe server did not start; its whole log is {log}")
