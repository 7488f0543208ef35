"""Rows handed out by their worth: the best of all allocations, and even where worths are alike."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import pytest
import torch

from guilomo_train.search.allocation import Allocation
from guilomo_train.search.fill import even, fill, row_costs, split
from guilomo_train.search.space import SearchSpace

SPACES = [
    SearchSpace({"a": (5, 7), "b": (11, 3), "c": (2, 9)}, max_experts=2, max_rank=3),
    SearchSpace({"a": (4, 4), "b": (4, 4)}, max_experts=4, max_rank=2),
    SearchSpace({"a": (3, 8), "b": (6, 1)}, max_experts=1, max_rank=6),
    SearchSpace({"a": (3, 8), "b": (6, 1)}, max_experts=6, max_rank=1),
]


def llama(layers: int = 30) -> SearchSpace:
    shapes = {"q": (576, 576), "k": (192, 576), "up": (1536, 576), "down": (576, 1536)}
    return SearchSpace({f"{i}.{k}": s for i in range(layers) for k, s in shapes.items()})


def alike(modules: int = 34) -> SearchSpace:
    return SearchSpace({str(i): (64, 64) for i in range(modules)})


def allocation(space: SearchSpace, rows: tuple[int, ...]) -> Allocation:
    ranks = [split(r, space.max_experts, space.max_rank) for r in rows]
    return Allocation(dict(zip(space.linears, ranks, strict=True)), space.top_k, space.max_rank)


def row_counts(allocation: Allocation) -> list[int]:
    return [sum(ranks) for ranks in allocation.ranks.values()]


def draw_worths(space: SearchSpace, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (len(space.linears), space.max_experts * space.max_rank)
    return (
        torch.rand(shape, generator=generator, dtype=torch.float64).sort(-1, descending=True).values
    )


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("seed", range(5))
def test_every_price_has_its_best_allocation_and_no_budget_between_has_less(
    space: SearchSpace, seed: int
) -> None:
    worths = draw_worths(space, seed)
    gained = torch.nn.functional.pad(worths.cumsum(-1), (1, 0))

    def worth(rows: Sequence[int]) -> float:
        return float(gained[torch.arange(len(rows)), torch.tensor(rows)].sum())

    counts = range(space.max_experts * space.max_rank + 1)
    everything = list(product(counts, repeat=len(worths)))
    sizes = torch.tensor([allocation(space, r).parameters(space.linears) for r in everything])
    worth_of = torch.tensor([worth(r) for r in everything], dtype=torch.float64)
    best_at = {}
    for price in torch.logspace(-4, 0, 200):
        best = int((worth_of - price * sizes).argmax())
        best_at[int(sizes[best])] = float(worth_of[best])
        assert fill(space, worths, int(sizes[best])) == allocation(space, everything[best])
    assert len(best_at) > 5

    for budget in range(int(sizes.max()) + 2):
        found = fill(space, worths, budget)
        assert found.parameters(space.linears) <= budget
        assert worth(row_counts(found)) >= max(w for size, w in best_at.items() if size <= budget)


def test_a_row_counts_for_no_more_than_those_before_it() -> None:
    space = alike(2)
    worths = torch.ones(2, 64)
    worths[0, 1:] = 0.5
    worths[0, 2] = 9.0  # behind a row of 0.5
    # Room for all of the second module and six rows.
    budget = space.cost(8, 8) // 2 + 6 * 128 + 2 * 64
    assert row_counts(fill(space, worths, budget)) == [6, 64]


def test_modules_without_worth_get_nothing_while_there_are_others() -> None:
    space = alike(3)
    worths = torch.zeros(3, 64)
    worths[1] = 1.0
    found = fill(space, worths, space.cost(8, 8) // 3)
    assert list(found.ranks.values()) == [(), (8,) * 8, ()]


@pytest.mark.parametrize("space", [alike(), llama()])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.1, 0.3, 0.7, 0.99, 1.0, 2.0])
def test_even_differs_by_a_row_at_most_and_spends_the_budget(
    space: SearchSpace, share: float
) -> None:
    budget = int(share * space.cost(8, 8))
    found = even(space, budget)
    rows = row_counts(found)
    assert max(rows) - min(rows) <= 1
    left = budget - found.parameters(space.linears)
    assert left >= 0
    next_rows = [row_costs(space)[m, r] for m, r in enumerate(rows) if r == min(rows) < 64]
    assert all(left < cost for cost in next_rows)


@pytest.mark.parametrize("curve", [torch.ones(64), 0.9 ** torch.arange(64), torch.zeros(64)])
def test_modules_that_are_alike_get_as_much_whatever_their_rows_are_worth(
    curve: torch.Tensor,
) -> None:
    space = alike()
    for budget in range(0, int(space.cost(8, 8)), 9_973):
        assert fill(space, curve.expand(34, -1), budget) == even(space, budget)


def test_the_larger_modules_lie_evenly_among_all() -> None:
    space = alike()
    for larger in range(1, 34):
        rows = row_counts(even(space, (2 * 34 + larger) * 128))
        assert sum(rows) == 2 * 34 + larger
        # Of any run of modules as many are larger as of all, but for two.
        for run in range(1, 34):
            inside = [sum(rows[i : i + run]) - 2 * run for i in range(34 - run)]
            assert all(abs(n - run * larger / 34) < 2 for n in inside)


def test_split_is_a_path_from_nothing_to_the_whole_space() -> None:
    for max_experts, max_rank in product(range(1, 9), repeat=2):
        splits = [split(r, max_experts, max_rank) for r in range(max_experts * max_rank + 1)]
        assert splits[0] == ()
        assert splits[-1] == (max_rank,) * max_experts
        for rows, ranks in enumerate(splits):
            assert sum(ranks) == rows
            assert all(1 <= rank <= max_rank for rank in ranks)
            assert max(ranks, default=0) - min(ranks, default=0) <= 1
    assert [len(split(r, 8, 8)) for r in (1, 3, 4, 8, 9, 22, 36, 64)] == [1, 1, 2, 2, 3, 4, 6, 8]
