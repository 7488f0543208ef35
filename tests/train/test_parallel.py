"""Several processes, and accumulated parts of a batch, train what one process does at once."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from trl import SFTConfig

from guilomo_train.cli import main
from guilomo_train.data.batches import Batches
from guilomo_train.errors import ConfigError
from guilomo_train.lora_moe import LoraMoeConfig
from guilomo_train.processes import take_sharding_request
from guilomo_train.trainer import LoraMoeTrainer
from tests.train.tiny import tiny_llama

# 41 rows to train and 9 to validate on: the last batch of each pass has one row, so that one of
# two processes is left without any.
ROWS = [
    {"prompt": f"number {i}" + ", and so on" * (i % 7), "completion": "odd" if i % 2 else "even"}
    for i in range(50)
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    for name, rows in (("train", ROWS[:41]), ("validation", ROWS[41:])):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return [
        "--train", str(folder / "train.jsonl"), "--validation", str(folder / "validation.jsonl"),
    ]  # fmt: skip


def settings(base: Path, data: list[str], output: Path, batch_size: int) -> list[str]:
    listed = [
        "--base", base, "--output", output, *data, "--save_steps", 2, "--max_experts", 3,
        "--max_rank", 2, "--order", "second", "--selection_learning_rate", 0.3,
        "--search_balance_coefficient", 0.5, "--balance_coefficient", 0.5,
        "--search_batch_size", batch_size, "--batch_size", batch_size,
        "--modules_to_save", "embed_tokens,lm_head",
    ]  # fmt: skip
    return ["run", *(str(item) for item in listed)]


def assert_same_weights(one: Path, other: Path, tolerance: float, of: str = "adapter") -> None:
    a, b = (load_file(o / of / "adapter_model.safetensors") for o in (one, other))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance)


def launched(launcher: str, *arguments: object, **pipes: Any) -> subprocess.Popen[str]:
    """The command in two processes, by `torchrun` or `accelerate launch`."""
    any_port = ["--main_process_port", "0"]  # that is free
    how = {  # as modules: an environment over another has not the other's commands
        "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
        "accelerate": [
            *("accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1"),
            *any_port,
        ],
    }
    return subprocess.Popen(
        [sys.executable, "-m", *how[launcher], *map(str, arguments)],
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **pipes.pop("variables", {})},
        **pipes,
    )


def kill_at(checkpoint: Path, launcher: subprocess.Popen[str], log: Path) -> None:
    """Kills a launcher with its processes as soon as they begin to write a checkpoint."""
    while not checkpoint.exists() and launcher.poll() is None:
        time.sleep(0.01)
    assert launcher.poll() is None, log.read_text()
    for process in (launcher, *psutil.Process(launcher.pid).children(recursive=True)):
        process.kill()
    launcher.wait()


@pytest.fixture
def allocation(tmp_path: Path) -> Path:
    kinds = ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
    modules = {f"model.layers.{n}.{kind}": [2, 1, 2] for n in (0, 1) for kind in kinds}
    path = tmp_path / "allocation.json"
    path.write_text(json.dumps({"format_version": 1, "top_k": 2, "max_rank": 2, "ranks": modules}))
    return path


@pytest.mark.slow
def test_two_processes_find_and_train_what_one_does_and_resume_what_they_began(
    tiny_base: Path, data: list[str], tmp_path: Path
) -> None:
    """Modules of the base that are trained whole, too."""
    one, two = tmp_path / "one", tmp_path / "two"
    arguments = ["-m", "guilomo_train.cli", *settings(tiny_base, data, two, 2)]

    # torchrun, killed with its processes in the search; one process meanwhile.
    log = tmp_path / "log"
    with log.open("w") as out:
        killed = launched("torchrun", *arguments, stdout=out, stderr=out)
    kill_at(two / "checkpoints/search/checkpoint-6", killed, log)
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    resumed = launched("accelerate", "--multi_gpu", *arguments, "--resume", **both)
    assert main(settings(tiny_base, data, one, 4)) == 0
    printed, error = resumed.communicate(timeout=240)
    assert resumed.returncode == 0, error
    assert "search/checkpoint-4" in error or "search/checkpoint-6" in error
    for said, where in (("14 modules", printed), ("fine-tuning took", error)):
        assert where.count(said) == 1, "one process alone prints"

    assert (one / "allocation.json").read_text() == (two / "allocation.json").read_text()
    a, b = (load_file(o / "selection.safetensors") for o in (one, two))
    for name in a:
        assert a[name].abs().max() > 0.5
        # Second order divides a difference of two passes, with their rounding, by a small step.
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=2e-2)
    assert_same_weights(one, two, 1e-5)
    assert_same_health(one, two, ("search", "finetune"))
    runs = [json.loads((o / "run.json").read_text()) for o in (one, two)]
    assert runs[0]["training_loss"] == pytest.approx(runs[1]["training_loss"], rel=1e-5)
    assert [run["inputs"]["number of processes"] for run in runs] == [1, 2]


@pytest.mark.slow
def test_two_processes_learn_online_what_one_does(
    tiny_base: Path, data: list[str], tmp_path: Path
) -> None:
    """Each has the gradient of its own rows in the masks, in the last batch of none."""
    one, two = tmp_path / "one", tmp_path / "two"
    search = ["search", "--base", tiny_base, *data[:2], "--max_experts", 3, "--max_rank", 2]
    torchrun = ("torchrun", "-m", "guilomo_train.cli", *search, "--output", two)
    process = launched(*torchrun, "--search_batch_size", 2, stderr=subprocess.PIPE)
    whole = [*search, "--output", one, "--search_batch_size", 4]
    assert main([str(item) for item in whole]) == 0
    error = process.communicate(timeout=240)[1]
    assert process.returncode == 0, error
    assert ", online" in error
    a, b = (load_file(o / "selection.safetensors") for o in (one, two))
    for name in a:
        assert a[name].abs().max() > 0.5
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-3)


def assert_same_health(one: Path, other: Path, stages: tuple[str, ...]) -> None:
    """Router health is that of all processes' tokens: in the log, and of each router at the end."""
    names = ("router_entropy", "max_load", "dead_experts")
    a, b = (json.loads((o / "history.json").read_text()) for o in (one, other))
    for stage in stages:
        logs = [[e for e in h[stage]["log"] if "max_load" in e] for h in (a, b)]
        assert logs[0]
        for first, second in zip(*logs, strict=True):
            for name in names:
                assert first[name] == pytest.approx(second[name], abs=5e-4), (stage, name)
    routers = [h["finetune"]["routers"] for h in (a, b)]
    assert routers[0].keys() == routers[1].keys()
    for module, figures in routers[0].items():
        assert routers[1][module]["load"] == pytest.approx(figures["load"], abs=2e-2)
        assert routers[1][module]["entropy"] == pytest.approx(figures["entropy"], abs=1e-3)


