"""What `guilomo-train plan` says, against what runs take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from guilomo_train.cli import main
from tests.train.test_search_memory import EXPERTS, peak
from tests.train.tiny import tiny_llama, tiny_tokenizer

LAYERS = 4
FACTOR = 1.3  # between what is planned and what is used


def tiny(layers: int) -> LlamaForCausalLM:
    return tiny_llama(len(tiny_tokenizer()), layers, hidden_size=64)


def planned(base: Path, folder: Path, *flags: object) -> dict[str, Any]:
    file = folder / "plan.json"
    command = ["plan", "--base", base, "--train", "none", "--output", "none", "--json", file]
    command += ["--tokens", 36000, "--rate", 100, "--dtype", "bfloat16", *flags]
    assert main([str(item) for item in command]) == 0
    value = json.loads(file.read_text())
    return {stage["name"]: stage for stage in value["stages"]} | {"whole": value}


@pytest.fixture
def config_alone(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    tiny(LAYERS).config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("stage", "rank", "length"),
    [("fine-tuning", 8, 128), ("search", 64, 8)],
    ids=["activations", "large adapter"],
)
def test_a_run_takes_the_memory_that_was_planned(
    config_alone: Path, tmp_path: Path, stage: str, rank: int, length: int
) -> None:
    """The plan has the config alone, without weights; the run is a real one."""
    used, adapter = peak(stage == "search", rank, length, tmp_path, LAYERS)
    flags = ["--max_experts", EXPERTS, "--max_rank", rank, "--max_length", length]
    flags += ["--search_batch_size", 4, "--batch_size", 4, "--order", "second"]
    plan = planned(config_alone, tmp_path, *flags, "--budget", adapter // 4)
    assert plan[stage]["adapter_parameters"] == adapter // 4
    assert used / FACTOR < plan[stage]["peak"] < used * FACTOR
    assert plan["whole"]["base_parameters"] == tiny(LAYERS).num_parameters()


def test_flags_take_their_part_of_memory_and_time(config_alone: Path, tmp_path: Path) -> None:
    def stage(*flags: object) -> dict[str, float]:
        return planned(config_alone, tmp_path, "--max_length", 64, *flags)["fine-tuning"]

    plain = stage()
    # 36,000 tokens at 100 a second, twice.
    assert plain["hours"] == pytest.approx(0.2)
    assert stage("--gradient_checkpointing")["activations"] < 0.6 * plain["activations"]
    assert stage("--batch_size", 16)["activations"] > 1.5 * plain["activations"]
    two = stage("--processes", 2, "--fsdp")
    assert two["base"] == plain["base"] // 2
    assert two["hours"] == pytest.approx(0.1)
    linear = sum(w.numel() for n, w in tiny(LAYERS).named_parameters() if n.endswith("proj.weight"))
    four_bits = stage("--quantize", "4bit")
    assert plain["base"] - four_bits["base"] == pytest.approx(linear * (2 - 0.516), rel=1e-3)


def test_a_plan_reads_rows_and_measures_a_rate(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"prompt": n * "n ", "completion": "2"}) for n in (1, 9)))
    settings = tmp_path / "run.yaml"
    settings.write_text(f"base: {tiny_base}\ntrain: {rows}\noutput: {tmp_path / 'out'}\n")
    file = tmp_path / "plan.json"
    assert main(["plan", "--config", str(settings), "--json", str(file)]) == 0
    value = json.loads(file.read_text())
    assert main(["data", "--config", str(settings)]) == 0
    shown = capsys.readouterr().out
    assert "peak" in shown
    assert f"2 rows of {value['load']['tokens']} tokens" in shown
    assert f"the longest {value['load']['length']}\n" in shown
    assert all(stage["hours"] > 0 for stage in value["stages"])
    assert not (tmp_path / "out").exists()
