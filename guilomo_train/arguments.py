"""What TRL's trainer is told: the arguments of a stage, and where its log goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.integrations import MLflowCallback, TensorBoardCallback, WandbCallback
from trl import SFTConfig

from guilomo_train.checkpoints import KEPT
from guilomo_train.config import CommonConfig

WARMUP = 0.05  # share of a search's steps over which the learning rate rises


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
