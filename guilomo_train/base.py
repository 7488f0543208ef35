"""The base model and its tokenizer, loaded as training and evaluation need them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.distributed import DistributedConfig
from transformers.utils.hub import cached_file, extract_commit_hash

from guilomo_serve.adapter import CONFIG_FILE, BaseModel
from guilomo_serve.precision import half_precision_is_slow
from guilomo_train.adapters import with_adapter
from guilomo_train.endings import end_tokens, stop_tokens, written_ends
from guilomo_train.errors import BaseError
from guilomo_train.limits import enough_memory
from guilomo_train.lora_moe import LoraMoeConfig
from guilomo_train.processes import Sharding, processes
from guilomo_train.shards import size_of, spread
from guilomo_train.zero3 import load_in_parts


@dataclass
class Base:
    """A base model in memory.

    `name` is what the adapter will record, with the `commit` of a base on the hub.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    commit: str | None = None

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The tokens that an adapter of it has to stop at beside the base's own end tokens."""
        return stop_tokens(end_tokens(self.model, self.tokenizer), written_ends(self.tokenizer))

    def ending(self) -> str:
        """What is unusual in how its answers end, as a sentence; "" for nothing."""
        written = written_ends(self.tokenizer)
        if not written:
            return (
                "the base's chat template writes no token at the end of an answer: each completion "
                f"is taught to end with {self.tokenizer.eos_token!r}"
            )
        if not self.stop_token_ids:
            return ""
        stop, *ends = self.tokenizer.convert_ids_to_tokens(
            [*self.stop_token_ids, *sorted(end_tokens(self.model, self.tokenizer))]
        )
        return (
            f"the base's chat template ends an answer with {stop!r}, which is none of the base's "
            f"end tokens ({', '.join(map(repr, ends))}): the evaluation stops at it, and the "
            "adapter's stop_token_ids have guilomo-serve do so"
        )


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


