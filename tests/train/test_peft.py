"""The method as PEFT's users know it: wrap, save, load, switch, disable."""

from __future__ import annotations

import subprocess
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
)
from trl import SFTConfig, SFTTrainer

from guilomo_serve.adapter import AdapterError, BaseModel, read_adapter, write_adapter
from guilomo_train.adapters import adapter_of
from guilomo_train.lora_moe import LoraMoeConfig, LoraMoeLayer
from guilomo_train.search.allocation import Allocation
from tests.train.tiny import tiny_llama, tiny_tokenizer

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


def adapted(model: torch.nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, LoraMoeLayer)]


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


def test_transformers_loads_an_adapter_as_it_loads_a_lora(tmp_path: Path) -> None:
    """By the folder alone, and into a model that is there; neither loads nothing and says so."""
    tiny_llama(64).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = LoraMoeConfig(num_experts=3, expert_rank=2, task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.eval().save_pretrained(tmp_path / "adapter")
    by_folder = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(logits(by_folder), logits(model))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(loaded.eval()), logits(model))


def test_importing_guilomo_is_enough_to_load_an_adapter(tmp_path: Path) -> None:
    """In a new process, as other programs load it; without the import PEFT knows no such type."""
    LoraMoeConfig(experts=RAGGED).save_pretrained(tmp_path)
    script = f"""
from peft import PeftConfig
try:
    PeftConfig.from_pretrained({str(tmp_path)!r})
except KeyError as e:
    print(e)
import guilomo
print(PeftConfig.from_pretrained({str(tmp_path)!r}).r)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.stdout == "'GUILOMO'\nNone\n", done.stderr


@pytest.mark.parametrize("kind", ["lora_B", "lora_router"])
def test_weights_that_are_missing_are_warned_of(tmp_path: Path, kind: str) -> None:
    trained(LoraMoeConfig(num_experts=3, expert_rank=2)).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    save_file({k: t for k, t in weights.items() if kind not in k},
              tmp_path / "adapter_model.safetensors")  # fmt: skip
    with pytest.warns(UserWarning, match=f"missing adapter keys.*{kind}"):
        PeftModel.from_pretrained(tiny_llama(64), tmp_path)


def test_a_state_dict_says_which_modules_are_adapted() -> None:
    config = LoraMoeConfig(num_experts=3, expert_rank=2, target_modules=["q_proj"])
    state = get_peft_model_state_dict(inject_adapter_in_model(config, tiny_llama(64)))
    other = inject_adapter_in_model(
        LoraMoeConfig(num_experts=3, expert_rank=2), tiny_llama(64), state_dict=state
    )
    assert adapted(other) == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]


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
    assert trainable == {"lora_A", "lora_B", "lora_router"}


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


def fill(model: PeftModel, adapter: str, seed: int) -> None:
    """Makes an adapter of several change what the model says."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name and f".{adapter}." in name:
            torch.nn.init.normal_(parameter)


def test_two_adapters_at_once_add_up_and_each_is_saved_by_itself(tmp_path: Path) -> None:
    one, two = LoraMoeConfig(experts=RAGGED), LoraMoeConfig(target_modules=["v_proj"])
    model = get_peft_model(tiny_llama(64), one, adapter_name="one")
    model.add_adapter("two", two)
    for seed, name in enumerate(("one", "two")):
        fill(model, name, seed)
    model.eval()
    layer = "model.layers.0.self_attn"
    model.base_model.set_adapter(["one", "two"])
    x = torch.randn(3, 32)
    attention = model.get_base_model().get_submodule(layer)
    for kind, adapter in (("q_proj", "one"), ("v_proj", "two")):
        part = getattr(attention, kind)
        expected = part.base_layer(x) + part._delta(adapter, x)
        torch.testing.assert_close(part(x), expected)
    both = logits(model)
    said = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        said[name] = logits(model)
        assert not torch.equal(said[name], both)
    trainable = {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"two"}

    model.save_pretrained(tmp_path)
    for name in said:
        read_adapter(tmp_path / name, BaseModel.from_module(tiny_llama(64)))
        again = PeftModel.from_pretrained(tiny_llama(64), tmp_path / name).eval()
        assert torch.equal(logits(again), said[name])
    # Loaded beside another one, an adapter says the same.
    loaded = PeftModel.from_pretrained(tiny_llama(64), tmp_path / "one", adapter_name="one").eval()
    loaded.load_adapter(tmp_path / "two", "two")
    loaded.set_adapter("two")
    assert torch.equal(logits(loaded), said["two"])