# The command, telling how much of the base's decoder layers this process holds between passes. An
# adapter's weights are whole, and known by name: a search freezes them too for some passes.
WATCHED = """
import os, sys
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import LlamaForCausalLM
from guilomo_train.cli import main

def look(module, _):
    if isinstance(module, LlamaForCausalLM):
        named = module.model.layers.named_parameters()
        base = [p for name, p in named if "lora_" not in name]
        held = sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in base)
        # One write a line: two processes share the log.
        os.write(1, f"held: {held / sum(p.numel() for p in base)}\\n".encode())

register_module_forward_pre_hook(look)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_base_sharded_by_fsdp_is_tuned_resumed_and_scored_like_a_whole_one(
    tiny_base: Path, data: list[str], allocation: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    common = ["--base", tiny_base, *data[:2], "--allocation", allocation, "--save_steps", 2]
    common += ["--balance_coefficient", 0.5, "--lora_dropout", 0, "--gradient_checkpointing"]
    common += ["--eval", data[3], "--eval_rows", 4, "--max_new_tokens", 2]
    script, log = tmp_path / "watched.py", tmp_path / "log"
    script.write_text(WATCHED)
    arguments = [script, "finetune", *common, "--output", two, "--batch_size", 2]

    with log.open("w") as out:
        killed = launched(
            "torchrun", *arguments, stdout=out, stderr=out,
            variables={"ACCELERATE_USE_FSDP": "true"},
        )  # fmt: skip
    kill_at(two / "checkpoints/finetune/checkpoint-6", killed, log)
    assert "base in 2 shards" in log.read_text()
    with log.open("w") as out:
        fsdp = ["--use_fsdp", "--fsdp_version", 2]
        resumed = launched("accelerate", *fsdp, *arguments, "--resume", stdout=out, stderr=out)
    whole = ["finetune", *common, "--output", one, "--batch_size", 4]
    assert main([str(item) for item in whole]) == 0
    assert resumed.wait(timeout=240) == 0, log.read_text()

    said = log.read_text()
    assert "finetune/checkpoint-4" in said or "finetune/checkpoint-6" in said
    held = [line.split()[1] for line in said.splitlines() if line.startswith("held:")]
    assert held.count("0.5") > 2, "two processes, a half each, in the steps that were left"
    assert set(held) == {"0.5", "1.0"}, "whole for the evaluation alone"
    assert_same_weights(one, two, 1e-5)
    assert_same_health(one, two, ("finetune",))
    runs = [json.loads((o / "run.json").read_text()) for o in (one, two)]
    assert runs[0]["training_loss"] == pytest.approx(runs[1]["training_loss"], rel=1e-5)
    for name in ("scores", "parameters", "base_parameters"):
        assert runs[0][name] == runs[1][name]


# Several runs in the same two processes, whose start takes longer than a run.
SEVERAL = f"""{WATCHED.rpartition("sys.exit")[0]}
import json
from accelerate import PartialState

