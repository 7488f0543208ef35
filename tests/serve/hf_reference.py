"""The same adapters in transformers: what the served model is compared with."""

from __future__ import annotations

from pathlib import Path

import peft
import torch

from guilomo_serve import check
from guilomo_serve.adapter import is_guilomo_adapter, read_adapter
from guilomo_serve.check import logprobs

__all__ = ["greedy", "logprobs", "model_with"]


def model_with(base: Path, adapter: Path | None) -> torch.nn.Module:
    """The base in its own dtype, with an adapter applied by hooks or by PEFT."""
    if adapter is None:
        return check.model_with(base, None)
    if is_guilomo_adapter(adapter):
        return check.model_with(base, read_adapter(adapter))
    return peft.PeftModel.from_pretrained(check.model_with(base, None), adapter).eval()


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
