"""The arms of benchmarks/proof.py: what each trains, on the same rows, steps and batches.

Arms with an allocation train fresh LoRA-MoE weights of it, so they differ in the allocation alone.
PEFT's methods train under the same trainer, loss, schedule and batch order. `truncated` cuts a
large trained adapter down. `run` goes on from its search's weights, and `uniform-run` is uniform
under exactly its schedule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import (
    AdaLoraConfig,
    EvaConfig,
    LoraConfig,
    PeftModel,
    get_peft_model,
    initialize_lora_eva_weights,
)
from transformers import TrainerCallback

from guilomo_serve.adapter import Adapter
from guilomo_train.adapters import adapter_of, with_adapter
from guilomo_train.arguments import training_arguments
from guilomo_train.base import Base
from guilomo_train.config import CommonConfig, FinetuneConfig, SearchConfig
from guilomo_train.finetuning import finetune
from guilomo_train.lora_moe import LoraMoeConfig
from guilomo_train.loss import completion_nll
from guilomo_train.search.allocation import Allocation
from guilomo_train.search.controls import random_allocation, rescaled, shuffled
from guilomo_train.search.fill import even, fill
from guilomo_train.search.saliency import one_shot_worths, whitened_worths
from guilomo_train.search.selection import SelectionVectors
from guilomo_train.search.space import SearchSpace
from guilomo_train.search.trainer import SearchTrainer
from guilomo_train.searching import SearchResult, search
from guilomo_train.trainer import LoraMoeTrainer

EPOCHS, BATCH, BALANCE = 2.0, 8, 0.01
# Where uniform puts its rows: kinds of module (none named: all), and most experts of a module.
SHAPES: dict[str, tuple[tuple[str, ...], int]] = {
    "all": ((), 8),
    "attention": (("q_proj", "k_proj", "v_proj", "o_proj"), 8),
    "query-value": (("q_proj", "v_proj"), 8),
    "mlp": (("gate_proj", "up_proj", "down_proj"), 8),
    "down": (("down_proj",), 8),
    "all-one-expert": ((), 1),
}
SPECTRA = ("plain", "whitened")  # of the gradient, by which one-shot may go
LARGE = 16  # rank of the adapter that `truncated` cuts down
ORTHOGONAL = 0.5  # AdaLoRA's default weight of its regulariser
ADALORA_PHASES = 0.1, 0.3  # shares of the steps: at full size first, at the final size last


@dataclass(frozen=True)
class Setting:
    """What a run has whatever its arm.

    Attributes:
        base: unwrapped; an arm leaves its model wrapped.
        space: what can be chosen, with parameters as the cost.
        budget: parameters.
        train: the rows.
        common: seed and row length.
        rate: of learning, in a search too.
        shape: uniform's, of SHAPES; one-shot's, of SPECTRA; else empty.
        searched: gives the searched allocation of this task, budget and seed.
        work: a folder for trainers' files.
    """

    base: Base
    space: SearchSpace
    budget: int
    train: Dataset
    common: CommonConfig
    rate: float
    shape: str
    searched: Callable[[], Allocation]
    work: Path

    @property
    def modules(self) -> list[str]:
        return list(self.space.linears)


@dataclass(frozen=True)
class Trained:
    """What an arm leaves: the model to score, its adapter's size, its rank rows by module."""

    model: PeftModel
    parameters: int
    rows: dict[str, int]


def searched(setting: Setting) -> Trained:
    return allocated(setting, setting.searched())


def of_shuffled(setting: Setting) -> Trained:
    linears = setting.space.linears
    return allocated(setting, shuffled(setting.searched(), linears, setting.common.seed))


def one_shot(setting: Setting) -> Trained:
    """A spectrum of the frozen base's gradient over all training rows, through the same price."""
    model = setting.base.model
    model.eval()
    losses = [lambda b=batch: completion_nll(model, b) for batch in batches(setting)]
    if setting.shape == "whitened":
        worths = whitened_worths(model, setting.space, losses)
    else:
        worths = one_shot_worths(model, setting.space, losses)["spectrum"]
    return allocated(setting, fill(setting.space, worths, setting.budget))


def uniform(setting: Setting) -> Trained:
    found = uniform_allocation(setting.space, setting.shape, setting.budget)
    return allocated(setting, found)


def of_random(setting: Setting) -> Trained:
    linears = setting.space.linears
    return allocated(setting, random_allocation(linears, setting.budget, setting.common.seed))


def released(setting: Setting) -> Trained:
    """The released code's choices, which know no budget: what they find, rescaled to this one."""
    common, space = setting.common, setting.space
    paper = SearchSpace(space.linears, fewest_experts=space.top_k)
    torch.manual_seed(common.seed)
    config = LoraMoeConfig(
        task_type="CAUSAL_LM",
        target_modules=setting.modules,
        num_experts=paper.max_experts,
        expert_rank=paper.max_rank,
        top_k=paper.top_k,
        lora_alpha=common.lora_alpha,
    )
    trainer = trainer_of(
        setting,
        with_adapter(setting.base.model, config),
        kind=SearchTrainer,
        epochs=1.0,
        schedule="constant_with_warmup",
        balance=BALANCE,
        selection=SelectionVectors(paper, choice="argmax", initial="random"),
        estimator="argmax",
        selection_learning_rate=0.1,
    )
    trainer.train()
    setting.base.model = trainer.model.unload()
    return allocated(setting, rescaled(trainer.allocation(), space, setting.budget))


