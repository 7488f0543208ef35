"""An allocation of a given size from what each rank row is worth.

R rows of a module have one split into experts (`split`), so an allocation is a number of rows for
each module. Rows are handed out by worth over cost: what a row adds, over its row of A, its
column of B and the rows that its split adds to the router. So the numbers of rows that are worth
most less a price for each parameter are found, whatever the price, when the budget is their size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from guilomo_train.search.allocation import Allocation
from guilomo_train.search.space import SearchSpace

_GOLDEN = (math.sqrt(5) - 1) / 2


def fill(space: SearchSpace, worths: torch.Tensor, budget: float) -> Allocation:
    """The allocation that a budget buys.

    Modules that are alike end within one row of each other. Once a row costs more than is left,
    other modules may still get as many rows as that one would have had, and no more.

    Args:
        space: what can be chosen. A module may get fewer than `top_k` experts too, or none.
        worths: `[M, E * r]`: what the i-th row of each module is worth, in any unit that modules
            share. A row counts for no more than those before it.
        budget: what the space's costs count: parameters (routers included), or seconds.
    """
    worths = worths.double().cummin(-1).values
    pairs = zip(worths.tolist(), row_costs(space).tolist(), strict=True)
    return _fill(space, [_densities(worth, cost) for worth, cost in pairs], budget)


def shared(scores: torch.Tensor, rows: int) -> torch.Tensor:
    """Worths `[M, rows]` of scores `[M]` that have no curve: 1/i of it for row i, by which `fill`
    gives rows in proportion to the score over a row's cost."""
    return scores[:, None] / torch.arange(1, rows + 1)


def even(space: SearchSpace, budget: float) -> Allocation:
    """As many rows in every module, or one more, as a budget buys."""
    return _fill(space, torch.ones_like(row_costs(space)).tolist(), budget)


def split(rows: int, max_experts: int, max_rank: int) -> tuple[int, ...]:
    """The ranks of the experts that share a module's rows.

    Experts and ranks grow alike, at the ratio of their largest numbers, so that the whole is
    `max_experts` of `max_rank`. Ranks are as even as can be, the larger ones first.
    """
    experts = max(-(-rows // max_rank), math.isqrt(rows * max_experts // max_rank), 1)
    experts = min(experts, max_experts, rows)
    return tuple((rows + experts - 1 - e) // experts for e in range(experts))


def row_costs(space: SearchSpace) -> torch.Tensor:
    """`[M, E * r]`: what the i-th row of each module adds to the cost, float64."""
    rows = range(space.max_experts * space.max_rank + 1)
    experts = torch.tensor([len(split(n, space.max_experts, space.max_rank)) for n in rows])
    of_experts = torch.nn.functional.pad(space.expert_costs.cumsum(-1), (1, 0))[:, experts]
    return space.costs.row[:, None] + of_experts.diff(dim=-1)


def spread(count: int) -> list[float]:
    """A turn for each of `count` modules, by golden-ratio steps: those whose turns come first,
    however many, lie evenly among all."""
    return [i * _GOLDEN % 1 for i in range(count)]


def _fill(space: SearchSpace, densities: list[list[float]], budget: float) -> Allocation:
    """`fill` from the worth per parameter of each row, which never rises along a module."""
    costs = row_costs(space).tolist()
    order = [
        (-density, row, turn, module)
        for module, turn in enumerate(spread(len(costs)))
        for row, density in enumerate(densities[module])
    ]
    rows = [0] * len(costs)
    left, last = budget, len(costs[0])
    for _, row, _, module in sorted(order):
        if row <= last and costs[module][row] <= left:
            left -= costs[module][row]
            rows[module] += 1
        else:
            last = min(last, row)
    ranks = (split(count, space.max_experts, space.max_rank) for count in rows)
    return Allocation(dict(zip(space.linears, ranks, strict=True)), space.top_k, space.max_rank)


def _densities(worths: Sequence[float], costs: Sequence[float]) -> list[float]:
    """Worth per parameter of each row of a module, which never rises.

    A row that brings a router row along may pay less than the next one does. Such rows count
    together, by the mean of what they pay (pool adjacent violators).
    """
    pools: list[tuple[float, float, int]] = []  # worth, cost, rows
    for worth, cost in zip(worths, costs, strict=True):
        rows = 1
        while pools and pools[-1][0] / pools[-1][1] < worth / cost:
            before = pools.pop()
            worth, cost, rows = before[0] + worth, before[1] + cost, before[2] + rows
        pools.append((worth, cost, rows))
    return [worth / cost for worth, cost, rows in pools for _ in range(rows)]
