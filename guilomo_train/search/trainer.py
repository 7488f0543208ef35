"""The trainer of a search: fine-tuning steps, each with one of the selection vectors.

A step draws one allocation of the budget's size (the masks), takes the lower level's gradient
under it, then the upper step with the same masks, and the lower optimiser's step last. The upper
step needs dL/dM of rows that the weights have not learned. In the first pass over the training
rows that is each batch until the optimiser's step, so the lower level's backward pass gives both
gradients (`online`). Otherwise a batch of held-out rows gives the upper one, as hypergradient.py
has it, and the lower gradient serves as the unrolled step. Both judge the loss that the weights
learn from. Where gradients are accumulated, a step is all of its parts: one draw, one observation.

In Python, without the command line:

    trainer = SearchTrainer(model=model, args=args, train_dataset=rows, selection=selection, ...)
    trainer.train()
    allocation = trainer.allocation()      # the model computes what this allocation does
    trainer.upper.findings()               # and how sure it is
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from torch import nn

from guilomo_train.data.batches import Batches, with_blank
from guilomo_train.search.allocation import Allocation
from guilomo_train.search.estimators import Estimator
from guilomo_train.search.hypergradient import UnrolledStep, adam_scales
from guilomo_train.search.selection import SelectionVectors
from guilomo_train.search.upper import UpperLevel
from guilomo_train.trainer import LoraMoeTrainer

SNAPSHOTS = 100  # of the allocation while a search runs, about


class SearchTrainer(LoraMoeTrainer):
    """The lower level is its parent's training; `training_step` adds the upper step.

    Args:
        selection: the selection vectors; the model's adapter has the full search space.
        estimator: how they learn; see estimators.py.
        selection_learning_rate: of the estimators that use Adam.
        validation_dataset: rows of the upper level, prepared as `train_dataset` is; None to learn
            online, from each training batch before the weights do.
        second_order: differentiate through the unrolled lower step; needs `validation_dataset`.
    """

    learning_rate_option = "--search_learning_rate"

    def __init__(
        self,
        *args: Any,
        selection: SelectionVectors,
        estimator: Estimator,
        selection_learning_rate: float,
        validation_dataset: Dataset | None = None,
        second_order: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, eval_dataset=validation_dataset, **kwargs)
        self.online = validation_dataset is None
        self.second_order = second_order
        parts = self.args.gradient_accumulation_steps
        of_pass = math.ceil(len(self.get_train_dataloader()) / parts)
        steps = math.ceil(self.args.num_train_epochs * of_pass)
        self.upper = UpperLevel(
            self.layers,
            selection,
            estimator=estimator,
            steps=self.args.max_steps if self.args.max_steps > 0 else steps,
            learning_rate=selection_learning_rate,
            seed=self.args.seed,
        )
        self.parts: list[dict[str, Any]] = []  # of the step that is under way
        self.weights = [p for p in self.model.parameters() if p.requires_grad]
        if not self.online:
            rows = self.eval_dataset.select_columns(["input_ids", "labels"])
            self.validation_rows = with_blank(rows)
            self.validation_batches = Batches(
                len(rows),
                self.args.per_device_train_batch_size * parts,
                self.args.seed,
                self.args.world_size,
                self.args.process_index,
            )

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        if not self.parts:
            self.upper.draw(self.online)
        self.parts.append(inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            if self.online:
                self.upper.step_online(self._mean_over_processes)
            else:
                self._upper_step(num_items_in_batch)
            self.parts = []
        return loss

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the parent's; afterwards the model computes what the allocation found does."""
        result = super().train(*args, **kwargs)
        self.upper.settle()
        return result

    def allocation(self) -> Allocation:
        """What the search has found so far."""
        return self.upper.allocation()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        logs["expected_rank"] = round(self.upper.selection.expected_total_rank(), 1)
        super().log(logs, start_time)
        # Into the trainer's state, so that a checkpoint has it.
        if self.state.global_step >= self.state.max_steps or self._is_snapshot():
            ranks = self.allocation().ranks
            self.state.log_history[-1]["total_ranks"] = [sum(r) for r in ranks.values()]

    def _is_snapshot(self) -> bool:
        logged = self.state.global_step // self.args.logging_steps
        every = max(1, self.state.max_steps // int(SNAPSHOTS * self.args.logging_steps))
        return logged % every == 0

    def _upper_step(self, num_items: torch.Tensor | int | None) -> None:
        """Moves the selection vectors; weights, gradients and lower optimiser stay as they are."""
        parts = [self._prepare_inputs(part) for part in self.parts]
        held_out = [self._prepare_inputs(part) for part in self._validation_parts()]
        scored = sum((part["labels"][:, 1:] != -100).sum() for part in held_out)
        held_out_items = self._over_processes(scored)

        def train_loss(part: dict[str, torch.Tensor]) -> torch.Tensor:
            nll, balance = self.losses(self.model, part, num_items)
            return nll + self.balance_coefficient * balance / len(parts)

        def validation_loss(part: dict[str, torch.Tensor]) -> torch.Tensor:
            nll, balance = self.losses(self.model, part, held_out_items)
            self._finite(self._mean_over_processes(nll.detach()), "the validation loss")
            return nll + self.balance_coefficient * balance / len(held_out)

        unrolled = None
        if self.second_order:
            lower = self._clipped([w.grad for w in self.weights])
            unrolled = UnrolledStep(
                learning_rate=self._get_learning_rate(),
                train_gradient=lower,
                scales=lambda: adam_scales(self.optimizer.optimizer, self.weights, lower),
            )
        self.upper.step(
            [partial(train_loss, part) for part in parts],
            [partial(validation_loss, part) for part in held_out],
            self.weights,
            unrolled,
            reduce=self._mean_over_processes,
        )

    def _clipped(self, gradient: list[torch.Tensor]) -> list[torch.Tensor]:
        """What the trainer's clipping will leave of the gradient in the step that follows."""
        most = self.args.max_grad_norm
        if not most:
            return gradient
        norms = torch.stack([torch.linalg.vector_norm(g) for g in gradient])
        norm = torch.linalg.vector_norm(norms)
        share = most / (norm + 1e-6)  # as torch.nn.utils.clip_grad_norm_ has it
        return gradient if share >= 1 else [g * share for g in gradient]

    def _mean_over_processes(self, gradient: torch.Tensor) -> torch.Tensor:
        if self.accelerator.num_processes == 1:
            return gradient  # accelerate would copy it
        return self.accelerator.reduce(gradient, reduction="mean")

    def _validation_parts(self) -> list[dict[str, torch.Tensor]]:
        """The rows of this step: over and over through all of them, each pass in another order. In
        as many parts as the training batch, which alone would fit into memory; processes with fewer
        rows have as many parts, since they all take part in each forward pass."""
        rows, count = self.validation_batches.at(self.state.global_step), len(self.parts)
        parts = [rows[i::count] or [self.validation_batches.blank] for i in range(count)]
        return [self.data_collator([self.validation_rows[row] for row in part]) for part in parts]

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "upper": self.upper.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.upper.load_state_dict(state["upper"])
