"""The same adapters in transformers: what the served model is compared with."""

from __future__ import annotations

from pathlib import Path

import torch

from guilomo_serve.check import hf
from guilomo_serve.check.hf import logprobs as logprobs


def model_with(base: Path, adapter: Path | None) -> torch.nn.Module:
    """The base in its own dtype, with an adapter applied by hooks or by PEFT."""
    model = hf.load_base(base)
    return model if adapter is None else hf.with_adapter(model, adapter)[0]


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
