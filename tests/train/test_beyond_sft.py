"""DPO, KTO and GRPO of TRL train a LoRA-MoE adapter, with the load-balance loss."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer

from guilomo_serve.adapter import BaseModel, read_adapter
from guilomo_train.balance import BalanceLoss
from guilomo_train.lora_moe import LoraMoeConfig
from tests.train.tiny import tiny_llama, tiny_tokenizer

HOW_TO = Path(__file__).parent.parent.parent / "docs" / "dpo.md"
ROWS = range(8)
PAIRS = [{"prompt": f"{i}?", "chosen": "even", "rejected": "odd"} for i in ROWS]
JUDGED = [{"prompt": f"{i}?", "completion": "even", "label": bool(i % 2)} for i in ROWS]
PROMPTS = [{"prompt": f"{i}?"} for i in ROWS]


class BalancedDPO(BalanceLoss, DPOTrainer):
    pass


class BalancedKTO(BalanceLoss, KTOTrainer):
    pass


class BalancedGRPO(BalanceLoss, GRPOTrainer):
    pass


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(text))) for text in completions]


KINDS: dict[str, tuple[Any, Any, list[dict[str, Any]], dict[str, Any], dict[str, Any]]] = {
    "DPO": (BalancedDPO, DPOConfig, PAIRS, {}, {}),
    "KTO": (BalancedKTO, KTOConfig, JUDGED, {}, {}),
    "GRPO": (
        BalancedGRPO, GRPOConfig, PROMPTS, {"num_generations": 2, "max_completion_length": 6},
        {"reward_funcs": reward},
    ),
}  # fmt: skip


def trained(kind: str, coefficient: float, folder: Path, accumulated: int = 1) -> Any:
    """A trainer after three steps, whose loss is the load-balance loss alone but for TRL's own."""
    trainer_class, config, rows, settings, more = KINDS[kind]
    tokenizer = tiny_tokenizer()
    trainer = trainer_class(
        model=tiny_llama(len(tokenizer)),
        args=config(
            output_dir=str(folder), max_steps=3, learning_rate=1e-2, logging_steps=1,
            per_device_train_batch_size=4 // accumulated, gradient_accumulation_steps=accumulated,
            report_to="none", save_strategy="no", use_cpu=True, bf16=False, seed=0, **settings,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraMoeConfig(num_experts=4, expert_rank=2, task_type="CAUSAL_LM"),
        **more,
    )  # fmt: skip
    trainer.balance_coefficient = coefficient
    trainer.train()
    return trainer


def routers(trainer: Any) -> torch.Tensor:
    state = trainer.model.state_dict()
    return torch.cat([t.flatten() for name, t in state.items() if "lora_router" in name])


@pytest.mark.parametrize("kind", KINDS)
def test_the_routers_learn_from_the_load_balance_loss(kind: str, tmp_path: Path) -> None:
    with_loss, without = trained(kind, 1000.0, tmp_path / "a"), trained(kind, 0.0, tmp_path / "b")
    logs = [entry for entry in with_loss.state.log_history if "balance" in entry]
    assert len(logs) == 3
    assert all(0.8 < entry["balance"] < 4 for entry in logs)
    assert all("router_entropy" in entry for entry in logs)
    assert not torch.equal(routers(with_loss), routers(without))
    # In the first step all experts give zero: of the two runs one alone moves its routers then.
    losses = [t.state.log_history[0]["loss"] for t in (with_loss, without)]
    assert losses[0] - losses[1] == pytest.approx(1000 * logs[0]["balance"], rel=0.02)
    # And the adapter is one that a server takes.
    with_loss.save_model(str(tmp_path / "adapter"))
    base = BaseModel.from_module(tiny_llama(len(with_loss.processing_class)))
    assert read_adapter(tmp_path / "adapter", base).spec.total_experts == 14 * 4


@pytest.mark.parametrize("kind", ["DPO", "GRPO"])
def test_accumulated_parts_share_the_weight_of_the_loss(kind: str, tmp_path: Path) -> None:
    trainer = trained(kind, 1000.0, tmp_path / "a", accumulated=2)
    without = trained(kind, 0.0, tmp_path / "b", accumulated=2)
    first, other = trainer.state.log_history[0], without.state.log_history[0]
    assert first["loss"] - other["loss"] == pytest.approx(1000 * first["balance"], rel=0.02)


def test_the_how_to_runs_as_written_and_goes_on_from_an_adapter(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", HOW_TO.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "preferences.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
    names: dict[str, Any] = {"__name__": "how_to"}
    small = code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(tiny_base))
    exec(small.replace("learning_rate", "use_cpu=True, bf16=False, learning_rate"), names)
    adapter = tmp_path / "runs/dpo/adapter"
    assert read_adapter(adapter).spec.total_experts == 14 * 4

    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    model = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    trainer = names["BalancedDPO"](
        model=model,
        args=DPOConfig(
            output_dir=str(tmp_path / "on"), max_steps=1, logging_steps=1, use_cpu=True, bf16=False
        ),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=AutoTokenizer.from_pretrained(tiny_base),
    )
    trainer.train()
    # Before its first step the policy is the reference: -log sigmoid(0).
    first = trainer.state.log_history[0]
    assert first["loss"] - 0.01 * first["balance"] == pytest.approx(0.6931, abs=2e-3)
