"""`guilomo-train compare`: two allocations of one base side by side."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
from peft import get_peft_model

from guilomo_serve.adapter import write_adapter
from guilomo_train.adapters import adapter_of
from guilomo_train.cli import main
from guilomo_train.compare import spearman
from guilomo_train.lora_moe import LoraMoeConfig
from guilomo_train.search.allocation import Allocation
from tests.train.test_cli import guilomo_train
from tests.train.tiny import tiny_llama

MODULES = [f"model.layers.{i}.mlp.{kind}_proj" for i in range(2) for kind in ("up", "down")]


def saved(path: Path, *ranks: tuple[int, ...], modules: list[str] = MODULES) -> Path:
    Allocation(dict(zip(modules, ranks, strict=True)), top_k=2, max_rank=8).save(path)
    return path


def adapter(folder: Path, allocation: Path, layers: int = 2) -> Path:
    """An adapter folder of an allocation, for a tiny base of so many layers."""
    ranks = Allocation.load(allocation).experts(lora_alpha=16).items()
    experts = {m: [{"rank": e.rank, "scaling": e.scaling} for e in listed] for m, listed in ranks}
    config = LoraMoeConfig(experts=experts, task_type="CAUSAL_LM")
    write_adapter(adapter_of(get_peft_model(tiny_llama(64, layers), config)), folder, "card")
    return folder


def test_an_adapter_and_an_allocation_are_laid_side_by_side(tmp_path: Path) -> None:
    first = saved(tmp_path / "a.json", (4, 4), (8, 8, 8), (1, 1), (2, 3))
    second = saved(tmp_path / "b.json", (8, 8, 8), (4, 4), (1, 1), (2, 2))
    folder, png = adapter(tmp_path / "adapter", first), tmp_path / "compare.png"
    done = guilomo_train("compare", folder, second, "--png", png)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["layer", "up_proj", "down_proj", "rank"] in lines
    assert ["0", "2x8", "3x24", "+16", "3x24", "2x8", "-16", "32", "32", "+0"] in lines
    assert ["1", "2x2", "2x2", "+0", "2x5", "2x4", "-1", "7", "6", "-1"] in lines
    assert "A: 9 experts, total rank 39, top 2 a token" in done.stdout
    assert "B: 9 experts, total rank 38, top 2 a token" in done.stdout
    assert "4 modules, 2 with as many experts; total rank differs by 8.2 a module" in done.stdout
    assert "Spearman correlation of total rank over modules: 0.80" in done.stdout
    assert png.read_bytes()[:4] == b"\x89PNG"


def test_a_module_without_adapter_has_rank_0_whether_the_file_lists_it_or_the_folder_cannot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = saved(tmp_path / "a.json", (4, 4), (), (), ())
    second = saved(tmp_path / "b.json", (), (5,), (), (2, 2))
    expected = [
        ["0", "2x8", "-", "-8", "-", "1x5", "+5", "8", "5", "-3"],
        ["1", "-", "-", "+0", "-", "2x4", "+4", "0", "4", "+4"],
    ]

    def compared(a: Path, b: Path) -> list[str]:
        png = tmp_path / "compare.png"
        assert main(["compare", str(a), str(b), "--png", str(png)]) == 0
        assert png.read_bytes()[:4] == b"\x89PNG"
        return capsys.readouterr().out.splitlines()

    folders = adapter(tmp_path / "first", first), adapter(tmp_path / "second", second)
    for a, b in ((first, second), (folders[0], second), (first, folders[1])):
        lines = compared(a, b)
        assert [line.split() for line in lines if line.strip().startswith(("0 ", "1 "))] == expected
        assert "4 modules, 1 with as many experts; total rank differs by 4.2 a module" in "\n".join(
            lines
        )
        # Ranks 8 0 0 0 and 0 5 0 4: places 4 2 2 2 and 1.5 4 1.5 3.
        assert lines[-1].endswith(f"over modules: {-2 / math.sqrt(3 * 4.5):.2f}")
    # Two folders have no more than the union of their modules, in the order of the layers.
    lines = compared(*folders)
    assert lines[4].split() == ["layer", "down_proj", "up_proj", "rank"]
    assert [line.split() for line in lines[5:7]] == [
        ["0", "-", "1x5", "+5", "2x8", "-", "-8", "8", "5", "-3"],
        ["1", "-", "2x4", "+4", "-", "0", "4", "+4"],
    ]
    assert "3 modules, 0 with as many experts" in "\n".join(lines)


def test_allocations_of_different_bases_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks = [(4, 4)] * 4
    first = saved(tmp_path / "a.json", *ranks)
    fewer = saved(tmp_path / "b.json", *ranks[:3], modules=MODULES[:3])
    for pair in ((first, fewer), (fewer, first)):
        assert main(["compare", *map(str, pair)]) == 2
        message = capsys.readouterr().err
        assert f"{fewer} lacks 1 of the modules of the other, such as {MODULES[3]}" in message

    small = adapter(tmp_path / "small", first)
    large = adapter(tmp_path / "large", first, layers=3)
    assert main(["compare", str(small), str(large)]) == 2
    message = capsys.readouterr().err
    assert "are of different bases (LlamaConfig with 2 layers" in message
    assert "and LlamaConfig with 3 layers" in message


def test_spearman_is_the_textbook_formula_and_ties_share_their_rank() -> None:
    generator = random.Random(0)
    x, y = (generator.sample(range(1000), 50) for _ in range(2))
    places = [[sorted(v).index(i) for i in v] for v in (x, y)]
    squares = sum((a - b) ** 2 for a, b in zip(*places, strict=True))
    assert spearman(x, y) == pytest.approx(1 - 6 * squares / (50 * (50**2 - 1)))
    # Ranks 1.5 1.5 3 4 and 1 2 3.5 3.5: covariance 4, both variances 4.5.
    assert spearman([1, 1, 2, 3], [1, 2, 3, 3]) == pytest.approx(4 / 4.5)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert math.isnan(spearman([5, 5, 5], [1, 2, 3]))
