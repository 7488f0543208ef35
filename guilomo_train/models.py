"""The base model and its tokenizer, loaded as training and evaluation need them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from accelerate import PartialState
from peft import get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from guilomo_serve.adapter import BaseModel
from guilomo_train.errors import BaseError, ConfigError
from guilomo_train.lora_moe import LoraMoeConfig


@dataclass
class Base:
    """A base model in memory. `name` is what the adapter will record."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sizes:
    """A base without its weights.

    Attributes:
        parameters: of the base.
        linears: full module name -> (out_features, in_features) of its linear layers.
        adapted: those that are to be adapted.
    """

    parameters: int
    linears: Mapping[str, tuple[int, int]]
    adapted: tuple[str, ...]


def sizes_of(name: str, target_modules: str | list[str]) -> Sizes:
    """The sizes of a base and of its layers to adapt, from its config alone.

    Args:
        name: a folder or hub name.
        target_modules: as PEFT takes them.

    Raises:
        BaseError: there is no such model.
        ConfigError: it has no such modules.
    """
    try:
        config = AutoConfig.from_pretrained(name)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as e:
        raise _not_a_base(name, e) from None
    parameters = model.num_parameters()
    linears = BaseModel.from_module(model).linears
    # Wrapped as a search wraps it, so that both mean the same layers.
    wrapped = LoraMoeConfig(target_modules=target_modules, num_experts=1, expert_rank=1)
    try:
        with torch.device("meta"):
            get_peft_model(model, wrapped)
    except ValueError as e:
        raise ConfigError(f"target_modules: {e}") from None
    assert wrapped.experts is not None
    return Sizes(parameters, linears, tuple(wrapped.experts))


def load_base(name: str, dtype: str = "auto") -> Base:
    """Loads a causal language model from a folder or by its hub name, onto the GPU if there is one.

    Under `torchrun` or `accelerate launch` each process loads it onto its own GPU.

    Raises:
        BaseError: there is no such model, or it is not a causal language model.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as e:
        raise _not_a_base(name, e) from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Base(name, model.to(processes().device), tokenizer)


def processes() -> PartialState:
    """The processes that `torchrun` or `accelerate launch` started, or this one alone.

    On a machine without a GPU they speak through gloo.
    """
    return PartialState(cpu=not torch.cuda.is_available())


def _not_a_base(name: str, error: Exception) -> BaseError:
    reason = str(error).strip().splitlines()[0]
    return BaseError(f"--base {name}: not a causal language model's folder or name: {reason}")
