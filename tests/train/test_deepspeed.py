"""A base that DeepSpeed's ZeRO-3 spreads over two processes is trained like a whole one."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import testing

from guilomo_train.cli import main
from guilomo_train.errors import ConfigError
from guilomo_train.processes import take_sharding_request
from tests.train.test_parallel import (
    ROWS,
    assert_same_health,
    assert_same_weights,
    launched,
)

pytest.importorskip("deepspeed", reason="deepspeed is not installed: make test-extras")

# The command, telling how much of the base's decoder layers this process holds between passes.
WATCHED = """
import os, sys
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import LlamaForCausalLM
from guilomo_train.cli import main

def look(module, _):
    if isinstance(module, LlamaForCausalLM):
        named = module.model.layers.named_parameters()
        base = [p for name, p in named if "lora_" not in name]
        whole = sum(getattr(p, "ds_numel", p.numel()) for p in base)
        held = sum(p.numel() + (p.ds_tensor.numel() if hasattr(p, "ds_id") else 0) for p in base)
        os.write(1, f"held: {held / whole}\\n".encode())

register_module_forward_pre_hook(look)
sys.exit(main(sys.argv[1:]))
"""
# As DeepSpeed comes, small weights stay whole, and those that are soon needed again.
ZERO3 = {
    "stage": 3,
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": "auto",
}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("quantize", ["none", "4bit"])
def test_a_run_on_a_base_in_parts_finds_and_trains_what_one_on_a_whole_base_does(
    tiny_base: Path, tmp_path: Path, quantize: str
) -> None:
    """Second order takes the gradient in the masks alone, and moves the adapter in between."""
    one, two, rows = tmp_path / "one", tmp_path / "two", tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, ROWS[:41])))
    common = ["--base", tiny_base, "--train", rows, "--order", "second", "--save_steps", 4]
    common += ["--max_experts", 3, "--max_rank", 2, "--search_balance_coefficient", 0.5]
    common += ["--balance_coefficient", 0.5, "--gradient_checkpointing", "--epochs", 1]
    common += ["--quantize", quantize, "--dtype", "float32"]
    common += ["--budget", 0.002, "--eval", rows, "--eval_rows", 4, "--max_new_tokens", 2]
    script, log = tmp_path / "watched.py", tmp_path / "log"
    script.write_text(WATCHED)
    config = tmp_path / "deepspeed.json"
    config.write_text(json.dumps({"zero_optimization": ZERO3, "train_batch_size": "auto"}))
    how = ["--use_deepspeed", "--deepspeed_config_file", config, script]
    parts = ["run", *common, "--output", two, "--search_batch_size", 2, "--batch_size", 2]
    with log.open("w") as out:
        process = launched("accelerate", *how, *parts, stdout=out, stderr=subprocess.STDOUT)
    whole = ["run", *common, "--output", one, "--search_batch_size", 4, "--batch_size", 4]
    assert main([str(item) for item in whole]) == 0
    assert process.wait(timeout=800) == 0, log.read_text()

    said = log.read_text()
    assert "base in 2 shards (ZeRO-3)" in said
    held = re.findall(r"held: (\S+)", said)
    assert held.count("0.5") >= 16
    assert set(held) == {"0.5", "1.0"}, "whole for the evaluation alone"
    assert (one / "allocation.json").read_text() == (two / "allocation.json").read_text()
    a, b = (load_file(o / "selection.safetensors") for o in (one, two))
    for name in a:
        testing.assert_close(a[name], b[name], rtol=0, atol=2e-2)
    for folder in ("start", "adapter"):
        assert_same_weights(one, two, 1e-5 if quantize == "none" else 5e-5, folder)
    assert_same_health(one, two, ("search", "finetune"))
    runs = [json.loads((o / "run.json").read_text()) for o in (one, two)]
    assert runs[0]["scores"] == pytest.approx(runs[1]["scores"], rel=1e-5)
    for name in ("parameters", "base_parameters"):
        assert runs[0][name] == runs[1][name]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"zero_optimization": {"stage": 2}}, "stage is 2, expected 3"),
        ({"zero_optimization": ZERO3, "optimizer": {"type": "AdamW"}}, "has 'optimizer', expected"),
        (
            {"zero_optimization": {**ZERO3, "offload_optimizer": {"device": "cpu"}}},
            "offload_optimizer is given, expected none",
        ),
    ],
)
def test_more_than_to_spread_the_base_is_refused(
    config: dict[str, object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps(config))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    with pytest.raises(ConfigError, match=message):
        take_sharding_request()
