"""Allocations in which modules have several experts, one without a router, or none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from guilomo_serve.adapter import Expert
from guilomo_train.errors import AllocationError
from guilomo_train.search.allocation import Allocation

LINEARS = {"a": (10, 7), "b": (5, 3), "c": (2, 4)}
MIXED = Allocation({"a": (3, 1), "b": (), "c": (2,)}, top_k=2, max_rank=4)


def test_a_module_without_experts_is_kept_in_the_file_and_costs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "allocation.json"
    MIXED.save(path)
    assert json.loads(path.read_text())["ranks"] == {"a": [3, 1], "b": [], "c": [2]}
    assert Allocation.load(path) == MIXED
    # Rows of A and columns of B, and the router of `a` alone.
    assert MIXED.parameters(LINEARS) == 4 * (10 + 7) + 2 * 7 + 2 * (2 + 4)
    assert (MIXED.total_experts, MIXED.total_rank) == (3, 6)


def test_the_adapter_has_the_modules_with_experts_alone() -> None:
    assert MIXED.experts(lora_alpha=8) == {
        "a": (Expert(3, 2.0), Expert(1, 2.0)),
        "c": (Expert(2, 2.0),),
    }


@pytest.mark.parametrize("ranks", [None, 3, [0], [5], ["2"], [[]], [2, None]])
def test_a_bad_list_of_ranks_is_refused(tmp_path: Path, ranks: object) -> None:
    path = tmp_path / "allocation.json"
    path.write_text(json.dumps({**MIXED.to_json(), "ranks": {"a": [1], "b": ranks}}))
    with pytest.raises(AllocationError) as refused:
        Allocation.load(path)
    assert f"{path}: ranks['b'] is {ranks!r}, expected a list" in str(refused.value)
    assert "from 1 to max_rank (4), or [] for no adapter there" in str(refused.value)


def test_an_allocation_without_any_expert_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "allocation.json"
    nothing = Allocation({"a": (), "b": ()}, top_k=2, max_rank=4)
    nothing.save(path)
    with pytest.raises(AllocationError, match=f"{path}: gives no module an expert, so there is no"):
        Allocation.load(path)
    with pytest.raises(AllocationError, match="the allocation gives no module an expert"):
        nothing.experts(lora_alpha=8)
