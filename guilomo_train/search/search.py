"""The search: fine-tuning steps on training data, each followed by one of the selection vectors.

A step draws one allocation (the masks), takes the lower level's gradient under it, and then the
upper step with the same masks: the hypergradient on a validation batch moves the selection
vectors. The lower optimiser steps last, so that its gradient serves the unrolled step too.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader

from guilomo_train.config import CommonConfig, SearchConfig
from guilomo_train.data import split_validation
from guilomo_train.finetune import training_arguments, with_adapter
from guilomo_train.lora_moe import LoraMoeConfig
from guilomo_train.models import Base
from guilomo_train.search.allocation import Allocation
from guilomo_train.search.hypergradient import UnrolledStep, adam_scales
from guilomo_train.search.selection import SearchSpace, SelectionVectors
from guilomo_train.search.upper import UpperLevel
from guilomo_train.trainer import LoraMoeTrainer


@dataclass(frozen=True)
class SearchResult:
    """What a search found and what it took.

    `record` goes into the adapter's config: method, seed, steps, seconds.
    """

    allocation: Allocation
    seconds: float
    record: dict[str, Any]


class SearchTrainer(LoraMoeTrainer):
    """The lower level is its parent's training; `training_step` adds the upper step.

    Args:
        selection: the selection vectors; the model's adapter has the full search space.
        second_order: differentiate through the unrolled lower step.
        selection_learning_rate: of the selection vectors' Adam.
        validation_dataset: rows of the upper level, prepared as `train_dataset` is.
    """

    learning_rate_option = "--search_learning_rate"

    def __init__(
        self,
        *args: Any,
        selection: SelectionVectors,
        second_order: bool,
        selection_learning_rate: float,
        validation_dataset: Dataset,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, eval_dataset=validation_dataset, **kwargs)
        self.second_order = second_order
        self.upper = UpperLevel(
            self.layers,
            selection.to(self.args.device),
            selection_learning_rate,
            self.args.seed,
        )
        self.weights = [p for p in self.model.parameters() if p.requires_grad]
        self.validation_batches = self._cycle_validation()

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        self.upper.draw()
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self._upper_step(self._prepare_inputs(inputs))
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        logs["expected_rank"] = round(self.upper.selection.expected_total_rank(), 1)
        super().log(logs, start_time)

    def _upper_step(self, inputs: dict[str, torch.Tensor]) -> None:
        """Moves the selection vectors; weights, gradients and lower optimiser stay as they are."""
        validation = self._prepare_inputs(next(self.validation_batches))

        def train_loss() -> torch.Tensor:
            nll, balance = self.losses(self.model, inputs)
            return nll + self.balance_coefficient * balance

        def validation_loss() -> torch.Tensor:
            nll = self.losses(self.model, validation)[0]
            self._finite(nll, "the validation loss")
            return nll

        unrolled = None
        if self.second_order:
            lower = [w.grad for w in self.weights]
            unrolled = UnrolledStep(
                learning_rate=self._get_learning_rate(),
                train_gradient=lower,
                scales=adam_scales(self.optimizer.optimizer, self.weights, lower),
            )
        self.upper.step(
            train_loss,
            validation_loss,
            self.weights,
            unrolled,
            reduce=lambda gradient: self.accelerator.reduce(gradient, reduction="mean"),
        )

    def _cycle_validation(self) -> Iterator[dict[str, torch.Tensor]]:
        loader = DataLoader(
            self.eval_dataset,
            batch_size=self.args.per_device_train_batch_size,
            shuffle=True,
            generator=torch.Generator().manual_seed(self.args.seed),
            collate_fn=self.data_collator,
        )
        while True:
            yield from loader


def search(
    base: Base,
    train: Dataset,
    validation: Dataset | None,
    common: CommonConfig,
    config: SearchConfig,
    work: Path,
) -> SearchResult:
    """Searches an allocation.

    Args:
        base: the base model; it is wrapped while the search runs and unwrapped afterwards.
        train: rows as `data.load_rows` gives them.
        validation: rows of the upper level; None splits a share off `train`.
        common, config: the settings.
        work: a folder for the trainer's files.

    Raises:
        ConfigError, DataError: the target modules or the data cannot be used.
        DivergedError: a loss is not finite.
    """
    started = time.monotonic()
    lower, upper = split_validation(train, common, validation)
    torch.manual_seed(common.seed)
    peft_config = LoraMoeConfig(
        task_type="CAUSAL_LM",
        target_modules=common.targets(),
        num_experts=config.max_experts,
        expert_rank=config.max_rank,
        top_k=common.top_k,
        lora_alpha=common.lora_alpha,
    )
    model = with_adapter(base, peft_config)
    assert peft_config.experts is not None
    space = SearchSpace(
        tuple(peft_config.experts), config.max_experts, config.max_rank, common.top_k
    )
    trainer = SearchTrainer(
        model=model,
        args=training_arguments(
            common,
            work,
            epochs=config.search_epochs,
            batch_size=config.search_batch_size,
            learning_rate=config.search_learning_rate,
        ),
        train_dataset=lower,
        processing_class=base.tokenizer,
        balance_coefficient=config.search_balance_coefficient,
        selection=SelectionVectors(space, config.estimator, config.choice),
        second_order=config.order == "second",
        selection_learning_rate=config.selection_learning_rate,
        validation_dataset=upper,
    )
    trainer.train()
    base.model = model.unload()
    allocation = trainer.upper.selection.allocation()
    seconds = time.monotonic() - started
    record = {
        "method": "guilomo",
        "order": config.order,
        "estimator": config.estimator,
        "choice": config.choice,
        "seed": common.seed,
        "steps": trainer.state.global_step,
        "seconds": round(seconds, 1),
        "max_experts": config.max_experts,
        "max_rank": config.max_rank,
    }
    return SearchResult(allocation, seconds, record)
