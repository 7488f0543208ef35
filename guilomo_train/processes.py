"""The processes that train together, and whether they keep the base in shards."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState

from guilomo_train.errors import ConfigError


def processes() -> PartialState:
    """The processes that `torchrun` or `accelerate launch` started, or this one alone.

    On a machine without a GPU they speak through gloo.
    """
    return PartialState(cpu=not torch.cuda.is_available())


@dataclass(frozen=True)
class Sharding:
    """How the base is spread over the processes: by FSDP, or by ZeRO-3 with DeepSpeed's settings
    for it."""

    zero3: dict[str, Any] | None = None


# Of `accelerate launch`'s FSDP settings those that would have to do more than shard.
_FSDP_BEYOND = {
    "FSDP_OFFLOAD_PARAMS": "the base stays on its device",
    "FSDP_ACTIVATION_CHECKPOINTING": "give --gradient_checkpointing instead",
}


def take_sharding_request() -> Sharding | None:
    """What `accelerate launch --use_fsdp` or `--use_deepspeed` asks for (ACCELERATE_USE_FSDP=true,
    ACCELERATE_USE_DEEPSPEED=true).

    The request is taken out of the environment: accelerate would shard once more what `load_base`
    has sharded, and DeepSpeed the adapter as well.

    Raises:
        ConfigError: it asks for what is not done.
    """
    if os.environ.pop("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        from guilomo_train.zero3 import zero3_request

        zero = zero3_request()
        return Sharding(zero) if processes().num_processes > 1 else None
    if os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return None
    for name, remedy in _FSDP_BEYOND.items():
        if os.environ.get(name, "false").lower() == "true":
            raise ConfigError(
                f"FSDP configuration: {name.lower()} is true, expected false: {remedy}"
            )
    return Sharding() if processes().num_processes > 1 else None
