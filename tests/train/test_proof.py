"""benchmarks/proof.py on a tiny base: what a killed plan leaves, and what the summary says."""

from __future__ import annotations

import importlib
import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from guilomo_train.search.allocation import Allocation
from guilomo_train.search.controls import rescaled, shuffled
from guilomo_train.search.space import Prices, SearchSpace
from tests.train.tiny import save_tiny_base

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a script of the benchmarks by its name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Files of the task that comes with files, in the form of the real ones."""
    for split in ("train", "test"):
        rows = [{"prompt": f"{split} {i}\u2028?", "completion": str(i % 7)} for i in range(40)]
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (tmp_path / f"banking77.{split}.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """With few tokens, as EVA scores every position against all of them."""
    return save_tiny_base(tmp_path / "base")


@pytest.fixture
def small(benchmark, monkeypatch):
    """proof.py with few rows, one rate and two shapes to choose from."""
    proof, tasks = benchmark("proof"), benchmark("proof_tasks")
    monkeypatch.setattr(tasks, "DEV_POOL", 8)
    monkeypatch.setattr(tasks, "EARLIER", 5)
    monkeypatch.setattr(tasks, "GENERATED", (40, 20))
    monkeypatch.setattr(proof, "RATES", (1e-2,))
    monkeypatch.setattr(proof, "SHAPES", ("all", "mlp"))
    tasks.pools_of.cache_clear()
    yield proof
    tasks.pools_of.cache_clear()


def test_no_row_is_in_two_pools_and_scored_ones_are_left_out(small, benchmark, data: Path) -> None:
    tasks = benchmark("proof_tasks")
    for part in tasks.PARTS:
        pools = [{row["prompt"] for row in pool} for pool in tasks.pools_of(part, data).values()]
        assert sum(map(len, pools)) == len(set.union(*pools))
    test = tasks.read(data / "banking77.test.jsonl")
    kept = tasks.pools_of("banking77", data)["test"]
    scored = tasks.scored_earlier(test)
    assert 5 <= len(scored) <= 10
    assert len(kept) == len(test) - len(scored)


def test_arms_of_a_seed_have_the_same_rows_and_seeds_others(benchmark, small, data: Path) -> None:
    tasks = benchmark("proof_tasks")
    sizes = tasks.Sizes(train=6, dev=3, test=5)
    first, again, other = (tasks.draw("mixture", s, "test", data, sizes) for s in (0, 0, 1))
    assert first == again != other
    assert {part: len(rows) for part, rows in first.score.items()} == dict.fromkeys(tasks.PARTS, 2)
    dev = tasks.draw("mixture", 0, "dev", data, sizes)
    assert dev.train == first.train
    assert dev.score != first.score


@pytest.mark.slow
def test_a_killed_plan_goes_on_to_the_same_files(
    small, data: Path, base: Path, tmp_path: Path, monkeypatch
) -> None:
    proof = small
    stage = proof.Stage(
        ("shuffled", "uniform"), (0.07,), (0,), tasks=("ticket",), tuned_on=("ticket",)
    )
    sizes = proof.Sizes(train=16, dev=4, test=6)

    def plan(out: Path) -> None:
        proof.Proof(base, data, out, sizes).stage(stage)

    plan(tmp_path / "whole")
    write, written = proof.write, []

    def killed_at_the_third(file: Path, value: dict) -> None:
        written.append(file)
        if len(written) == 3:
            raise KeyboardInterrupt
        write(file, value)

    monkeypatch.setattr(proof, "write", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        plan(tmp_path / "killed")
    assert len(results(tmp_path / "killed")) < len(results(tmp_path / "whole"))
    monkeypatch.setattr(proof, "write", write)
    plan(tmp_path / "killed")
    whole = results(tmp_path / "whole")
    assert results(tmp_path / "killed") == whole
    assert all(run["parameters"] <= run["parameters_allowed"] for run in whole.values())
    assert {name for name in whole if name.startswith("test")} == {
        f"test_ticket_0.07_{arm}_0" for arm in stage.arms
    }


def results(out: Path) -> dict[str, dict]:
    """Finished runs without the times that they took."""
    found = {file.stem: json.loads(file.read_text()) for file in out.glob("*.json")}
    for run in found.values():
        assert math.isfinite(run["loss"])
        del run["seconds"], run["cpu_seconds"]
    return found


@pytest.mark.slow
def test_every_arm_trains_at_its_budget_and_has_a_cost_of_serving(
    small, benchmark, data: Path, base: Path, tmp_path: Path
) -> None:
    proof = small
    bench = proof.Proof(base, data, tmp_path / "out", proof.Sizes(train=16, dev=4, test=6))
    shapes = {"uniform": "mlp", "uniform-run": "all", "one-shot": "whitened"}
    for arm in proof.ARMS:
        run = proof.Run(arm, 0.27, "calendar", 0, "dev", rate=1e-2, shape=shapes.get(arm, ""))
        result = bench.result(run, proof.Stage((arm,), (0.27,), (0,), "dev", ("calendar",)))
        assert math.isfinite(result["loss"])
        # AdaLoRA and EVA count rows of modules of any size.
        assert 0.6 < result["parameters"] / result["parameters_allowed"] < 1.4, arm

    # With a microsecond for a module that has an adapter, two for a row, five for a router's row.
    prices = Prices(*(x * torch.ones(len(bench.space.linears)) for x in (1e-6, 2e-6, 5e-6)))
    runs = [run | {"tuning": False} for run in results(tmp_path / "out").values()]
    space = replace(bench.space, prices=prices)
    benchmark("proof_serving").add_serving_costs(runs, space, tmp_path / "out" / "searches")
    cost = {run["arm"]: run.get("serving_us") for run in runs}
    assert {arm for arm in cost if cost[arm] is None} == {"run"}
    lora = next(run for run in runs if run["arm"] == "lora")
    there = [rows for rows in lora["rows"].values() if rows]
    assert cost["lora"] == pytest.approx(len(there) + 2 * sum(there))
    searched, other = (next(r for r in runs if r["arm"] == arm) for arm in ("searched", "random"))
    with pytest.raises(ValueError, match="another run"):
        benchmark("proof_serving").add_serving_costs(
            [searched, other | {"arm": "shuffled"}], space, tmp_path / "out" / "searches"
        )


def test_the_summary_of_three_seeds_by_hand(benchmark) -> None:
    summary = benchmark("proof_summary").summary
    losses = {"searched": (1.0, 2.0, 4.0), "shuffled": (1.1, 2.4, 4.0), "run": (1.0, 1.0, 1.0),
              "uniform-run": (1.5, 1.5, 1.5)}  # fmt: skip
    found = summary([
        {"pool": "test", "tuning": False, "arm": arm, "budget": 0.001, "task": "ticket",
         "seed": seed, "loss": loss, "parameters": 10}
        for arm, of_arm in losses.items() for seed, loss in enumerate(of_arm)
    ])  # fmt: skip
    rows = found["tasks"]["ticket"]["0.001"]
    assert rows["searched"] == {"loss": 2.33333, "seeds": 3, "parameters": 10}
    # Differences 0.1, 0.4, 0: mean 1/6, deviation 0.20817, t(2) = 4.3027.
    assert rows["shuffled"]["less"] == pytest.approx(0.16667)
    assert rows["shuffled"]["interval"] == pytest.approx([-0.35046, 0.68379], abs=2e-4)
    pooled = found["pooled"]["0.001"]
    assert pooled["shuffled"]["relative"] == pytest.approx(0.1)  # of 0.1, 0.2, 0
    assert pooled["shuffled"]["p"] == pytest.approx(0.2254, abs=1e-4)  # t = sqrt(3)
    assert pooled["shuffled"]["p_holm"] == pytest.approx(pooled["shuffled"]["p"], abs=1e-4)
    assert pooled["uniform-run"] == {"relative": 0.5, "seeds": 3, "against": "run", "tasks": 1}


def test_quantiles_of_student_and_holm(benchmark) -> None:
    proof = benchmark("proof_summary")
    for freedom, expected in ((1, 12.7062), (4, 2.7764), (19, 2.0930)):
        assert proof.t_quantile(0.05, freedom) == pytest.approx(expected, abs=2e-4)
    assert proof.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


LINEARS = {**{f"q{i}": (8, 8) for i in range(6)}, **{f"up{i}": (16, 8) for i in range(6)}}


def test_shuffled_keeps_what_each_shape_has() -> None:
    ranks = {module: (1,) * (i % 4) for i, module in enumerate(LINEARS)}
    found = Allocation(ranks, top_k=2, max_rank=8)
    dealt = [shuffled(found, LINEARS, seed) for seed in range(3)]
    for other in dealt:
        assert list(other.ranks) == list(ranks)
        for shape in set(LINEARS.values()):
            of_shape = [module for module in LINEARS if LINEARS[module] == shape]
            before, after = (Counter(a.ranks[m] for m in of_shape) for a in (found, other))
            assert before == after
        assert other.parameters(LINEARS) == found.parameters(LINEARS)
    assert dealt[0] != dealt[1] != dealt[2]
    assert shuffled(found, LINEARS, 1) == dealt[1]


def test_rescaled_keeps_proportions() -> None:
    space = SearchSpace({"a": (8, 8), "b": (8, 8), "c": (8, 8)}, max_experts=1, max_rank=64)
    found = Allocation({"a": (8, 8), "b": (8,), "c": ()}, top_k=1, max_rank=8)
    smaller = rescaled(found, space, 6 * 16)
    assert {m: sum(r) for m, r in smaller.ranks.items()} == {"a": 4, "b": 2, "c": 0}
