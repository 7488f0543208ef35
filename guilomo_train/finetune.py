"""Fine-tuning: an allocation and data to an adapter in memory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.integrations import MLflowCallback, TensorBoardCallback, WandbCallback
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

WARMUP = 0.05  # share of a search's steps over which the learning rate rises


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
        revision=base.commit,
        search=search_record,
    )
    model = with_adapter(base.model, peft_config)
    if start is not None:
        _start_from(model, start)
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
        revision=config.revision,
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


class _WandbRun(WandbCallback):
    """A run of its own for each stage; the callback alone would go on with the first."""

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        super().on_train_end(*args, **kwargs)
        self._wandb.finish()


def log_callbacks(common: CommonConfig, stage: str) -> list[TrainerCallback]:
    """What else than the trainer's own log gets its figures: TensorBoard, below <output>/logs, or
    a service."""
    if common.report_to == "none":
        return []
    if common.report_to == "wandb":
        return [_WandbRun()]
    if common.report_to == "mlflow":
        return [MLflowCallback()]
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
    schedule: str = "cosine",
    gradient_accumulation_steps: int = 1,
    save_steps: int = 0,
    **others: Any,
) -> SFTConfig:
    """TRL's arguments for a stage. The adapter's weights are float32, the base runs as loaded.

    `others` are further fields of SFTConfig, which win over those here.
    """
    fields: dict[str, Any] = {
        "output_dir": str(work),
        "run_name": f"{Path(common.output).name}-{work.name}",
        "num_train_epochs": epochs,
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "learning_rate": learning_rate,
        "lr_scheduler_type": schedule,
        "warmup_steps": WARMUP,
        "max_length": common.max_length,
        "completion_only_loss": True,
        "loss_type": "nll",  # some versions of TRL have another default
        "gradient_checkpointing": common.gradient_checkpointing,
        "bf16": False,
        "seed": common.seed,
        "logging_steps": 10,
        "save_strategy": "steps" if save_steps else "no",
        "save_steps": save_steps or 1,
        "save_total_limit": KEPT,
        "use_cpu": not torch.cuda.is_available(),
        # Masked experts have a gradient, of zeros; looking for weights without one costs a pass
        # over the graph, and would not see that the load-balance loss uses the routers.
        "ddp_find_unused_parameters": False,
        "report_to": "none",
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    return SFTConfig(**fields | others)
