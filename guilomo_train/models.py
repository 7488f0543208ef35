"""The base model and its tokenizer, loaded as training and evaluation need them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import PartialState
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from guilomo_train.errors import BaseError


@dataclass
class Base:
    """A base model in memory. `name` is what the adapter will record."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


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
        reason = str(e).strip().splitlines()[0]
        raise BaseError(
            f"--base {name}: not a causal language model's folder or name: {reason}"
        ) from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Base(name, model.to(processes().device), tokenizer)


def processes() -> PartialState:
    """The processes that `torchrun` or `accelerate launch` started, or this one alone.

    On a machine without a GPU they speak through gloo.
    """
    return PartialState(cpu=not torch.cuda.is_available())
