"""Controls: their shapes, their sizes, the authors' files, and the command that writes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from guilomo_train.cli import main
from guilomo_train.errors import AllocationError, ConfigError
from guilomo_train.search.allocation import Allocation
from guilomo_train.search.controls import (
    TOLERANCE,
    at_size,
    authors_allocation,
    mola,
    plain_lora,
    random_allocation,
    uniform,
)
from guilomo_train.search.space import parameter_budget
from tests.train.test_cli import guilomo_train

SHAPES = {"self_attn.q_proj": (576, 576), "self_attn.k_proj": (192, 576), "mlp.up": (1536, 576)}
LINEARS = {f"model.layers.{i}.{kind}": shape for i in range(30) for kind, shape in SHAPES.items()}


def distance(allocation: Allocation, parameters: int) -> float:
    return abs(allocation.parameters(LINEARS) / parameters - 1)


def test_plain_lora_is_one_expert_scaled_as_peft_does() -> None:
    allocation = plain_lora(LINEARS, 32)
    assert set(allocation.ranks.values()) == {(32,)}
    (expert,) = allocation.experts(lora_alpha=16)["model.layers.0.mlp.up"]
    assert (expert.rank, expert.scaling) == (32, 0.5)


@pytest.mark.parametrize(("pattern", "sizes"), [("2468", [2, 4, 6, 8]), ("8642", [8, 6, 4, 2])])
def test_mola_gives_each_quarter_of_the_layers_its_digit(pattern: str, sizes: list[int]) -> None:
    linears = {f"model.layers.{i}.mlp.up": (8, 8) for i in range(32)}
    allocation = mola(linears, pattern, rank=8)
    experts = [len(allocation.ranks[f"model.layers.{i}.mlp.up"]) for i in range(32)]
    assert experts == [n for n in sizes for _ in range(8)]
    # 30 layers cannot be cut into four equal groups: 8, 7, 8, 7.
    experts = [len(ranks) for ranks in mola(LINEARS, pattern, rank=8).ranks.values()]
    assert [experts.count(n) for n in sizes] == [24, 21, 24, 21]


def test_at_size_keeps_the_experts_and_evens_the_ranks_out() -> None:
    searched = random_allocation(LINEARS, 2_000_000, seed=3)
    size = searched.parameters(LINEARS)
    for control in (
        plain_lora(LINEARS, 8),
        uniform(LINEARS, 8, 8),
        *(mola(LINEARS, pattern, 8) for pattern in ("2468", "8642", "5555")),
        Allocation({m: (8,) * (0, 1, 4)[i % 3] for i, m in enumerate(LINEARS)}, 2, 8),
        Allocation({m: (8,) * (i % 2) for i, m in enumerate(LINEARS)}, 1, 8),  # LoRA here and there
    ):
        fitted = at_size(control, LINEARS, size)
        assert distance(fitted, size) < TOLERANCE
        assert {m: len(r) for m, r in fitted.ranks.items()} == {
            m: len(r) for m, r in control.ranks.items()
        }
        ranks = [r for listed in fitted.ranks.values() for r in listed]
        assert max(ranks) - min(ranks) <= 1
        if len(ranks) > len(LINEARS):
            assert fitted.max_rank == 8, "the scale is the searched allocation's"
        else:
            assert fitted.max_rank == max(ranks)
    # A single row may be more than the tolerance.
    assert at_size(plain_lora({"a": (100, 100)}, 1), {"a": (100, 100)}, 300).ranks == {"a": (1,)}
    # The rows left over are spread: each half of the layers has about half of them.
    fitted = at_size(uniform(LINEARS, 4, 8), LINEARS, 1_500_000)
    halves = [sum(map(sum, list(fitted.ranks.values())[a : a + 45])) for a in (0, 45)]
    assert abs(halves[0] - halves[1]) < 0.02 * sum(halves)


@pytest.mark.parametrize("parameters", [768, 100_000, 600_000, 2_000_000, 4_000_000, 6_600_000])
def test_random_meets_its_size_within_the_search_space(parameters: int) -> None:
    drawn = [random_allocation(LINEARS, parameters, seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2] or parameters == 768  # one row, and one kind that has such a row
    for allocation in drawn:
        assert distance(allocation, parameters) < TOLERANCE
        assert allocation.total_experts >= 1
        assert all(len(ranks) <= 8 for ranks in allocation.ranks.values())
        assert all(1 <= r <= 8 for ranks in allocation.ranks.values() for r in ranks)
        assert allocation.max_rank == 8


def test_random_at_the_middle_of_the_space_draws_all_counts_and_ranks_alike() -> None:
    # The expectation of a uniform draw: 4 experts of rank 4.5; one alone has no router.
    middle = sum(4 * 4.5 * (o + i) + 35 / 9 * i for o, i in LINEARS.values())
    drawn = [random_allocation(LINEARS, round(middle), seed) for seed in range(20)]
    experts = [len(ranks) for a in drawn for ranks in a.ranks.values()]
    ranks = [r for a in drawn for listed in a.ranks.values() for r in listed]
    for n in range(9):
        assert experts.count(n) / len(experts) == pytest.approx(1 / 9, abs=0.04)
    for r in range(1, 9):
        assert ranks.count(r) / len(ranks) == pytest.approx(1 / 8, abs=0.02)


def test_a_size_out_of_reach_is_refused_with_what_can_be_reached() -> None:
    with pytest.raises(AllocationError, match=r"100,000 parameters are too few for 720 experts"):
        at_size(uniform(LINEARS, 8, 8), LINEARS, 100_000)
    with pytest.raises(AllocationError, match=r"9,000,000 parameters cannot be reached: one row"):
        random_allocation(LINEARS, 9_000_000, seed=0)
    with pytest.raises(AllocationError, match=r"1 experts are fewer than top_k \(2\)"):
        uniform(LINEARS, 1, 8)
    with pytest.raises(AllocationError, match="a is in no numbered layer"):
        mola({"a": (4, 4)}, "2468", 8)


def test_a_budget_is_a_share_or_a_count() -> None:
    assert parameter_budget("0.01", 135_000_000) == 1_350_000
    assert parameter_budget("2e6", 135_000_000) == 2_000_000
    assert parameter_budget(1, 135_000_000) == 1
    for wrong in ("0", "-1", "much", "nan", "inf"):
        with pytest.raises(ConfigError, match=f"budget is '{wrong}'"):
            parameter_budget(wrong, 135_000_000)


def authors_files(folder: Path, experts: dict[str, int], ranks: dict[str, int]) -> list[Path]:
    paths = [folder / "rank.json", folder / "expert.json"]
    for path, value in zip(paths, (ranks, experts), strict=True):
        path.write_text(json.dumps(value, indent=4))
    return paths


def test_the_authors_files_are_read_and_ranks_beyond_the_experts_dropped(tmp_path: Path) -> None:
    module = "model.layers.0.mlp.up"
    ranks = {f"{module}.expertlora_E_vector_{i}": 8 - i for i in range(8)}
    files = authors_files(tmp_path, {module: 3}, ranks)
    assert authors_allocation(*files, LINEARS) == Allocation({module: (8, 7, 6)}, 2, 8)

    for experts, by_expert, message in (
        ({"model.layers.99.mlp.up": 2}, ranks, r"no linear layer 'model\.layers\.99\.mlp\.up'"),
        ({module: 9}, ranks, r"mlp\.up\.expertlora_E_vector_8 is missing"),
        ({module: 2}, {module: 4}, "is not <module>.expertlora_E_vector_<number>"),
        ({module: 0}, ranks, "'model.layers.0.mlp.up' is 0, expected an integer >= 1"),
    ):
        files = authors_files(tmp_path, experts, by_expert)
        with pytest.raises(AllocationError, match=message):
            authors_allocation(*files, LINEARS)


def test_the_command_writes_what_finetune_takes(tiny_base: Path, tmp_path: Path) -> None:
    searched = tmp_path / "random.json"
    done = guilomo_train(
        "baseline", "--base", tiny_base, "--kind", "random", "--output", searched,
        "--budget", 4_000, "--experts", 4, "--rank", 4, "--seed", 7,
        "--target_modules", "q_proj,up_proj,down_proj",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "6 modules" in done.stdout
    like = Allocation.load(searched)

    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n' * 16)
    control = tmp_path / "control.json"
    command = ["baseline", "--kind", "mola-2468", "--like", searched, "--output", control]
    assert main([*map(str, command), "--base", str(tiny_base)]) == 0
    allocation = Allocation.load(control)
    assert allocation.ranks.keys() == like.ranks.keys()
    assert (allocation.max_rank, allocation.top_k) == (4, 2)

    command = ["finetune", "--train", data, "--allocation", control, "--epochs", 1]
    command += ["--base", tiny_base, "--output", tmp_path / "tuned"]
    assert main(list(map(str, command))) == 0
    parameters = json.loads((tmp_path / "tuned" / "run.json").read_text())["parameters"]
    assert parameters == pytest.approx(4_000, rel=2 * TOLERANCE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kind", "random"], "kind random needs a size: --budget or --like"),
        (["--kind", "lora", "--budget", "x"], "budget is 'x', expected a share"),
        (["--kind", "lora", "--target_modules", "query"], "target_modules"),
        (["--kind", "lora", "--base", "."], "--base .: not a causal language model"),
    ],
)
def test_a_wrong_setting_is_one_line(
    options: list[str],
    message: str,
    tiny_base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "out.json"
    assert main(["baseline", "--base", str(tiny_base), "--output", str(output), *options]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())
