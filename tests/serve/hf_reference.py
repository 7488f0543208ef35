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


def surprise(model: torch.nn.Module, tokens: list[int], answer: int) -> tuple[float, float]:
    """How much less likely the last `answer` tokens are than sampled ones are on average.

    Returns:
        The sum over them of entropy + log p in nats, and the standard deviation of that sum.
    """
    with torch.inference_mode():
        logits = model(torch.tensor([tokens])).logits[0, -answer - 1 : -1].double()
    log_p = logits.log_softmax(-1)
    mean = (log_p.exp() * log_p).sum(-1)
    variance = (log_p.exp() * (log_p - mean[:, None]) ** 2).sum(-1)
    of_tokens = log_p.gather(1, torch.tensor(tokens[-answer:])[:, None])[:, 0]
    return float((of_tokens - mean).sum()), float(variance.sum() ** 0.5)
