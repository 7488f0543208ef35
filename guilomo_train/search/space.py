"""What a search can choose from, and what each choice costs.

A module gets 0 to `max_experts` experts of ranks 1 to `max_rank`. With none it has no adapter, with
one no router. What it costs is a sum,

    present (if it has any expert)  +  row * total rank  +  router * experts (if more than one)

in parameters (a row is a row of A and a column of B, a router row is one of W_r), or in seconds of
serving by prices that benchmarks/serving_prices.py has measured on a machine.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from guilomo_train.errors import ConfigError
from guilomo_train.search.allocation import Allocation

Linears = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Prices:
    """What a module's adapter costs, one number a module, float64 `[M]`."""

    present: torch.Tensor
    row: torch.Tensor
    router: torch.Tensor

    def cost(self, allocation: Allocation) -> float:
        """Of a whole allocation, whose modules are in this order."""
        rows = torch.tensor([sum(r) for r in allocation.ranks.values()], dtype=torch.float64)
        count = torch.tensor([len(r) for r in allocation.ranks.values()])
        routers = torch.where(count > 1, count, 0)
        parts = self.present * (count > 0) + self.row * rows + self.router * routers
        return float(parts.sum())


def parameter_prices(linears: Linears) -> Prices:
    """Prices in parameters, for modules of (out, in) features."""
    sizes = torch.tensor(list(linears.values()), dtype=torch.float64)
    return Prices(torch.zeros(len(sizes), dtype=torch.float64), sizes.sum(-1), sizes[:, 1])


def parameter_budget(value: str | float, base_parameters: int) -> int:
    """A budget as a number of parameters: a share (< 1) of the base's, or the number itself.

    Raises:
        ConfigError: it is neither.
    """
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise ConfigError(
            f"budget is {value!r}, expected a share of the base's parameters (0.01) or a number "
            "of parameters (2000000)"
        )
    return round(number * base_parameters) if number < 1 else round(number)


def latency_prices(linears: Linears, path: Path) -> Prices:
    """Prices in seconds, from a result of benchmarks/serving_prices.py.

    Raises:
        ConfigError: the file is none, or lacks a shape that a module has.
    """
    try:
        shapes = json.loads(path.read_text())["result"]["shapes"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ConfigError(
            f"prices {path}: no result of benchmarks/serving_prices.py ({type(e).__name__}: {e})"
        ) from None
    columns = []
    for module, (out_features, in_features) in linears.items():
        shape = f"{out_features}x{in_features}"
        try:
            found = [float(shapes[shape][part]) for part in ("present", "row", "router")]
        except (KeyError, ValueError, TypeError):
            raise ConfigError(
                f"prices {path}: has no prices of {shape}, the shape of {module}; measure them "
                "with benchmarks/serving_prices.py and this base"
            ) from None
        columns.append(found)
    return Prices(*torch.tensor(columns, dtype=torch.float64).unbind(-1))


def expert_costs(prices: Prices, max_experts: int) -> torch.Tensor:
    """What each expert adds beside its rows, `[M, E]`.

    The first one adds the adapter, the second one a router with a row for both.
    """
    costs = prices.router[:, None].repeat(1, max_experts)
    costs[:, 0] = prices.present
    costs[:, 1:2] *= 2
    return costs


@dataclass(frozen=True)
class SearchSpace:
    """What can be chosen.

    Attributes:
        linears: (out, in) features of each module, by its full name.
        max_experts, max_rank: the largest numbers.
        top_k: experts that a token uses; a module with fewer uses all of its own.
        fewest_experts: counts below it are ruled out. The paper has top_k here.
        prices: what a budget counts; None for parameters.
    """

    linears: Linears
    max_experts: int = 8
    max_rank: int = 8
    top_k: int = 2
    fewest_experts: int = 0
    prices: Prices | None = None

    @cached_property
    def sizes(self) -> Prices:
        """Prices in parameters."""
        return parameter_prices(self.linears)

    @property
    def costs(self) -> Prices:
        """What a budget counts."""
        return self.sizes if self.prices is None else self.prices

    @cached_property
    def expert_costs(self) -> torch.Tensor:
        """What each expert costs beside its rows, `[M, E]`."""
        return expert_costs(self.costs, self.max_experts)

    def allocation(self, ranks: list[list[int]]) -> Allocation:
        """An allocation of ranks that are given in the modules' order."""
        modules = zip(self.linears, map(tuple, ranks), strict=True)
        return Allocation(dict(modules), self.top_k, self.max_rank)

    def cost(self, experts: int, rank: int) -> float:
        """Of so many experts of such rank in each module."""
        return self.costs.cost(self.allocation([[rank] * experts for _ in self.linears]))
