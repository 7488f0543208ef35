"""An adapter on a base in int8 (compressed-tensors W8A8) adds no error to the base's own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from guilomo_serve import check
from guilomo_serve.adapter import read_adapter

pytestmark = pytest.mark.slow

PROMPTS = [list(b"The quick brown fox jumps over the lazy dog."), list(b"2 + 2 = 4, 3 + 3 =")]
QUANTIZATION = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
            "input_activations": {
                **{"num_bits": 8, "type": "int", "symmetric": True},
                **{"strategy": "token", "dynamic": True},
            },
        }
    },
}


def quantize(base: Path, folder: Path, rounded: Path) -> None:
    """Writes the base in int8 by output channel, and the same rounded weights in float32."""
    for copy in (folder, rounded):
        shutil.copytree(base, copy)
    quantized, plain = {}, {}
    for name, weight in load_file(base / "model.safetensors").items():
        quantized[name] = plain[name] = weight
        if "_proj." in name:
            scale = weight.abs().amax(dim=1, keepdim=True) / 127
            quantized[name] = (weight / scale).round().to(torch.int8)
            quantized[name.replace(".weight", ".weight_scale")] = scale
            plain[name] = quantized[name] * scale
    save_file(quantized, folder / "model.safetensors", {"format": "pt"})
    save_file(plain, rounded / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config = {**config, "quantization_config": QUANTIZATION, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))


def see(base: str, adapter: str, target: str) -> None:
    """In a process of its own: what vLLM computes without and with the adapter."""
    torch.save(check.see_vllm(base, [None, Path(adapter)], PROMPTS, torch.bfloat16), target)


def test_logprobs_and_choices_on_an_int8_base(
    tiny_model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    base, rounded = tmp_path / "int8", tmp_path / "rounded"
    quantize(tiny_model, base, rounded)
    program = "import sys; from tests.serve.test_quantized_base import see; see(*sys.argv[1:])"
    ran = subprocess.run(
        [sys.executable, "-c", program, base, adapters["first"], tmp_path / "seen.pt"],
        env={
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "VLLM_PLUGINS": "guilomo",
        },
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    alone, ours = torch.load(tmp_path / "seen.pt", weights_only=False)
    adapter = read_adapter(adapters["first"])
    wanted_alone, wanted = (
        check.see_transformers(rounded, a, PROMPTS, torch.bfloat16) for a in (None, adapter)
    )
    for seen in zip(alone, ours, wanted_alone, wanted, strict=True):
        row = check.compare(*seen, top_k=adapter.spec.top_k)
        print(row)
        assert row.error < 2 * row.base_error + 0.02
        assert row.agreed > 0.9 * row.choices
