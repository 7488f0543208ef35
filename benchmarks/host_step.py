"""What a step costs in Python: guilomo's op of each layer, and what is done once a step.

Kernels are not launched, so this is the host's time alone, and needs no GPU. Under CUDA graphs the
layers' part is 0: their Python runs while a graph is captured. Median of several rounds.

    layer_us    the op of one layer, eager, with adapters in the batch
    idle_us     the op of one layer that no adapter of the batch has
    batch_us    once a step whose tokens use other slots than the last one's
    activate_us an adapter of 128 layers gets a slot that another one had, but for the copy of its
                weights: layers are narrow here, and kernel_costs.py has the time of real ones
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # so that the ops of kernels are there on a CPU
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from common import report
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.lora import LoRAConfig
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.model_executor.layers.linear import ReplicatedLinear

from guilomo_serve.ops import kernels
from guilomo_serve.ops.layer import LayerWeights, SliceWeights, TokenBlocks
from guilomo_serve.ops.memory import AdapterMemory
from guilomo_serve.ops.triton_slots import AdapterSlots, TritonSlots
from guilomo_serve.runtime import layers
from guilomo_serve.runtime.model_manager import SLOTS, TokenSlots

WIDTH, RANKS, ADAPTERS = 256, (4, 8), 8
LAYERS, NARROW = 128, 16  # of an 8B base: four in each of 32 blocks


class NoLaunch:
    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=32, help="of the batch, one a request")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--out", type=Path, help="write the result with machine and versions here")
    args = parser.parse_args()

    kernels._shrink = kernels._expand = NoLaunch()
    layers.make_slots = TritonSlots
    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{folder}/store", 0, "gloo")
        initialize_model_parallel(1, 1)
        slot_of = {1 + i: SLOTS - ADAPTERS + i for i in range(ADAPTERS)}
        slots = TokenSlots(TokenBlocks(2048, ADAPTERS, "cpu"), slot_of)
        used, idle = layer(slots), layer(slots)
    for slot in slot_of.values():
        stacked = weights(WIDTH)
        used.slots.set(slot, stacked)
        used.set_lora(slot, stacked, None)
    ids = tuple(1 + i % ADAPTERS for i in range(args.tokens))
    mapping = SimpleNamespace(index_mapping=ids)
    x, y = torch.randn(args.tokens, WIDTH), torch.zeros(args.tokens, WIDTH)
    with torch.inference_mode():
        result = {
            "batch_us": median_us(
                lambda: slots.update_metadata(mapping, [], SLOTS, 0), args.rounds
            ),
            "layer_us": median_us(lambda: used.add_routed_(y, x), args.rounds),
            "idle_us": median_us(lambda: idle.add_routed_(y, x), args.rounds),
            "activate_us": median_us(activation(), args.rounds),
        }
    for name, value in result.items():
        print(f"{name:>11} {value:8.1f}")
    report(result, args, args.out)


def weights(width: int) -> LayerWeights:
    one = SliceWeights(
        *(torch.randn(sum(RANKS), width), torch.randn(width, sum(RANKS))),
        *(torch.randn(len(RANKS), width), RANKS, (1.0, 1.0)),
    )
    return LayerWeights.stack([one], [width], 2, torch.float32)


def activation() -> Callable[[], None]:
    """Puts an adapter of a whole model into a slot that has one."""
    one = {str(i): weights(NARROW) for i in range(LAYERS)}
    layers = {name: TritonSlots(SLOTS, NARROW, (NARROW,), torch.float32, "cpu") for name in one}
    slots = AdapterSlots(layers, AdapterMemory(2**24, "cpu"))
    packed = slots.pack(one)
    for slot in range(ADAPTERS):
        slots.set(slot, packed)

    def activate() -> None:
        slots.set(0, None)
        slots.set(0, packed)

    return activate


def layer(slots: TokenSlots) -> Any:
    (made,) = (c for c in layers.LAYER_CLASSES if c.__name__.startswith("RoutedReplicated"))
    base = ReplicatedLinear(WIDTH, WIDTH, bias=False, params_dtype=torch.float32)
    found = made(base)
    found.create_lora_weights(SLOTS, LoRAConfig(max_lora_rank=8, lora_dtype=torch.float32))
    found.punica_wrapper = slots
    return found


def median_us(call: Callable[[], None], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return round(statistics.median(times) * 1e6, 1)


if __name__ == "__main__":
    sys.exit(main())
