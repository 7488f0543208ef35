"""Logs of a run in Weights & Biases and MLflow: each stage is a run of its own there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from guilomo_train.cli import main
from tests.train.tiny import save_tiny_base


def reported(to: str, folder: Path) -> None:
    """A search and a fine-tuning of ten steps each, with their logs in a service."""
    save_tiny_base(folder / "base")
    rows = [{"prompt": f"{i}?", "completion": "odd" if i % 2 else "even"} for i in range(40)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ["run", "--base", folder / "base", "--train", folder / "rows.jsonl"]
    command += ["--max_experts", 2, "--max_rank", 2, "--search_batch_size", 4, "--batch_size", 4]
    command += ["--epochs", 1, "--report_to", to, "--output", folder / "mine"]
    assert main([str(item) for item in command]) == 0


def test_mlflow_has_the_losses_of_each_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed: make test-extras")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "adapters")
    reported("mlflow", tmp_path)
    runs = mlflow.search_runs(experiment_names=["adapters"], output_format="list")
    named = {run.info.run_name: run for run in runs}
    assert named.keys() == {"mine-search", "mine-finetune"}
    for run in runs:
        assert run.info.status == "FINISHED"
        assert {"loss", "nll", "tokens_per_second"} <= run.data.metrics.keys()
    rate = named["mine-finetune"].data.params["learning_rate"]
    assert float(rate) == pytest.approx(1e-3)


def test_wandb_has_a_run_of_each_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed: make test-extras")
    monkeypatch.setenv("WANDB_MODE", "offline")  # to be sent later, by `wandb sync`
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    reported("wandb", tmp_path)
    logs = [path.read_bytes() for path in tmp_path.glob("wandb/offline-run-*/run-*.wandb")]
    for name in (b"mine-search", b"mine-finetune"):
        (log,) = (log for log in logs if name in log)
        assert b"train/nll" in log
