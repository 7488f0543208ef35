"""The loss of a LoRA-MoE model, on TRL's trainer.

    L = mean NLL of the completion's tokens + balance_coefficient * L_balance

L_balance is the load-balance loss of balance.py.

Both are those of the batch that all processes take together, so that P processes with b rows do
what one does with P b: the NLL is divided by the tokens of all of them. Over the parts of an
accumulated step the NLL is exact too; L_balance is the mean of the parts' own, because the choices
of the whole step are known only when its last part has run.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import SaveStrategy, TrainOutput
from trl import SFTConfig, SFTTrainer

from guilomo_train.adapters import unsharded_state
from guilomo_train.arguments import check_arguments
from guilomo_train.balance import RouterWatch
from guilomo_train.base import check_tokens
from guilomo_train.checkpoints import STATE_FILE, Checkpointing, complete, whole
from guilomo_train.data.batches import Batches, BatchLoader, with_blank
from guilomo_train.data.packing import PackedCollator, packed
from guilomo_train.data.preparing import prepare
from guilomo_train.errors import ConfigError, DivergedError
from guilomo_train.health import RouterFigures, RouterHealth
from guilomo_train.lora_moe import LoraMoeLayer
from guilomo_train.loss import completion_nll
from guilomo_train.progress import ProgressLine

_logger = logging.getLogger(__name__)


class LoraMoeTrainer(RouterWatch, SFTTrainer):
    """TRL's SFTTrainer with the load-balance loss.

    The loss itself is computed here and not by TRL: on a CPU TRL scores every position against
    the whole vocabulary, prompts and padding too, which costs a small model a quarter of its
    step.

    Args:
        balance_coefficient: weight of the load-balance loss; with 0 it is only watched.
        checkpointing: the settings to write into checkpoints, and the one to go on from.

    Raises:
        ConfigError: DeepSpeed is asked for, gradient checkpointing in its reentrant form, an option
            of TRL's own losses (that of a base's own routers among them), several GPUs in one
            process, float16 without loss scaling, or packing on a base that does not keep packed
            rows apart.
        DataError: no row of a data set has a token to learn from.
        BaseError: a row has a token that the base has no embedding of.
    """

    learning_rate_option = "--learning_rate"
    control: Any  # TrainerControl, which callbacks write into
    train_dataset: Dataset
    data_collator: Any

    def __init__(
        self,
        *,
        model: PeftModel,
        args: SFTConfig,
        balance_coefficient: float,
        checkpointing: Checkpointing | None = None,
        **kwargs: Any,
    ) -> None:
        check_arguments(model, args)
        if kwargs.get("compute_metrics") is not None:
            raise ConfigError(
                "compute_metrics is given, but held-out rows are watched by their loss alone: "
                "score the finished adapter with guilomo_train.evaluate"
            )
        _leave_out_auxiliary_loss(model, args)
        # TRL's own packing computes with FlashAttention alone.
        packing, args.packing = args.packing, False
        # On a base that is sharded as it is loaded transformers refuses checkpoints, for it cannot
        # write sharded optimiser states; what is trained here is whole in each process.
        strategy, args.save_strategy = args.save_strategy, SaveStrategy.NO
        super().__init__(model, args, **kwargs)
        self.args.save_strategy, self.args.packing = strategy, packing
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(ProgressLine())
        if self.args.gradient_checkpointing and (self.args.gradient_checkpointing_kwargs or {}).get(
            "use_reentrant"
        ):
            raise ConfigError(
                "gradient_checkpointing_kwargs has use_reentrant=True, expected False: reentrant "
                "checkpointing loses the gradient of the load-balance loss and of a search"
            )
        for rows in (self.train_dataset, self.eval_dataset):
            if rows is not None:
                check_tokens(self.model, self.processing_class, rows["input_ids"])
        if packing:
            self.train_dataset = packed(self.model, self.train_dataset, self.args.max_length)
            self.data_collator = PackedCollator(self.data_collator)
        self.balance_coefficient = balance_coefficient
        self.checkpointing = checkpointing or Checkpointing(0, {}, None)
        for parameter in self.model.parameters():
            if parameter.requires_grad:  # TRL makes them bfloat16 where the base is quantised
                parameter.data = parameter.data.float()
        # Whatever the base takes: `compute_loss` below divides by the tokens of the whole step.
        self.model_accepts_loss_kwargs = True
        self.loss_sum = torch.zeros((), device=self.args.device)  # this process's, over steps
        self.tokens = torch.zeros((), device=self.args.device)  # of rows, since the last log line
        self.started = self.window_began = time.monotonic()
        self.seconds_before = 0.0  # of the process that a resumed run goes on from

    def _prepare_dataset(
        self, dataset: Dataset, processing_class: Any, args: SFTConfig, *rest: Any
    ) -> Dataset:
        """TRL's tokenised rows, cut by preparing.py and not by TRL."""
        uncut = copy.copy(args)
        uncut.max_length = None
        rows = super()._prepare_dataset(dataset, processing_class, uncut, *rest)
        return prepare(
            rows,
            processing_class,
            args.max_length,
            args.truncation_mode == "keep_end",
            partial(_warn, args),
        )

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        resume = resume_from_checkpoint or self.checkpointing.resume
        self.window_began = time.monotonic()
        if resume is None:
            return super().train(None, *args, **kwargs)
        state = TrainerState.load_from_json(str(Path(resume) / TRAINER_STATE_NAME))
        if state.global_step < state.max_steps:
            return super().train(str(resume), *args, **kwargs)
        # All steps are done; transformers would take one more where epochs are no whole number.
        self.state = state
        self._load_from_checkpoint(str(resume))
        self.load_state_dict(_read_state(resume))
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load_best_model()
        self.model.train()  # or TRL would log for an evaluation
        self.log({"train_loss": self.mean_loss()})  # as at the end of every training
        return TrainOutput(state.global_step, self.mean_loss(), {})

    def get_train_dataloader(self) -> DataLoader:
        columns = ["input_ids", "labels", *(["seq_lengths"] if self.args.packing else [])]
        rows = self.train_dataset.select_columns(columns)
        batches = Batches(
            len(rows),
            self._train_batch_size,
            self.args.seed,
            self.args.world_size,
            self.args.process_index,
            lengths=[len(ids) for ids in rows["input_ids"]],
            parts=self.args.gradient_accumulation_steps,
        )
        return BatchLoader(
            with_blank(rows),
            batch_sampler=batches,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.loss_sum += loss
        self.tokens += inputs["attention_mask"].sum()
        return loss

    @torch.no_grad()
    def evaluate(
        self,
        eval_dataset: Dataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """The completions' loss per token on held-out rows, `eval_loss`, and nothing else."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        rows = rows.select_columns(["input_ids", "labels"])
        lengths = [len(ids) for ids in rows["input_ids"]]
        args = self.args
        batches = Batches(
            len(rows), args.per_device_eval_batch_size, args.seed, args.world_size,
            args.process_index, lengths,
        )  # fmt: skip
        begun = time.monotonic()
        self.model.eval()
        sums = torch.zeros(2, device=args.device)
        rows = with_blank(rows)
        for batch in batches:
            inputs = self._prepare_inputs(self.data_collator([rows[row] for row in batch]))
            nll = completion_nll(self.model, inputs, num_items=1)
            sums += torch.stack([nll, (inputs["labels"][:, 1:] != -100).sum().to(nll)])
        loss, tokens = self._over_processes(sums).tolist()
        metrics = {f"{metric_key_prefix}_loss": loss / tokens}
        self.log(dict(metrics))
        self.model.train()
        self.control = self.callback_handler.on_evaluate(args, self.state, self.control, metrics)
        self.window_began += time.monotonic() - begun
        return metrics

    def mean_loss(self) -> float:
        """The loss of a step, averaged over all steps so far, before a resumption too."""
        return self._mean_loss_sum() / max(self.state.global_step, 1)

    def _mean_loss_sum(self) -> float:
        return self.accelerator.reduce(self.loss_sum, reduction="mean").item()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        if return_outputs:
            raise NotImplementedError("evaluate with guilomo_train.evaluate, not in the trainer")
        health = self.health if self.model.training else None
        nll, balance = self.losses(model, inputs, num_items_in_batch, health)
        if not self.model.training:
            return nll
        # With a token count of the whole accumulated batch, the sum over its parts is the mean.
        parts = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
        mean = self.accelerator.reduce(parts * nll.detach(), reduction="mean")
        self._metrics["train"]["nll"].append(self._finite(mean, "the loss"))
        return nll + self.weighted(balance, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if not self.model.training:  # of held-out rows
            super().log(logs, start_time)
            return
        now, tokens = time.monotonic(), self._over_processes(self.tokens).item()
        if tokens:
            logs["tokens_per_second"] = round(tokens / (now - self.window_began))
        self.tokens.zero_()
        self.window_began = now
        super().log(logs, start_time)

    def routers(self) -> dict[str, RouterFigures]:
        """Health of each router in the last steps, by its module's full name."""
        names = [
            name.removeprefix("base_model.model.")
            for name, layer in self.model.named_modules()
            if isinstance(layer, LoraMoeLayer) and len(layer.lora_router) > 0
        ]
        return {names[place]: figures for place, figures in self.health.figures.items()}

    def losses(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        num_items: torch.Tensor | int | None = None,
        health: RouterHealth | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The completion's NLL and the load-balance loss of one batch, both differentiable.

        Their means over the processes are those of the batch that all processes took together.

        Args:
            model: the (possibly wrapped) model.
            inputs: `input_ids`, `attention_mask` and `labels` (-100: not scored), `[B, S]`.
            num_items: tokens to divide the NLL by; None for those of this batch.
            health: counts what the routers did.
        """
        processes = self.accelerator.num_processes
        scored = inputs["labels"][:, 1:] != -100
        if num_items is None:
            num_items = self._over_processes(scored.sum())
        watched = self.balance_coefficient > 0 or health is not None
        self.keep_routings(watched)
        nll = processes * completion_nll(model, inputs, num_items)
        routings = self.kept_routings()
        if not watched:
            return nll, nll.new_zeros(())
        # A row without labels is there only to fill a batch.
        tokens = inputs["attention_mask"].bool() & scored.any(dim=-1, keepdim=True)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.balance_coefficient > 0):
            balance = self.balance_of(routings, tokens, health)
        return nll, balance

    def _over_processes(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(tensor, reduction="sum")

    def _finite(self, loss: torch.Tensor, name: str) -> float:
        """The loss as a number, for a loss that is the same in all processes.

        Raises:
            DivergedError: it is not finite; going on would only spoil the weights for good.
        """
        value, step = loss.item(), self.state.global_step + 1
        if math.isfinite(value):
            return value
        if step == 1:
            raise DivergedError(
                f"{name} is {value} in the first step, before any weight has moved: the base "
                "itself gives no finite numbers; try --dtype float32, or another base"
            )
        raise DivergedError(
            f"{name} is {value} in step {step} of {self.state.max_steps}: "
            f"lower {self.learning_rate_option} ({self.args.learning_rate:g})"
        )

    def state_dict(self) -> dict[str, Any]:
        """What a later process needs beyond that which transformers' trainer saves."""
        return {
            "loss_sum": self._mean_loss_sum(),
            # What the next log line is made of.
            "metrics": dict(self._metrics["train"]),
            "health": self.health.state_dict(
                lambda counts: self.accelerator.reduce(counts, reduction="mean")
            ),
            "seconds": self.seconds_before + time.monotonic() - self.started,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what `state_dict` gave."""
        self.loss_sum.fill_(state["loss_sum"])
        self._metrics["train"].update(state["metrics"])
        self.health.load_state_dict(state["health"], self.args.device)
        self.seconds_before = state["seconds"]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        with whole(folder):
            super()._save_checkpoint(model, trial)
            state = self.state_dict()
            self.accelerator.wait_for_everyone()  # each process writes its random state
            if self.args.should_save:
                torch.save(state, folder / STATE_FILE)
                complete(folder, self.checkpointing.settings)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Called by the trainer when model and optimiser are in place."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.load_state_dict(_read_state(checkpoint))
            self.state.save_steps = self.args.save_steps  # may be set anew

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Writes the adapter alone; the trainer would add the tokenizer, megabytes each time."""
        self.model.save_pretrained(
            output_dir, state_dict=unsharded_state(self.model), save_embedding_layers=False
        )

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: a checkpoint is no model to pass on, and `model_card.py` writes the adapter's."""


def _leave_out_auxiliary_loss(model: PeftModel, args: SFTConfig) -> None:
    """The load-balance loss of a base's own routers, which TRL would have the base compute even
    where its config does not ask for it."""
    text = model.config.get_text_config()
    if getattr(text, "output_router_logits", False):
        _warn(
            args,
            "the base's config has output_router_logits, for the load-balance loss of its own "
            "routers: they are frozen here, and that loss is left out",
        )
        text.output_router_logits = False
    if hasattr(args, "router_aux_loss_coef"):  # not every version has it
        args.router_aux_loss_coef = 0.0


def _warn(args: SFTConfig, message: str) -> None:
    if args.process_index == 0:
        _logger.warning("%s", message)


def _read_state(checkpoint: str | Path) -> dict[str, Any]:
    return torch.load(Path(checkpoint) / STATE_FILE, map_location="cpu", weights_only=True)
