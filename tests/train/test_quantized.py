"""Bases whose linear layers are quantised: by bitsandbytes, and by a class of our own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from trl import SFTConfig, SFTTrainer

from guilomo_serve.adapter import BaseModel, read_adapter
from guilomo_train.arguments import training_arguments
from guilomo_train.base import load_base
from guilomo_train.cli import main
from guilomo_train.config import CommonConfig
from guilomo_train.lora_moe import LoraMoeConfig, LoraMoeLayer
from guilomo_train.trainer import LoraMoeTrainer
from tests.train.tiny import tiny_llama, tiny_tokenizer

KINDS = ["4bit", "8bit"]
ROWS = [{"prompt": f"number {i}", "completion": "odd" if i % 2 else "even"} for i in range(44)]


class Int8Linear(nn.Module):
    """As quantised layers are: two sizes, no float weight, no subclass of nn.Linear."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.abs().amax(1, keepdim=True) / 127
        weight = (linear.weight / scale).round().to(torch.int8)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tokenizer = tiny_tokenizer()
    tiny_llama(len(tokenizer), hidden_size=128).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    Dataset.from_list(ROWS).to_json(path)
    return path


def quantized(base: Path, kind: str) -> PreTrainedModel:
    config = BitsAndBytesConfig(
        load_in_4bit=kind == "4bit",
        load_in_8bit=kind == "8bit",
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return AutoModelForCausalLM.from_pretrained(base, quantization_config=config)


def learns(model: PeftModel) -> None:
    """Some steps lower the loss, all of the adapter has a gradient, nothing of the base has."""
    ids = torch.arange(24, device=model.device).reshape(2, 12)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.01)
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        assert all(p.grad is not None for p in trained)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    assert all("lora_" in n for n, p in model.named_parameters() if p.requires_grad)


def test_layers_without_a_float_weight_are_adapted() -> None:
    model = tiny_llama(64)
    for name in ("q_proj", "o_proj"):
        attention = model.model.layers[0].self_attn
        setattr(attention, name, Int8Linear(getattr(attention, name)))
    peft = get_peft_model(
        model,
        LoraMoeConfig(target_modules=["q_proj", "o_proj"], num_experts=2, expert_rank=2),
    )
    dtypes = {p.dtype for p in peft.parameters() if p.requires_grad}
    assert dtypes == {torch.float32}
    learns(peft)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_bitsandbytes_base_learns_saves_and_loads(
    kind: str, prepared: bool, base: Path, tmp_path: Path
) -> None:
    model = quantized(base, kind)
    plain = BaseModel.from_module(AutoModelForCausalLM.from_pretrained(base))
    assert BaseModel.from_module(model) == plain  # what was trained on it fits the plain base
    if prepared:
        model = prepare_model_for_kbit_training(
            model, gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    peft = get_peft_model(model, LoraMoeConfig(num_experts=2, expert_rank=2))
    peft.train()
    learns(peft)
    peft.save_pretrained(tmp_path)
    read_adapter(tmp_path, plain)
    again = PeftModel.from_pretrained(quantized(base, kind), tmp_path).eval()
    ids = torch.arange(10, device=again.device)[None]
    if not prepared:  # preparing turns the norms into float32
        with torch.no_grad():
            assert torch.equal(again(ids).logits, peft.eval()(ids).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_after_an_evaluation_are_those_before_it(kind: str, base: Path) -> None:
    model = get_peft_model(
        load_base(str(base), "bfloat16", kind).model, LoraMoeConfig(num_experts=2, expert_rank=2)
    )
    ids = torch.arange(24, device=model.device).reshape(2, 12)
    found = []
    for _ in range(2):
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
        model.zero_grad()
        model.eval()
        with torch.no_grad():
            model(input_ids=ids)
    assert max(gradient.abs().max() for gradient in found[0]) > 0.01
    assert all(map(torch.equal, *found))


def test_trl_on_a_quantised_base_saves_an_adapter_of_the_format(base: Path, tmp_path: Path) -> None:
    """TRL makes the whole adapter bfloat16 there, routers too; a saved router is float32."""
    trainer = SFTTrainer(
        model=quantized(base, "4bit"),
        args=SFTConfig(
            output_dir=str(tmp_path),
            max_steps=2,
            report_to="none",
            save_strategy="no",
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tiny_tokenizer(),
        peft_config=LoraMoeConfig(num_experts=3, expert_rank=2, task_type="CAUSAL_LM"),
    )
    trainer.train()
    layers = [m for m in trainer.model.modules() if isinstance(m, LoraMoeLayer)]
    assert {layer.lora_router["default"].weight.dtype for layer in layers} == {torch.bfloat16}
    trainer.save_model(str(tmp_path / "adapter"))
    read_adapter(tmp_path / "adapter")


def test_our_trainer_keeps_the_adapter_in_float32(base: Path, tmp_path: Path) -> None:
    common = CommonConfig(base="", train="", output="")
    model = get_peft_model(quantized(base, "4bit"), LoraMoeConfig(task_type="CAUSAL_LM"))
    LoraMoeTrainer(
        model=model,
        args=training_arguments(common, tmp_path, epochs=1, batch_size=4, learning_rate=1e-3),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tiny_tokenizer(),
        balance_coefficient=0.0,
    )
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_trains_on_a_quantised_base(
    kind: str, base: Path, rows: Path, tmp_path: Path
) -> None:
    arguments = [
        "run", "--base", base, "--train", rows, "--output", tmp_path, "--quantize", kind,
        "--max_experts", 2, "--max_rank", 2, "--order", "second", "--gradient_checkpointing",
        "--epochs", 1, "--eval", rows, "--eval_rows", 4, "--max_new_tokens", 2,
    ]  # fmt: skip
    assert main([str(item) for item in arguments]) == 0
    plain = BaseModel.from_module(AutoModelForCausalLM.from_pretrained(base))
    adapter = read_adapter(tmp_path / "adapter", plain)
    assert all(w.lora_b.abs().max() > 0 for w in adapter.weights.values())


def test_without_bitsandbytes_the_command_says_what_to_install(
    base: Path,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as where it is not installed
    arguments = ["search", "--base", base, "--train", rows, "--output", tmp_path]
    assert main([*map(str, arguments), "--quantize", "4bit"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "--quantize 4bit: needs the package bitsandbytes" in said
