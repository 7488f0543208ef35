"""A model split by layers over the stages of a pipeline (--pipeline-parallel-size).

Each stage has the layers of its own, and takes of an adapter what these need. Whether all of an
adapter has a place is judged by each for the whole model: when their managers are made, the stages
tell one another which modules they have.

The seam, for vLLM 0.32: `load_lora_model` of `LoRAModelRunnerMixin`; and `intermediate_tensors` of
`GPUModelRunner` (v1/worker/gpu_model_runner.py), what a stage gets from the one before. It is made
by the first dummy run, which the CPU build leaves out where nothing is compiled, as with LoRA: the
first request ended the engine. If it is renamed, this does nothing and that is so again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

Shapes = Mapping[str, tuple[int, int]]


def install() -> None:
    """Has a later stage on a CPU ready for the first request."""
    from vllm.distributed import get_pp_group
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    load = LoRAModelRunnerMixin.load_lora_model

    def load_and_make_ready(runner: Any, model: Any, vllm_config: Any, device: torch.device) -> Any:
        if torch.device(device).type == "cpu" and not get_pp_group().is_first_rank:
            runner.intermediate_tensors = model.make_empty_intermediate_tensors(
                batch_size=runner.max_num_tokens,
                dtype=runner.model_config.dtype,
                device=runner.device,
            )
        return load(runner, model, vllm_config, device)

    setattr(LoRAModelRunnerMixin, "load_lora_model", load_and_make_ready)  # noqa: B010


def shapes_elsewhere(own: Shapes) -> dict[str, tuple[int, int]]:
    """What the other stages have; to be called by all at the same time.

    Args:
        own: module, by vLLM's name -> (out, in) of the whole of it, of this stage.
    """
    from vllm.distributed import get_pp_group

    stages = get_pp_group()
    if stages.world_size == 1:
        return {}
    found: list[Any] = [None] * stages.world_size
    torch.distributed.all_gather_object(found, dict(own), group=stages.cpu_group)
    return {module: shape for shapes in found for module, shape in shapes.items()}
