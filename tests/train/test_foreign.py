"""Adapters of MoLA, LoRAMoE and HydraLoRA compute as ours what they compute by their own formulas.

The checkpoints have the names and shapes with which their code saves them; the references below
follow the formulas of their layers, expert by expert.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from guilomo_serve.adapter import CONFIG_FILE, WEIGHTS_FILE, AdapterError, BaseModel, read_adapter
from guilomo_train.cli import main
from guilomo_train.config import ImportConfig
from guilomo_train.errors import TrainError
from guilomo_train.foreign import import_adapter
from guilomo_train.lora_moe import LoraMoeConfig
from tests.adapter.test_fuzz import FUZZ, TEXTS, VALUES
from tests.train.tiny import tiny_llama

Tensors = dict[str, torch.Tensor]
IDS = torch.arange(3, 43).reshape(2, 20)
ALPHA = 12
COMMON = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "/models/llama",
    "inference_mode": True, "lora_alpha": ALPHA, "lora_dropout": 0.05, "bias": "none",
    "modules_to_save": None, "fan_in_fan_out": False,
}  # fmt: skip
MLP = {"target_modules": ["gate_proj", "up_proj", "down_proj"], "enable_lora": None,
       "merge_weights": False}  # fmt: skip
CONFIGS = {
    "MoLA": {
        **COMMON, "r": [3, 2], "target_modules": ["q_proj", "down_proj"], "auto_mapping": None,
        "revision": None, "init_lora_weights": True, "layers_to_transform": None,
        "layers_pattern": None,
    },
    "LoRAMoE": {**COMMON, **MLP, "r": 2, "lora_nums": 4, "blc_alpha": 0.1, "blc_weight": 0.01},
    "HydraLoRA": {**COMMON, **MLP, "r": 2, "lora_nums": 3},
}  # fmt: skip
MOLA_EXPERTS, MOLA_TOP_K = [2, 4], [2, 2]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny_llama(60).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def modules_of(model: nn.Module, targets: list[str]) -> dict[str, nn.Linear]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(tuple(targets))
    }


def tensors_of(kind: str) -> Tensors:
    """What their `save_pretrained` writes of an adapter of random weights."""
    config, tensors = CONFIGS[kind], {}
    torch.manual_seed(1)

    def add(name: str, *shape: int) -> None:
        tensors[f"base_model.model.{name}.weight"] = torch.randn(shape) / shape[-1] ** 0.5

    for module, linear in modules_of(tiny_llama(60), config["target_modules"]).items():
        out_features, in_features = linear.weight.shape
        if kind == "MoLA":
            layer = int(module.split(".")[2])
            rank, experts = config["r"][layer], MOLA_EXPERTS[layer]
            for e in range(experts):
                add(f"{module}.lora_A_{e}", rank, in_features)
                add(f"{module}.lora_B_{e}", out_features, rank)
            add(f"{module}.router.router", experts, in_features)
            continue
        rank, experts = config["r"], config["lora_nums"]
        add(f"{module}.lora_route", experts, in_features)
        if kind == "HydraLoRA":
            add(f"{module}.lora_A", rank, in_features)
        for e in range(experts):
            if kind == "LoRAMoE":
                add(f"{module}.lora_A{e}", rank, in_features)
            add(f"{module}.lora_B{e}", out_features, rank)
    return tensors


def added(kind: str, module: str, tensors: Tensors, x: torch.Tensor) -> torch.Tensor:
    """What their layer adds to the base's output, by the formula of its `forward`."""

    def of(part: str) -> torch.Tensor:
        return tensors[f"base_model.model.{module}.{part}.weight"]

    config, total = CONFIGS[kind], torch.zeros(())
    if kind == "MoLA":
        layer = int(module.split(".")[2])
        weights = F.softmax(F.linear(x, of("router.router")), dim=-1, dtype=torch.float)
        chosen, indices = torch.topk(weights, MOLA_TOP_K[layer], dim=-1)
        chosen = chosen / chosen.sum(dim=-1, keepdim=True)
        for e in range(MOLA_EXPERTS[layer]):
            share = (chosen * (indices == e)).sum(-1, keepdim=True)
            output = F.linear(F.linear(x, of(f"lora_A_{e}")), of(f"lora_B_{e}"))
            total = total + share * output * (ALPHA / config["r"][layer])
        return total
    weights = F.softmax(F.linear(x, of("lora_route")), dim=-1, dtype=torch.float32)
    for e in range(config["lora_nums"]):
        a = of("lora_A" if kind == "HydraLoRA" else f"lora_A{e}")
        output = F.linear(F.linear(x, a), of(f"lora_B{e}"))
        total = total + weights[..., e : e + 1] * output * (ALPHA / config["r"])
    return total


