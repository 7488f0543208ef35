"""Every stage on the architectures people train: from rows to an adapter that PEFT loads again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from guilomo_serve.adapter import BaseModel, read_adapter, write_adapter
from guilomo_train.base import Base, load_base
from guilomo_train.cli import main
from guilomo_train.config import CommonConfig, FinetuneConfig, SearchConfig
from guilomo_train.data import load_rows
from guilomo_train.finetuning import finetune
from guilomo_train.lora_moe import LoraMoeConfig, LoraMoeLayer
from guilomo_train.searching import search
from tests.train.tiny import tiny_tokenizer

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
HEADS = {**SIZES, "head_dim": 8}
SPLIT = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
FUSED = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
ATTENTION = "q_proj,k_proj,v_proj,o_proj"


def gemma3_with_vision(vocab_size: int) -> Gemma3Config:
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    return Gemma3Config(
        text_config={**HEADS, "vocab_size": vocab_size}, vision_config=vision, mm_tokens_per_image=4
    )


DENSE = {
    "llama": (lambda v: LlamaConfig(**SIZES, vocab_size=v), SPLIT),
    "llama-tied": (lambda v: LlamaConfig(**SIZES, vocab_size=v, tie_word_embeddings=True), SPLIT),
    "qwen2": (lambda v: Qwen2Config(**SIZES, vocab_size=v), SPLIT),
    "qwen3": (lambda v: Qwen3Config(**HEADS, vocab_size=v), SPLIT),
    "mistral": (lambda v: MistralConfig(**SIZES, vocab_size=v, sliding_window=16), SPLIT),
    "gemma2": (lambda v: Gemma2Config(**HEADS, vocab_size=v), SPLIT),
    "gemma3": (lambda v: Gemma3TextConfig(**HEADS, vocab_size=v), SPLIT),
    "gemma3-vision": (gemma3_with_vision, SPLIT),
    # Its layers are no nn.Linear, and attention and MLP both end in a c_proj.
    "gpt2": (
        lambda v: GPT2Config(vocab_size=v, n_embd=32, n_layer=2, n_head=4, eos_token_id=2),
        {"c_attn", "c_proj", "c_fc"},
    ),
    "phi3": (lambda v: Phi3Config(**SIZES, vocab_size=v), FUSED),
}
MOE = {
    "qwen3-moe": lambda v: Qwen3MoeConfig(
        **HEADS, vocab_size=v, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
    "mixtral": lambda v: MixtralConfig(**SIZES, vocab_size=v, num_local_experts=4),
    "gpt-oss": lambda v: GptOssConfig(**HEADS, vocab_size=v, num_local_experts=4),
    "deepseek-v3": lambda v: DeepseekV3Config(
        **{**SIZES, "num_key_value_heads": 4},
        vocab_size=v,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
    ),
}


def model_of(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def folder_of(config_of: Any, folder: Path) -> Path:
    """A base's folder as people have it: weights, config, tokenizer."""
    tokenizer = tiny_tokenizer()
    # Some room: Qwen's class of tokenizer adds a token of its own.
    model_of(config_of(len(tokenizer) + 8)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows_file(folder: Path, count: int = 44) -> Path:
    path = folder / "rows.jsonl"
    rows = [
        {"prompt": f"number {i}", "completion": "odd" if i % 2 else "even"} for i in range(count)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def logits(model: nn.Module) -> torch.Tensor:
    ids = torch.arange(5, 25).reshape(2, 10)
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def train(base: Base, common: CommonConfig, work: Path) -> PeftModel:
    """Search, fine-tuning and the adapter folder `work/adapter`."""
    rows = load_rows(common.train, base.tokenizer)
    found = search(
        base, rows, None, common, SearchConfig(max_experts=2, max_rank=2), work / "search"
    )
    tuning = FinetuneConfig(epochs=1)
    result = finetune(
        base, rows, found.allocation, common, tuning, work / "finetune", start=found.adapter
    )
    write_adapter(result.adapter, work / "adapter", "card")
    return result.model


@pytest.mark.parametrize("name", DENSE)
def test_an_adapter_trained_on_it_is_the_adapter_that_loads(name: str, tmp_path: Path) -> None:
    config_of, kinds = DENSE[name]
    folder = folder_of(config_of, tmp_path / "base")
    common = CommonConfig(base=str(folder), train=str(rows_file(tmp_path)), output="")
    trained = train(load_base(str(folder)), common, tmp_path)

    fresh = load_base(str(folder)).model
    base = BaseModel.from_module(fresh)
    adapter = read_adapter(tmp_path / "adapter", base)
    assert adapter.spec.base == base.fingerprint
    assert {module.split(".")[-1] for module in adapter.weights} == kinds
    assert len(adapter.weights) == 2 * (len(kinds) + (name == "gpt2"))  # the language model's alone
    assert all(w.lora_b.abs().max() > 0 for w in adapter.weights.values())
    before = logits(fresh)
    again = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(trained))
    assert not torch.equal(logits(again), before)


@pytest.mark.parametrize("name", MOE)
def test_a_base_that_is_a_mixture_of_experts_is_refused_and_left_alone(name: str) -> None:
    model = model_of(MOE[name](64))
    moe = next(n for n, _ in model.named_modules() if n.endswith(".experts"))
    with pytest.raises(ValueError, match=r"all-linear.*mlp\.experts belongs to a mixture.*o_proj"):
        get_peft_model(model, LoraMoeConfig())
    router = next(n for n in ("gate", "router") if hasattr(model.get_submodule(moe[:-8]), n))
    for part in ("experts", router):
        with pytest.raises(ValueError, match=f"{part} is an expert or router"):
            get_peft_model(model, LoraMoeConfig(target_modules=["o_proj", part]))
    assert not any(isinstance(m, LoraMoeLayer) for m in model.modules())


def test_experts_that_are_a_list_of_linear_layers_are_refused_too() -> None:
    block = nn.ModuleDict(
        {
            "gate": nn.Linear(4, 2),
            "experts": nn.ModuleList([nn.ModuleDict({"up_proj": nn.Linear(4, 4)})]),
            "o_proj": nn.Linear(4, 4),
        }
    )
    for targets in ("all-linear", ["up_proj"], ["gate"], r".*up_proj"):
        with pytest.raises(ValueError, match="mixture of experts in the base"):
            get_peft_model(nn.ModuleDict({"mlp": block}), LoraMoeConfig(target_modules=targets))


def test_the_attention_of_a_mixture_of_experts_can_be_adapted(tmp_path: Path) -> None:
    folder = folder_of(MOE["qwen3-moe"], tmp_path / "base")
    common = CommonConfig(
        base=str(folder),
        train=str(rows_file(tmp_path)),
        output="",
        target_modules=ATTENTION,
    )
    trained = train(load_base(str(folder)), common, tmp_path)
    fresh = load_base(str(folder)).model
    assert len(read_adapter(tmp_path / "adapter", BaseModel.from_module(fresh)).weights) == 8
    again = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(trained))


