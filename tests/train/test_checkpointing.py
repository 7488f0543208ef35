"""Gradient checkpointing and bfloat16 bases: the same losses and gradients, in every stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from trl import SFTConfig, SFTTrainer

from guilomo_train.arguments import training_arguments
from guilomo_train.config import CommonConfig
from guilomo_train.errors import ConfigError
from guilomo_train.lora_moe import LoraMoeConfig, LoraMoeLayer
from guilomo_train.search.selection import SelectionVectors
from guilomo_train.search.space import SearchSpace
from guilomo_train.search.trainer import SearchTrainer
from guilomo_train.trainer import LoraMoeTrainer
from tests.train.tiny import tiny_llama, tiny_tokenizer

ROWS = Dataset.from_list(
    [{"prompt": f"number {i}", "completion": "odd" if i % 2 else "even"} for i in range(12)]
)
BALANCE = 0.5  # large, so that a gradient it loses shows


def wrapped(dtype: torch.dtype = torch.float32) -> PeftModel:
    config = LoraMoeConfig(num_experts=3, expert_rank=2, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(len(tiny_tokenizer())).to(dtype), config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # at zero, neither A nor router nor vectors had a gradient
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def arguments(work: Path, checkpointing: bool) -> SFTConfig:
    common = CommonConfig(base="", train="", output="", gradient_checkpointing=checkpointing)
    made = training_arguments(common, work, epochs=1, batch_size=4, learning_rate=1e-2)
    made.max_steps = 3
    made.logging_steps = 1
    return made


def finetuning(work: Path, model: PeftModel, checkpointing: bool) -> LoraMoeTrainer:
    return LoraMoeTrainer(
        model=model,
        args=arguments(work, checkpointing),
        train_dataset=ROWS,
        processing_class=tiny_tokenizer(),
        balance_coefficient=BALANCE,
    )


def searching(
    work: Path, model: PeftModel, checkpointing: bool, order: str, batch: int = 4, parts: int = 1
) -> SearchTrainer:
    linears = {
        name.removeprefix("base_model.model."): (layer.out_features, layer.in_features)
        for name, layer in model.named_modules()
        if isinstance(layer, LoraMoeLayer)
    }
    space = SearchSpace(linears, 3, 2)
    args = arguments(work, checkpointing)
    args.per_device_train_batch_size, args.gradient_accumulation_steps = batch, parts
    return SearchTrainer(
        model=model,
        args=args,
        train_dataset=ROWS,
        processing_class=tiny_tokenizer(),
        balance_coefficient=BALANCE,
        selection=SelectionVectors(space, budget=space.cost(3, 2) // 2),
        estimator="marginal",
        selection_learning_rate=0.1,
        validation_dataset=None if order == "online" else ROWS,
        second_order=order == "second",
    )


def trained(trainer: LoraMoeTrainer) -> tuple[list[float], list[torch.Tensor]]:
    """Losses of the steps, and everything that was trained."""
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    moved = [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]
    if isinstance(trainer, SearchTrainer):
        moved += [p.detach().clone() for p in trainer.upper.selection.parameters()]
    return losses, moved


STAGES: dict[str, Any] = {
    "finetune": finetuning,
    **{o: lambda *a, o=o: searching(*a, order=o) for o in ("online", "first", "second")},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("stage", STAGES)
def test_checkpointing_changes_nothing_but_memory(
    stage: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    plain = trained(STAGES[stage](tmp_path, wrapped(dtype), False))
    model = wrapped(dtype)
    runs = 0

    def count(*_: Any) -> None:
        nonlocal runs
        runs += 1

    model.get_base_model().model.layers[0].mlp.up_proj.register_forward_hook(count)
    trainer = STAGES[stage](tmp_path, model, True)
    checkpointed = trained(trainer)
    forwards = {"finetune": 1, "online": 1, "first": 2, "second": 4}[stage]
    assert runs == 3 * 2 * forwards  # each again in its backward pass
    assert all(layer.routing is None for layer in trainer.layers), "it holds activations"
    torch.testing.assert_close(checkpointed[0], plain[0])
    for a, b in zip(checkpointed[1], plain[1], strict=True):
        torch.testing.assert_close(a, b)


def test_reentrant_checkpointing_is_refused_where_it_would_lose_gradients(tmp_path: Path) -> None:
    made = arguments(tmp_path, True)
    made.gradient_checkpointing_kwargs = {"use_reentrant": True}
    with pytest.raises(ConfigError, match="use_reentrant=True, expected False"):
        LoraMoeTrainer(
            model=wrapped(),
            args=made,
            train_dataset=ROWS,
            processing_class=tiny_tokenizer(),
            balance_coefficient=0.0,
        )


def test_trl_checkpoints_in_both_forms(tmp_path: Path) -> None:
    """On TRL's own trainer there is no loss beside the model's, so the reentrant form is right."""

    def run(**kwargs: Any) -> list[torch.Tensor]:
        trainer = SFTTrainer(
            model=tiny_llama(len(tiny_tokenizer())),
            args=SFTConfig(
                output_dir=str(tmp_path),
                max_steps=3,
                learning_rate=1e-2,
                bf16=False,
                report_to="none",
                save_strategy="no",
                **kwargs,
            ),
            train_dataset=ROWS,
            processing_class=tiny_tokenizer(),
            peft_config=LoraMoeConfig(num_experts=3, expert_rank=2, task_type="CAUSAL_LM"),
        )
        trainer.train()
        return [p.detach() for p in trainer.model.parameters() if p.requires_grad]

    plain = run(gradient_checkpointing=False)
    assert any(p.abs().max() > 0 for p in plain)
    for reentrant in (False, True):
        other = run(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        for a, b in zip(other, plain, strict=True):
            torch.testing.assert_close(a, b)
