"""What vLLM compiles when the first request needs it, compiled before the server is ready.

vLLM 0.32 has torch.compile around the count that gives a token its rank among all tokens
(`batched_count_greater_than` of vllm/v1/sample/ops/logprobs.py). The first request with `logprobs`
or `prompt_logprobs` stopped the whole engine for up to 20 s. `Sampler.gather_logprobs`, which calls
it, is called here as vLLM does, so that what is compiled fits; if it is renamed, the server does
not start, and if something else is compiled late, tests/serve/test_compiling.py says so. The second
model runner (vllm/v1/worker/gpu), the one of GPUs, has another sampler, which counts ranks in a
kernel of its own and is warmed up by vLLM (vllm/v1/worker/gpu/warmup.py).
"""

from __future__ import annotations

from typing import Any

import torch

_TOKENS = 4


def install() -> None:
    """Gives vLLM's workers the method that the front end calls by its name."""
    from vllm.v1.worker.worker_base import WorkerBase

    setattr(WorkerBase, "guilomo_warm_up", _warm_up)  # noqa: B010


@torch.inference_mode()
def _warm_up(worker: Any) -> None:
    from vllm.v1.sample.sampler import Sampler

    runner = worker.model_runner
    if runner.is_pooling_model or not isinstance(runner.sampler, Sampler):
        return  # it samples nothing, or by other code
    logits = torch.zeros(_TOKENS, runner.model_config.get_vocab_size(), device=runner.device)
    logprobs = runner.sampler.compute_logprobs(logits)
    tokens = torch.zeros(_TOKENS, dtype=torch.int64, device=runner.device)
    runner.sampler.gather_logprobs(logprobs, 1, tokens)
