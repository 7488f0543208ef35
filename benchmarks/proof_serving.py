"""What the adapters of benchmarks/proof.py's runs cost in serving.

A run's file has the rows of each module. How they are split into experts, on which the price of a
router depends, follows from the arm. Prices are those of benchmarks/serving_prices.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from proof_arms import rows_of, uniform_allocation

from guilomo_train.search.allocation import Allocation
from guilomo_train.search.controls import random_allocation, shuffled
from guilomo_train.search.fill import split
from guilomo_train.search.space import SearchSpace

PLAIN = ("lora", "rslora", "adalora", "eva", "truncated")  # one expert a module


def add_serving_costs(
    results: Sequence[dict[str, Any]], space: SearchSpace, searches: Path
) -> None:
    """Adds `serving_us` to each result that has an adapter: microseconds of a step, all modules.

    Not to those of `run`, whose files do not say how its rows are split.

    Args:
        results: of finished runs.
        space: the base's modules, with prices in seconds.
        searches: the folder of the allocations that were found.

    Raises:
        ValueError: a result is not of the allocation that is made for it: another base or folder.
    """
    rates = {
        (result["task"], result["budget"], result["seed"]): result["rate"]
        for result in results
        if result["arm"] == "searched" and not result["tuning"]
    }
    for result in results:
        if result["rows"] is None or result["tuning"] or result["arm"] == "run":
            continue
        rate = rates.get((result["task"], result["budget"], result["seed"]))
        allocation = allocation_of(result, space, searches, rate)
        # Parameters tell how rows are split, as routers are among them. AdaLoRA has further ones.
        same = result["arm"] in PLAIN or (
            allocation.parameters(space.linears) == result["parameters"]
        )
        if rows_of(allocation) != result["rows"] or not same:
            raise ValueError(
                f"{result['arm']}, seed {result['seed']}: an allocation of another run"
            )
        result["serving_us"] = 1e6 * space.costs.cost(allocation)


def allocation_of(
    result: dict[str, Any], space: SearchSpace, searches: Path, rate: float | None
) -> Allocation:
    """What a run trained; `rate` is that of its search, if it has one."""
    arm, seed = result["arm"], result["seed"]
    if arm in ("searched", "shuffled"):
        name = f"{result['task']}_{result['budget']:g}_{rate:g}_{seed}.json"
        allocation = Allocation.load(searches / name)
        return shuffled(allocation, space.linears, seed) if arm == "shuffled" else allocation
    if arm == "random":
        return random_allocation(space.linears, result["parameters_allowed"], seed)
    if arm in ("uniform", "uniform-run"):
        return uniform_allocation(space, result["shape"], result["parameters_allowed"])
    if arm in PLAIN:
        return space.allocation([[rows] if rows else [] for rows in result["rows"].values()])
    rows = result["rows"].values()
    return space.allocation([list(split(n, space.max_experts, space.max_rank)) for n in rows])