def run(setting: Setting) -> Trained:
    """One epoch of search and one on from its weights, as `guilomo-train run`."""
    found = search_of(setting)
    return allocated(setting, found.allocation, epochs=1.0, start=found.adapter)


def uniform_run(setting: Setting) -> Trained:
    """Uniform under the schedule and batches of `run`: an epoch with the rate up, and one on."""
    allocation = uniform_allocation(setting.space, setting.shape, setting.budget)
    torch.manual_seed(setting.common.seed)
    model = with_adapter(setting.base.model, moe_config(setting, allocation))
    trainer_of(setting, model, epochs=1.0, schedule="constant_with_warmup", balance=BALANCE).train()
    start = adapter_of(model)
    setting.base.model = model.unload()
    return allocated(setting, allocation, epochs=1.0, start=start)


def lora(setting: Setting, rank_stabilised: bool = False) -> Trained:
    model = lora_model(setting, use_rslora=rank_stabilised)
    trainer_of(setting, model).train()
    return plain(setting, model)


def rslora(setting: Setting) -> Trained:
    return lora(setting, rank_stabilised=True)


def eva(setting: Setting) -> Trained:
    """PEFT's EVA: A from the inputs' principal directions, ranks where they explain most."""
    config = EvaConfig(rho=2.0)
    model = lora_model(setting, init_lora_weights="eva", eva_config=config)
    trainer = trainer_of(setting, model)
    loader = list(trainer.get_train_dataloader())
    initialize_lora_eva_weights(model, loader, show_progress_bar=False)
    trainer.train()
    return plain(setting, model)


