"""Memory and time of a run before it starts: what `guilomo-train plan` says.

Parameters are counted on the base's config, without its weights. What a token leaves for the
backward pass is seen on models of one and of two of the base's blocks, with weights of zeros, on
short rows of three lengths. From these follow the bytes of all blocks at any length:

    bytes = c + rows (a length + b length^2)      c: copies of the adapter in the base's precision

The output layer's part and all that does not depend on rows are computed. The same two models tell
the time of a block, where no rate is given.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from guilomo_serve.adapter import BaseModel
from guilomo_serve.precision import half_precision_is_slow
from guilomo_train.adapters import with_adapter
from guilomo_train.base import load_tokenizer, sizes_of, without_weights
from guilomo_train.config import (
    VALIDATION_SHARE,
    CommonConfig,
    FinetuneConfig,
    PlanConfig,
    SearchConfig,
    order_of,
)
from guilomo_train.data import load_rows
from guilomo_train.data.rendering import encode
from guilomo_train.endings import written_ends
from guilomo_train.limits import enough_memory
from guilomo_train.lora_moe import LoraMoeConfig, LoraMoeLayer
from guilomo_train.lora_moe.layer import Masks
from guilomo_train.processes import processes
from guilomo_train.searching import search_budget, search_space
from guilomo_train.shards import check_spreading

GIB = 2**30
LENGTHS = (32, 64, 128)  # of the rows that are tried; three tell a, b and c
# Of a quantised weight, and of its scales: NF4 has one byte for 64 weights, and four for 256 of
# those.
QUANTISED_BYTES = {"4bit": 0.5, "8bit": 1.0}
SCALE_BYTES = {"4bit": 1 / 64 + 4 / (64 * 256), "8bit": 0.0}
# Copies of the adapter that a search holds beside weights, gradients and optimiser.
COPIES = {"online": 0, "first": 1, "second": 3}
# Forward and backward passes of a search's step, in those of a fine-tuning's.
PASSES = {"online": 1, "first": 2, "second": 4}


@dataclass(frozen=True)
class Load:
    """What the rows ask for: the tokens of all of them, and the most of a row, which a batch is
    padded to. `learned` are the most that the output layer scores in a row."""

    tokens: int
    length: int
    learned: int


@dataclass(frozen=True)
class Stage:
    """A search or a fine-tuning on one device: parameters, bytes and hours.

    `activations` are what all blocks keep for the backward pass, `output_layer` the logits and
    their gradients, `workspace` what one layer takes while it is computed.
    """

    name: str
    adapter_parameters: int
    base: int
    adapter: int
    gradients: int
    optimiser: int
    copies: int
    activations: int
    output_layer: int
    workspace: int
    hours: float

    @property
    def peak(self) -> int:
        return sum(
            (self.base, self.adapter, self.gradients, self.optimiser, self.copies,
             self.activations, self.output_layer, self.workspace)
        )  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """A run, planned."""

    base_parameters: int
    load: Load
    stages: tuple[Stage, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "base_parameters": self.base_parameters,
            "load": vars(self.load),
            "stages": [vars(stage) | {"peak": stage.peak} for stage in self.stages],
        }

    def table(self) -> str:
        rows = [("GiB on each device", *(stage.name for stage in self.stages))]
        for name in (
            "base", "adapter", "gradients", "optimiser", "copies", "activations", "output_layer",
            "workspace", "peak",
        ):  # fmt: skip
            sizes = (f"{getattr(stage, name) / GIB:.2f}" for stage in self.stages)
            rows.append((name.replace("_", " "), *sizes))
        parameters = (f"{stage.adapter_parameters:,}" for stage in self.stages)
        rows.append(("adapter's parameters", *parameters))
        rows.append(("hours", *(f"{stage.hours:.2f}" for stage in self.stages)))
        lines = [f"{row[0]:22}" + "".join(f"{cell:>18}" for cell in row[1:]) for row in rows]
        load = self.load
        return "\n".join(
            [
                f"base: {self.base_parameters:,} parameters; rows: {load.tokens:,} tokens, at most "
                f"{load.length} in one",
                *lines,
                "not counted: what CUDA and its allocator keep beside, and the evaluation",
            ]
        )


@dataclass(frozen=True)
class Blocks:
    """What some blocks of the base keep of rows, with a step's seconds for a token."""

    constant: float
    linear: float
    square: float
    seconds: float

    def bytes(self, rows: int, length: int) -> float:
        return self.constant + rows * (self.linear * length + self.square * length**2)

    def __sub__(self, other: Blocks) -> Blocks:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Blocks(*(a - b for a, b in pairs))


