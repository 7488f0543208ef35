"""What TRL's trainer is told: the arguments of a stage, and where its log goes; and what
`LoraMoeTrainer` refuses of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.integrations import MLflowCallback, TensorBoardCallback, WandbCallback
from trl import SFTConfig

from guilomo_train.checkpoints import KEPT
from guilomo_train.config import CommonConfig
from guilomo_train.errors import ConfigError

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


# TRL's options for the loss, and for batches that its own loss knows, with what leaves them off.
_OF_OTHER_TRAINERS: dict[str, tuple[Any, ...]] = {
    "packing_strategy": ("bfd",),
    "eval_packing": (None, False),
    "padding_free": (False,),
    "label_smoothing_factor": (0.0,),
    "loss_type": ("nll", "chunked_nll"),  # the same, computed in parts
    "use_liger_kernel": (False,),
    "average_tokens_across_devices": (True,),
    "router_aux_loss_coef": (None, 0.0),
    # Of other orders of rows.
    "data_seed": (None,),
    "dataloader_drop_last": (False,),
    "train_sampling_strategy": ("random",),
}


def check_arguments(model: nn.Module, args: SFTConfig) -> None:
    """Checks that `LoraMoeTrainer` does what it is asked for.

    Args:
        model: with the adapter.
        args: of the trainer.

    Raises:
        ConfigError: DeepSpeed is asked for, several GPUs are in one process, the base is float16
            and its loss not scaled, or an option is given that TRL's own loss or batches know.
    """
    if args.deepspeed_plugin is not None:
        raise ConfigError(
            "deepspeed is given, which would leave each process a part of the adapter: spread "
            "the base alone, as `accelerate launch --use_deepspeed --zero_stage 3 -m "
            "guilomo_train.cli` does (guilomo_train.base.load_base with a Sharding)"
        )
    if args.n_gpu > 1:
        raise ConfigError(
            f"{args.n_gpu} GPUs are in one process, where DataParallel would split each batch "
            "behind the routers' backs: start a process for each (torchrun --nproc-per-node "
            f"{args.n_gpu}), or show it one GPU (CUDA_VISIBLE_DEVICES=0)"
        )
    if getattr(model, "dtype", None) == torch.float16 and not args.fp16:
        raise ConfigError(
            "the base is float16, in which small gradients are 0 without loss scaling: load it "
            "in bfloat16 or float32, or set fp16=True"
        )
    for option, only in _OF_OTHER_TRAINERS.items():
        # Versions have different ones, with different defaults, which nobody has asked for.
        left_alone = (*only, getattr(SFTConfig, option, only[0]))
        if getattr(args, option, only[0]) not in left_alone:
            raise ConfigError(
                f"{option} is {getattr(args, option)!r}, expected {only[0]!r}: a LoRA-MoE has "
                "a trainer of its own, with its own loss and order of rows"
            )


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
