"""A program: adapters on quantised layers of vLLM's, as far as a CPU runs them.

    python -m tests.serve.quantized FOLDER

Of each method that GPUs serve it makes layers of random weights, as vLLM does for a checkpoint, has
the manager's classes take them, and prints as its last line, as JSON, how far what an adapter adds
to a layer's output is from the formula, as a share of it; and what is said of a layer that vLLM
takes no adapters on. vLLM has kernels for CPUs of all but NVFP4, which it emulates.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.lora import LoRAConfig
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.lora.utils import from_layer
from vllm.model_executor.kernels import linear as kernels
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.platforms import PlatformEnum

from guilomo_serve.ops import reference
from guilomo_serve.ops.layer import Batch, LayerWeights, SliceWeights
from guilomo_serve.runtime import register
from guilomo_serve.runtime.layers import device_of
from guilomo_serve.runtime.model_manager import TokenSlots, _our_layers
from guilomo_serve.runtime.unsupported import UnsupportedError

WIDTH, HEAD, RANKS, TOP_K = 256, 64, (2, 3), 1
DTYPE = torch.bfloat16


def compressed(form: str, weights: dict[str, Any], inputs: dict[str, Any] | None) -> dict[str, Any]:
    """A config of compressed-tensors."""
    group = {
        "targets": ["Linear"],
        "weights": {"symmetric": True, "dynamic": False, **weights},
        "input_activations": inputs and {"symmetric": True, **inputs},
    }
    return {"format": form, "ignore": [], "config_groups": {"group_0": group}}


def number(bits: int, kind: str, strategy: str, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": kind, "strategy": strategy, **more}


FP4 = number(4, "float", "tensor_group", group_size=16)
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "FP8": (
        "compressed-tensors",
        compressed(
            "float-quantized",
            number(8, "float", "channel"),
            number(8, "float", "token", dynamic=True),
        ),
    ),
    "W4A16": (
        "compressed-tensors",
        compressed("pack-quantized", number(4, "int", "group", group_size=32), None),
    ),
    "W8A8": (
        "compressed-tensors",
        compressed(
            "int-quantized", number(8, "int", "channel"), number(8, "int", "token", dynamic=True)
        ),
    ),
    "NVFP4": (
        "compressed-tensors",
        compressed("nvfp4-pack-quantized", FP4, {**FP4, "dynamic": "local"}),
    ),
    "NVFP4 of ModelOpt": (
        "modelopt_fp4",
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}
        | {"kv_cache_quant_algo": None, "exclude_modules": []},
    ),
    "GPTQ": ("gptq", {"bits": 4, "group_size": 32, "desc_act": False, "sym": True}),
    "AWQ": ("awq", {"bits": 4, "group_size": 32, "zero_point": True}),
}


def filled(base: torch.nn.Module) -> torch.nn.Module:
    """Random weights, as a checkpoint's, in the layout of the method's kernel."""
    for name, values in base.named_parameters():
        shape = values.shape
        if name == "g_idx":
            random = torch.arange(len(values)) // 32
        elif values.dtype.is_floating_point:
            random = torch.rand(shape, dtype=torch.float32) / 10 + 0.01
        else:
            bits = torch.iinfo(values.dtype)
            random = torch.randint(max(bits.min, -bits.max), bits.max, shape)
        values.data.copy_(random.to(values.dtype))
    base.quant_method.process_weights_after_loading(base)
    return base


def error(base: torch.nn.Module, modules: list[str]) -> float:
    """How far a layer of two slots is from its base's output and the formula."""
    with _our_layers():
        layer = from_layer(base, 2, LoRAConfig(max_lora_rank=8, lora_dtype=DTYPE), modules)
    layer.punica_wrapper = TokenSlots(None, {})
    layer.punica_wrapper.batch = Batch(np.array([1, -1, 1, 1]))
    rows, widths = sum(RANKS), [part.width for part in layer.parts()]
    slices = [
        SliceWeights(
            *((torch.randn(rows, WIDTH) / 16).to(DTYPE), torch.randn(width, rows).to(DTYPE)),
            *(torch.randn(len(RANKS), WIDTH), RANKS, (20.0, 30.0)),
        )
        for width in widths
    ]
    layer.set_lora(1, LayerWeights.stack(slices, widths, TOP_K, DTYPE), None)
    x = torch.randn(4, WIDTH).to(DTYPE)
    without = base(x)[0].double()
    added = torch.cat(
        [
            reference.routed_lora(
                *(x.double(), s.lora_a.double(), s.lora_b.double(), s.router.double()),
                *(s.ranks, s.scalings, TOP_K),
            )
            for s in slices
        ],
        dim=1,
    )
    added[1] = 0
    found = layer(x)[0].double()
    assert without.isfinite().all()
    assert torch.equal(found[1], without[1])
    return ((found - without - added).norm() / (without + added).norm()).item()


@torch.inference_mode()
def errors(method: str, settings: dict[str, Any]) -> list[float]:
    """Of a layer that packs q, k and v, one that packs two modules, and one of a single module."""
    quantization = get_quantization_config(method).from_config(settings)
    quantization.packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    given = {"bias": False, "quant_config": quantization, "params_dtype": DTYPE}
    at = "model.layers.0"
    qkv = QKVParallelLinear(WIDTH, HEAD, 4, 2, **given, prefix=f"{at}.self_attn.qkv_proj")
    up = MergedColumnParallelLinear(WIDTH, 2 * [WIDTH], **given, prefix=f"{at}.mlp.gate_up_proj")
    down = RowParallelLinear(WIDTH, WIDTH, **given, prefix=f"{at}.mlp.down_proj")
    return [
        error(filled(qkv), ["q_proj", "k_proj", "v_proj"]),
        error(filled(up), ["gate_proj", "up_proj"]),
        error(filled(down), ["down_proj"]),
    ]


def main() -> None:
    register()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
    kernels._POSSIBLE_NVFP4_KERNELS[PlatformEnum.CPU] = [kernels.EmulationNvFp4LinearKernel]
    config = VllmConfig()
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{sys.argv[1]}/store", 0, "gloo")
        initialize_model_parallel(1, 1)
        # The methods ask for nothing else of a model's.
        config.model_config = SimpleNamespace(dtype=DTYPE, multimodal_config=None, is_moe=False)
        found = {name: errors(*of_method) for name, of_method in METHODS.items()}
        unknown = ReplicatedLinear(8, 4, bias=False, params_dtype=DTYPE)
        del unknown.weight
        try:
            device_of(unknown)
        except UnsupportedError as e:
            print(json.dumps([found, str(e)]))


if __name__ == "__main__":
    main()
