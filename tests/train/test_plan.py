"""What `guilomo-train plan` says, against what runs take."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import LlamaForCausalLM

from guilomo_train.base import load_base
from guilomo_train.cli import main
from guilomo_train.config import CommonConfig, FinetuneConfig
from guilomo_train.finetuning import finetune
from guilomo_train.processes import Sharding
from guilomo_train.search.allocation import Allocation
from tests.train.test_parallel import launched
from tests.train.test_search_memory import EXPERTS, highest, peak
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


def test_a_base_in_8_bit_cannot_be_spread(
    config_alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--base", config_alone, "--train", "none", "--output", tmp_path / "out"]
    given += ["--tokens", 9, "--rate", 9, "--processes", 2, "--fsdp", "--quantize", "8bit"]
    assert main(["plan", *map(str, given)]) == 2
    assert "--quantize 8bit: cannot be spread over processes" in capsys.readouterr().err


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


RANK, LENGTH, WIDE = 2, 32, 256


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of which weights are most of the memory."""
    folder = tmp_path_factory.mktemp("wide")
    tokenizer = tiny_tokenizer()
    tiny_llama(len(tokenizer), 8, hidden_size=WIDE).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def used(folder: Path, work: Path, quantize: str, sharding: Sharding | None) -> dict[str, int]:
    """Bytes of the base in this process, and the most that there were in a fine-tuning of it."""
    held = []

    def tuned() -> None:
        base = load_base(str(folder), "bfloat16", quantize, sharding)
        for weight in base.model.parameters():
            local: Any = weight.to_local() if hasattr(weight, "to_local") else weight
            held.append(local.numel() * local.element_size())
            if sharding is None:  # out of the mapped file
                weight.data = weight.data.clone()
        for module in base.model.modules():
            state: Any = getattr(module, "quant_state", None)  # in 4 bit scales, and their own
            for scales in (state, state.state2) if state is not None else ():
                held.append(scales.absmax.numel() * scales.absmax.element_size())
        modules = tuple(n for n, _ in base.model.named_modules() if n.endswith("_proj"))
        ids = torch.randint(3, 200, (8, LENGTH)).tolist()
        finetune(
            base,
            Dataset.from_dict({"input_ids": ids, "labels": ids}),
            Allocation.uniform(modules, EXPERTS, RANK),
            CommonConfig(base=str(folder), train="", output=str(work)),
            FinetuneConfig(epochs=1, batch_size=2),
            work,
        )

    return {"peak": highest(tuned, work), "base": sum(held)}


def as_planned(of: dict[str, int], base: Path, folder: Path, *flags: object) -> None:
    flags = ("--max_experts", EXPERTS, "--max_rank", RANK, "--batch_size", 2, *flags)
    whole = planned(base, folder, *flags, "--max_length", LENGTH)["whole"]
    most = next(s for s in whole["stages"] if s["name"] == "search")["adapter_parameters"]
    plan = planned(base, folder, *flags, "--max_length", LENGTH, "--budget", most)["fine-tuning"]
    assert plan["base"] == pytest.approx(of["base"], rel=0.01)
    assert of["peak"] / FACTOR < plan["peak"] < of["peak"] * FACTOR


@pytest.mark.parametrize("quantize", ["4bit", "8bit"])
def test_a_quantised_base_takes_the_memory_that_was_planned(
    quantize: str, wide_base: Path, tmp_path: Path
) -> None:
    as_planned(
        used(wide_base, tmp_path, quantize, None), wide_base, tmp_path, "--quantize", quantize
    )


# In one of two processes, with a whole base and with a part of it.
IN_PROCESSES = """
import json, sys
from pathlib import Path
from guilomo_train.processes import Sharding, processes
from tests.train.test_plan import used

base, work = map(Path, sys.argv[1:])
said = {}
for name, quantize, sharding in (
    ("whole", "none", None), ("fsdp", "none", Sharding()), ("4bit", "4bit", Sharding())
):
    folder = work / f"{name}-{processes().process_index}"
    folder.mkdir()
    said[name] = used(base, folder, quantize, sharding)
if processes().is_main_process:
    (work / "said.json").write_text(json.dumps(said))
processes().destroy_process_group()
"""


@pytest.mark.slow
def test_processes_take_the_memory_that_was_planned(wide_base: Path, tmp_path: Path) -> None:
    script = tmp_path / "in_processes.py"
    script.write_text(IN_PROCESSES)
    here = {"PYTHONPATH": str(Path(__file__).parents[2])}  # the script imports `used`
    process = launched(
        "torchrun", script, wide_base, tmp_path, stderr=subprocess.PIPE, variables=here
    )
    error = process.communicate(timeout=280)[1]
    assert process.returncode == 0, error
    said = json.loads((tmp_path / "said.json").read_text())
    as_planned(said["whole"], wide_base, tmp_path, "--processes", 2)
    as_planned(said["fsdp"], wide_base, tmp_path, "--processes", 2, "--fsdp")
    four_bits = ("--fsdp", "--quantize", "4bit")
    as_planned(said["4bit"], wide_base, tmp_path, "--processes", 2, *four_bits)
