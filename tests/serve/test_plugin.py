"""What the plugin leaves as it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

_PROGRAM = """
import gc, sys
usual = gc.get_threshold()
from guilomo_serve import importing
importing.begin()
assert gc.get_threshold() > usual
import torch
from vllm.plugins import load_general_plugins
load_general_plugins()
assert gc.get_threshold() == usual
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.lora import LoRAConfig
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.lora.utils import from_layer
from vllm.model_executor.layers.linear import ReplicatedLinear
with set_current_vllm_config(VllmConfig()):
    init_distributed_environment(1, 0, f"file://{sys.argv[1]}", 0, "gloo")
    initialize_model_parallel(1, 1)
    base = ReplicatedLinear(8, 4, bias=False, params_dtype=torch.float32)
    layer = from_layer(base, 2, LoRAConfig(max_lora_rank=8, lora_dtype=torch.float32), [])
    layer.set_lora(0, torch.ones(8, 8), torch.ones(4, 8))
    print(type(layer).__name__, float(layer.lora_a_stacked[0][0].sum()))
"""


def test_vllms_own_managers_have_vllms_layers(tmp_path: Path):
    """A program that makes them gives their layers tensors, which ours do not take."""
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(tmp_path / "store")],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "ReplicatedLinearWithLoRA 64.0"


def test_the_command_for_a_running_server_needs_no_vllm():
    """Whose import takes longer than all that the command does."""
    program = "import sys, guilomo_serve.cli; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0


def test_a_compiled_model_finds_the_layers_of_its_engine(tmp_path: Path):
    """Also where another engine's compiled code is in the cache, and layers have another order."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.serve.compiled", str(tmp_path)],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    *errors, hits = (float(value) for value in done.stdout.splitlines()[-1].split())
    assert len(errors) == 2
    assert max(errors) < 1e-4
    assert hits == 1  # no layer is a constant in it


def test_adapters_go_with_what_vllm_quantises(tmp_path: Path):
    """The op sees a layer's input and its output alone, whatever is between them."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.serve.quantized", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    errors, refused = json.loads(done.stdout.splitlines()[-1])
    assert errors.keys() >= {"FP8", "GPTQ", "AWQ", "W4A16", "W8A8", "NVFP4", "NVFP4 of ModelOpt"}
    for method, of_layers in errors.items():
        assert max(of_layers) < 0.01, method  # which rounding to bfloat16 comes to
    assert refused.startswith("vLLM takes no adapters on a layer quantised by Unquantized")
