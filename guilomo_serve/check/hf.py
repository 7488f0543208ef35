"""Adapters on a base in transformers: what the served model is compared with.

LoRA-MoE adapters are applied by hooks, plain ones by PEFT.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from guilomo_serve.adapter import is_guilomo_adapter, read_adapter
from guilomo_serve.adapter.spec import TENSOR_PREFIX
from guilomo_serve.ops import torch_ops
from guilomo_serve.ops.layer import SliceWeights


@dataclass(frozen=True)
class Modules:
    """An adapter's modules by their names in the base, and the experts that a token uses."""

    weights: Mapping[str, SliceWeights]
    top_k: int


@dataclass(frozen=True)
class Wanted:
    """What transformers computes for a prompt of T tokens.

    Attributes:
        logprobs: [T - 1] float32, of each token but the first, given those before it.
        router_logits: module -> [T, E] float32, of the modules with a router.
    """

    logprobs: torch.Tensor
    router_logits: Mapping[str, torch.Tensor]


def load_base(base: str | Path, dtype: torch.dtype | str = "auto", **settings: Any) -> Any:
    """The base model in transformers; settings are those of `from_pretrained`."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=dtype, **settings).eval()


def with_adapter(model: Any, folder: str | Path) -> tuple[Any, Modules]:
    """Applies an adapter to a model, for good.

    Returns:
        The model, which PEFT wraps, and the adapter's modules as they were read.
    """
    if not is_guilomo_adapter(folder):
        return _with_plain(model, folder)
    adapter = read_adapter(folder)
    modules = {}
    for name, experts in adapter.spec.experts.items():
        modules[name] = SliceWeights.of(adapter.weights[name], experts)
        model.get_submodule(name).register_forward_hook(
            _add_routed(modules[name], adapter.spec.top_k)
        )
    return model, Modules(modules, adapter.spec.top_k)


def logprobs(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    """Log-probability of each token but the first, given those before it; float32."""
    with torch.inference_mode():
        logits = model(torch.tensor([tokens])).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


def see(model: Any, modules: Modules | None, prompts: Sequence[list[int]]) -> list[Wanted]:
    """What the model computes for each prompt; `modules` are those of its adapter."""
    kept: dict[str, torch.Tensor] = {}
    if modules is not None:
        layers = {_plain_name(name): layer for name, layer in model.named_modules()}
        for name, weights in modules.weights.items():
            if weights.router is not None:
                layers[name].register_forward_hook(_keep_logits(kept, name, weights.router))
    seen = []
    for tokens in prompts:
        scores = logprobs(model, tokens)
        seen.append(Wanted(scores, dict(kept)))
    return seen


def _with_plain(model: Any, folder: str | Path) -> tuple[Any, Modules]:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    model = PeftModel.from_pretrained(model, folder).eval()
    modules = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            (adapter,) = layer.lora_A
            lora_a, lora_b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            modules[_plain_name(name)] = SliceWeights(
                lora_a.detach(), lora_b.detach(), None, (len(lora_a),), (layer.scaling[adapter],)
            )
    return model, Modules(modules, top_k=1)


def _plain_name(name: str) -> str:
    return name.removeprefix(TENSOR_PREFIX)


def _keep_logits(
    kept: dict[str, torch.Tensor], name: str, router: torch.Tensor
) -> Callable[..., None]:
    def hook(_module: Any, inputs: tuple[torch.Tensor, ...], _output: Any) -> None:
        kept[name] = torch.nn.functional.linear(inputs[0].flatten(0, -2).float(), router)

    return hook


def _add_routed(weights: SliceWeights, top_k: int) -> Callable[..., torch.Tensor]:
    ranks = torch.tensor(weights.ranks)
    expert_of_row = torch.repeat_interleave(ranks)
    row_scaling = torch.tensor(weights.scalings)[expert_of_row]

    def hook(_module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        x = inputs[0].flatten(0, -2)
        added = torch_ops.routed_lora(
            x,
            weights.lora_a.to(x.dtype),
            weights.lora_b.to(x.dtype),
            weights.router,
            row_scaling,
            expert_of_row,
            top_k,
        )
        return output + added.view_as(output)

    return hook