def adalora(setting: Setting) -> Trained:
    """PEFT's AdaLoRA: half as many rows again as its budget, of which training prunes the least."""
    linears = setting.space.linears
    cost = {module: sum(sizes) + 1 for module, sizes in linears.items()}  # E has one for each row
    target = setting.budget * len(cost) // sum(cost.values())
    steps = int(EPOCHS * -(-len(setting.train) // BATCH))
    first, last = (round(share * steps) for share in ADALORA_PHASES)
    torch.manual_seed(setting.common.seed)
    config = AdaLoraConfig(
        task_type="CAUSAL_LM",
        init_r=max(2, -(-3 * target // (2 * len(cost)))),
        tinit=first,
        tfinal=last,
        total_step=steps,
        lora_alpha=setting.common.lora_alpha,
        orth_reg_weight=ORTHOGONAL,
        target_modules=setting.modules,
    )
    model = get_peft_model(setting.base.model, config)
    model.base_model.rankallocator.target_bgt = target  # target_r counts whole rows a module
    trainer_of(setting, model, kind=AdaLoraTrainer, callbacks=[Prune()]).train()
    kept = {
        key.removeprefix("base_model.model.").removesuffix(".lora_E.default"): sum(pattern)
        for key, pattern in config.rank_pattern.items()
    }
    rows = {module: kept.get(module, 0) for module in linears}
    return Trained(model, sum(cost[module] * n for module, n in rows.items()), rows)


def truncated(setting: Setting) -> Trained:
    """LoRA of rank LARGE everywhere, cut to the budget by the singular values of what it adds."""
    model = lora_model(setting, Allocation.uniform(tuple(setting.modules), 1, LARGE, top_k=1))
    trainer_of(setting, model).train()
    layers = {module: model.get_submodule(f"base_model.model.{module}") for module in
              setting.modules}  # fmt: skip
    parts = {
        module: torch.linalg.svd(layer.get_delta_weight("default"), full_matrices=False)
        for module, layer in layers.items()
    }
    worths = torch.stack([s[:LARGE].square() for _, s, _ in parts.values()])
    space = SearchSpace(setting.space.linears, max_experts=1, max_rank=LARGE, top_k=1)
    allocation = fill(space, worths, setting.budget)
    with torch.no_grad():
        for module, layer in layers.items():
            u, s, v = parts[module]
            rank = sum(allocation.ranks[module])
            a, b = layer.lora_A["default"].weight.zero_(), layer.lora_B["default"].weight.zero_()
            a[:rank] = v[:rank]
            b[:, :rank] = u[:, :rank] * s[:rank] / layer.scaling["default"]
    return Trained(model, allocation.parameters(space.linears), rows_of(allocation))


ARMS: dict[str, Callable[[Setting], Trained]] = {
    "searched": searched,
    "shuffled": of_shuffled,
    "one-shot": one_shot,
    "uniform": uniform,
    "random": of_random,
    "released": released,
    "lora": lora,
    "rslora": rslora,
    "adalora": adalora,
    "eva": eva,
    "truncated": truncated,
    "run": run,
    "uniform-run": uniform_run,
}


def search_of(setting: Setting) -> SearchResult:
    config = SearchConfig(
        budget=str(setting.budget),
        search_batch_size=BATCH,
        search_learning_rate=setting.rate,
        search_balance_coefficient=BALANCE,
    )
    return search(setting.base, setting.train, None, setting.common, config, setting.work)


def uniform_allocation(space: SearchSpace, shape: str, budget: int) -> Allocation:
    """As many rows in each module of the shape's kinds, or one more; no adapter elsewhere."""
    kinds, experts = SHAPES[shape]
    there = {m: sizes for m, sizes in space.linears.items() if not kinds or kind(m) in kinds}
    rows = space.max_experts * space.max_rank
    found = even(SearchSpace(there, experts, rows // experts, space.top_k), budget)
    ranks = {module: found.ranks.get(module, ()) for module in space.linears}
    return Allocation(ranks, space.top_k, space.max_rank)  # scaled as a searched one


def kind(module: str) -> str:
    return module.rpartition(".")[2]


def allocated(
    setting: Setting, allocation: Allocation, epochs: float = EPOCHS, start: Adapter | None = None
) -> Trained:
    """LoRA-MoE weights of an allocation, fresh ones unless `start` has some."""
    config = FinetuneConfig(
        epochs=epochs,
        batch_size=BATCH,
        learning_rate=setting.rate,
        balance_coefficient=BALANCE,
    )
    result = finetune(
        setting.base, setting.train, allocation, setting.common, config, setting.work, start=start
    )
    parameters = allocation.parameters(setting.space.linears)
    return Trained(result.model, parameters, rows_of(allocation))


def moe_config(setting: Setting, allocation: Allocation) -> LoraMoeConfig:
    experts = allocation.experts(setting.common.lora_alpha)
    return LoraMoeConfig(
        task_type="CAUSAL_LM",
        top_k=allocation.top_k,
        lora_alpha=setting.common.lora_alpha,
        experts={
            module: [{"rank": e.rank, "scaling": e.scaling} for e in listed]
            for module, listed in experts.items()
        },
    )


def lora_model(setting: Setting, allocation: Allocation | None = None, **options: Any) -> PeftModel:
    """The base with PEFT's LoRA: as many rows in each module as the budget buys, or one more."""
    if allocation is None:
        space = SearchSpace(setting.space.linears, max_experts=1, max_rank=64, top_k=1)
        allocation = even(space, setting.budget)
    ranks = {module: sum(listed) for module, listed in allocation.ranks.items() if listed}
    torch.manual_seed(setting.common.seed)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=max(ranks.values()),
        rank_pattern=ranks,
        lora_alpha=setting.common.lora_alpha,
        target_modules=list(ranks),
        **options,
    )
    return get_peft_model(setting.base.model, config)


def plain(setting: Setting, model: PeftModel) -> Trained:
    """A trained LoRA, by the ranks that it ended with."""
    rows = dict.fromkeys(setting.modules, 0)
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            rows[name.removeprefix("base_model.model.")] = module.r["default"]
    parameters = sum(n * sum(setting.space.linears[module]) for module, n in rows.items())
    return Trained(model, parameters, rows)


def trainer_of(
    setting: Setting,
    model: PeftModel,
    *,
    kind: type[LoraMoeTrainer] = LoraMoeTrainer,
    epochs: float = EPOCHS,
    schedule: Any = "cosine",
    balance: float = 0.0,
    **options: Any,
) -> LoraMoeTrainer:
    """A trainer with the rows, batches and schedule that `finetune` has."""
    return kind(
        model=model,
        args=training_arguments(
            setting.common,
            setting.work,
            epochs=epochs,
            batch_size=BATCH,
            learning_rate=setting.rate,
            schedule=schedule,
        ),
        train_dataset=setting.train,
        processing_class=setting.base.tokenizer,
        balance_coefficient=balance,
        **options,
    )


def batches(setting: Setting) -> list[dict[str, torch.Tensor]]:
    """The batches of a pass over the training rows, as the trainer makes them."""
    first = Allocation({setting.modules[0]: (1,)}, 1, 1)
    model = with_adapter(setting.base.model, moe_config(setting, first))
    loader = trainer_of(setting, model).get_train_dataloader()
    setting.base.model = model.unload()
    device = setting.base.model.device
    return [{name: tensor.to(device) for name, tensor in batch.items()} for batch in loader]


def rows_of(allocation: Allocation) -> dict[str, int]:
    return {module: sum(ranks) for module, ranks in allocation.ranks.items()}


class AdaLoraTrainer(LoraMoeTrainer):
    """AdaLoRA's regulariser, which PEFT adds to a loss of the model's own alone: P and Q are to be
    orthogonal (Zhang et al. 2023, eq. 4)."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        distances = []
        for name, p in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                gram = p @ p.T if "lora_A" in name else p.T @ p
                distances.append((gram - torch.eye(len(gram), device=p.device)).norm())
        return loss + ORTHOGONAL * torch.stack(distances).mean()


class Prune(TrainerCallback):
    """AdaLoRA's call after each step of the optimiser, while the gradients are there."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["model"].base_model.update_and_allocate(state.global_step)
