"""Sampled answers on CPUs, where vLLM's own are wrong or end the engine.

*A request with a `seed` whose prompt is prefilled in parts.* After each part but the last vLLM
throws away the token that it has sampled, and puts the request's generator back with `set_offset`.
Generators of CPUs have no such method, so the request would end the engine. Here its generator is
set aside while such a step samples: the token that nobody gets comes from the common generator,
and nothing is to be put back.

*Drafts.* Whether a drafted token is kept depends on the request's temperature, top_k and top_p,
repeated for each of its drafts. vLLM's kernel for CPUs writes them into a copy that it drops, and
goes on with whatever was in that memory; and in a step that has no drafts, a top_k ends the engine.
Here torch repeats them, and without drafts there is nothing to do.

Both are of vLLM's first model runner (vllm/v1/worker/gpu_model_runner.py, 0.32), the one that CPUs
have. Its second one (vllm/v1/worker/gpu), the one of GPUs, samples by other code, which needs
nothing of this on a CPU either.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def install() -> None:
    """Replaces `load_lora_model` of vLLM's model runners, which every one of them calls once."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as FirstModelRunner
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    load = LoRAModelRunnerMixin.load_lora_model

    def load_and_mend(runner: Any, model: Any, vllm_config: Any, device: torch.device) -> Any:
        if torch.device(device).type == "cpu" and isinstance(runner, FirstModelRunner):
            _set_generators_aside(runner)
            _mend_drafts()
        return load(runner, model, vllm_config, device)

    setattr(LoRAModelRunnerMixin, "load_lora_model", load_and_mend)  # noqa: B010


def _set_generators_aside(runner: Any) -> None:
    """Gives one model runner a `sample_tokens` that leaves generators of unfinished prompts be."""
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


def _mend_drafts() -> None:
    from vllm.v1.sample import rejection_sampler

    constrain = rejection_sampler.apply_sampling_constraints

    def constrain_if_any(logits: torch.Tensor, *args: Any) -> torch.Tensor:
        return constrain(logits, *args) if len(logits) else logits

    rejection_sampler.apply_sampling_constraints = constrain_if_any
    rejection_sampler.expand_batch_to_tokens = _repeat_for_drafts


def _repeat_for_drafts(
    x: torch.Tensor,
    cu_num_tokens: torch.Tensor,
    num_tokens: int,
    replace_from: float = 0,
    replace_to: float = 0,
) -> torch.Tensor:
    """As `expand_batch_to_tokens` of vLLM's rejection sampler: a request's value for each draft.

    Args:
        x: of each request [requests].
        cu_num_tokens: drafts of the requests up to each, itself included [requests].
        num_tokens: all drafts.
        replace_from: a value of `x` in whose place stands ...
        replace_to: ... this one.

    Returns:
        [num_tokens].
    """
    counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
    replaced = x.masked_fill(x == replace_from, replace_to)
    return replaced.repeat_interleave(counts, output_size=num_tokens)
