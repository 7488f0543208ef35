"""Fine-tuning: an allocation and rows to an adapter in memory."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import EarlyStoppingCallback, TrainerCallback

from guilomo_serve.adapter import (
    Adapter,
    BaseModel,
)
from guilomo_train.adapters import adapter_of, check_whole_modules, start_from, with_adapter
from guilomo_train.arguments import log_callbacks, training_arguments
from guilomo_train.base import Base
from guilomo_train.checkpoints import Checkpointing
from guilomo_train.config import CommonConfig, FinetuneConfig
from guilomo_train.errors import ConfigError, DivergedError
from guilomo_train.lora_moe import LoraMoeConfig
from guilomo_train.search.allocation import Allocation
from guilomo_train.trainer import LoraMoeTrainer


@dataclass(frozen=True)
class FinetuneResult:
    """A trained adapter. The base it was trained on carries it as a PEFT model.

    `history` has the allocation's modules, the trainer's log, and the health of each router in the
    last steps. `best` says of which step the weights are and its loss on held-out rows, where the
    best ones were taken.
    """

    adapter: Adapter
    model: PeftModel
    seconds: float
    loss: float
    history: dict[str, Any]
    best: dict[str, float] | None = None


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
    dev: Dataset | None = None,
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
        dev: held-out rows whose loss is watched, `config` says how often and what for.

    Raises:
        DivergedError: the loss is not finite.
        ConfigError: the allocation names a module that the base lacks, `start` has another one, or
            a module cannot be trained whole.
        AllocationError: the allocation has no expert in any module.
    """
    started = time.monotonic()
    torch.manual_seed(common.seed)
    linears = BaseModel.from_module(base.model).linears
    for module in allocation.ranks:
        if module not in linears:
            raise ConfigError(f"--allocation: the base has no linear layer {module!r}")
    alpha = common.alpha(allocation.max_rank)
    experts = allocation.experts(alpha)
    peft_config = LoraMoeConfig(
        task_type="CAUSAL_LM",
        top_k=allocation.top_k,
        lora_alpha=alpha,
        lora_dropout=config.lora_dropout,
        experts={
            module: [{"rank": e.rank, "scaling": e.scaling} for e in listed]
            for module, listed in experts.items()
        },
        modules_to_save=config.whole_modules(),
        stop_token_ids=list(base.stop_token_ids),
        revision=base.commit,
        search=search_record,
    )
    check_whole_modules(base.model, config.whole_modules() or (), experts)
    model = with_adapter(base.model, peft_config)
    if start is not None:
        start_from(model, start)
    looks = _looks(config)
    trainer = LoraMoeTrainer(
        model=model,
        args=training_arguments(
            common,
            work,
            epochs=config.epochs,
            batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            schedule=config.lr_scheduler_type,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            warmup_steps=config.warmup_steps,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            packing=config.packing,
            save_steps=looks.pop("save_steps", checkpointing.save_steps if checkpointing else 0),
            **looks,
        ),
        train_dataset=train,
        eval_dataset=dev,
        processing_class=base.tokenizer,
        balance_coefficient=config.balance_coefficient,
        checkpointing=checkpointing,
        callbacks=[*log_callbacks(common, "finetune"), *_stopping(config)],
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
    best = None
    if trainer.args.load_best_model_at_end:
        best = {"step": trainer.state.best_global_step, "dev_loss": trainer.state.best_metric}
    return FinetuneResult(adapter, model, seconds, loss, history, best)


def _looks(config: FinetuneConfig) -> dict[str, Any]:
    """When the loss on held-out rows is looked at, and weights are saved for it, as transformers
    has it."""
    if config.dev is None:
        return {}
    when = "epoch" if config.eval_steps is None else "steps"
    looks = {"eval_strategy": when, "eval_steps": config.eval_steps}
    looks["per_device_eval_batch_size"] = config.batch_size
    if config.load_best_model_at_end or config.early_stopping_patience is not None:
        # The best weights are those of a checkpoint, so there is one at each look.
        looks |= {"save_strategy": when, "save_steps": config.eval_steps or 1}
        looks |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
        looks |= {"greater_is_better": False}
    return looks


def _stopping(config: FinetuneConfig) -> list[TrainerCallback]:
    if config.early_stopping_patience is None:
        return []
    return [EarlyStoppingCallback(config.early_stopping_patience)]
