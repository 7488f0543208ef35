"""The method as PEFT's users know it: wrap, save, load, switch, disable."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model

from guilomo_serve.adapter import BaseModel, read_adapter, write_adapter
from guilomo_train.finetune import adapter_of
from guilomo_train.lora_moe import LoraMoeConfig, LoraMoeLayer
from guilomo_train.search.allocation import Allocation
from tests.train.tiny import tiny_llama

IDS = torch.arange(20).reshape(2, 10)
RAGGED = {
    "model.layers.0.self_attn.q_proj": [{"rank": 3, "scaling": 2.0}, {"rank": 1, "scaling": 0.5}],
    "model.layers.1.mlp.down_proj": [{"rank": 4, "scaling": 1.0}],
    "model.layers.1.mlp.up_proj": [{"rank": r, "scaling": 2.0} for r in (1, 2, 5)],
}


def trained(config: LoraMoeConfig) -> PeftModel:
    """A model whose adapter changes what the model says."""
    model = get_peft_model(tiny_llama(64), config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    return model.eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("experts", [None, RAGGED], ids=["uniform", "ragged"])
def test_what_peft_saves_is_the_adapter_format_and_loads_again(
    tmp_path: Path, experts: dict[str, list[dict[str, float]]] | None
) -> None:
    model = trained(
        LoraMoeConfig(num_experts=3, expert_rank=2, experts=experts, task_type="CAUSAL_LM")
    )
    model.save_pretrained(tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter", BaseModel.from_module(tiny_llama(64)))
    assert len(adapter.weights) == (2 * 7 if experts is None else 3)

    again = PeftModel.from_pretrained(tiny_llama(64), tmp_path / "adapter").eval()
    assert torch.equal(logits(again), logits(model))
    assert not torch.equal(logits(again), logits(tiny_llama(64)))


def test_what_we_write_peft_loads(tmp_path: Path) -> None:
    model = trained(LoraMoeConfig(experts=RAGGED, task_type="CAUSAL_LM"))
    write_adapter(adapter_of(model), tmp_path / "adapter", "card")
    again = PeftModel.from_pretrained(tiny_llama(64), tmp_path / "adapter").eval()
    assert torch.equal(logits(again), logits(model))


def test_a_fresh_adapter_says_what_the_base_says_and_only_it_trains() -> None:
    base = logits(tiny_llama(64).eval())
    model = get_peft_model(tiny_llama(64), LoraMoeConfig(num_experts=2, expert_rank=2)).eval()
    assert torch.equal(logits(model), base)
    trainable = {n.split(".")[-3] for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"lora_A", "lora_B", "router"}


def test_adapters_are_switched_and_disabled() -> None:
    model = trained(LoraMoeConfig(experts=RAGGED))
    first = logits(model)
    model.add_adapter("second", LoraMoeConfig(num_experts=2, expert_rank=3))
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    base = logits(tiny_llama(64).eval())
    assert torch.equal(logits(model), base)  # B of the second is still zero
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    model.delete_adapter("second")
    assert torch.equal(logits(model), first)


def test_unload_gives_the_base_back_and_merge_is_refused() -> None:
    model = trained(LoraMoeConfig(experts=RAGGED))
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_and_unload()
    base = model.unload()
    assert not any(isinstance(m, LoraMoeLayer) for m in base.modules())
    assert torch.equal(logits(base), logits(tiny_llama(64).eval()))


def test_the_router_stays_float32_on_a_bfloat16_base(tmp_path: Path) -> None:
    model = get_peft_model(
        tiny_llama(64).bfloat16(),
        LoraMoeConfig(num_experts=2, expert_rank=2),
        autocast_adapter_dtype=False,
    )
    model.save_pretrained(tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter")
    weights = next(iter(adapter.weights.values()))
    assert weights.router is not None
    assert (weights.router.dtype, weights.lora_a.dtype) == (torch.float32, torch.bfloat16)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 0}, "top_k is 0"),
        ({"num_experts": 1.5}, "num_experts is 1.5"),
        ({"lora_alpha": 0}, "lora_alpha is 0"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0"),
        ({"experts": {"model.layers.9.mlp.up_proj": [{"rank": 1, "scaling": 1.0}]}}, "layers.9"),
        ({"target_modules": ["embed_tokens"]}, "linear layers alone"),
    ],
)
def test_a_config_that_cannot_be_applied_says_which_field(
    fields: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        get_peft_model(tiny_llama(64), LoraMoeConfig(**fields))  # type: ignore[arg-type]


def test_parameters_of_an_allocation_are_those_of_its_adapter() -> None:
    model = trained(LoraMoeConfig(experts=RAGGED))
    allocation = Allocation(
        {m: tuple(int(e["rank"]) for e in listed) for m, listed in RAGGED.items()}, 2, 5
    )
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert allocation.parameters(BaseModel.from_module(tiny_llama(64)).linears) == count
