"""The search: a base and rows to an allocation, with the weights that it was found on."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from guilomo_serve.adapter import Adapter, BaseModel, ModuleWeights
from guilomo_train.adapters import adapter_of, with_adapter
from guilomo_train.arguments import log_callbacks, training_arguments
from guilomo_train.base import Base
from guilomo_train.checkpoints import Checkpointing
from guilomo_train.config import CommonConfig, SearchConfig, order_of
from guilomo_train.data import search_rows
from guilomo_train.errors import ConfigError
from guilomo_train.lora_moe import LoraMoeConfig
from guilomo_train.search.allocation import Allocation
from guilomo_train.search.selection import SelectionVectors
from guilomo_train.search.space import Linears, SearchSpace, latency_prices, parameter_budget
from guilomo_train.search.trainer import SearchTrainer
from guilomo_train.shards import count_parameters


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