def sizes_of(
    name: str,
    target_modules: str | list[str],
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Sizes:
    """The sizes of a base and of its layers to adapt, from its config alone.

    Args:
        name: a folder or hub name.
        target_modules: as PEFT takes them.
        revision, trust_remote_code: as those of `load_base`.

    Raises:
        BaseError: there is no such model.
        ConfigError: it has no such modules.
    """
    model = without_weights(name, revision, trust_remote_code)
    parameters = model.num_parameters()
    linears = BaseModel.from_module(model).linears
    # Wrapped as a search wraps it, so that both mean the same layers.
    wrapped = LoraMoeConfig(target_modules=target_modules, num_experts=1, expert_rank=1)
    with torch.device("meta"):
        adapted = with_adapter(model, wrapped).peft_config["default"].experts
    return Sizes(parameters, linears, tuple(adapted))


def without_weights(
    name: str, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A base on the meta device, from its config alone; arguments as those of `load_base`.

    Raises:
        BaseError: there is no such model.
    """
    _check_base_name(name, revision)
    code = {"trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, **code)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, **code)
    except (OSError, ValueError, ImportError) as e:
        raise _not_a_base(name, e) from None


def commit_of(name: str, revision: str | None = None) -> str | None:
    """The commit of a base on the hub that was loaded; None for a folder."""
    return extract_commit_hash(cached_file(name, "config.json", revision=revision), None)


def _check_base_name(name: str, revision: str | None) -> None:
    """Refuses what transformers takes in its own way: it would load an adapter's base and put the
    adapter on it, and of a folder it takes no notice of a revision."""
    if revision is not None and Path(name).is_dir():
        raise BaseError(
            f"--revision {revision}: --base {name} is a folder, of which there is one version; "
            "leave it out"
        )
    if (Path(name) / CONFIG_FILE).is_file():
        raise BaseError(
            f"--base {name}: is an adapter and no model; give the base that it was trained on (its "
            f"{CONFIG_FILE} names it), and to go on from its weights use finetune --start"
        )


def load_base(
    name: str,
    dtype: str = "auto",
    quantize: str = "none",
    sharding: Sharding | None = None,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
) -> Base:
    """Loads a causal language model from a folder or by its hub name, onto the GPU if there is one.

    Under `torchrun` or `accelerate launch` each process loads it onto its own GPU.

    Args:
        name: folder or hub name.
        dtype: precision of what is not quantised; "auto" is the one it is stored in, or float32
            on a CPU that is slow in half precision.
        quantize: "4bit" (NF4, as in QLoRA) or "8bit" loads the linear layers quantised.
        sharding: each process keeps a part of every weight alone (PyTorch's FSDP2, by transformers'
            own plan for the architecture, or DeepSpeed's ZeRO-3) and gathers a layer while it
            computes. All processes must call this, and every later forward pass. An adapter that
            is put on it afterwards is whole in each process.
        revision: branch, tag or commit on the hub.
        trust_remote_code: whether code that comes with the model may run.
        attn_implementation: as transformers takes it; None for its choice.

    Raises:
        BaseError: there is no such model, it is an adapter, it is not a causal language model, it
            has no tokenizer or no end token, bitsandbytes is missing, or transformers has no plan
            to shard it.
        OutOfMemoryError: it does not fit.
    """
    _check_base_name(name, revision)
    device = processes().device
    if dtype == "auto" and half_precision_is_slow():
        dtype = "float32"
    zero3 = None if sharding is None else sharding.zero3
    fsdp = sharding is not None and zero3 is None
    load = partial(
        AutoModelForCausalLM.from_pretrained,
        name,
        dtype=dtype,
        revision=revision,
        trust_remote_code=trust_remote_code,
        attn_implementation=attn_implementation,
        quantization_config=_quantization(quantize, dtype),
        # Quantised weights cannot be moved later, but by FSDP, which takes them apart as it does.
        device_map=None if quantize == "none" else {"": "cpu" if fsdp else device},
        distributed_config=(
            DistributedConfig(fsdp_size=processes().num_processes)
            if fsdp and quantize == "none"
            else None
        ),
    )
    try:
        with enough_memory("loading the base", "give --dtype bfloat16 or --quantize 4bit"):
            if zero3 is not None:
                stored = without_weights(name, revision, trust_remote_code).dtype
                wanted = stored if dtype == "auto" else getattr(torch, dtype)
                model = load_in_parts(load, zero3, wanted, quantize == "4bit")
            else:
                model = load()
            if quantize == "4bit":
                _keep_4_bit_as_loaded(model)
                if fsdp:
                    model = spread(model)
            elif sharding is None and not getattr(model, "is_quantized", False):
                model.to(device)
    except (OSError, ValueError, ImportError) as e:
        raise _not_a_base(name, e) from None
    tokenizer = load_tokenizer(name, revision, trust_remote_code)
    if tokenizer.eos_token is None:
        raise BaseError(
            f"--base {name}: its tokenizer has no eos_token, by which an answer ends; set it in "
            "tokenizer_config.json"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Base(name, model, tokenizer, commit_of(name, revision))


def load_tokenizer(
    name: str, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a base; arguments as those of `load_base`.

    Raises:
        BaseError: there is none.
    """
    _check_base_name(name, revision)
    try:
        return AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, ImportError) as e:
        raise BaseError(
            f"--base {name}: has no tokenizer that can be loaded; put its tokenizer files "
            f"beside the weights ({_first_line(e)})"
        ) from None


def check_tokens(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[list[int]]
) -> None:
    """Checks that the base has an embedding of all tokens, of which a tokenizer may know more, and
    of all positions, where they are learned.

    Args:
        model: the base, or a PEFT model of it.
        tokenizer: what made the tokens.
        texts: token ids; taken one after another, as there may be more than memory holds.

    Raises:
        BaseError: it lacks a token's, which the message names, or the last position's.
    """
    longest = max(map(len, texts), default=0)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    decoder = getattr(base, "get_decoder", lambda: base)()  # not a tower of images
    for part, module in decoder.named_modules():
        # Two of OPT's positions are for padding; others have as many as they say.
        if isinstance(module, nn.Embedding) and re.search(r"wpe|position", part.split(".")[-1]):
            most = int(getattr(model.config, "max_position_embeddings", module.num_embeddings))
            if longest > most:
                raise BaseError(
                    f"--base: has {most} positions ({part}), but a row has {longest} tokens; give "
                    f"--max_length {most} or less, or shorter rows"
                )
    most = max((max(ids, default=0) for ids in texts), default=0)
    most = max(most, tokenizer.pad_token_id)
    weight = model.get_input_embeddings().weight  # type: ignore[operator]
    embeddings = size_of(weight)[0]
    if most >= embeddings:
        raise BaseError(
            f"--base: its tokenizer makes token {most} ({tokenizer.convert_ids_to_tokens(most)!r}) "
            f"of the rows, but its embedding has {embeddings} tokens alone; put the tokenizer "
            "beside the weights that they were trained with"
        )


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


def _keep_4_bit_as_loaded(model: PreTrainedModel) -> None:
    """On CPUs with bfloat16 products bitsandbytes 0.50 packs a weight anew in the first forward
    pass of an evaluation (`Linear4bit.forward`), and leaves it so: what follows has no gradient
    through the layer, and FSDP would gather what was before. Where a version asks for that
    otherwise, the test of gradients after an evaluation fails."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _not_a_base(name: str, error: Exception) -> BaseError:
    if "trust_remote_code" in str(error):
        return BaseError(
            f"--base {name}: comes with code of its own; read it, and give --trust_remote_code"
        )
    return BaseError(
        f"--base {name}: not a causal language model's folder or name: {_first_line(error)}"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