PartialState.destroy_process_group = lambda self: None  # the next run goes on with it
for command in json.loads(sys.argv[1]):
    os.environ["ACCELERATE_USE_FSDP"] = "true"  # a run takes it out
    assert main(command) == 0
"""
SEARCHES = [("online", "none"), ("first", "none"), ("second", "4bit")]


def sharded_search(base: Path, data: list[str], order: str, quantize: str) -> list[str]:
    """A run with a search, without what differs between one process and two."""
    run = ["run", "--base", base, *data[:2], "--order", order, "--save_steps", 4, "--epochs", 1]
    run += ["--quantize", quantize, "--dtype", "float32", "--dev", data[3], "--eval_steps", 3]
    run += ["--max_experts", 3, "--max_rank", 2, "--search_balance_coefficient", 0.5]
    run += ["--balance_coefficient", 0.5, "--gradient_checkpointing"]
    run += ["--eval", data[3], "--eval_rows", 4, "--max_new_tokens", 2]
    return [str(item) for item in run]


@pytest.fixture(scope="module")
def sharded(
    tiny_base: Path, data: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[subprocess.Popen[str], Path]:
    """Two processes that do all searches of SEARCHES, and the folder of their outputs and log."""
    folder = tmp_path_factory.mktemp("sharded")
    script = folder / "several.py"
    script.write_text(SEVERAL)
    parts = ["--search_batch_size", "2", "--batch_size", "2", "--output"]
    commands = [
        [*sharded_search(tiny_base, data, *how), *parts, str(folder / how[0])] for how in SEARCHES
    ]
    with (folder / "log").open("w") as out:
        fsdp = ["--use_fsdp", "--fsdp_version", 2, script]
        return launched("accelerate", *fsdp, json.dumps(commands), stdout=out, stderr=out), folder


@pytest.mark.slow
@pytest.mark.parametrize(("order", "quantize"), SEARCHES)
def test_a_search_on_a_base_sharded_by_fsdp_finds_what_one_on_a_whole_base_does(
    sharded: tuple[subprocess.Popen[str], Path],
    tiny_base: Path,
    data: list[str],
    tmp_path: Path,
    order: str,
    quantize: str,
) -> None:
    """First and second order take the gradient in the masks alone through layers that are sharded
    and computed again; second order moves the adapter in between. A base in 4 bit is spread by
    other means; looks at --dev are passes without a gradient."""
    process, folder = sharded
    one, two, log = tmp_path / "one", folder / order, folder / "log"
    whole = ["--search_batch_size", "4", "--batch_size", "4", "--output", str(one)]
    assert main([*sharded_search(tiny_base, data, order, quantize), *whole]) == 0
    assert process.wait(timeout=240) == 0, log.read_text()

    searching = re.findall(r"search: .*?search took", log.read_text(), re.S)
    searching = searching[SEARCHES.index((order, quantize))]
    assert ", base in 2 shards" in searching
    held = re.findall(r"held: (\S+)", searching)
    assert held.count("0.5") == len(held) >= 16, "a half each, in both processes, in every pass"

    assert (one / "allocation.json").read_text() == (two / "allocation.json").read_text()
    a, b = (load_file(o / "selection.safetensors") for o in (one, two))
    for name in a:
        assert a[name].abs().max() > 0.5
        # Second order divides a difference of two passes, with their rounding, by a small step.
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=2e-2)
    for folder in ("start", "adapter"):
        assert_same_weights(one, two, 1e-5, folder)
    assert_same_health(one, two, ("search", "finetune"))
    runs = [json.loads((o / "run.json").read_text()) for o in (one, two)]
    for record in runs:
        del record["search"]["seconds"]
    assert runs[0]["search"] == runs[1]["search"]
    assert runs[0]["scores"] == pytest.approx(runs[1]["scores"], rel=1e-5)
    for name in ("parameters", "base_parameters"):
        assert runs[0][name] == runs[1][name]


# In the second of two processes memory does not suffice.
ONE_FAILS = """
import os, sys
from guilomo_train.cli import main
own = [] if os.environ["RANK"] == "0" else ["--max_rank", "1000000000000"]
sys.exit(main([*sys.argv[1:], *own]))
"""


@pytest.mark.slow
def test_an_error_of_several_processes_is_said_once_and_ends_all(
    tiny_base: Path, data: list[str], allocation: Path, tmp_path: Path
) -> None:
    script = tmp_path / "one_fails.py"
    script.write_text(ONE_FAILS)
    common = ["--base", tiny_base, *data, "--output", tmp_path / "out"]
    whole = ["finetune", *common, "--allocation", allocation, "--modules_to_save", "embed_tokens"]
    started = [
        launched("torchrun", *command, variables=variables, stderr=subprocess.PIPE)
        for command, variables in (
            (["-m", "guilomo_train.cli", *whole], {"ACCELERATE_USE_FSDP": "true"}),
            ([script, "search", *common], {}),
        )
    ]
    expected = (
        "finetune: error: --modules_to_save: each process has a part of model.embed_tokens alone",
        "search: error: out of memory in the search: lower --search_batch_size (8)",
    )
    for process, message in zip(started, expected, strict=True):
        said = process.communicate(timeout=120)[1]
        assert process.returncode != 0
        assert said.count(": error: ") == 1, said
        assert f"guilomo-train {message}" in said
        # What torchrun itself has to say of a process that failed ends with its own traceback.
        assert "guilomo_train/" not in said.split("torch/distributed/run.py")[0], said


def test_fsdp_that_would_do_more_than_shard_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    with pytest.raises(ConfigError, match="fsdp_offload_params is true, expected false"):
        take_sharding_request()


def test_a_trainer_refuses_deepspeed_in_python_too(tmp_path: Path) -> None:
    made = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    made.deepspeed_plugin = object()  # of the package, which is no requirement
    model = get_peft_model(tiny_llama(8), LoraMoeConfig(num_experts=2, expert_rank=1))
    with pytest.raises(ConfigError, match="deepspeed is given, which would leave each process"):
        LoraMoeTrainer(model=model, args=made, balance_coefficient=0.0)


def test_deepspeed_that_is_not_installed_is_one_line(
    tiny_base: Path,
    data: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    given = ["search", "--base", str(tiny_base), *data, "--output", str(tmp_path / "out")]
    assert main(given) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "DeepSpeed is asked for, but not installed: pip install deepspeed" in said


def test_accumulated_gradients_equal_those_of_the_large_batch(
    tiny_base: Path, data: list[str], allocation: Path, tmp_path: Path
) -> None:
    """Those of the NLL; the load-balance loss of a step is the mean of its parts' own."""
    for name, batch_size, steps in (("large", 8, 1), ("parts", 4, 2)):
        done = main(
            [
                "finetune", "--base", str(tiny_base), *data, "--output", str(tmp_path / name),
                "--allocation", str(allocation), "--batch_size", str(batch_size),
                "--gradient_accumulation_steps", str(steps), "--balance_coefficient", "0",
            ]
        )  # fmt: skip
        assert done == 0
    assert_same_weights(tmp_path / "large", tmp_path / "parts", 1e-6)


@pytest.mark.parametrize("rows", [16, 41, 42, 48])
def test_processes_and_parts_share_out_the_same_batches(rows: int) -> None:
    lengths = [7 * i % 11 + 1 for i in range(rows)]
    whole = Batches(rows, 8, 3, 1, 0, lengths)
    shares = [Batches(rows, 4, 3, 2, p, lengths) for p in (0, 1)]
    parts = Batches(rows, 4, 3, 1, 0, lengths, parts=2)
    orders = []
    for epoch in (0, 1):
        for batches in (whole, *shares, parts):
            batches.set_epoch(epoch)
        expected = list(whole)
        orders.append(expected)
        assert sorted(chain(*expected)) == list(range(rows))
        for batch, first, second in zip(expected, *shares, strict=True):
            assert first == batch[::2]
            assert second == (batch[1::2] or [whole.blank])
        assert list(chain(*parts)) == list(chain(*expected))
        assert [whole.at(epoch * len(whole) + i) for i in range(len(whole))] == expected
    assert orders[0] != orders[1]