def test_two_adapters_of_the_same_layer_add_up() -> None:
    config = {"target_modules": ["q_proj"], "num_experts": 3, "expert_rank": 2}
    model = get_peft_model(tiny_llama(64), LoraMoeConfig(**config))
    model.add_adapter("second", LoraMoeConfig(**config))
    for seed, name in enumerate(("default", "second")):
        fill(model, name, seed)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    x = torch.randn(3, 32)
    base = layer.base_layer(x)
    alone = []
    for name in ("default", "second"):
        model.set_adapter(name)
        alone.append(layer(x) - base)
    model.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(layer(x), base + alone[0] + alone[1])


def test_a_batch_of_mixed_adapters_is_refused() -> None:
    model = trained(LoraMoeConfig(experts=RAGGED))
    with pytest.raises(ValueError, match="adapter_names: rows of one batch"):
        model(IDS, adapter_names=["default", "__base__"])


def test_dropout_falls_on_the_experts_input_and_leaves_the_router_alone() -> None:
    config = LoraMoeConfig(target_modules=["q_proj"], num_experts=4, lora_dropout=0.5)
    model = trained(config)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    layer.keep_routing = True
    x = torch.randn(5, 32)
    still = layer(x), layer.routing.logits
    assert torch.equal(layer(x), still[0])
    model.train()
    torch.manual_seed(0)
    assert not torch.equal(layer(x), still[0])
    assert torch.equal(layer.routing.logits, still[1])


