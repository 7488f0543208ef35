"""Several processes, and accumulated parts of a batch, train what one process does at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from guilomo_train.batches import Batches
from guilomo_train.cli import main

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
    ]  # fmt: skip
    return ["run", *(str(item) for item in listed)]


def assert_same_weights(one: Path, other: Path, tolerance: float) -> None:
    a, b = (load_file(o / "adapter" / "adapter_model.safetensors") for o in (one, other))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance)


@pytest.mark.slow
def test_two_processes_find_and_train_what_one_does_and_resume_what_they_began(
    tiny_base: Path, data: list[str], tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    arguments = ["-m", "guilomo_train.cli", *settings(tiny_base, data, two, 2)]
    scripts, env = Path(sys.executable).parent, {**os.environ, "OMP_NUM_THREADS": "1"}

    # torchrun, killed with its processes in the search; one process meanwhile.
    log = tmp_path / "log"
    with log.open("w") as out:
        killed = subprocess.Popen(
            [scripts / "torchrun", "--standalone", "--nproc-per-node", "2", *arguments],
            stdout=out, stderr=out, env=env,
        )  # fmt: skip
    while not (two / "checkpoints/search/checkpoint-6").exists() and killed.poll() is None:
        time.sleep(0.01)
    assert killed.poll() is None, log.read_text()
    for process in (killed, *psutil.Process(killed.pid).children(recursive=True)):
        process.kill()
    killed.wait()

    launch = ["launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--main_process_port", "0"]  # any that is free
    resumed = subprocess.Popen(
        [scripts / "accelerate", *launch, *arguments, "--resume"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env,
    )  # fmt: skip
    assert main(settings(tiny_base, data, one, 4)) == 0
    printed, error = resumed.communicate(timeout=240)
    assert resumed.returncode == 0, error
    assert "search/checkpoint-4" in error or "search/checkpoint-6" in error
    for said, where in (("14 modules:", printed), ("fine-tuning took", error)):
        assert where.count(said) == 1, "one process alone prints"

    assert (one / "allocation.json").read_text() == (two / "allocation.json").read_text()
    a, b = (load_file(o / "selection.safetensors") for o in (one, two))
    for name in a:
        assert a[name].abs().max() > 0.5
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-3)
    assert_same_weights(one, two, 1e-5)
    runs = [json.loads((o / "run.json").read_text()) for o in (one, two)]
    assert runs[0]["training_loss"] == pytest.approx(runs[1]["training_loss"], rel=1e-5)
    assert [run["inputs"]["number of processes"] for run in runs] == [1, 2]


def test_accumulated_gradients_equal_those_of_the_large_batch(
    tiny_base: Path, data: list[str], tmp_path: Path
) -> None:
    """Those of the NLL; the load-balance loss of a step is the mean of its parts' own."""
    kinds = ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
    modules = {f"model.layers.{n}.{kind}": [2, 1, 2] for n in (0, 1) for kind in kinds}
    allocation = tmp_path / "allocation.json"
    allocation.write_text(
        json.dumps({"format_version": 1, "top_k": 2, "max_rank": 2, "ranks": modules})
    )
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
