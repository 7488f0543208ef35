"""A base that is a mixture of experts itself: its attention takes adapters, its experts do not.

With LoRA, vLLM 0.32 wraps the experts of such a base for adapters that may come. Its CPU build has
no kernel for that and does not start; on a GPU the base loses its fastest ones. Nothing here wraps
experts, so the base keeps the kernels that it has without LoRA.

The seam, for vLLM 0.32: `FusedMoEConfig` as vllm/model_executor/layers/fused_moe/layer.py makes it,
whose `is_lora_enabled` decides that. If the class is no longer taken from there, such a base does
not start on a CPU, and is slower on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch


def install() -> None:
    """Has vLLM choose kernels for experts without LoRA; calling it again changes nothing."""
    from vllm.model_executor.layers.fused_moe import layer
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig

    def as_without_lora(*args: Any, **kwargs: Any) -> FusedMoEConfig:
        return FusedMoEConfig(*args, **{**kwargs, "is_lora_enabled": False})

    setattr(layer, "FusedMoEConfig", as_without_lora)  # noqa: B010


def left_alone(model: torch.nn.Module) -> set[str]:
    """The last parts of the names of layers that an adapter may not have.

    Heads and embeddings, which vLLM's own LoRA gets wrong on a CPU: a request of the base that is
    in a batch with an adapter is answered with what is in the slots (tests/serve/
    test_embeddings.py), and with a wrapped lm_head `prompt_logprobs` ends the engine. Our kernels
    have none for a GPU. Experts; what stands beside them, their router above all; and what
    multi-head latent attention multiplies into other weights, so that the layer itself does not run
    for each token.
    """
    from vllm.model_executor.layers.attention import MLAAttention
    from vllm.model_executor.layers.fused_moe import MoERunner
    from vllm.model_executor.layers.linear import LinearBase

    names: set[str] = set()
    for name, module in model.named_modules():
        names.update(getattr(module, "embedding_modules", ()))  # of a language model in it, too
        if isinstance(module, MoERunner):
            block, _, experts = name.rpartition(".")
            beside = model.get_submodule(block).named_children()
            names |= {experts, *(n for n, layer in beside if isinstance(layer, LinearBase))}
        if isinstance(module, MLAAttention):
            names.add("kv_b_proj")
    return names
