"""An adapter as a plain LoRA: the same function where it is one, and near it where not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from guilomo_serve.adapter import CONFIG_FILE
from guilomo_serve.adapter.plain import GENERATING, check_plain_config
from guilomo_train.cli import main
from guilomo_train.config import ExportConfig
from guilomo_train.export import export
from guilomo_train.lora_moe import LoraMoeConfig, LoraMoeLayer
from tests.train.tiny import tiny_llama, tiny_tokenizer

SINGLE = {
    "model.layers.0.self_attn.q_proj": [{"rank": 3, "scaling": 2.0}],
    "model.layers.1.mlp.down_proj": [{"rank": 5, "scaling": 0.3}],
}
ROUTED = LoraMoeConfig(num_experts=3, expert_rank=2, task_type="CAUSAL_LM")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tokenizer = tiny_tokenizer()
    tiny_llama(len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [{"prompt": f"number {i} of {i * i}", "completion": f"{i % 7} is it"} for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "rows.jsonl"


def trained(base: Path, config: LoraMoeConfig, folder: Path, alike: bool = False) -> PeftModel:
    """A random adapter's model and folder; `alike` makes all experts of a module the same one."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    torch.manual_seed(1)
    for layer in model.modules():
        if isinstance(layer, LoraMoeLayer):
            a, b = layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data
            torch.nn.init.normal_(b, std=0.3)
            if alike:
                a.copy_(a[:2].repeat(3, 1))
                b.copy_(b[:, :2].repeat(1, 3))
    model.save_pretrained(folder)
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(40).reshape(2, 20)).logits


def loaded(folder: Path) -> torch.Tensor:
    """What the LoRA says, loaded as any other; a server would take it too."""
    value = json.loads((folder / CONFIG_FILE).read_text())
    assert check_plain_config(value, "", GENERATING) == []
    model = PeftModel.from_pretrained(tiny_llama(len(tiny_tokenizer())), folder)
    assert isinstance(model.peft_config["default"], LoraConfig)
    return logits(model)


def test_one_expert_a_module_is_a_lora(base: Path, tmp_path: Path, capsys) -> None:
    config = LoraMoeConfig(experts=SINGLE, task_type="CAUSAL_LM")
    model = trained(base, config, tmp_path / "adapter")
    command = ["export", "--adapter", tmp_path / "adapter", "--output", tmp_path / "lora"]
    assert main([*map(str, command)]) == 0
    assert "rank 5, the same function" in capsys.readouterr().out
    torch.testing.assert_close(loaded(tmp_path / "lora"), logits(model))


def test_experts_that_are_alike_are_a_lora(base: Path, data: Path, tmp_path: Path) -> None:
    """Then the router changes nothing, and least squares find the one expert."""
    trained(base, ROUTED, tmp_path / "adapter", alike=True)
    config = ExportConfig(
        str(tmp_path / "adapter"), str(tmp_path / "lora"), str(base), str(data), rank=2
    )
    found = export(config)
    assert found.lost is not None
    assert found.lost < 1e-3
    assert found.loss is not None
    assert found.loss[0] == pytest.approx(found.loss[1], rel=1e-3)
    loaded(tmp_path / "lora")


def test_a_routed_adapter_is_come_near_to_and_how_near_is_said(
    base: Path, data: Path, tmp_path: Path, capsys
) -> None:
    trained(base, ROUTED, tmp_path / "adapter")
    lost = []
    for rank in (1, 3, 6):
        given = (str(tmp_path / "adapter"), str(tmp_path / f"lora-{rank}"), str(base), str(data))
        found = export(ExportConfig(*given, rank=rank))
        lost.append(found.lost)
        assert str(found) in (tmp_path / f"lora-{rank}" / "README.md").read_text()
    assert 0 < lost[2] < lost[1] < lost[0] < 1
    assert lost[2] < 0.5

    command = ["export", "--adapter", tmp_path / "adapter", "--output", tmp_path / "other"]
    assert main([*map(str, command)]) == 2
    assert "14 modules have a router, so a LoRA can only come near" in capsys.readouterr().err
    command = ["export", "--adapter", tmp_path / "adapter", "--output", base]
    assert main([*map(str, command)]) == 2
    assert "exists and is no adapter" in capsys.readouterr().err
