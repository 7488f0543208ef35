"""Servers that are forked from a process that has imported vLLM.

Nine tenths of a tiny server's start are imports, in each of its three processes. Here one process
imports (Python's fork server) and is forked for each server, and the server forks its engine, as
vLLM does by default on GPUs; on CPUs it spawns it. A server whose environment is read by an import
(`TORCH_LOGS`, say) has to be started anew.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_IMPORTED = [
    "guilomo_serve.cli",
    "guilomo_serve.runtime",
    "vllm.entrypoints.cli.serve",
    "vllm.entrypoints.openai.api_server",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.llama",
]


class Forked:
    """A `guilomo-serve` forked from that process, with what tests use of `subprocess.Popen`."""

    def __init__(self, arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        """Starts it in a session of its own.

        Args:
            arguments: those of `guilomo-serve`.
            log: gets what it writes to stdout and stderr.
            environment: its whole environment.
        """
        log.write_bytes(b"")  # tests look into it at once
        # Read as that process imports vLLM. TRL, imported by other tests, lowers it.
        os.environ["VLLM_LOGGING_LEVEL"] = "INFO"
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_IMPORTED)
        self._process = context.Process(
            name="APIServer", target=_serve, args=(arguments, log, environment)
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("guilomo-serve", timeout or 0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self._process.terminate()


def _serve(arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
    """Runs in the forked process."""
    os.setsid()
    with log.open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["guilomo-serve", *arguments]
    from guilomo_serve.cli import main

    _fork_the_engine()
    try:
        sys.exit(main())
    finally:
        atexit._run_exitfuncs()  # multiprocessing ends its processes without


def _fork_the_engine() -> None:
    """`CpuPlatform` (vllm/platforms/cpu.py) asks for spawned ones, whatever was asked before."""
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config

    def checked(config: Any) -> None:
        check(config)
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"

    CpuPlatform.check_and_update_config = staticmethod(checked)
