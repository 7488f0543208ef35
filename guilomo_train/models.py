"""The base model and its tokenizer, loaded as training and evaluation need them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from guilomo_train.errors import BaseError
from guilomo_train.limits import enough_memory


@dataclass
class Base:
    """A base model in memory. `name` is what the adapter will record."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load_base(name: str, dtype: str = "auto", quantize: str = "none") -> Base:
    """Loads a causal language model from a folder or by its hub name, onto the GPU if there is one.

    Args:
        name: folder or hub name.
        dtype: precision of what is not quantised; "auto" is the one it is stored in.
        quantize: "4bit" (NF4, as in QLoRA) or "8bit" loads the linear layers quantised.

    Raises:
        BaseError: there is no such model, it is not a causal language model, it has no tokenizer,
            or bitsandbytes is missing.
        OutOfMemoryError: it does not fit.
    """
    # Each process of torchrun has a GPU of its own; quantised weights cannot be moved later.
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        with enough_memory("loading the base", "give --dtype bfloat16 or --quantize 4bit"):
            model = AutoModelForCausalLM.from_pretrained(
                name,
                dtype=dtype,
                quantization_config=_quantization(quantize, dtype),
                device_map=None if quantize == "none" else {"": device},
            )
            if not getattr(model, "is_quantized", False):
                model.to(device)
    except (OSError, ValueError, ImportError) as e:
        raise BaseError(
            f"--base {name}: not a causal language model's folder or name: {_first_line(e)}"
        ) from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError) as e:
        raise BaseError(
            f"--base {name}: has no tokenizer that can be loaded; put its tokenizer files "
            f"beside the weights ({_first_line(e)})"
        ) from None
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise BaseError(
                f"--base {name}: its tokenizer has neither a pad_token nor an eos_token; "
                "set one in tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return Base(name, model, tokenizer)


def _quantization(quantize: str, dtype: str) -> BitsAndBytesConfig | None:
    if quantize == "none":
        return None
    if find_spec("bitsandbytes") is None:
        raise BaseError(
            f"--quantize {quantize}: needs the package bitsandbytes (pip install bitsandbytes), "
            "or leave --quantize out"
        )
    if quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32 if dtype == "float32" else torch.bfloat16,
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