def plan(
    common: CommonConfig, search: SearchConfig, finetune: FinetuneConfig, machine: PlanConfig
) -> Plan:
    """Plans `guilomo-train run` with these settings.

    The fine-tuning's adapter is of the budget's size, and as even as can be.

    Raises:
        BaseError: the base has no config that can be read; without `machine.tokens` no tokenizer.
        ConfigError, DataError: the target modules, the budget or the rows cannot be used.
    """
    order = order_of(common, search)
    remote = (common.revision, common.trust_remote_code)
    sizes = sizes_of(common.base, common.targets(), *remote)
    whole = without_weights(common.base, *remote)
    config = whole.config
    dtype = _dtype(common, config)
    whole.to(dtype)
    linears = {module: sizes.linears[module] for module in sizes.adapted}
    space = search_space(linears, common, search)
    share = search_budget(space, search.budget, sizes.parameters) / space.cost(
        search.max_experts, search.max_rank
    )
    most = int(replace(space, prices=None).cost(search.max_experts, search.max_rank))
    load = _load(common, machine)
    if machine.fsdp:
        check_spreading(common.quantize)
    base = _bytes(whole, whole, common.quantize) / (machine.processes if machine.fsdp else 1)
    if common.quantize != "none":  # scales are whole everywhere
        base += SCALE_BYTES[common.quantize] * sum(w.numel() for w in _quantised(whole))
    workspace = _workspace(whole, common.quantize, machine.fsdp)
    held_out = order != "online" and common.validation is None
    kept = 1 - (common.validation_share or VALIDATION_SHARE) if held_out else 1.0
    packed = max(load.length, common.max_length) if finetune.packing else load.length
    stages = []
    for name, parameters, copies, rows, length, passes, rank in (
        ("search", most, COPIES[order], search.search_batch_size, load.length,
         search.search_epochs * PASSES[order] * kept, search.max_rank),
        ("fine-tuning", round(share * most), 0, finetune.batch_size, packed, finetune.epochs,
         max(1, round(share * search.max_rank))),
    ):  # fmt: skip
        adapter = LoraMoeConfig(
            target_modules=common.targets(),
            num_experts=search.max_experts,
            expert_rank=rank,
            top_k=max(common.top_k, min(2, search.max_experts)),
            task_type="CAUSAL_LM",
        )
        one, two = (
            _measured(
                _few_blocks(config, n, common, adapter, dtype),
                name == "search",
                timed=machine.rate is None,
            )
            for n in (1, 2)
        )
        block, count = two - one, _text(config).num_hidden_layers
        width, vocabulary = _text(config).hidden_size, _text(config).vocab_size
        if common.gradient_checkpointing:  # a block's input, and all of the block in hand
            activations = two.bytes(rows, length) - block.bytes(rows, length)
            activations += count * rows * length * width * dtype.itemsize
        else:
            activations = one.bytes(rows, length) + (count - 1) * block.bytes(rows, length)
        learned = packed if finetune.packing and name != "search" else load.learned
        # Logits, those of learned tokens, their log-softmax in float32, and gradients of them.
        output_layer = rows * learned * vocabulary * (12 if dtype.itemsize == 2 else 16)
        if machine.rate is not None:
            seconds = 1 / machine.rate
        else:
            block_weights = sum(p.numel() for p in _blocks(whole)[0].parameters())
            head = width * vocabulary / block_weights * load.learned / load.length
            seconds = two.seconds / 2 * (count + head)  # a difference of two times may be none
            seconds *= 1.5 if common.gradient_checkpointing else 1  # each block forward once more
        stages.append(
            Stage(
                name,
                parameters,
                base=int(base),
                adapter=4 * parameters,
                gradients=4 * parameters * (2 if machine.processes > 1 else 1),  # DDP's buckets
                optimiser=8 * parameters,
                copies=4 * parameters * copies,
                activations=int(activations),
                output_layer=output_layer,
                workspace=workspace,
                hours=load.tokens * passes * seconds / machine.processes / 3600,
            )
        )
    return Plan(sizes.parameters, load, tuple(stages))


def _text(config: PretrainedConfig) -> Any:
    return config.get_text_config()


def _dtype(common: CommonConfig, config: PretrainedConfig) -> torch.dtype:
    """As `load_base` takes it."""
    if common.dtype != "auto":
        return getattr(torch, common.dtype)
    stored = _text(config).dtype or torch.float32
    if half_precision_is_slow():
        return torch.float32
    return getattr(torch, stored) if isinstance(stored, str) else stored


