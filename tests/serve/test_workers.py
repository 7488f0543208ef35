"""Each worker has the plugin and its server's settings."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from guilomo_serve.catalogue.settings import ADMIN_KEY, Settings

# The engine has the plugin; its workers, which are processes of their own, are told to load none.
_WITHOUT = """
import os, sys
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.executor.multiproc_executor import MultiprocExecutor

if __name__ == "__main__":
    config = EngineArgs(
        sys.argv[1], enable_lora=True, tensor_parallel_size=2, enforce_eager=True, max_model_len=64
    ).create_engine_config()
    os.environ["VLLM_PLUGINS"] = ""
    MultiprocExecutor(config)
    print("the workers are ready")
"""


@pytest.mark.slow
def test_workers_without_the_plugin_end_the_start(tiny_model: Path, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(_WITHOUT)
    done = subprocess.run(
        [sys.executable, str(program), str(tiny_model)],
        env={**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode != 0
    assert "the workers are ready" not in done.stdout
    said = done.stdout + done.stderr
    assert "RuntimeError: a worker has no guilomo plugin, without which adapters are not" in said


def test_workers_of_ray_get_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's older Ray executor copies only variables that it is told of."""
    from vllm.ray.ray_env import get_env_vars_to_copy

    environment: dict[str, str] = {"VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY": "MINE_"}
    Settings(admin_key="k").export(environment)
    for name, value in {**environment, "MINE_TOO": "1"}.items():
        monkeypatch.setenv(name, value)
    assert {"GUILOMO_SERVE", ADMIN_KEY, "MINE_TOO"} <= get_env_vars_to_copy()
