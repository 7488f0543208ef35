"""Ray as the executor: its workers have the plugin and the settings, and answer as one process.
And Ray Serve LLM.

vLLM 0.32 has no Ray workers on a CPU, as its CPU platform names no resource of Ray's. These tests
give it one by vLLM's own seam for platforms: the CPU platform that calls its workers' resource GPU,
and a Ray of this machine that is told of two. Ray is no dependency: `make test-fleet` installs it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serve import helpers, hf_reference
from tests.serve.expert_load import check_load, expected_load, first_sampled
from tests.serve.helpers import guilomo_serve, serving
from tests.serve.test_parallel_modes import (
    FLAGS,
    PROMPTS,
    UNBOUND,
    check_answers,
    check_refusal,
    check_swaps,
)

ray = pytest.importorskip("ray", reason="Ray is not installed: make test-fleet")

pytestmark = [pytest.mark.slow, pytest.mark.fleet, pytest.mark.timeout(1200)]

_PLATFORM = """
from vllm.platforms.cpu import CpuPlatform

class RayCpuPlatform(CpuPlatform):
    ray_device_key = "GPU"

def register():
    return "ray_cpu.RayCpuPlatform"
"""


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """What a server needs that takes its workers of a Ray on this machine, with two places."""
    about = tmp_path / "platform" / "ray_cpu-1.dist-info"
    about.mkdir(parents=True)
    (about.parent / "ray_cpu.py").write_text(_PLATFORM)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: ray-cpu\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[vllm.platform_plugins]\nray_cpu = ray_cpu:register\n")
    monkeypatch.setenv("PYTHONPATH", str(about.parent), prepend=os.pathsep)  # Ray's workers too
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setattr(helpers, "START_TIMEOUT_S", 900)  # Ray's workers start after the engine
    ray.init(num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False)
    yield {**UNBOUND, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    ray.shutdown()


def test_two_workers_of_ray_answer_as_one_process(
    tiny_model: Path, adapters: dict[str, Path], environment: dict[str, str], tmp_path: Path
) -> None:
    parallel = ("-tp", "2", "--distributed-executor-backend", "ray")
    command = guilomo_serve(tiny_model, adapters, *parallel, "--check-adapters", *FLAGS)
    with serving(command, tmp_path / "log", environment) as server:
        # A worker samples if it has the settings.
        assert server.load("sampled", adapters["first"]).ok
        time.sleep(1.5)  # it is due to sample
        prompt, load = first_sampled(server, "sampled", PROMPTS[0])
        check_load(load, expected_load(tiny_model, adapters["first"], prompt), len(prompt))
        check_answers(server, tiny_model, {"base": None, **adapters})
        check_refusal(server, tiny_model, tmp_path / "bad")
        check_swaps(server, tiny_model, adapters["first"], adapters["second"])


def test_ray_serve_llm_loads_an_adapter_from_storage_on_a_miss(
    tiny_model: Path, adapters: dict[str, Path]
) -> None:
    pytest.importorskip("ray.serve.llm", reason="ray[serve] is not installed: make test-fleet")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.serve.ray_serve_llm"),
            *(str(tiny_model), str(adapters["first"])),
        ],
        env={**os.environ, "RAY_AUTH_MODE": "disabled", "VLLM_CPU_KVCACHE_SPACE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=1000,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for name, folder in (("base", None), ("base:support", adapters["first"])):
        model = hf_reference.model_with(tiny_model, folder)
        assert found[name] == hf_reference.greedy(model, found["prompt"], len(found[name]))
