"""A request with a `seed` whose prompt is prefilled in parts, on CPUs.

After each part but the last vLLM throws away the token that it has sampled, and puts the request's
generator back with `set_offset`. Generators of CPUs have no such method, so the request would end
the engine. Here its generator is set aside while such a step samples: the token that nobody gets
comes from the common generator, and nothing is to be put back.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def install() -> None:
    """Replaces `load_lora_model` of vLLM's model runners, which every one of them calls once."""
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    load = LoRAModelRunnerMixin.load_lora_model

    def load_and_mend(runner: Any, model: Any, vllm_config: Any, device: torch.device) -> Any:
        if torch.device(device).type == "cpu":
            _mend(runner)
        return load(runner, model, vllm_config, device)

    setattr(LoRAModelRunnerMixin, "load_lora_model", load_and_mend)  # noqa: B010


def _mend(runner: Any) -> None:
    """Gives one model runner a `sample_tokens` that sets generators aside."""
    sample_tokens = runner.sample_tokens

    def sample_without_the_unfinished(grammar_output: Any) -> Any:
        generators = runner.input_batch.generators
        unfinished = np.flatnonzero(runner.discard_request_mask.np[: runner.input_batch.num_reqs])
        aside = {i: generators.pop(i) for i in unfinished.tolist() if i in generators}
        try:
            return sample_tokens(grammar_output)
        finally:
            generators.update(aside)

    runner.sample_tokens = sample_without_the_unfinished
