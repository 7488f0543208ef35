"""The search: fine-tuning steps on training data, each with one of the selection vectors.

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
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn

from guilomo_serve.adapter import Adapter, BaseModel, ModuleWeights
from guilomo_train.adapters import adapter_of, with_adapter
from guilomo_train.arguments import log_callbacks, training_arguments
from guilomo_train.base import Base
from guilomo_train.batches import Batches, with_blank
from guilomo_train.checkpoints import Checkpointing
from guilomo_train.config import CommonConfig, SearchConfig, order_of
from guilomo_train.data import search_rows
from guilomo_train.errors import ConfigError
from guilomo_train.lora_moe import LoraMoeConfig
from guilomo_train.search.allocation import Allocation
from guilomo_train.search.controls import parameter_budget
from guilomo_train.search.estimators import Estimator
from guilomo_train.search.hypergradient import UnrolledStep, adam_scales
from guilomo_train.search.selection import SelectionVectors
from guilomo_train.search.space import Linears, SearchSpace, latency_prices
from guilomo_train.search.upper import UpperLevel
from guilomo_train.trainer import LoraMoeTrainer
from guilomo_train.zero3 import count_parameters

SNAPSHOTS = 100  # of the allocation while a search runs, about


@dataclass(frozen=True)
class SearchResult:
    """What a search found and what it took.

    `adapter` has the weights as the search left them, those of the allocation alone. `record` goes
    into the adapter's config: method, seed, steps, seconds. `vectors` are the selection vectors
    that the allocation is read off. `history` has the modules, and the trainer's log, in which
    `total_ranks` is the allocation of that time: a total rank for each module.
    """

    allocation: Allocation
    adapter: Adapter
    vectors: dict[str, torch.Tensor]
    seconds: float
    record: dict[str, Any]
    history: dict[str, Any]


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


def search(
    base: Base,
    train: Dataset,
    validation: Dataset | None,
    common: CommonConfig,
    config: SearchConfig,
    work: Path,
    checkpointing: Checkpointing | None = None,
) -> SearchResult:
    """Searches an allocation.

    Args:
        base: the base model; it is wrapped while the search runs and unwrapped afterwards.
        train: rows as `data.load_rows` gives them.
        validation: rows of the upper level, of `common.validation`.
        common, config: the settings.
        work: a folder for the trainer's files, checkpoints among them.
        checkpointing: how often, and where to go on; None for no checkpoints.

    Raises:
        ConfigError, DataError: the target modules or the data cannot be used.
        DivergedError: a loss is not finite.
    """
    started = time.monotonic()
    order = order_of(common, config)
    lower, upper = search_rows(train, common, validation, held_out=order != "online")
    torch.manual_seed(common.seed)
    linears = BaseModel.from_module(base.model).linears
    base_parameters = count_parameters(base.model)
    peft_config = LoraMoeConfig(
        task_type="CAUSAL_LM",
        target_modules=common.targets(),
        num_experts=config.max_experts,
        expert_rank=config.max_rank,
        top_k=common.top_k,
        lora_alpha=common.alpha(config.max_rank),
        stop_token_ids=list(base.stop_token_ids),
        revision=base.commit,
    )
    model = with_adapter(base.model, peft_config)
    adapted = {module: linears[module] for module in model.peft_config["default"].experts}
    space = search_space(adapted, common, config)
    budget = search_budget(space, config.budget, base_parameters)
    trainer = SearchTrainer(
        model=model,
        args=training_arguments(
            common,
            work,
            epochs=config.search_epochs,
            batch_size=config.search_batch_size,
            learning_rate=config.search_learning_rate,
            # Fine-tuning goes on from these weights: the rate falls at its end, not here.
            schedule="constant_with_warmup",
            gradient_accumulation_steps=config.search_gradient_accumulation_steps,
            save_steps=checkpointing.save_steps if checkpointing else 0,
        ),
        train_dataset=lower,
        processing_class=base.tokenizer,
        balance_coefficient=config.search_balance_coefficient,
        checkpointing=checkpointing,
        selection=SelectionVectors(space, config.choice, budget=budget),
        estimator=config.estimator,
        selection_learning_rate=config.selection_learning_rate,
        validation_dataset=upper,
        second_order=order == "second",
        callbacks=log_callbacks(common, "search"),
    )
    trainer.train()
    largest = adapter_of(model)
    base.model = model.unload()
    allocation = trainer.allocation()
    vectors = {k: v.detach().cpu() for k, v in trainer.upper.selection.state_dict().items()}
    seconds = trainer.seconds_before + time.monotonic() - started
    record = {
        "method": "guilomo",
        "order": order,
        "estimator": config.estimator,
        "choice": config.choice,
        "budget": budget,
        "budget_in": config.budget_in,
        "parameters": allocation.parameters(space.linears),
        **trainer.upper.findings(),
        "seed": common.seed,
        "steps": trainer.state.global_step,
        "seconds": round(seconds, 1),
        "max_experts": config.max_experts,
        "max_rank": config.max_rank,
    }
    history = {"modules": list(space.linears), "log": trainer.state.log_history}
    adapter = cut(largest, allocation)
    adapter = replace(adapter, spec=replace(adapter.spec, search=record))
    return SearchResult(allocation, adapter, vectors, seconds, record, history)


def cut(adapter: Adapter, allocation: Allocation) -> Adapter:
    """Of an adapter with the largest counts everywhere, the part that an allocation names.

    A count's mask has the first experts, and the first rank rows of each: this computes what the
    layers of a search compute under the allocation's masks.

    Args:
        adapter: its experts all have the rank `allocation.max_rank`.
        allocation: of the same modules; those without experts are not in the part.

    Raises:
        AllocationError: no module has an expert.
    """
    experts = allocation.experts(adapter.spec.lora_alpha)
    weights = {}
    for module in experts:
        whole, ranks = adapter.weights[module], allocation.ranks[module]
        begins = [e * allocation.max_rank for e in range(len(ranks))]
        rows = torch.cat([torch.arange(b, b + r) for b, r in zip(begins, ranks, strict=True)])
        weights[module] = ModuleWeights(
            lora_a=whole.lora_a[rows],
            lora_b=whole.lora_b[:, rows].contiguous(),
            router=whole.router[: len(ranks)].clone()
            if whole.router is not None and len(ranks) > 1
            else None,
        )
    targets = tuple(sorted({module.split(".")[-1] for module in experts}))
    return Adapter(replace(adapter.spec, experts=experts, target_modules=targets), weights)


def search_space(linears: Linears, common: CommonConfig, config: SearchConfig) -> SearchSpace:
    """What a search with these settings can choose. Args: linears: (out, in) of each module."""
    return SearchSpace(
        linears,
        config.max_experts,
        config.max_rank,
        common.top_k,
        prices=latency_prices(linears, Path(config.prices)) if config.prices else None,
    )


def search_budget(space: SearchSpace, budget: str | None, base_parameters: int) -> float:
    """What a search keeps to: a number of parameters, or of seconds if the space has such prices.

    Args:
        space: what can be chosen.
        budget: a share of the base's parameters, or a number of parameters; of serving time a share
            of what the largest layers cost. None for a third of the largest layers.
        base_parameters: of the base model.

    Raises:
        ConfigError: no allocation of the search space has that size.
    """
    most = space.cost(space.max_experts, space.max_rank)
    if budget is None:
        return most / 3
    if space.prices is not None:
        share = float(budget)
        if not 0 < share <= 1:
            raise ConfigError(
                f"budget is {budget}, expected with --budget_in latency a share of the time that "
                "the largest layers take, more than 0 and at most 1"
            )
        return share * most
    parameters = parameter_budget(budget, base_parameters)
    least = int(space.costs.row.min())
    if not least <= parameters <= most:
        raise ConfigError(
            f"budget is {budget}, which is {parameters:,} parameters, expected {least:,} "
            f"(one row in one layer) to {most:,.0f} "
            f"({space.max_experts} experts of rank {space.max_rank} in each)"
        )
    return parameters