def test_trl_trains_saves_and_loads(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    base = tiny_llama(len(tokenizer))
    rows = [{"prompt": f"number {i}", "completion": "odd" if i % 2 else "even"} for i in range(16)]
    trainer = SFTTrainer(
        model=base,
        args=SFTConfig(
            output_dir=str(tmp_path / "work"),
            num_train_epochs=1,
            learning_rate=1e-2,
            report_to="none",
            save_strategy="epoch",
            use_cpu=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraMoeConfig(num_experts=3, expert_rank=2, task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    (checkpoint,) = (tmp_path / "work").glob("checkpoint-*")
    for folder in (tmp_path / "adapter", checkpoint):
        adapter = read_adapter(folder, BaseModel.from_module(tiny_llama(len(tokenizer))))
        assert all(w.lora_b.abs().max() > 0 for w in adapter.weights.values())
        again = get_peft_model_state_dict(
            PeftModel.from_pretrained(tiny_llama(len(tokenizer)), folder)
        )
        trained = get_peft_model_state_dict(trainer.model)
        assert again.keys() == trained.keys()
        assert all(torch.equal(again[key], tensor) for key, tensor in trained.items())


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
        ({"experts": {}}, "experts has none: expected a module at least"),
        ({"experts": {**RAGGED, "lm_head": []}}, "experts has none for 'lm_head'"),
        ({"target_modules": ["embed_tokens"]}, "linear layers alone"),
        ({"target_modules": ["q_proj", "query"]}, "target_modules has 'query'.*q_proj, k_proj"),
        ({"target_modules": "q_proj"}, "has 'q_proj', which as a pattern for whole names names no"),
        ({"bias": "lora_only"}, "bias is 'lora_only', which a LoRA-MoE does not have: an adapter"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern is .*: give each module's ranks in exp"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern is .*: give each expert's scaling in"),
        ({"target_parameters": ["w"]}, "target_parameters is .*: only linear layers"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is .*modules_to_save"),
        ({"use_dora": True}, "use_dora is True.*norm of its sum"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is .*the base as it is"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', expected True, False or"),
        ({"layers_to_transform": [9]}, r"layers_to_transform is \[9\], which has no linear layer"),
        ({"layers_to_transform": "0"}, "layers_to_transform is '0', expected a number or a list"),
        ({"layers_to_transform": 0, "target_modules": ".*q_proj"}, "not with a pattern"),
        ({"layers_pattern": "layers"}, "layers_pattern is given without layers_to_transform"),
    ],
)
def test_a_config_that_cannot_be_applied_says_which_field(
    fields: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        get_peft_model(tiny_llama(64), LoraMoeConfig(**fields))  # type: ignore[arg-type]


def test_a_weighted_sum_of_adapters_is_refused_in_one_sentence() -> None:
    model = trained(LoraMoeConfig(num_experts=2, expert_rank=2))
    with pytest.raises(ValueError, match="add_weighted_adapter: routers of two"):
        model.add_weighted_adapter(["default"], [0.5], "half")


def test_a_config_used_twice_fits_each_model() -> None:
    config = LoraMoeConfig(task_type="CAUSAL_LM", num_experts=2, expert_rank=3)
    small = get_peft_model(tiny_llama(300, layers=1), config)
    large = get_peft_model(tiny_llama(300, layers=3), config)
    assert [len(adapted(model)) for model in (small, large)] == [7, 21]
    other = get_peft_model(tiny_llama(300, layers=1), replace(config, expert_rank=5))
    ranks = {e["rank"] for listed in other.peft_config["default"].experts.values() for e in listed}
    assert ranks == {5}


def test_what_other_methods_call_rank_is_refused() -> None:
    with pytest.raises(ValueError, match="r is 16, expected expert_rank=16"):
        LoraMoeConfig(r=16)


def test_a_router_that_chooses_one_expert_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="top_k is 1"):
        LoraMoeConfig(top_k=1)


def test_options_that_are_left_off_are_no_options() -> None:
    off = {"bias": "none", "rank_pattern": {}, "use_dora": False, "trainable_token_indices": None}
    get_peft_model(tiny_llama(64), LoraMoeConfig(**off))


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]])
@pytest.mark.parametrize("layers", [2, [0, 2]])
def test_layers_to_transform_are_the_blocks_that_are_adapted(
    targets: str | list[str], layers: int | list[int]
) -> None:
    config = LoraMoeConfig(target_modules=targets, layers_to_transform=layers, num_experts=2)
    model = get_peft_model(tiny_llama(64, layers=3), config)
    listed = layers if isinstance(layers, list) else [layers]
    assert {int(name.split(".layers.")[1].split(".")[0]) for name in adapted(model)} == set(listed)
    assert len(adapted(model)) == len(listed) * (7 if targets == "all-linear" else 1)


def test_rslora_scales_by_the_root_of_the_rank() -> None:
    config = LoraMoeConfig(target_modules=["q_proj"], expert_rank=4, use_rslora=True)
    experts = get_peft_model(tiny_llama(64), config).peft_config["default"].experts
    assert {e["scaling"] for listed in experts.values() for e in listed} == {16.0 / 2}


def test_gaussian_rows_have_the_spread_of_their_experts_rank() -> None:
    config = LoraMoeConfig(
        target_modules=["down_proj"], num_experts=3, expert_rank=64, init_lora_weights="gaussian"
    )
    model = get_peft_model(tiny_llama(64, hidden_size=128), config)
    for layer in model.modules():
        if isinstance(layer, LoraMoeLayer):
            assert layer.lora_A["default"].weight.std().item() == pytest.approx(1 / 64, rel=0.05)
            assert not layer.lora_B["default"].weight.any()


def test_a_config_that_is_loaded_says_what_was_trained(tmp_path: Path) -> None:
    """Nor is there a warning of modules to exclude, which `experts` leaves out by itself."""
    config = LoraMoeConfig(num_experts=3, expert_rank=2, exclude_modules=["up_proj"])
    model = get_peft_model(tiny_llama(64), config)
    assert len(adapted(model)) == 2 * 6
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = PeftModel.from_pretrained(tiny_llama(64), tmp_path)
    loaded = again.peft_config["default"]
    assert (loaded.num_experts, loaded.expert_rank) == (3, 2)
    ragged = LoraMoeConfig(experts=RAGGED)
    assert (ragged.num_experts, ragged.expert_rank) == (None, None)


def test_a_model_of_the_meta_device_is_filled_afterwards() -> None:
    config = LoraMoeConfig(num_experts=3, expert_rank=2)
    model = trained(config)
    with torch.device("meta"):
        empty = get_peft_model(tiny_llama(64), config)
    empty.load_state_dict(model.state_dict(), assign=True)
    rotary = empty.get_base_model().model
    rotary.rotary_emb = tiny_llama(64).model.rotary_emb  # its buffer is in no state
    assert torch.equal(logits(empty.eval()), logits(model))


def test_a_model_trains_after_it_answered() -> None:
    model = trained(LoraMoeConfig(num_experts=3, expert_rank=2))
    with torch.inference_mode():
        model(IDS)
    model(IDS).logits.sum().backward()


@dataclass
class Described:
    """A config that is none of transformers'."""

    hidden_size: int = 8


@pytest.mark.parametrize("config", [{"hidden_size": 8}, Described(), None])
def test_any_module_can_be_adapted_whatever_its_config(config: object) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    module.config = config
    model = get_peft_model(module, LoraMoeConfig(num_experts=2, expert_rank=2))
    assert adapted(model) == ["base_model.model.0", "base_model.model.2"]
    assert model(torch.ones(1, 8)).shape == (1, 2)


HEADS = {
    "SEQ_CLS": LlamaForSequenceClassification,
    "TOKEN_CLS": LlamaForTokenClassification,
    "QUESTION_ANS": LlamaForQuestionAnswering,
}


@pytest.mark.parametrize("task", HEADS)
def test_a_head_is_trained_and_kept_and_refused_where_it_would_not_be_applied(
    task: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    base = HEADS[task](tiny_llama(64).config)
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraMoeConfig(num_experts=2, expert_rank=2, task_type=task))
    assert len(adapted(model)) == 2 * 7
    head = [p for n, p in model.named_parameters() if p.requires_grad and "modules_to_save" in n]
    assert head
    for parameter in head:
        torch.nn.init.normal_(parameter)
    said = model.eval()(IDS)[0]
    model.save_pretrained(tmp_path / "adapter")
    fresh = HEADS[task].from_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    assert torch.equal(again(IDS)[0], said)
    with pytest.raises(AdapterError, match=r"modules_to_save|belongs to no module"):
        read_adapter(tmp_path / "adapter")


def test_modules_to_save_are_trained_whole(tmp_path: Path) -> None:
    config = LoraMoeConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(tiny_llama(64), config)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            torch.nn.init.normal_(parameter)
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(64), tmp_path).eval()
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(AdapterError, match=r"modules_to_save is \['lm_head'\], which a LoRA-MoE"):
        read_adapter(tmp_path)


def test_parameters_of_an_allocation_are_those_of_its_adapter() -> None:
    model = trained(LoraMoeConfig(experts=RAGGED))
    ranks = {m: tuple(int(e["rank"]) for e in listed) for m, listed in RAGGED.items()}
    allocation = Allocation({**ranks, "model.layers.0.self_attn.k_proj": ()}, 2, 5)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert allocation.parameters(BaseModel.from_module(tiny_llama(64)).linears) == count
