"""A program: layers in code that torch compiles, of two engines in one process.

    python -m tests.serve.compiled FOLDER

The second engine has the first one's compiled code in its cache, and made its layers in another
order. Prints for each engine how far its layers are from the same ones run eagerly, and how often
compiled code was found in the cache.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from torch._dynamo.utils import counters
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.lora import LoRAConfig
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.linear import ReplicatedLinear

from guilomo_serve.ops.layer import Batch, LayerWeights, SliceWeights
from guilomo_serve.runtime.layers import LAYER_CLASSES
from guilomo_serve.runtime.model_manager import TokenSlots

WIDTH, RANKS = 16, (2, 3)
NAMES = ("model.layers.0.o_proj", "model.layers.1.o_proj")
(Layer,) = (c for c in LAYER_CLASSES if c.__name__ == "RoutedReplicatedLinearWithLoRA")


class Model(torch.nn.Module):
    def __init__(self, order: tuple[str, ...], config: VllmConfig, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        slots = TokenSlots(None, {})
        slots.batch = Batch(np.array([0, -1, 0]))
        lora = LoRAConfig(max_lora_rank=8, lora_dtype=torch.float32)
        for name in order:
            base = ReplicatedLinear(WIDTH, WIDTH, bias=False, params_dtype=torch.float32)
            torch.nn.init.normal_(base.weight)
            base.quant_method.process_weights_after_loading(base)
            layer = Layer(base)
            layer.create_lora_weights(1, lora)
            layer.punica_wrapper = slots
            rows = sum(RANKS)
            weights = SliceWeights(
                *(torch.randn(rows, WIDTH), torch.randn(WIDTH, rows)),
                *(torch.randn(len(RANKS), WIDTH), RANKS, (1.0, 0.5)),
            )
            layer.set_lora(0, LayerWeights.stack([weights], [WIDTH], 1, torch.float32), None)
            layer.place(name, config.compilation_config.static_forward_context)
            self.add_module(name.replace(".", "_"), layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in NAMES:
            x = getattr(self, name.replace(".", "_"))(x)[0].tanh()
        return x


@torch.inference_mode()
def engine(order: tuple[str, ...], seed: int) -> float:
    torch._dynamo.reset()  # the code that was compiled stays in its cache
    config = VllmConfig()
    with set_current_vllm_config(config):
        model = Model(order, config, seed)
        x = torch.randn(3, WIDTH)
        compiled = torch.compile(model, fullgraph=True)
        with set_forward_context(None, config):
            return (compiled(x) - model(x)).abs().max().item()


def main() -> None:
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{sys.argv[1]}/store", 0, "gloo")
        initialize_model_parallel(1, 1)
    errors = [engine(order, seed) for seed, order in enumerate((NAMES, NAMES[::-1]))]
    print(*errors, counters["inductor"]["fxgraph_cache_hit"])


if __name__ == "__main__":
    main()