def _load(common: CommonConfig, machine: PlanConfig) -> Load:
    if machine.tokens is not None:
        return Load(machine.tokens, common.max_length, common.max_length)
    tokenizer = load_tokenizer(common.base, common.revision, common.trust_remote_code)
    rows = load_rows(
        common.train, tokenizer, common.train_rows, common.seed, common.train_weights,
        common.loss_on,
    )  # fmt: skip
    written = written_ends(tokenizer)
    tokens, length, learned = 0, 1, 1
    for row in rows:
        both = (row["input_ids"], row["labels"]) if "input_ids" in row else None
        ids, labels = both or encode(tokenizer, row, written)
        tokens += min(len(ids), common.max_length)
        length = max(length, min(len(ids), common.max_length))
        learned = max(learned, sum(label != -100 for label in labels[: common.max_length]))
    return Load(tokens, length, learned)


def _bytes(part: nn.Module, model: PreTrainedModel, quantize: str) -> float:
    """Of all weights of a part of the model, without scales."""
    quantised = {id(w) for w in _quantised(model)} if quantize != "none" else set()
    return sum(
        p.numel() * (QUANTISED_BYTES[quantize] if id(p) in quantised else p.element_size())
        for p in part.parameters()
    )


def _quantised(model: PreTrainedModel) -> list[nn.Parameter]:
    """The weights of all linear layers but the output layer."""
    output = model.get_output_embeddings()
    linears = map(model.get_submodule, BaseModel.from_module(model).linears)
    weights: list[Any] = [linear.weight for linear in linears if linear is not output]
    return weights


def _blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The list of the language model's blocks."""
    lists = [m for m in model.get_decoder().modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=len)


def _workspace(model: PreTrainedModel, quantize: str, sharded: bool) -> int:
    """What has to be whole while it is computed: of a quantised base one weight, of a sharded one
    two blocks, the one in hand and the one that comes, and embedding and output layer."""
    bytes_ = 0.0
    if sharded:
        ends: Any = {model.get_input_embeddings(), model.get_output_embeddings()} - {None}
        whole = {id(m.weight): m.weight for m in ends}
        bytes_ += 2 * _bytes(_blocks(model)[0], model, quantize)
        bytes_ += sum(w.numel() * w.element_size() for w in whole.values())
    if quantize != "none":
        bytes_ += max(w.numel() * w.element_size() for w in _quantised(model))
    return int(bytes_)


def _few_blocks(
    config: PretrainedConfig, count: int, common: CommonConfig, adapter: LoraMoeConfig,
    dtype: torch.dtype,
) -> PeftModel:  # fmt: skip
    """A model of so many of the base's blocks and a few words, with weights of zeros."""
    short = copy.deepcopy(config)
    text = _text(short)
    text.num_hidden_layers, text.vocab_size = count, 64
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(text, name, None)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:count]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            short,
            dtype=dtype,
            attn_implementation=common.attn_implementation,
            trust_remote_code=common.trust_remote_code,
        )
    with enough_memory("the measurement of two blocks", "plan on a machine with more memory"):
        model = model.to_empty(device=processes().device)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data.zero_()
        return with_adapter(model, adapter)


def _measured(model: PeftModel, search: bool, timed: bool) -> Blocks:
    model.train()
    device = processes().device
    for layer in model.modules():
        if search and isinstance(layer, LoraMoeLayer):
            experts = layer.experts["default"]
            layer.masks = Masks(
                torch.ones(len(experts), device=device, requires_grad=True),
                torch.ones(len(experts), experts[0].rank, device=device, requires_grad=True),
            )
    kept = [_kept(model, length) for length in LENGTHS]
    powers = torch.tensor([[1.0, n, n * n] for n in LENGTHS], dtype=torch.float64)
    constant, linear, square = torch.linalg.solve(powers, torch.tensor(kept).double()).tolist()
    seconds = [] if timed else [0.0]
    for _ in range(3 if timed else 0):
        begun = time.perf_counter()
        _forward(model, LENGTHS[-1]).sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    return Blocks(constant, linear, square, min(seconds) / LENGTHS[-1])


def _forward(model: PeftModel, length: int) -> torch.Tensor:
    ids = torch.zeros(1, length, dtype=torch.long, device=model.device)
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits


def _kept(model: PeftModel, length: int) -> int:
    """Bytes that a forward pass of one row keeps for the backward pass, without parameters."""
    known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _forward(model, length)
    return sum(kept.values())