def test_the_loss_of_a_bases_own_routers_is_left_out_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """TRL has the base compute it, even for a config that does not ask for it."""

    def asking(vocab_size: int) -> Any:
        config = MOE["qwen3-moe"](vocab_size)
        config.output_router_logits = True
        return config

    folder = folder_of(asking, tmp_path / "base")
    common = CommonConfig(
        base=str(folder), train=str(rows_file(tmp_path)), output="", target_modules=ATTENTION
    )
    model = train(load_base(str(folder)), common, tmp_path)
    said = [record.getMessage() for record in caplog.records]
    assert sum("the base's config has output_router_logits" in text for text in said) == 1
    assert model(input_ids=torch.arange(5, 9)[None]).aux_loss is None


def test_the_command_refuses_a_mixture_of_experts_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of(MOE["mixtral"], tmp_path / "base")
    given = ["search", "--base", folder, "--train", rows_file(tmp_path)]
    assert main([*map(str, given), "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "mixture of experts" in said
    assert "name the layers to adapt, of q_proj, k_proj, v_proj, o_proj" in said
    assert not list((tmp_path / "out").iterdir())


def test_the_output_layer_is_refused() -> None:
    model = model_of(LlamaConfig(**SIZES, vocab_size=64))
    with pytest.raises(ValueError, match="lm_head is the output layer"):
        get_peft_model(model, LoraMoeConfig(target_modules=["lm_head"]))


SMALL: dict[str, Any] = {"d_model": 16, "vocab_size": 64}
HALVES: dict[str, Any] = {
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
}
# Layers of the body, with both halves where there are two.
BODIES = {
    "T5": (
        lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(**SMALL, d_kv=4, d_ff=32, num_layers=2, num_heads=4)
        ),
        2 * 6 + 2 * 10,
    ),
    "BART": (
        lambda: transformers.BartForConditionalGeneration(
            transformers.BartConfig(
                **SMALL,
                encoder_layers=2,
                decoder_layers=2,
                **HALVES,
            )
        ),
        2 * 6 + 2 * 10,
    ),
    "Whisper": (
        lambda: transformers.WhisperForConditionalGeneration(
            transformers.WhisperConfig(
                **SMALL,
                encoder_layers=1,
                decoder_layers=1,
                **HALVES,
                num_mel_bins=8,
                pad_token_id=0,
                bos_token_id=0,
                eos_token_id=0,
                decoder_start_token_id=0,
                suppress_tokens=None,
                begin_suppress_tokens=None,
            )
        ),
        6 + 10,
    ),
    "CLIP": (
        lambda: transformers.CLIPModel(
            transformers.CLIPConfig(
                text_config={**TOWER, "vocab_size": 64},
                vision_config={**TOWER, "image_size": 8, "patch_size": 4},
                projection_dim=8,
            )
        ),
        2 * 6 + 2,
    ),
    "BERT": (
        lambda: transformers.BertForSequenceClassification(
            transformers.BertConfig(**{**TOWER, "vocab_size": 64})
        ),
        6 + 1,
    ),
    "ViT": (
        lambda: transformers.ViTForImageClassification(
            transformers.ViTConfig(**TOWER, image_size=8, patch_size=4)
        ),
        6,
    ),
}
TOWER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}


@pytest.mark.parametrize("name", BODIES)
def test_all_linear_layers_of_a_body_are_adapted(name: str) -> None:
    make, count = BODIES[name]
    model = get_peft_model(make(), LoraMoeConfig(num_experts=2, expert_rank=2))
    assert sum(isinstance(m, LoraMoeLayer) for m in model.modules()) == count
