"""A Triton backend that says it is there, so that vLLM's second model runner runs without a GPU.

vLLM runs that one on GPUs; it needs Triton, whose kernels its interpreter runs on a CPU. Triton
finds backends by entry points of installed packages, so the folder that `installed` makes is one.
"""

from __future__ import annotations

import os
from pathlib import Path


def installed(folder: Path) -> dict[str, str]:
    """Makes a folder that has the backend, and the environment of a process that is to use it."""
    info = folder / "triton_for_cpu-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: triton-for-cpu\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[triton.backends]\ncpu = tests.serve.triton_for_cpu\n")
    repository = Path(__file__).parents[3]
    paths = [str(folder), str(repository), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "TRITON_INTERPRET": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1",
    }
