"""Fine-tuning: an allocation and data to an adapter in memory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback
from trl import SFTConfig

from guilomo_serve.adapter import (
    Adapter,
    AdapterSpec,
    BaseFingerprint,
    BaseModel,
    Expert,
    ModuleWeights,
)
from guilomo_train.checkpoints import KEPT, Checkpointing
from guilomo_train.config import CommonConfig, FinetuneConfig
from guilomo_train.errors import ConfigError, DivergedError
from guilomo_train.lora_moe import LoraMoeConfig
from guilomo_train.models import Base, unsharded_state, with_adapter
from guilomo_train.search.allocation import Allocation
from guilomo_train.trainer import LoraMoeTrainer

WARMUP = 0.05  # share of the steps over which the learning rate rises


@dataclass(frozen=True)
class FinetuneResult:
    """A trained adapter. The base it was trained on carries it as a PEFT model.

    `history` has the allocation's modules, the trainer's log, and the health of each router in the
    last steps.
    """

    adapter: Adapter
    model: PeftModel
    seconds: float
    loss: float
    history: dict[str, Any]


def finetune(
    base: Base,
    train: Dataset,
    allocation: Allocation,
    common: CommonConfig,
    config: FinetuneConfig,
    work: Path,
    search_record: dict[str, Any] | None = None,
    start: Adapter | None = None,
    checkpointing: Checkpointing | None = None,
) -> FinetuneResult:
    """Trains the adapter of an allocation.

    Args:
        base: the base model.
        train: rows as `data.load_rows` gives them.
        allocation: experts and ranks of each module.
        common, config: the settings.
        work: a folder for the trainer's files, checkpoints among them.
        search_record: how the allocation was found; it is written into the adapter.
        start: an adapter of this allocation whose weights to begin with; None for fresh ones.
        checkpointing: how often, and where to go on; None for no checkpoints.

    Raises:
        DivergedError: the loss is not finite.
        ConfigError: the allocation names a module that the base lacks, or `start` has another one.
        AllocationError: the allocation has no expert in any module.
    """
    started = time.monotonic()
    torch.manual_seed(common.seed)
    linears = BaseModel.from_module(base.model).linears
    for module in allocation.ranks:
        if module not in linears:
            raise ConfigError(f"--allocation: the base has no linear layer {module!r}")
    experts = allocation.experts(common.lora_alpha)
    peft_config = LoraMoeConfig(
        task_type="CAUSAL_LM",
        top_k=allocation.top_k,
        lora_alpha=common.lora_alpha,
        lora_dropout=config.lora_dropout,
        experts={
            module: [{"rank": e.rank, "scaling": e.scaling} for e in listed]
            for module, listed in experts.items()
        },
        stop_token_ids=list(base.stop_token_ids),
        search=search_record,
    )
    model = with_adapter(base.model, peft_config)
    if start is not None:
        _start_from(model, start)
    trainer = LoraMoeTrainer(
        model=model,
        args=training_arguments(
            common,
            work,
            epochs=config.epochs,
            batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            save_steps=checkpointing.save_steps if checkpointing else 0,
        ),
        train_dataset=train,
        processing_class=base.tokenizer,
        balance_coefficient=config.balance_coefficient,
        checkpointing=checkpointing,
        callbacks=log_callbacks(common, "finetune"),
    )
    trainer.train()
    loss = trainer.mean_loss()
    adapter = adapter_of(model)
    if not all(torch.isfinite(w.lora_b).all() for w in adapter.weights.values()):
        raise DivergedError(
            f"training diverged (loss {loss}): lower --learning_rate ({config.learning_rate})"
        )
    seconds = trainer.seconds_before + time.monotonic() - started
    history = {
        "modules": list(allocation.ranks),
        "log": trainer.state.log_history,
        "routers": {module: figures.to_json() for module, figures in trainer.routers().items()},
    }
    return FinetuneResult(adapter, model, seconds, loss, history)


def _start_from(model: PeftModel, start: Adapter) -> None:
    """Puts an adapter's weights into the model's new one, which has to have the same experts."""
    name = model.active_adapter
    config, theirs = model.peft_config[name], start.spec.experts
    if config.top_k != start.spec.top_k:
        raise ConfigError(f"--start: its top_k is {start.spec.top_k}, expected {config.top_k}")
    if config.experts.keys() != theirs.keys():
        module = sorted(config.experts.keys() ^ theirs.keys())[0]
        where = "only the adapter" if module in theirs else "only the allocation"
        raise ConfigError(f"--start: {where} has {module}, expected the modules of the allocation")
    for module, experts in theirs.items():
        expected = config.experts_of(module)
        if experts != expected:
            raise ConfigError(
                f"--start: the experts of {module} are {_short(experts)}, expected those of the "
                f"allocation and --lora_alpha, {_short(expected)}"
            )
    set_peft_model_state_dict(model, start.tensors(), adapter_name=name)


def _short(experts: Sequence[Expert]) -> str:
    scaling = ", ".join(f"{s:g}" for s in sorted({e.scaling for e in experts}))
    return f"of rank {', '.join(str(e.rank) for e in experts)} (scaling {scaling})"


def adapter_of(model: PeftModel) -> Adapter:
    """The active adapter of a PEFT model as the adapter format has it.

    A and B are in the base's precision, in which their products run anyway.
    """
    name = model.active_adapter
    config = model.peft_config[name]
    experts = {module: config.experts_of(module) for module in config.experts}
    spec = AdapterSpec(
        base_model_name_or_path=config.base_model_name_or_path,
        target_modules=tuple(config.to_dict()["target_modules"]),
        top_k=config.top_k,
        lora_alpha=config.lora_alpha,
        experts=experts,
        base=BaseFingerprint.from_json(config.base_fingerprint),
        task_type=config.task_type,
        search=config.search,
        stop_token_ids=tuple(config.stop_token_ids or ()),
    )
    state = get_peft_model_state_dict(
        model, unsharded_state(model), adapter_name=name, save_embedding_layers=False
    )
    dtype = model.dtype

    def tensor(module: str, kind: str) -> torch.Tensor:
        return state[f"base_model.model.{module}.{kind}.weight"].detach().cpu()

    weights = {
        module: ModuleWeights(
            lora_a=tensor(module, "lora_A").to(dtype),
            lora_b=tensor(module, "lora_B").to(dtype),
            router=tensor(module, "lora_router").float() if len(listed) > 1 else None,
        )
        for module, listed in experts.items()
    }
    return Adapter(spec, weights)


def log_callbacks(common: CommonConfig, stage: str) -> list[TrainerCallback]:
    """What else than the trainer's own log gets its figures: TensorBoard, below <output>/logs."""
    if common.report_to == "none":
        return []
    callback = TensorBoardCallback()
    callback.logging_dir = str(Path(common.output) / "logs" / stage)
    return [callback]


def training_arguments(
    common: CommonConfig,
    work: Path,
    *,
    epochs: float,
    batch_size: int,
    learning_rate: float,
    schedule: Literal["cosine", "constant_with_warmup"] = "cosine",
    gradient_accumulation_steps: int = 1,
    save_steps: int = 0,
) -> SFTConfig:
    """TRL's arguments for a stage. The adapter's weights are float32, the base runs as loaded."""
    return SFTConfig(
        output_dir=str(work),
        num_train_epochs=epochs,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        learning_rate=learning_rate,
        lr_scheduler_type=schedule,
        warmup_steps=WARMUP,
        max_length=common.max_length,
        completion_only_loss=True,
        gradient_checkpointing=common.gradient_checkpointing,
        bf16=False,
        seed=common.seed,
        logging_steps=10,
        save_strategy="steps" if save_steps else "no",
        save_steps=save_steps or 1,
        save_total_limit=KEPT,
        use_cpu=not torch.cuda.is_available(),
        # Masked experts have a gradient, of zeros; looking for weights without one costs a pass
        # over the graph, and would not see that the load-balance loss uses the routers.
        ddp_find_unused_parameters=False,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    )
