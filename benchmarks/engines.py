"""What benchmarks of vLLM's engine share: how it is set up, and what it is given to do."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Sequence
from typing import Any

from guilomo_serve.precision import half_precision_is_slow


def start(model: str, requests: int, prompt_tokens: int, **settings: Any) -> Any:
    """vLLM's `LLM`, without prefix cache, in the precision of `guilomo-serve`.

    In eager mode unless the settings say otherwise. Prompts are given as tokens.

    Args:
        model: the base model.
        requests: that run at once.
        prompt_tokens: of each of them, at most; all are prefilled in one step.
        settings: further ones of `LLM`.
    """
    os.environ.update(VLLM_LOGGING_LEVEL="ERROR", VLLM_CPU_KVCACHE_SPACE="1", HF_HUB_OFFLINE="1")
    from vllm import LLM

    ours = {
        "dtype": "float32" if half_precision_is_slow() else "auto",
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "max_model_len": 512,
        "max_num_seqs": requests,
        "max_num_batched_tokens": max(2048, requests * prompt_tokens),
        "disable_log_stats": True,
    }
    return LLM(model, **{**ours, **settings})


def generate(
    llm: Any, loras: Sequence[Any], prompts: int, prompt_tokens: int, new_tokens: int
) -> float:
    """Seconds for random prompts, the same each time, whose adapters are `loras` in turn."""
    from vllm import SamplingParams

    generator = random.Random(0)
    vocabulary = range(100, min(20_000, llm.model_config.get_vocab_size()))
    tokens = [
        {"prompt_token_ids": generator.choices(vocabulary, k=prompt_tokens)} for _ in range(prompts)
    ]
    parameters = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    chosen = [loras[i % len(loras)] for i in range(prompts)] if loras else None
    begin = time.perf_counter()
    llm.generate(tokens, parameters, use_tqdm=False, lora_request=chosen)
    return time.perf_counter() - begin
