"""The processes that train together, and whether they keep the base in shards."""

from __future__ import annotations

import os

import torch
from accelerate import PartialState

from guilomo_train.errors import ConfigError


def processes() -> PartialState:
    """The processes that `torchrun` or `accelerate launch` started, or this one alone.

    On a machine without a GPU they speak through gloo.
    """
    return PartialState(cpu=not torch.cuda.is_available())


# ZeRO-3 takes the gradients that second order unrolls, and the weights that an adapter's files have
# unless they are smaller than its stage3_param_persistence_threshold.
DEEPSPEED_REFUSED = (
    "DeepSpeed is asked for, but it leaves each process a part of the adapter, which searches and "
    "the adapter's files need whole: use `accelerate launch --use_fsdp`, which spreads the base "
    "alone"
)


# Of `accelerate launch`'s FSDP settings those that would have to do more than shard.
_FSDP_BEYOND = {
    "FSDP_OFFLOAD_PARAMS": "the base stays on its device",
    "FSDP_ACTIVATION_CHECKPOINTING": "give --gradient_checkpointing instead",
}


def take_sharding_request() -> bool:
    """Whether `accelerate launch --use_fsdp`, or ACCELERATE_USE_FSDP=true, asks to shard the base.

    The request is taken out of the environment: accelerate, which acts on it on GPUs alone, would
    shard once more what `load_base` has sharded.

    Raises:
        ConfigError: it asks for what is not done, or DeepSpeed is asked for.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise ConfigError(DEEPSPEED_REFUSED)
    if os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    for name, remedy in _FSDP_BEYOND.items():
        if os.environ.get(name, "false").lower() == "true":
            raise ConfigError(
                f"FSDP configuration: {name.lower()} is true, expected false: {remedy}"
            )
    return processes().num_processes > 1
