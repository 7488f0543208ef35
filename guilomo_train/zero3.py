"""A base that DeepSpeed's ZeRO-3 spreads over the processes.

Each process keeps a part of every weight of the base, and gathers a layer's while it computes. The
adapter is put on afterwards and is whole everywhere, as on a base in shards of FSDP, so that
searches, files, checkpoints and the adapter's float32 are as without. DeepSpeed trains nothing:
of it `deepspeed.zero.Init`, which transformers enters while it loads, and the hooks are used that
`deepspeed.initialize` puts on the modules of a model that it is given without an optimiser. If a
version puts them elsewhere, the layers of the base compute with weights of no elements, and fail.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from accelerate.utils import DeepSpeedPlugin
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from guilomo_train.errors import ConfigError

# Sections of a DeepSpeed config that are about training, which it does not do here.
_OF_TRAINING = ("optimizer", "scheduler")


def zero3_request() -> dict[str, Any]:
    """The `zero_optimization` of the config that `accelerate launch --use_deepspeed` asks for.

    Raises:
        ConfigError: DeepSpeed is not installed, or is asked for more than to spread the base.
    """
    if find_spec("deepspeed") is None:
        raise ConfigError(
            "DeepSpeed is asked for, but not installed: pip install deepspeed, or use "
            "`accelerate launch --use_fsdp`, which does the same"
        )
    config = DeepSpeedPlugin().deepspeed_config
    for section in _OF_TRAINING:
        if section in config:
            raise ConfigError(
                f"DeepSpeed configuration: has {section!r}, expected none: DeepSpeed spreads the "
                "base, and the adapter is trained as without; give --learning_rate and the like"
            )
    zero = config["zero_optimization"]
    if zero["stage"] != 3:
        raise ConfigError(
            f"DeepSpeed configuration: stage is {zero['stage']}, expected 3 (--zero_stage 3): the "
            "others spread gradients and optimiser of what is trained, which is a small adapter; "
            "to have the base whole in each process launch without DeepSpeed"
        )
    if (zero.pop("offload_optimizer", None) or {}).get("device", "none") not in ("none", "auto"):
        raise ConfigError(
            "DeepSpeed configuration: offload_optimizer is given, expected none: the adapter's "
            "optimiser stays on its device; offload_param moves the base"
        )
    if (zero.get("offload_param") or {}).get("device", "none") in ("none", "auto"):
        zero.pop("offload_param", None)
    return {key: value for key, value in zero.items() if value != "auto"}


def load_in_parts(
    load: Callable[[], PreTrainedModel],
    zero: dict[str, Any],
    dtype: torch.dtype,
    quantised: bool = False,
) -> PreTrainedModel:
    """A model of which each process has a part. All processes must call this, and every later
    forward pass.

    Args:
        load: `from_pretrained` with its arguments.
        zero: as `zero3_request` gives it.
        dtype: of the model.
        quantised: whether it is in 4 bit: then it is taken apart when it is loaded, not while.
    """
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,  # asked for, though nothing is trained
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == torch.bfloat16},
    }
    # Of the process group that is there.
    deepspeed.init_distributed(torch.distributed.get_backend())
    alive = None if quantised else HfDeepSpeedConfig(config)  # transformers refers to it weakly
    try:
        model = load()
    finally:
        del alive
        unset_hf_deepspeed_config()
    deepspeed.initialize(model=model, config=config)
    return model
