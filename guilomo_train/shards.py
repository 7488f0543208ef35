"""A base of which each process has a part, and of the other parameters what is whole."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig

from guilomo_train.errors import ConfigError
from guilomo_train.processes import processes


def spread(model: PreTrainedModel) -> PreTrainedModel:
    """Spreads a base in 4 bit, which each process has loaded, over the processes, by FSDP2.

    transformers spreads what is not quantised while it reads it; bitsandbytes has to see whole
    weights. Their scales stay whole, a thirtieth of them. In its forward pass bitsandbytes' layer
    puts its scales to the weight that FSDP has gathered.

    All processes must call this, and every later forward pass.

    Raises:
        ValueError: transformers has no plan to shard this architecture.
    """
    embeddings, output = model.get_input_embeddings(), model.get_output_embeddings()
    tied = output is not None and output.weight is embeddings.weight
    if tied:  # one parameter cannot be in two groups of FSDP's
        output.weight = nn.Parameter(output.weight.detach(), requires_grad=False)
    config, _, mesh = model.prepare_distribute_model(
        DistributedConfig(fsdp_size=processes().num_processes)
    )
    model = model.maybe_distribute_model(model, config, mesh)
    if tied:
        model.tie_weights()
    model.hf_device_map = {"": processes().device}  # FSDP has moved it
    return model


def check_spreading(quantize: str) -> None:
    """Of quantised bases those in 4 bit can be spread.

    Raises:
        ConfigError: this one cannot.
    """
    if quantize == "8bit":
        raise ConfigError(
            "--quantize 8bit: cannot be spread over processes, as bitsandbytes looks for scales at "
            "the weight itself, which FSDP replaces; use --quantize 4bit"
        )


def is_whole(parameter: nn.Parameter) -> bool:
    """Whether a process has all of it: neither FSDP nor ZeRO-3 has taken it apart."""
    return not isinstance(parameter, DTensor) and not hasattr(parameter, "ds_id")


def size_of(parameter: torch.Tensor) -> torch.Size:
    """Of a parameter as a whole, whatever part this process has."""
    return getattr(parameter, "ds_shape", parameter.shape)


def count_parameters(model: PreTrainedModel) -> int:
    """`model.num_parameters()`, which counts nothing of what ZeRO-3 has taken apart, and of what is
    in 4 bit and spread half."""
    count = model.num_parameters()
    count += sum(p.ds_numel for p in model.parameters() if hasattr(p, "ds_numel"))
    for module in model.modules():
        weight: Any = getattr(module, "weight", None)
        state = getattr(module, "quant_state", None)  # of bitsandbytes' layers in 4 bit
        if state is not None and not is_whole(weight):
            count += math.prod(state.shape) - size_of(weight).numel()
    return count