def saved(folder: Path, kind: str, tensors: Tensors | None = None, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / CONFIG_FILE).write_text(json.dumps({**CONFIGS[kind], **config}))
    torch.save(tensors_of(kind) if tensors is None else tensors, folder / "adapter_model.bin")
    return folder


def imported(folder: Path, base: Path, output: Path, *flags: str) -> int:
    paths = ("--adapter", folder, "--base", base, "--output", output)
    return main(["import", *map(str, paths), *flags])


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_imported_adapter_is_the_same_function(
    kind: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, flags = saved(tmp_path / "theirs", kind), ["--top_k", "2"] if kind == "MoLA" else []
    assert imported(folder, base, tmp_path / "ours", *flags) == 0
    out = capsys.readouterr().out
    assert f"an adapter of {kind}, the same function" in out
    assert "it was trained on '/models/llama'" in out

    reference, tensors = AutoModelForCausalLM.from_pretrained(base), tensors_of(kind)
    plain = logits(reference)
    for name, linear in modules_of(reference, CONFIGS[kind]["target_modules"]).items():

        def hook(_: Any, given: Any, output: torch.Tensor, name: str = name) -> torch.Tensor:
            return output + added(kind, name, tensors, given[0])

        linear.register_forward_hook(hook)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "ours")
    assert isinstance(model.peft_config["default"], LoraMoeConfig)
    expected, found = logits(reference), logits(model)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert (expected - plain).abs().max() > 0.1

    read = BaseModel.from_module(AutoModelForCausalLM.from_pretrained(base))
    spec = read_adapter(tmp_path / "ours", read).spec
    assert spec.top_k == {"MoLA": 2, "LoRAMoE": 4, "HydraLoRA": 3}[kind]
    card = (tmp_path / "ours" / "README.md").read_text()
    assert f"trained by the code of {kind}" in card
    assert str(base) in card


def test_experts_of_layers_differ_and_one_alone_needs_no_router(base: Path, tmp_path: Path) -> None:
    """MoLA's layers each have a top_k, and one adapter's top_k can mean them all."""
    tensors = tensors_of("MoLA")
    for name in [n for n in tensors if ".layers.0." in n]:
        if "_1." in name:
            del tensors[name]
        elif "router" in name:
            tensors[name] = tensors[name][:1]
    folder = saved(tmp_path / "theirs", "MoLA", tensors)
    assert imported(folder, base, tmp_path / "ours", "--top_k", "1,3") == 0
    adapter = read_adapter(tmp_path / "ours")
    assert adapter.spec.top_k == 3
    first = adapter.weights["model.layers.0.mlp.down_proj"]
    assert first.router is None
    assert first.lora_a.equal(
        tensors["base_model.model.model.layers.0.mlp.down_proj.lora_A_0.weight"]
    )
    assert len(adapter.spec.experts["model.layers.1.mlp.down_proj"]) == 4


def test_safetensors_are_read_too(base: Path, tmp_path: Path) -> None:
    folder = saved(tmp_path / "theirs", "LoRAMoE")
    save_file(tensors_of("LoRAMoE"), folder / WEIGHTS_FILE)
    (folder / "adapter_model.bin").unlink()
    assert imported(folder, base, tmp_path / "ours") == 0


GATE = "base_model.model.model.layers.0.mlp.gate_proj"


def without(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(f"{GATE}.{name}")


def setting(name: str, tensor: torch.Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: tensor})


