"""A run that is killed and resumed ends in the same files as one that is not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from guilomo_train.cli import main

ROWS = [
    {"prompt": f"number {i}" + ", and so on" * (i % 7), "completion": "odd" if i % 2 else "even"}
    for i in range(53)
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "parity.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS))
    return path


def settings(base: Path, data: Path, output: Path) -> list[str]:
    """A run with all that has a state: both optimisers, drawn counts, dropout, added gradients."""
    listed = [
        "run", "--base", base, "--train", data, "--output", output, "--save_steps", 3,
        "--max_experts", 3, "--max_rank", 2, "--order", "second", "--search_batch_size", 4,
        "--search_epochs", 2, "--selection_learning_rate", 0.3, "--epochs", 3, "--batch_size", 4,
        "--gradient_accumulation_steps", 2, "--lora_dropout", 0.1,
        "--dtype", "bfloat16",
    ]  # fmt: skip
    return [str(item) for item in listed]


def run_and_kill(arguments: list[str], checkpoint: Path, log: Path) -> None:
    """Starts the command and kills it as soon as it begins to write a checkpoint."""
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "guilomo_train.cli", *arguments],
            stdout=out,
            stderr=out,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, log.read_text()


def history(output: Path) -> dict:
    """history.json without the trainer's own figures, which it counts anew when it goes on."""
    value = json.loads((output / "history.json").read_text())
    kept = ("step", "nll", "balance", "expected_rank", "total_ranks", "router_entropy", "max_load")
    for stage in value.values():
        stage["log"] = [{k: v for k, v in e.items() if k in kept} for e in stage["log"]]
    return value


@pytest.mark.slow
def test_a_run_killed_in_both_stages_and_resumed_equals_an_uninterrupted_one(
    tiny_base: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    one_thread: None,
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main(settings(tiny_base, data, whole)) == 0
    arguments = settings(tiny_base, data, broken)
    search, finetune = (broken / "checkpoints" / stage for stage in ("search", "finetune"))

    # The third checkpoint is a half-written one now; another, far later, has all but its end.
    run_and_kill(arguments, search / "checkpoint-9", tmp_path / "log")
    shutil.copytree(search / "checkpoint-6", search / "checkpoint-18")
    (search / "checkpoint-18" / "complete.json").unlink()
    (search / "checkpoint-9" / "complete.json").unlink(missing_ok=True)

    # What cannot be gone on with is one line, and nothing is lost by it.
    for wrong, message in (
        ([], "has an unfinished run; go on with it by --resume"),
        (["--resume", "--seed", "5"], "--resume: seed is 5, but"),
        (["--resume", "--max_rank", "3"], "--resume: max_rank is 3, but"),
        (["--resume", "--train_rows", "40"], "--resume: train_rows is 40, but"),
    ):
        assert main([*arguments, *wrong]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    shorter = tmp_path / "shorter.jsonl"
    shorter.write_text("\n".join(json.dumps(row) for row in ROWS[1:]))
    assert main([*arguments, "--resume", "--train", str(shorter)]) == 2
    assert "rows of --train is '52 rows" in capsys.readouterr().err.splitlines()[-1]

    run_and_kill([*arguments, "--resume"], finetune / "checkpoint-9", tmp_path / "log")
    assert "search/checkpoint-6" in (tmp_path / "log").read_text()
    assert not search.exists(), "a finished search leaves no checkpoints"
    assert (broken / "allocation.json").exists()
    assert not (broken / "run.json").exists()
    searched = (broken / "allocation.json").stat().st_mtime_ns
    assert main([*arguments, "--resume", "--fresh"]) == 2
    assert "--resume: start is 'fresh weights', but" in capsys.readouterr().err.splitlines()[-1]
    changed = ["--save_steps", "5", "--gradient_checkpointing"]  # which have no effect on a result
    assert main([*arguments, "--resume", *changed]) == 0
    said = capsys.readouterr().err
    assert "search: finished before" in said
    assert "finetune/checkpoint-6" in said or "finetune/checkpoint-9" in said
    assert (broken / "allocation.json").stat().st_mtime_ns == searched

    for name in ("allocation.json", "selection.safetensors", "adapter/adapter_model.safetensors"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes(), name
    losses = [json.loads((o / "run.json").read_text())["training_loss"] for o in (whole, broken)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert load_file(whole / "selection.safetensors")["experts"].abs().max() > 0
    assert not (broken / "checkpoints").exists()
    assert history(broken) == history(whole)
    for name in ("report.md", "loss.png", "search.png", "routers.png"):
        assert (broken / name).is_file(), name

    # Resumed once more there is nothing to do.
    assert main([*arguments, "--resume"]) == 0
    assert "fine-tuning: finished before" in capsys.readouterr().err


def test_a_search_that_died_after_its_last_step_takes_no_further_one(
    tiny_base: Path, data: Path, tmp_path: Path
) -> None:
    results = []
    for name in ("whole", "broken"):
        output = tmp_path / name
        arguments = [
            "search", "--base", tiny_base, "--train", data, "--output", output, "--save_steps", 4,
            "--max_experts", 3, "--max_rank", 2, "--search_batch_size", 4, "--search_epochs", 0.55,
        ]  # fmt: skip
        if name == "broken":
            obstacle = output / "allocation.json"
            obstacle.mkdir(parents=True)
            assert main([str(item) for item in arguments]) == 2
            obstacle.rmdir()
            arguments.append("--resume")
        assert main([str(item) for item in arguments]) == 0
        run = json.loads((output / "run.json").read_text())
        vectors = (output / "selection.safetensors").read_bytes()
        results.append((run["search"]["steps"], vectors, history(output)))
    assert results[0][0] == 8
    assert results[0][2]["search"]["log"][-1]["total_ranks"]
    assert results[0] == results[1]
