"""benchmarks/serving_prices.py: its fit, what it times, and the file that a search reads."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from guilomo_serve.ops.layer import Batch
from tests.train.tiny import tiny_llama

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "serving_prices.py"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("serving_prices_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_prices_of_seconds_that_they_made_are_found(benchmark) -> None:
    prices = {"present": 2e-5, "row": 3e-7, "router": 5e-7}
    made = {setting: benchmark.cost(prices, setting) for setting in benchmark.SETTINGS}
    assert made[8, 64] == pytest.approx(2e-5 + 64 * 3e-7 + 8 * 5e-7)
    assert made[1, 8] == pytest.approx(2e-5 + 8 * 3e-7), "one expert has no router"
    assert benchmark.fit(made) == pytest.approx(prices, rel=1e-6)


def test_no_price_is_below_0_and_the_others_are_the_best_without_it(benchmark) -> None:
    truth = {"present": 2e-5, "row": 3e-7, "router": -2e-7}
    made = {setting: benchmark.cost(truth, setting) for setting in benchmark.SETTINGS}
    found = benchmark.fit(made)
    assert found["router"] == 0

    def off(present: float, row: float) -> float:
        return sum(((present + row * r) / seconds - 1) ** 2 for (_, r), seconds in made.items())

    best = off(found["present"], found["row"])
    assert found["present"] > 0
    assert found["row"] > 0
    for present, row in ((1.01, 1), (0.99, 1), (1, 1.01), (1, 0.99)):
        assert off(present * found["present"], row * found["row"]) > best


def test_copies_are_of_one_adapter_and_have_memory_of_their_own(benchmark) -> None:
    calls = benchmark.copies(24, 16, 4, 10, torch.float32, torch.device("cpu"))
    assert len(calls) == benchmark.COPIES[1]
    batch, x = Batch(np.zeros(3, dtype=np.int64)), torch.randn(3, 16)
    added = [torch.zeros(3, 24) for _ in range(2)]
    for y, apply_ in zip(added, calls, strict=False):
        apply_(y, x, batch)
    torch.testing.assert_close(*added)
    assert added[0].abs().max() > 0
    weights = [apply_.__self__.weights[0] for apply_ in calls]
    assert [len(weights[0].lora_a), len(weights[0].router)] == [10, 4]
    for name in ("lora_a", "router"):
        assert len({getattr(of_copy, name).data_ptr() for of_copy in weights}) == len(calls)
    assert len({of_copy.lora_b[0].data_ptr() for of_copy in weights}) == len(calls)


def test_the_file_has_a_price_for_every_linear_layer_of_the_base(tmp_path: Path) -> None:
    base = tiny_llama(64)
    base.save_pretrained(tmp_path / "base")
    out = tmp_path / "prices.json"
    command = [sys.executable, SCRIPT, tmp_path / "base", "--tokens", 2, "--repeats", 3]
    done = subprocess.run(
        [*map(str, command), "--out", str(out)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert record["machine"]["cores"] >= 1
    assert set(record["result"]["shapes"]) == {"32x32", "16x32", "48x32", "32x48"}
    assert json.loads(done.stdout.splitlines()[-1]) == record["result"]
    assert done.stdout.count("the fit is off by") == 4
    for prices in record["result"]["shapes"].values():
        assert prices.keys() == {"present", "row", "router"}
        assert prices["present"] > 0
        assert min(prices.values()) >= 0