REFUSED_CONFIGS = [
    ("LoRAMoE", {"bias": "all"}, "bias is 'all', expected \"none\": it trains biases"),
    ("LoRAMoE", {"modules_to_save": ["embed_tokens"]}, "it trains whole modules"),
    ("HydraLoRA", {"fan_in_fan_out": True}, "it transposes the base's weights"),
    ("HydraLoRA", {"enable_lora": [True]}, "enable_lora is [True]"),
    ("HydraLoRA", {"use_dora": True}, "unknown key 'use_dora'"),
    ("LoRAMoE", {"peft_type": "MMOELORAS"}, "peft_type is 'MMOELORAS', expected 'LORA'"),
    ("LoRAMoE", {"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS'"),
    ("LoRAMoE", {"lora_nums": 8}, "lora_nums is 8, but model.layers.0.mlp.gate_proj has 4 experts"),
    ("LoRAMoE", {"lora_alpha": None}, "lora_alpha is None, expected a number > 0"),
    ("LoRAMoE", {"r": [2, 2]}, "r is [2, 2], expected an integer >= 1"),
    ("LoRAMoE", {"r": 3}, "has shape [2, 32], expected [3, 32]"),
    ("MoLA", {"r": 3}, "r is 3, expected a list of integers >= 1, one for each layer"),
    ("MoLA", {"r": [3]}, "r has 1 ranks, none for layer 1"),
]
REFUSED_TENSORS = [
    (without("lora_B2.weight"), "gate_proj.lora_B2.weight is missing, of 4 experts"),
    (without("lora_route.weight"), "belongs to no expert and no router"),
    (setting(f"{GATE}.lora_route.bias", torch.zeros(4)), "lora_route.bias belongs to no expert"),
    (setting("model.norm.weight", torch.zeros(4)), "model.norm.weight belongs to no expert"),
    (
        setting(f"{GATE}.lora_A1.weight", torch.zeros(2, 31)),
        "lora_A1.weight has shape [2, 31], expected [2, 32]",
    ),
    (
        setting(f"{GATE}.lora_A1.weight", torch.full((2, 32), float("nan"))),
        "lora_A1.weight is torch.float32, expected finite",
    ),
    (
        setting("base_model.model.model.layers.7.mlp.up_proj.lora_route.weight", torch.ones(1, 32)),
        "the base has no linear layer 'model.layers.7.mlp.up_proj'",
    ),
    (lambda tensors: tensors.clear(), "has no tensors, expected a router"),
    (
        lambda tensors: [tensors.pop(n) for n in list(tensors) if "route" in n],
        "expected a router and experts in each layer, named as by MoLA, LoRAMoE, HydraLoRA",
    ),
    (
        lambda tensors: (
            tensors.clear(),
            tensors.update({f"{GATE}.lora_A.weight": torch.ones(2, 32)}),
        ),
        "it is a plain LoRA, which PEFT and guilomo-serve take as it is",
    ),
]  # fmt: skip


def refusal(folder: Path, base: Path, top_k: str | None = None) -> str:
    """What an import is refused with; it leaves nothing behind."""
    before = sorted(folder.parent.iterdir())
    with pytest.raises((AdapterError, TrainError)) as error:
        import_adapter(ImportConfig(str(folder), str(base), str(folder.parent / "ours"), top_k))
    assert sorted(folder.parent.iterdir()) == before
    return str(error.value)


@pytest.mark.parametrize(("kind", "config", "message"), REFUSED_CONFIGS)
def test_what_a_config_says_and_is_not_applied_is_refused(
    kind: str,
    config: dict[str, Any],
    message: str,
    base: Path,
    tmp_path: Path,
) -> None:
    folder = saved(tmp_path / "theirs", kind, **config)
    said = refusal(folder, base, "2" if kind == "MoLA" else None)
    assert message in said
    assert str(folder) in said


@pytest.mark.parametrize(("change", "message"), REFUSED_TENSORS)
def test_tensors_that_are_not_all_of_an_adapter_are_refused(
    change: Callable[[Tensors], Any],
    message: str,
    base: Path,
    tmp_path: Path,
) -> None:
    tensors = tensors_of("LoRAMoE")
    change(tensors)
    folder = saved(tmp_path / "theirs", "LoRAMoE", tensors)
    said = refusal(folder, base)
    assert message in said
    assert str(folder) in said


def test_the_output_layer_is_refused(base: Path, tmp_path: Path) -> None:
    tensors = {
        n.replace(GATE, "base_model.model.lm_head"): t for n, t in tensors_of("LoRAMoE").items()
    }
    for name in [n for n in tensors if "lm_head.lora_B" in n]:
        tensors[name] = torch.ones(60, 2)
    said = refusal(saved(tmp_path / "theirs", "LoRAMoE", tensors), base)
    assert "lm_head is the output layer" in said


@pytest.mark.parametrize(
    ("kind", "top_k", "message"),
    [
        ("MoLA", None, "MoLA's files do not say how many experts a token uses"),
        ("MoLA", "3", "--top_k is 3 for model.layers.0.self_attn.q_proj, which has 2 experts"),
        ("MoLA", "1,2", "none means 2 experts in one layer and 1 of 2 in model.layers.0"),
        ("MoLA", "2,2,2", "--top_k has 3 numbers, expected 1, or 2 as r has"),
        ("MoLA", "0", "top_k is '0', expected a number >= 1"),
        ("HydraLoRA", "2", "HydraLoRA uses all experts; leave it out"),
    ],
)
def test_how_many_experts_a_token_uses_has_to_be_said_and_expressible(
    kind: str,
    top_k: str | None,
    message: str,
    base: Path,
    tmp_path: Path,
) -> None:
    assert message in refusal(saved(tmp_path / "theirs", kind), base, top_k)


class Harm:
    def __reduce__(self) -> Any:
        return (print, ("code of the file ran",))


@pytest.mark.parametrize("content", [Harm(), [1, 2], {"a": 1}, {1: torch.ones(1)}])
def test_a_file_of_more_than_tensors_is_refused_and_runs_nothing(
    content: Any, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(tmp_path / "theirs", "LoRAMoE", content)
    capsys.readouterr()
    assert imported(folder, base, tmp_path / "ours") == 2
    found = capsys.readouterr()
    assert "code of the file ran" not in found.out
    assert "adapter_model.bin: " in found.err
    assert "tensors" in found.err


def test_broken_files_and_folders_are_named(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(tmp_path / "theirs", "LoRAMoE")
    whole = (folder / "adapter_model.bin").read_bytes()
    (folder / "adapter_model.bin").write_bytes(whole[: len(whole) // 2])
    assert "not a complete file of torch.save" in refusal(folder, base)
    (folder / "adapter_model.bin").unlink()
    assert "adapter_model.bin: the file is missing" in refusal(folder, base)
    (folder / WEIGHTS_FILE).write_bytes(b"\x10")
    assert "not a complete safetensors file" in refusal(folder, base)
    outside = tmp_path / "outside.bin"
    (folder / WEIGHTS_FILE).unlink()
    outside.write_bytes(whole)
    (folder / "adapter_model.bin").symlink_to(outside)
    assert "leads out of the adapter folder" in refusal(folder, base)
    (folder / CONFIG_FILE).unlink()
    assert "adapter_config.json: the file is missing" in refusal(folder, base)
    assert imported(folder, base, folder) == 2
    assert "expected another folder than --adapter" in capsys.readouterr().err


def refused_or_imported(folder: Path, base: Path) -> None:
    """Imports, and is content with an error that names the folder; any other fails the test."""
    output, said = folder.parent / "ours", str(folder)
    try:
        import_adapter(ImportConfig(str(folder), str(base), str(output)))
        read_adapter(output)
    except AdapterError as e:
        said = str(e)
    assert str(folder) in said
    said.encode()


@given(
    st.dictionaries(TEXTS | st.sampled_from(sorted(CONFIGS["LoRAMoE"])), VALUES, max_size=3),
    st.sampled_from(["LoRAMoE", "HydraLoRA"]),
)
@settings(FUZZ, max_examples=60)
def test_any_config_is_imported_or_refused_by_name(
    base: Path, tmp_path: Path, changes: dict[str, Any], kind: str
) -> None:
    refused_or_imported(saved(tmp_path / "theirs", kind, **changes), base)


@given(st.data())
@settings(FUZZ, max_examples=60)
def test_any_bytes_of_a_weights_file_are_imported_or_refused_by_name(
    base: Path, tmp_path: Path, data: st.DataObject
) -> None:
    folder = saved(tmp_path / "theirs", "LoRAMoE")
    whole = (folder / "adapter_model.bin").read_bytes()
    begin = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(begin, min(len(whole), begin + 12)) | st.just(len(whole)))
    changed = whole[:begin] + data.draw(st.binary(max_size=12)) + whole[end:]
    (folder / "adapter_model.bin").write_bytes(changed)
    refused_or_imported(folder, base)
