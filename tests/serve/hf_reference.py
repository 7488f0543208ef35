"""The same adapters in transformers: what the served model is compared with."""

from __future__ import annotations

from pathlib import Path

import peft
import torch
import transformers

from guilomo_serve.adapter import is_guilomo_adapter, read_adapter
from guilomo_serve.ops import torch_ops


def model_with(base: Path, adapter: Path | None) -> torch.nn.Module:
    """The base in its own dtype, with an adapter applied by hooks or by PEFT."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto").eval()
    if adapter is None:
        return model
    if not is_guilomo_adapter(adapter):
        return peft.PeftModel.from_pretrained(model, adapter).eval()
    read = read_adapter(adapter)
    for name, experts in read.spec.experts.items():
        model.get_submodule(name).register_forward_hook(
            _add_routed(read.weights[name], experts, read.spec.top_k)
        )
    return model


def logprobs(model: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    """Log-probability of each token but the first, given those before it; float32."""
    with torch.inference_mode():
        logits = model(torch.tensor([tokens])).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


def greedy(model: torch.nn.Module, prompt: list[int], length: int) -> list[int]:
    """The tokens of a greedy answer, whatever ends the text."""
    answer: list[int] = []
    given, cache = torch.tensor([prompt]), None
    with torch.inference_mode():
        for _ in range(length):
            step = model(given, past_key_values=cache, use_cache=True)
            given, cache = step.logits[:, -1:].argmax(-1), step.past_key_values
            answer.append(int(given))
    return answer


def _add_routed(weights, experts, top_k):
    scaling = torch.tensor([e.scaling for e in experts])
    expert_of_row = torch.repeat_interleave(torch.tensor([e.rank for e in experts]))

    def hook(module, inputs, output):
        x = inputs[0].flatten(0, -2)
        added = torch_ops.routed_lora(
            x,
            weights.lora_a.to(x.dtype),
            weights.lora_b.to(x.dtype),
            weights.router,
            scaling[expert_of_row],
            expert_of_row,
            top_k,
        )
        return output + added.view_as(output)

    return hook
